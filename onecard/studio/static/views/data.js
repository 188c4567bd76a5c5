// Data: sources are named or uploaded, read by the kit, looked at token by token, cut by a slider, cleaned and split.

const N_BARS = 32;
const READING = { prompt_type: "auto", train_on: "all", thinking: "auto", columns: "", txt_split: "auto" };
const MAKING = {
  clean: { languages: "", min_chars: 1, max_chars: 0, near_duplicates: 0.7, compare: "whole", fix_encoding: true },
  split: { validation_size: 0.05, near_duplicates: 0.7, seed: 42 },
};
const pageId = crypto.randomUUID ? crypto.randomUUID() : String(Math.random());

const atLeast = (counts, least) => counts.reduce((sum, [value, n]) => sum + (value >= least ? n : 0), 0);

// What a limit does; data/cutoff_effect.py explains the counts.
export function atLimit(effect, limit) {
  const short = atLeast(effect.questions, limit);
  const room = Math.max(1, limit - effect.n_bos);
  const pieces = effect.documents.reduce((sum, [tokens, n]) => sum + n * Math.ceil(tokens / room), 0);
  const dropped = atLeast(effect.records, limit);
  const samples = atLeast(effect.lengths, 0) - short + pieces;
  const cut = atLeast(effect.lengths, limit + 1) - short;
  const all = Math.max(1, samples + dropped);
  return { samples, cut, dropped, cutShare: cut / all, droppedShare: dropped / all };
}

// Bars of equal width up to the longest; a border lies at the limit, so that what is above it is seen.
export function bars(effect, limit) {
  const counts = [...effect.lengths, ...effect.documents];
  const longest = Math.max(1, ...counts.map(([value]) => value));
  const width = Math.max(1, Math.ceil(longest / N_BARS));
  const found = [];
  for (let low = 0; low < longest; low += width) {
    for (const [from, to] of limit > low && limit < low + width ? [[low, limit], [limit, low + width]] : [[low, low + width]]) {
      const n = counts.reduce((sum, [value, count]) => sum + (value > from && value <= to ? count : 0), 0);
      found.push({ from: from + 1, to, n, over: from >= limit, share: (to - from) / width });
    }
  }
  const most = Math.max(1, ...found.map((bar) => bar.n));
  return found.map((bar) => ({ ...bar, key: `${bar.from}-${bar.to}`, style: { height: `${(100 * bar.n) / most}%` }, room: { flexGrow: String(bar.share) } }));
}

// What is named by a long path, an upload for one, is known by its end.
const shortName = (name) => (/[/\\]/.test(name) && name.length > 40 ? `…/${name.split(/[/\\]/).at(-1)}` : name);

export default function ({ Alpine, api, attempt, newest, withNews, on, t, format, tell }) {
  const [readings, samples, folders, searches, logs] = Array.from({ length: 5 }, newest);

  Alpine.data("dataView", () => ({
    shortName,
    sources: [],
    typed: "",
    reading: { ...READING },
    uploads: [],
    over: false,
    browsing: null,
    catalogue: { query: "", entries: null },
    found: null,
    asked: null,
    nReading: 0,
    limit: 1024,
    effect: { samples: 0, cut: 0, dropped: 0, cutShare: 0, droppedShare: 0 },
    bars: [],
    number: 0,
    sample: null,
    token: null,
    making: { program: "clean", name: "", clean: { ...MAKING.clean }, split: { ...MAKING.split } },
    job: null,
    isStarting: false,
    log: "",

    init() {
      const kept = JSON.parse(sessionStorage.getItem("onecard.data") || "null");
      if (kept) Object.assign(this, { sources: kept.sources, reading: { ...READING, ...kept.reading }, limit: kept.limit });
      this.$watch("limit", () => this.measure());
      on("job", (job) => this.jobNews(job));
      on("language", () => { if (this.found) this.read(); });
    },
    get busy() { return this.nReading > 0; },
    get readState() {
      if (this.busy) return t("data.reading_about");
      return this.found ? t("data.effect_samples", { n: format.number(this.found.n_samples) }) : "";
    },
    get base() { return this.$store.draft.options.model_path || ""; },
    get baseName() { return this.base || t("data.toy_base"); },
    keep() {
      const { sources, reading, limit } = this;
      sessionStorage.setItem("onecard.data", JSON.stringify({ sources, reading, limit }));
    },

    add(name) {
      const trimmed = name.trim();
      if (!trimmed || this.sources.some((source) => source.name === trimmed)) return;
      this.sources.push({ name: trimmed, amount: 1, limit: 0 });
      this.keep();
    },
    addTyped() { this.add(this.typed); this.typed = ""; },
    remove(at) { this.sources.splice(at, 1); this.keep(); },
    addSample() { this.add("sample/merge_sample.json"); },

    dropped(event) { this.over = false; this.upload([...event.dataTransfer.files]); },
    picked(event) { this.upload([...event.target.files]); event.target.value = ""; },
    async upload(files) {
      for (const file of files) await attempt(() => this.uploadOne(file));
    },
    // XMLHttpRequest, since fetch tells nothing of how far an upload is.
    uploadOne(file) {
      const shown = Alpine.reactive({ name: file.name, share: 0, request: new XMLHttpRequest() });
      this.uploads.push(shown);
      const at = () => { this.uploads = this.uploads.filter((one) => one.name !== file.name); };
      return new Promise((done, fail) => {
        const request = shown.request;
        request.open("PUT", `/api/data/uploads/${encodeURIComponent(file.name)}`);
        request.setRequestHeader("X-Language", document.documentElement.lang.startsWith("zh") ? "zh" : "en");
        request.setRequestHeader("Content-Type", "application/octet-stream");
        request.upload.onprogress = (event) => { shown.share = event.total ? event.loaded / event.total : 0; };
        request.onload = () => {
          at();
          let content = {};
          try { content = JSON.parse(request.responseText); } catch { content = {}; }
          if (request.status === 201) { this.add(content.path); done(); }
          else fail(new Error(content.error?.message || `${request.status}`));
        };
        request.onerror = () => { at(); fail(new Error(t("data.upload_failed", { name: file.name }))); };
        request.onabort = () => { at(); done(); };
        request.send(file);
      });
    },
    cancelUpload(at) { Alpine.raw(this.uploads[at].request).abort(); },

    async browse(folder) {
      const answer = await folders(() => api("GET", `/api/data/files?folder=${encodeURIComponent(folder)}`));
      if (answer) this.browsing = answer;
    },
    choose(entry) {
      if (entry.bytes === null) this.browse(entry.path);
      else this.add(entry.path);
    },
    async search() {
      const answer = await searches(() => api("GET", `/api/data/catalogue?q=${encodeURIComponent(this.catalogue.query)}`));
      if (answer) this.catalogue.entries = answer.entries;
    },
    refine() { if (this.catalogue.entries) this.search(); }, // closed since the key was pressed, it stays closed
    closeCatalogue() { this.catalogue.entries = null; searches(async () => {}); }, // nor does a late answer open it
    closeFolder() { this.browsing = null; folders(async () => {}); },

    get question() {
      const options = Object.fromEntries(Object.entries(this.reading).filter(([name, value]) => value !== READING[name]));
      const sources = this.sources.map(({ name, amount, limit }) => ({ name, amount: Number(amount), limit: Number(limit) || 0 }));
      return { sources, options, model_path: this.base || this.defaultBase(), page: pageId };
    },
    defaultBase() { return "sample/tiny-llama"; },
    async read() {
      if (!this.sources.length) return;
      this.nReading += 1;
      this.keep();
      const asked = this.question;
      const found = await readings(() => api("POST", "/api/data/read", asked));
      this.nReading -= 1;
      if (!found) return;
      Object.assign(this, { found, asked });
      this.number = 0;
      this.measure();
      await this.show(0);
    },
    async stop() { await attempt(() => api("POST", "/api/data/stop", {})); },
    setLimit(event) { this.limit = Number(event.target.value); },
    measure() {
      if (!this.found) return;
      this.effect = atLimit(this.found.effect, Number(this.limit));
      this.bars = bars(this.found.effect, Number(this.limit));
      this.keep();
    },
    get longest() {
      const counts = this.found ? [...this.found.effect.lengths, ...this.found.effect.documents] : [];
      return Math.max(64, ...counts.map(([value]) => value));
    },
    get chart() { return t("data.chart", { cut: format.percent(this.effect.cutShare, 1), dropped: format.percent(this.effect.droppedShare, 1), limit: format.number(Number(this.limit)) }); },
    barTitle(bar) { return t("data.bar", { from: format.number(bar.from), to: format.number(bar.to), n: format.number(bar.n) }); },
    shape([file, shape, n, keys]) {
      return t(keys.length ? "data.shape_keys" : "data.shape", { file, shape, n: format.number(n), keys: keys.join(", ") });
    },
    place([file, line, nth]) { return nth ? `${file}:${line}#${nth}` : `${file}:${line}`; },

    async show(number) {
      const last = this.found.n_samples - 1;
      const wanted = Math.min(Math.max(0, Number(number) || 0), last);
      this.number = wanted; // at once, so that the next press goes on from it
      const answer = await samples(() => api("POST", "/api/data/tokens", { ...this.asked, numbers: [wanted] }));
      if (!answer || !answer.samples.length) return;
      this.sample = answer.samples[0];
      this.token = null;
      this.draw();
    },
    another() { return this.show(Math.floor(Math.random() * this.found.n_samples)); },
    draw() {
      const spans = this.sample.tokens.map(([id, text, learned], at) => {
        const span = document.createElement("span");
        span.className = learned ? "token learned" : "token";
        span.dataset.at = at;
        span.textContent = text;
        return span;
      });
      this.$refs.tokens.replaceChildren(...spans);
    },
    pointed(event) {
      const at = event.target.dataset?.at;
      if (at !== undefined) this.select(Number(at));
    },
    stepped(event) {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !this.sample) return;
      event.preventDefault();
      const from = this.token ? this.token.at : -step;
      this.select(Math.min(Math.max(0, from + step), this.sample.tokens.length - 1));
    },
    select(at) {
      const [id, text, learned, weight] = this.sample.tokens[at];
      this.$refs.tokens.querySelector(".at")?.classList.remove("at");
      const span = this.$refs.tokens.children[at];
      span.classList.add("at");
      this.token = { at, id, text: JSON.stringify(text), learned, weight };
    },
    get tokenLine() {
      if (!this.token) return t("data.token_none");
      const kind = t(this.token.learned ? "data.learned" : "data.not_learned");
      const weight = this.token.weight === 1 ? "" : ` · ×${this.token.weight}`;
      return t("data.token", { at: this.token.at + 1, id: this.token.id, text: this.token.text, kind }) + weight;
    },
    get fate() {
      if (!this.sample) return "";
      const { question, n_tokens: n } = this.sample;
      const values = { n: format.number(n) };
      if (n <= Number(this.limit)) return t("data.fate_whole", values);
      if (question === null) return t("data.fate_pieces", values);
      return t(question >= Number(this.limit) ? "data.fate_dropped" : "data.fate_cut", values);
    },
    get isShort() { return this.sample && this.sample.tokens.length < this.sample.n_tokens; },

    async make() {
      if (this.isStarting) return;
      const { program, name } = this.making;
      const options = Object.fromEntries(Object.entries(this.making[program]).filter(([key, value]) => value !== MAKING[program][key] && value !== ""));
      for (const key of ["columns", "txt_split"]) if (this.reading[key] !== READING[key]) options[key] = this.reading[key];
      const sources = this.question.sources;
      this.isStarting = true;
      const told = await attempt(() => withNews(["job"], () => api("POST", `/api/data/make/${program}`, { sources, options, name })));
      this.isStarting = false;
      if (!told) return;
      const [started, news] = told;
      this.log = "";
      this.job = { id: started.job, state: "starting", results: started.results };
      const begun = { id: started.job, state: "starting", about: { results: started.results } };
      this.jobNews(news.map(([, job]) => job).filter((job) => job.id === started.job).at(-1) ?? begun);
    },
    async jobNews(job) {
      if (!this.job || job.id !== this.job.id) return;
      this.job = { id: job.id, state: job.state, results: job.about.results };
      const answer = await logs(() => api("GET", `/api/jobs/${job.id}/log?after=0`));
      if (answer) this.log = answer.text;
    },
    get jobState() { return this.job ? t(`data.job_${this.job.state}`) : ""; },
    get isDone() { return this.job && this.job.state === "done"; },
    get isRunning() { return this.isStarting || this.job && ["starting", "running"].includes(this.job.state); },
    cancelJob() { return attempt(() => api("POST", `/api/jobs/${this.job.id}/cancel`, {})); },
    useResult(path) { this.sources = []; this.add(path); this.found = null; this.sample = null; this.read(); },

    use() {
      const cleared = { data: null, data_path: null, prompt_type: null, train_on: null, thinking: null, columns: null, txt_split: null };
      this.$store.draft.set({ ...cleared, ...this.found.options, cutoff_len: Number(this.limit) });
      sessionStorage.setItem("onecard.n_tokens", String(this.found.n_tokens));
      tell(t("data.used"), "done");
      this.$store.ui.show("model", { focus: true });
    },
  }));
}
