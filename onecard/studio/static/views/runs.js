// Runs: the table of a folder, curves of several over one another, what differs in their settings, one run in full.
import { Chart, COLOURS, RunCurves } from "/static/charts.js";

const COLUMNS = ["id", "state", "step", "loss", "eval_loss", "verdict", "base", "data", "objective", "size", "date"];
const COMPARED = "onecard.compared";
const NUMBERS = ["step", "loss", "eval_loss", "size", "date"];

export default function ({ Alpine, api, attempt, newest, withNews, on, t, format, tell, focusOn }) {
  const curves = new Map();
  let chart = null;
  let drawing = false;
  let renaming = "";
  const details = newest();

  Alpine.data("runsView", () => ({
    columns: COLUMNS.map((name) => ({ name, kind: NUMBERS.includes(name) ? "number" : "text" })),
    runs: [], loaded: false, filter: "", state: "", sort: { name: "date", up: false },
    compared: [], known: ["loss"], series: "loss", logarithmic: false, differing: [], differingRuns: [],
    details: null, newName: "", trash: null, isTrashOpen: false, surely: "",

    init() {
      const heard = [
        on("online", () => this.load()),
        on("run", (row) => this.update(row)),
        on("gone", ({ id }) => this.forget(id)),
        on("rows", (news) => this.grow(news)),
        on("theme", () => chart?.redraw()),
        on("language", () => this.remake()),
        on("shown", (tab) => { if (tab === "runs") this.firstLook(); }),
      ];
      this.destroy = () => heard.forEach((stop) => stop());
    },
    async load() {
      const told = await attempt(() => withNews(["run", "gone"], () => api("GET", "/api/runs")));
      if (!told) return;
      const [found, news] = told;
      Object.assign(this, { runs: found.runs, loaded: true });
      news.forEach(([name, content]) => (name === "run" ? this.update(content) : this.forget(content.id)));
      for (const id of this.compared) if (!this.runs.some((row) => row.id === id)) this.forget(id);
      if (this.$store.ui.tab === "runs") this.firstLook();
    },
    // The newest runs are compared until somebody chooses others, which the tab remembers.
    firstLook() {
      if (!this.compared.length && this.loaded) {
        const chosen = JSON.parse(sessionStorage.getItem(COMPARED) || "[]").filter((id) => this.runs.some((row) => row.id === id));
        this.compareAll(chosen.length ? chosen : this.runs.slice(0, 3).map((row) => row.id));
      }
      this.later();
    },
    update(row) {
      const at = this.runs.findIndex((one) => one.id === row.id);
      if (at >= 0) this.runs[at] = row;
      else this.runs.push(row);
    },
    forget(id) {
      this.runs = this.runs.filter((row) => row.id !== id);
      if (this.isCompared(id)) this.compare(id, false);
      if (this.details && this.details.id === id && id !== renaming) this.details = null;
    },

    // --- the table
    states() { return [...new Set(this.runs.map((row) => row.state))].sort(); },
    shown() {
      const words = this.filter.toLowerCase().split(/\s+/).filter(Boolean);
      const fits = (row) => {
        const text = [row.id, row.base, row.data, row.objective, row.method, row.verdict, row.notes].join(" ").toLowerCase();
        return (!this.state || row.state === this.state) && words.every((word) => text.includes(word));
      };
      const { name, up } = this.sort;
      const order = (a, b) => {
        const [left, right] = [a[name], b[name]];
        if (left === right) return a.id.localeCompare(b.id);
        if (left === null || left === undefined) return 1; // what is not known stands last, whichever way
        if (right === null || right === undefined) return -1;
        return (left < right ? -1 : 1) * (up ? 1 : -1);
      };
      return this.runs.filter(fits).sort(order);
    },
    sortBy(column) { this.sort = { name: column.name, up: this.sort.name === column.name ? !this.sort.up : column.kind === "text" }; },
    sortOf(column) { return this.sort.name !== column.name ? "none" : this.sort.up ? "ascending" : "descending"; },
    arrow(column) { return this.sort.name !== column.name ? "" : this.sort.up ? " ↑" : " ↓"; },
    tone(state) {
      if (["failed", "lost"].includes(state)) return "bad";
      return state === "ended" ? "good" : ["paused", "given_back", "stopped"].includes(state) ? "warn" : "";
    },
    verdictTone(verdict) { return { better: "good", worse: "bad" }[verdict] ?? "dim"; },
    stepText(row) { return row.total ? `${format.number(row.step)} / ${format.number(row.total)}` : format.number(row.step); },
    methodText(row) { return [row.objective, row.method, row.bits ? `${row.bits} bit` : null].filter(Boolean).join(" · ") || "–"; },

    // --- curves over one another
    isCompared(id) { return this.compared.includes(id); },
    compare(id, wanted) {
      return this.compareAll(wanted ? [...this.compared, id] : this.compared.filter((one) => one !== id));
    },
    async compareAll(ids) {
      this.compared = [...new Set(ids)];
      sessionStorage.setItem(COMPARED, JSON.stringify(this.compared));
      for (const id of curves.keys()) if (!this.isCompared(id)) curves.delete(id);
      const added = this.compared.filter((id) => !curves.has(id)).map((id) => new RunCurves(id));
      added.forEach((one) => curves.set(one.id, one));
      this.differences();
      this.later();
      await Promise.all(added.map((one) => attempt(() => one.load(() => this.later()))));
    },
    async differences() {
      const ids = [...this.compared];
      if (ids.length < 2) { this.differing = []; return; }
      const query = ids.map((id) => `id=${encodeURIComponent(id)}`).join("&");
      const found = await attempt(() => api("GET", `/api/differences?${query}`));
      if (!found || ids.join() !== this.compared.join()) return;
      this.differingRuns = found.runs;
      this.differing = Object.entries(found.settings).map(([name, values]) => ({
        name, values: values.map((value, key) => ({ key, text: this.plain(value) })),
      }));
    },
    plain(value) {
      if (value === null || value === undefined || value === "") return "–";
      return typeof value === "object" ? JSON.stringify(value) : String(value);
    },
    async grow(news) {
      const one = curves.get(news.id);
      if (!one) return;
      if (!one.add(news)) await attempt(() => one.load());
      this.later();
    },
    later() {
      if (drawing) return;
      drawing = true;
      setTimeout(() => { drawing = false; this.draw(); }, 150);
    },
    draw() {
      if (this.$store.ui.tab !== "runs" || !this.compared.length) return;
      const known = [...new Set([...curves.values()].flatMap((one) => Object.keys(one.series)))];
      if (known.join() !== this.known.join()) this.known = known;
      if (!this.known.includes(this.series) && this.known.length) this.series = this.known[0];
      this.$nextTick(() => {
        const tells = { learning_rate: format.rate, tokens_per_s: (v) => format.number(v), peak_bytes: format.bytes };
        const tellValue = tells[this.series] ?? ((v) => format.number(v, 4));
        chart ??= new Chart(document.getElementById("chart-compare"), { title: "", tell: tellValue, step: t("runs.col_step"), height: 320, logarithmic: this.logarithmic });
        Object.assign(chart, { title: this.seriesLabel(this.series), tell: tellValue, binary: this.series === "peak_bytes" });
        chart.draw(this.compared.map((id, at) => ({
          label: id, values: curves.get(id)?.series[this.series], colour: COLOURS[at % COLOURS.length], dots: this.series.startsWith("eval"),
        })));
      });
    },
    draws(series) { this.series = series; this.later(); },
    seriesLabel(name) {
      const key = `runs.series_${name}`;
      return t(key) === key ? name : t(key);
    },
    setScale(wanted) { this.logarithmic = wanted; this.remake(); },
    remake() {
      chart?.destroy();
      chart = null;
      this.later();
    },

    // --- one run
    async open(id) {
      const from = document.activeElement;
      const found = await details(() => api("GET", `/api/runs/${encodeURIComponent(id)}`));
      if (!found) return;
      Object.assign(this, { details: found, newName: found.id.split(":").at(-1) });
      if ([from, document.body].includes(document.activeElement)) focusOn("details-title");
    },
    settingRows() {
      return Object.entries(this.details?.settings ?? {}).map(([name, value]) => ({ name, text: this.plain(value) }));
    },
    verdictText() {
      const found = this.details;
      if (!found || !found.verdict) return t("runs.verdict_none");
      const { low, high } = found.comparison.difference;
      const values = { change: format.number(found.difference, 4), low: format.number(low, 4), high: format.number(high, 4), n: found.n_compared };
      return `${t(`runs.verdict_${found.verdict}`)}: ${t("runs.verdict_by", values)}`;
    },
    async saveNotes(notes) {
      const found = await attempt(() => api("PATCH", `/api/runs/${encodeURIComponent(this.details.id)}`, { notes }));
      if (found) tell(t("runs.saved"), "done");
    },
    async rename() {
      const before = this.details.id;
      renaming = before; // that it is gone is heard before the answer comes
      const found = await attempt(() => api("PATCH", `/api/runs/${encodeURIComponent(before)}`, { name: this.newName.trim() }));
      renaming = "";
      if (!found || found.id === before) return;
      if (this.details && this.details.id === before) this.details = found;
      this.forget(before);
      this.update(found);
      tell(t("runs.saved"), "done");
    },
    async remove() {
      const { id } = this.details;
      const found = await attempt(() => api("DELETE", `/api/runs/${encodeURIComponent(id)}`));
      if (!found) return;
      this.forget(id);
      tell(t("runs.deleted", { name: id }), "done");
      if (this.isTrashOpen) await this.loadTrash();
    },
    watch() {
      const { id } = this.details;
      this.$store.ui.show("train");
      window.dispatchEvent(new CustomEvent("studio:watch", { detail: id }));
    },

    // --- trash
    async toggleTrash() {
      this.isTrashOpen = !this.isTrashOpen;
      this.trash = null; // until the answer comes
      if (this.isTrashOpen) await this.loadTrash();
    },
    async loadTrash() {
      const found = await attempt(() => api("GET", "/api/trash"));
      if (found) this.trash = found.trash;
    },
    async restore(one) {
      if (await attempt(() => api("POST", `/api/trash/${one.number}/restore`, {}))) await Promise.all([this.loadTrash(), this.load()]);
    },
    async purge(one) {
      if (this.surely !== one.number) { this.surely = one.number; return; }
      const found = await attempt(() => api("DELETE", `/api/trash/${one.number}`));
      if (found) this.trash = found.trash;
    },
  }));
}
