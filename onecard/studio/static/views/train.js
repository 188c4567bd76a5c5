// Train: the next run and its command, the queue, and one run that is watched, steered and asked.
import { Chart, COLOURS, RunCurves } from "/static/charts.js";

const BASIC = ["data_path", "model_path", "objective", "num_epoch", "learning_rate", "bits", "cutoff_len", "lora_r", "total_batch", "test_size"];
const RUNNING = ["starting", "training", "evaluating", "paused", "given_back"];
const ALLOWED = {
  pause: ["training", "evaluating"], continue: ["paused"], stop: RUNNING, save: ["training", "evaluating", "paused"],
  ask: ["training", "evaluating", "paused"], give_back: ["training", "evaluating", "paused"], take_back: ["given_back"],
  resume: ["stopped", "failed", "lost"],
};
const SERIES = ["forgetting", "learning_rate", "tokens_per_s", "peak_bytes"];

// The end of a long path, which is what tells it from others.
const atEnd = (text) => (text.length > 28 && /[/\\]/.test(text) ? `…${text.slice(text.length - 26).replace(/^[^/\\]*/, "")}` : text);

export default function ({ Alpine, api, attempt, newest, oneByOne, withNews, on, t, format, tell, focusOn }) {
  let curves = null;
  let charts = {};
  let drawing = false;
  let checking = null;
  let checked = Promise.resolve(); // until the newest check was answered
  let wasAnswered = () => {};
  let optionsRead = null;
  const checks = newest();

  Alpine.data("trainView", () => ({
    options: [], name: "", search: "", unknown: "", extra: [], checked: { command: null, name: "", problems: [] }, busy: false,
    queue: { entries: [], is_held: false }, isRead: false, runs: [], chosen: null, isPicked: false, run: null, drawn: [],
    question: "", answer: "", asking: false, questions: [], log: "",

    refresh: null, // named here: what init adds to `this` becomes one for all views
    init() {
      const heard = [
        on("queue", (queue) => { this.hear("queue", queue); this.check(); }),
        on("run", (row) => this.hear("run", row)),
        on("gone", (gone) => this.hear("gone", gone)),
        on("rows", (news) => this.grow(news)),
        on("online", () => this.load()),
        on("theme", () => Object.values(charts).forEach((chart) => chart.redraw())),
        on("language", () => { this.remakeCharts(); this.check(); }),
        on("shown", (tab) => { if (tab === "train") { this.check(); this.later(); } }),
        on("watch", (id) => this.pick(id)),
      ];
      this.refresh = oneByOne(() => this.readOutput());
      this.destroy = () => heard.forEach((stop) => stop());
      optionsRead = attempt(async () => { this.options = (await api("GET", "/api/options")).options; });
      this.$watch("$store.draft.options", () => this.check());
    },
    async load() {
      await attempt(async () => {
        const [[queue, table], news] = await withNews(["queue", "run", "gone"], () => Promise.all([api("GET", "/api/queue"), api("GET", "/api/runs")]));
        Object.assign(this, { queue, runs: table.runs, isRead: true });
        news.forEach(([name, content]) => this.hear(name, content));
        const first = this.runs.find((row) => RUNNING.includes(row.state)) ?? this.runs[0];
        if (!this.chosen && first) await this.choose(first.id);
        else if (this.chosen) await this.choose(this.chosen);
      });
    },
    hear(name, content) {
      if (name === "run") this.update(content);
      else if (name === "gone") this.runs = this.runs.filter((one) => one.id !== content.id);
      else { this.queue = content; this.watchNext(); }
    },
    update(row) {
      const at = this.runs.findIndex((one) => one.id === row.id);
      if (at >= 0) this.runs[at] = row;
      else this.runs.unshift(row);
      if (row.id === this.chosen) { this.run = row; this.refresh(); }
      else if (RUNNING.includes(row.state)) this.follow(row.id);
    },
    watchNext() {
      const begun = this.queue.entries.find((entry) => ["starting", "running"].includes(entry.state) && entry.run);
      if (begun) this.follow(begun.run);
    },
    // Watch a run that goes on, unless the one that is watched does, or somebody looks at one that is over.
    follow(id) {
      if (id !== this.chosen && !this.isPicked && !RUNNING.includes(this.run?.state)) this.choose(id);
    },
    pick(id) {
      this.isPicked = !RUNNING.includes(this.runs.find((one) => one.id === id)?.state);
      return this.choose(id);
    },

    // --- the next run
    shownOptions() {
      const names = [...BASIC, ...this.extra, ...Object.keys(this.$store.draft.options)];
      return [...new Set(names)].map((name) => this.options.find((one) => one.name === name)).filter(Boolean);
    },
    label(option) { return BASIC.includes(option.name) ? t(`train.opt_${option.name}`) : `--${option.name}`; },
    choices(option) { return option.kind === "flag" ? ["", "true", "false"] : ["", ...option.choices]; },
    choiceLabel(option, choice) { return choice === "" ? t("train.default", { value: String(option.default) }) : choice; },
    standard(option) {
      if (["learning_rate", "total_batch"].includes(option.name)) return t("train.by_itself"); // 0: chosen by the kit
      return [null, undefined].includes(option.default) ? "" : atEnd(String(option.default));
    },
    value(option) {
      const value = this.$store.draft.options[option.name];
      return value === undefined ? "" : Array.isArray(value) ? value.join(",") : String(value);
    },
    set(option, value) { this.$store.draft.set({ [option.name]: value.trim() }); this.check(); },
    rename(name) { this.name = name.trim(); this.check(); },
    found() { return this.options.find((one) => one.name === this.search.replace(/^--/, "")); },
    seek(text) { Object.assign(this, { search: text.trim(), unknown: "" }); },
    async showMore() {
      await optionsRead; // a name that is typed before the options have come is not unknown
      const option = this.found();
      this.unknown = option ? "" : this.search;
      if (option && !this.extra.includes(option.name)) this.extra.push(option.name);
      if (option) focusOn(`opt-${option.name}`);
      if (option) this.search = "";
    },
    problem(name) {
      const found = this.checked.problems.find(([flag]) => flag === `--${name}`);
      return found ? found[1] : "";
    },
    otherProblems() {
      const shown = [...this.shownOptions().map((option) => `--${option.name}`), "--name"];
      return this.checked.problems.filter(([flag]) => !shown.includes(flag)).map(([flag, text]) => `${flag}: ${text}`);
    },
    check() {
      clearTimeout(checking);
      wasAnswered();
      if (this.$store.ui.tab !== "train") return;
      checked = new Promise((resolve) => { wasAnswered = resolve; });
      const answered = wasAnswered;
      checking = setTimeout(async () => {
        const body = { options: this.$store.draft.options, name: this.name };
        this.checked = (await checks(() => api("POST", "/api/queue/check", body))) ?? this.checked;
        answered();
      }, 250);
    },
    // Whether the settings that are shown, and no earlier ones, can be started.
    async canStart() {
      for (let known = null; known !== checked;) {
        known = checked;
        await known;
      }
      return !!this.checked.command;
    },
    queueIsFree() { return !this.queue.entries.some((entry) => ["waiting", "starting", "running"].includes(entry.state)); },
    async add() {
      if (this.busy) return;
      this.busy = true;
      const typed = this.name;
      const fits = await this.canStart();
      const name = typed || this.checked.name;
      const done = fits && await this.change("POST", "/api/queue", { options: this.$store.draft.options, name });
      this.busy = false;
      if (!fits) return undefined;
      if (!done) return this.check();
      if (this.name === typed) this.name = ""; // another one is that of the next run, typed meanwhile
      this.isPicked = false;
      this.watchNext();
      tell(t("train.added", { name }), "done");
      this.check();
    },
    async copy() {
      if (!(await this.canStart())) return;
      await attempt(async () => {
        await navigator.clipboard.writeText(this.checked.command);
        tell(t("train.copied"), "done");
      });
    },
    clear() { this.$store.draft.clear(); Object.assign(this, { name: "", extra: [] }); this.check(); },

    // --- the queue
    // What goes on and waits, in its order; below it what is over, the newest first.
    listed() {
      const isOpen = (entry) => ["waiting", "starting", "running"].includes(entry.state);
      return [...this.queue.entries.filter(isOpen), ...this.queue.entries.filter((entry) => !isOpen(entry)).reverse()];
    },
    async change(method, path, body) {
      const told = await attempt(() => withNews(["queue"], () => api(method, path, body)));
      if (!told) return undefined;
      const [queue, news] = told;
      this.queue = news.length ? news.at(-1)[1] : queue;
      return queue;
    },
    move(entry, by) { return this.change("POST", `/api/queue/${entry.id}/move`, { by }); },
    remove(entry) { return this.change("DELETE", `/api/queue/${entry.id}`); },
    hold() { return this.change("POST", "/api/queue/hold", { is_held: !this.queue.is_held }); },
    async resume(run) {
      if (this.busy) return;
      this.busy = true;
      const done = await this.change("POST", `/api/runs/${encodeURIComponent(run)}/resume`, {});
      this.busy = false;
      if (!done) return;
      this.isPicked = false;
      tell(t("train.resumed"), "done");
    },
    edit(entry) {
      this.$store.draft.clear();
      this.$store.draft.set(entry.options);
      this.check();
      focusOn("run-name");
    },
    tone(state) {
      if (["failed", "lost"].includes(state)) return "bad";
      return ["done", "ended"].includes(state) ? "good" : ["paused", "given_back", "stopped", "cancelled"].includes(state) ? "warn" : "";
    },

    // --- the run that is watched
    async choose(id) {
      if (!id) return;
      if (id !== this.chosen) Object.assign(this, { answer: "", question: "", questions: [], log: "" });
      this.chosen = id;
      this.run = this.runs.find((one) => one.id === id) ?? null;
      if (!curves || curves.id !== id) curves = new RunCurves(id);
      this.$nextTick(() => { document.getElementById("watched-run").value = id; });
      const wanted = curves;
      await attempt(() => wanted.load(() => { if (wanted === curves) this.later(); }));
      await this.refresh();
    },
    async readOutput() {
      const id = this.chosen;
      if (this.$store.ui.tab !== "train") return;
      const path = `/api/runs/${encodeURIComponent(id)}`;
      const [log, asked] = await Promise.all([api("GET", `${path}/log`), api("GET", `${path}/questions`)]);
      if (id !== this.chosen) return;
      const shown = document.getElementById("run-log");
      const follows = shown.scrollTop + shown.clientHeight > shown.scrollHeight - 40;
      Object.assign(this, { log: log.text, questions: asked.questions });
      if (follows) this.$nextTick(() => { shown.scrollTop = shown.scrollHeight; });
    },
    async grow(news) {
      if (!curves || news.id !== curves.id) return;
      const wanted = curves;
      if (!wanted.add(news)) await attempt(() => wanted.load());
      this.later();
    },
    // Draws at most twice a second, and only what is seen.
    later() {
      if (drawing || !curves) return;
      drawing = true;
      setTimeout(() => { drawing = false; this.draw(); }, 400);
    },
    draw() {
      if (this.$store.ui.tab !== "train" || !curves) return;
      this.drawn = Object.keys(curves.series);
      this.$nextTick(() => {
        if (!charts.loss) this.makeCharts();
        const { loss, eval_loss: evaluated, reward, eval_reward: evaluatedReward } = curves.series;
        charts.loss.draw([
          { label: t("train.training"), values: loss ?? reward, colour: COLOURS[0] },
          { label: t("train.evaluation"), values: evaluated ?? evaluatedReward, colour: COLOURS[1], dots: true },
        ]);
        SERIES.forEach((name, at) => {
          charts[name].draw([{ label: t(`train.series_${name}`), values: curves.series[name], colour: COLOURS[2 + at], dots: name === "forgetting" }]);
        });
      });
    },
    makeCharts() {
      const tells = { forgetting: (v) => format.number(v, 4), learning_rate: format.rate, tokens_per_s: (v) => format.number(v), peak_bytes: format.bytes };
      charts.loss = new Chart(document.getElementById("chart-loss"), { title: t("train.series_loss"), tell: (v) => format.number(v, 4), step: t("train.step"), height: 280 });
      for (const name of SERIES) {
        charts[name] = new Chart(document.getElementById(`chart-${name}`), {
          title: t(`train.series_${name}`), tell: tells[name], step: t("train.step"), height: 170, binary: name === "peak_bytes",
        });
      }
    },
    remakeCharts() {
      Object.values(charts).forEach((chart) => chart.destroy());
      charts = {};
      this.later();
    },
    has(name) { return this.drawn.includes(name); },
    can(what) {
      return !!this.run && ALLOWED[what].includes(this.run.state);
    },
    progressText() {
      if (!this.run) return "";
      const { step, total } = this.run;
      const values = { step: format.number(step), total: format.number(total) };
      const place = total ? t("train.step_of", values) : `${t("train.step")} ${values.step}`;
      return `${place} · ${t("train.loss_now", { loss: format.loss(this.run.loss) })}`;
    },
    // The time that is left, by the speed of the last minutes of the log.
    endText() {
      const begun = this.begun ?? null;
      if (!this.run || this.run.state !== "training" || !this.run.total) { this.begun = null; return ""; }
      const now = Date.now() / 1000;
      if (!begun || begun.id !== this.run.id || begun.step > this.run.step) {
        this.begun = { id: this.run.id, step: this.run.step, time: now };
        return "";
      }
      const speed = (this.run.step - begun.step) / (now - begun.time);
      if (!(speed > 0)) return "";
      const left = (this.run.total - this.run.step) / speed;
      return t("train.left", { time: format.duration(left), end: format.date(now + left) });
    },
    async send(kind) {
      const path = `/api/runs/${encodeURIComponent(this.chosen)}`;
      const sent = await attempt(() => api("POST", `${path}/control`, { kind }));
      if (!sent) return;
      tell(t(`train.sent_${kind}`));
      const found = sent.request ? await attempt(() => this.replyTo(path, sent.request)) : null;
      if (found && found.state === "failed") tell(found.error, "error");
    },
    onQuestionKey(event) {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (this.question.trim() && !this.asking) this.ask();
    },
    async ask() {
      const id = this.chosen;
      const path = `/api/runs/${encodeURIComponent(id)}`;
      const take = (found) => { if (id === this.chosen) Object.assign(this, found); }; // of a run that is still watched
      Object.assign(this, { asking: true, answer: "" });
      await attempt(async () => {
        const { request } = await api("POST", `${path}/control`, { kind: "ask", question: this.question.trim() });
        const found = await this.replyTo(path, request, (answer) => take({ answer }));
        if (found.state === "failed") tell(found.error, "error");
        take({ answer: found.text });
        take({ questions: (await api("GET", `${path}/questions`)).questions });
      });
      this.asking = false;
    },
    async replyTo(path, request, sofar = () => {}) {
      for (;;) {
        const found = await api("GET", `${path}/replies/${request}`);
        sofar(found.text);
        if (["done", "failed"].includes(found.state)) return found;
        await new Promise((resolve) => setTimeout(resolve, 400));
      }
    },
    // The same question over the steps of the run.
    strip() {
      const groups = new Map();
      this.questions.forEach((row, key) => {
        const asked = row.question ?? row.messages?.at(-1)?.content ?? "";
        if (!groups.has(asked)) groups.set(asked, []);
        groups.get(asked).push({ key, step: row.step, answer: row.answer ?? row.text ?? "" });
      });
      return [...groups].map(([question, rows]) => ({ question, rows }));
    },
  }));
}
