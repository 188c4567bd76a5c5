// Export: a run in other forms, each made by a program of the kit as a job that outlives this page.
const SOON = 300; // ms: news that come close together load the list once
const AMOUNT = /: ([\d.]+) of ([\d.]+)/; // what the programs write of their progress

export default function ({ Alpine, api, attempt, newest, oneByOne, on, t, tell }) {
  const logs = newest();

  Alpine.data("exportView", () => ({
    kinds: {}, jobs: [], sources: [],
    source: "", kind: "merge", options: {}, name: "", address: "http://127.0.0.1:8000/v1",
    isRead: false, isTyped: false, isStarting: false, isCardInUse: false, problem: "", wrong: "", shown: "", log: "", asked: "", soon: 0,

    load: null, // named here: what init adds to `this` becomes one for all views
    init() {
      this.load = oneByOne(() => this.readJobs());
      on("shown", (name) => { if (name === "export") this.load(); });
      on("online", () => this.load());
      on("job", (job) => {
        if (!job.kind.startsWith("export-")) return;
        clearTimeout(this.soon);
        this.soon = setTimeout(() => this.load(), SOON);
      });
    },
    get kindNames() { return Object.keys(this.kinds); },
    get chosen() { return this.kinds[this.kind] || { options: {}, writes: true, takes: [], missing: "" }; },
    get optionNames() { return Object.keys(this.chosen.options); },
    get writes() { return this.chosen.writes; },
    get missing() { return this.chosen.missing; },
    get fitting() { return this.sources.filter((one) => this.chosen.takes.includes(one.kind)); },
    valuesOf(option) { return this.chosen.options[option] || []; },
    isOpen(job) { return job.state === "running" || job.state === "starting"; },
    classOf(job) { return { done: "good", failed: "bad", lost: "bad", running: "warn", starting: "warn" }[job.state] || "dim"; },
    valuesText(job) {
      const values = job.kind !== "verify-server" ? Object.values(job.options) : [];
      return values.length ? ` · ${values.join(", ")}` : "";
    },

    async readJobs() {
      const told = await api("GET", "/api/export");
      const isFirst = !this.kindNames.length;
      Object.assign(this, { kinds: told.kinds, sources: told.sources, isRead: true });
      this.jobs = told.jobs.map((job) => {
        const amount = AMOUNT.exec(job.line);
        // Without a value the bar only moves.
        const share = amount && Number(amount[2]) ? Number(amount[1]) / Number(amount[2]) : null;
        const words = job.command[2] === "onecard" ? job.command.slice(2) : ["python", ...job.command.slice(1)];
        return { ...job, share, words: words.join(" ") };
      });
      if (isFirst) this.onKind();
      else if (!this.fitting.some((one) => one.path === this.source)) this.suggest();
      if (this.shown) this.loadLog();
    },
    onKind() {
      this.options = Object.fromEntries(this.optionNames.map((name) => [name, this.valuesOf(name)[0]]));
      this.suggest();
    },
    suggest() {
      if (!this.fitting.some((one) => one.path === this.source)) this.source = this.fitting[0] ? this.fitting[0].path : "";
      this.problem = "";
      this.isCardInUse = false;
      if (this.isTyped && this.name) return;
      this.isTyped = false;
      const wanted = `${this.source.replaceAll("/", "-")}-${this.kind}`;
      const taken = new Set([...this.sources.map((one) => one.path), ...this.jobs.map((job) => job.name)]);
      let name = wanted;
      for (let number = 2; taken.has(name); number += 1) name = `${wanted}-${number}`;
      this.name = name;
    },
    async start(anyway) {
      this.isStarting = true;
      this.problem = "";
      this.wrong = "";
      const { name } = this;
      const body = { kind: this.kind, source: this.source, options: this.options, anyway };
      try {
        const job = await api("POST", "/api/export", this.writes ? { ...body, name } : { ...body, url: this.address });
        tell(t("export.started", { name: job.name }), "done");
        if (this.name === name) this.isTyped = false; // another one was typed meanwhile, for the next export
        this.isCardInUse = false;
        await this.load();
        this.suggest();
      } catch (reason) {
        this.problem = reason.message;
        this.wrong = reason.param || "";
        this.isCardInUse = reason.code === "card_in_use";
      }
      this.isStarting = false;
    },
    async cancel(job) {
      this.asked = job.id; // asked again, it is killed
      await attempt(() => api("POST", `/api/jobs/${job.id}/cancel`, {}));
      await this.load();
    },
    toggle(job) {
      this.shown = this.shown === job.id ? "" : job.id;
      this.log = "";
      if (this.shown) this.loadLog();
    },
    async loadLog() {
      const id = this.shown;
      const told = await logs(() => api("GET", `/api/jobs/${id}/log`));
      if (told && this.shown === id) this.log = told.text || "…";
    },
  }));
}
