// Model: a base, a card and four sliders; the memory plan follows while they move.

const GIB = 2 ** 30;
const SLIDERS = ["bits", "cutoff_len", "lora_r", "micro_batch"];
const PAUSE_MS = 60; // a slider that moves asks once for the place where it rests
const POLL_MS = 1500;
const USUAL_CARD = "2"; // of 11 GiB
const pageId = crypto.randomUUID ? crypto.randomUUID() : String(Math.random());
const nearest = (stops, value) => stops.reduce((best, stop, at) => (Math.abs(stop - value) < Math.abs(stops[best] - value) ? at : best), 0);

export default function ({ Alpine, api, attempt, on, t, format, tell }) {
  // 8.03 billion as the reader's language counts it.
  const weights = (n) => {
    const [large, small] = [Number(t("model.large")), Number(t("model.small"))];
    return n >= large ? t("model.n_large", { n: format.number(n / large, 2) }) : t("model.n_small", { n: format.number(n / small, 1) });
  };

  let opening = null;

  Alpine.data("modelView", () => ({
    typed: "",
    base: "",
    isToy: true,
    toy: "",
    local: [],
    known: [],
    cards: [],
    card: null,
    found: null,
    looked: false,
    ownGib: 11,
    choice: "",
    stops: {},
    at: {},
    plan: null,
    limits: null,
    busy: false,
    speeds: [],
    speed: 0,
    nTokens: 0,
    epochs: 3,

    async init() {
      this.waiting = null;
      this.asking = null;
      this.poll = null;
      this.isLoaded = false;
      on("shown", (name) => { if (name === "model") this.open(); });
      on("language", () => { if (this.plan) this.ask(); });
      if (this.$store.ui.tab === "model") this.open();
    },
    async open() {
      this.nTokens = Number(sessionStorage.getItem("onecard.n_tokens")) || this.nTokens;
      if (this.isLoaded) {
        this.fromDraft();
        this.ask();
        this.loadSpeeds();
        return;
      }
      opening ??= this.loadFirst().finally(() => { opening = null; }); // once: what was set meanwhile would be lost
      await opening;
    },
    async loadFirst() {
      const first = await attempt(() => api("GET", "/api/plan/models"));
      if (!first) return;
      this.isLoaded = true;
      Object.assign(this, { local: first.local, cards: first.cards, stops: first.stops });
      this.toy = first.default;
      for (const name of SLIDERS) this.at[name] = nearest(first.stops[name], first.defaults[name]);
      const typed = this.typed;
      this.fromDraft();
      if (typed) this.setBase(typed);
      this.choose(localStorage.getItem("onecard.card") || USUAL_CARD, false);
      this.load();
    },
    async load() {
      this.loadSpeeds();
      const machine = await attempt(() => api("GET", "/api/plan/machine"));
      this.looked = true;
      if (!machine) return;
      this.known = machine.known;
      this.found = machine.card;
      if (machine.card && !localStorage.getItem("onecard.card")) this.choose("found", false);
    },
    async loadSpeeds() {
      const answer = await attempt(() => api("GET", "/api/plan/speeds"));
      if (!answer) return;
      this.speeds = answer.runs;
      if (!this.speed && answer.runs.length) this.speed = Math.round(answer.runs[0].tokens_per_s);
    },
    fromDraft() {
      const options = this.$store.draft.options;
      this.base = options.model_path || this.toy;
      this.typed = options.model_path || "";
      this.isToy = this.base === this.toy;
      this.epochs = Number(options.num_epoch) || this.epochs;
      for (const name of SLIDERS) if (options[name]) this.stopAt(name, Number(options[name]));
    },
    // A value between two stops becomes one.
    stopAt(name, value) {
      if (!this.stops[name].includes(value)) this.stops[name] = [...this.stops[name], value].sort((a, b) => a - b);
      this.at[name] = this.stops[name].indexOf(value);
    },
    setBase(name) {
      this.typed = name === this.toy ? "" : name;
      this.base = name.trim() || this.toy;
      this.isToy = this.base === this.toy;
      this.plan = null;
      this.ask();
    },
    choose(choice, isTyped = true) {
      this.choice = choice;
      if (choice === "found" && this.found) this.card = this.found;
      else if (choice === "own") this.card = { name: "", gib: Number(this.ownGib), is_old: false };
      else this.card = this.cards[Number(choice)] || this.cards[2];
      if (isTyped && choice === "found") localStorage.removeItem("onecard.card");
      else if (isTyped) localStorage.setItem("onecard.card", choice);
      this.ask();
    },
    isChosen(at) { return this.choice === String(at); },
    cardName(card) { return `${card.name} (${format.number(card.gib, 1)} GiB)`; },
    get foundName() { return this.found ? t("model.found", { name: this.found.name, gib: format.number(this.found.gib, 1) }) : ""; },
    localName(path) { return path === this.toy ? t("model.toy") : path; },
    knownName(model) { return `${model.hub_id} (${weights(model.n_weights)})`; },

    value(name) { return this.stops[name] ? this.stops[name][this.at[name]] : 0; },
    valueText(name) { return name === "micro_batch" && !this.value(name) ? t("model.auto") : format.number(this.value(name)); },
    last(name) { return this.stops[name] ? this.stops[name].length - 1 : 0; },
    move(name, event) { this.at[name] = Number(event.target.value); this.ask(); },
    get options() {
      const options = Object.fromEntries(SLIDERS.map((name) => [name, this.value(name)]));
      if (!options.micro_batch) delete options.micro_batch;
      return options;
    },
    get question() { return { model_path: this.base, options: this.options, card: { gib: this.card.gib, is_old: this.card.is_old }, page: pageId }; },

    ask() {
      clearTimeout(this.waiting);
      clearTimeout(this.poll);
      if (!this.card || !this.base || this.$store.ui.tab !== "model") return;
      this.waiting = setTimeout(() => this.askNow(), PAUSE_MS);
    },
    async askNow() {
      this.asking?.abort();
      const asking = new AbortController();
      this.asking = asking;
      this.busy = true;
      const { question } = this;
      const planned = (path) => api("POST", path, question, { signal: asking.signal });
      try {
        // About as much is shown at once; of a model that is new here nothing is known yet.
        let plan = await planned("/api/plan/at_once");
        if (!plan.is_exact && plan.is_near && this.asking === asking) this.plan = plan;
        if (!plan.is_exact) plan = await planned("/api/plan");
        if (this.asking !== asking) return;
        this.plan = plan;
        this.limits = null;
        this.pollLimits();
      } catch (reason) {
        if (this.asking !== asking || reason.name === "AbortError" || reason.code === "superseded") return;
        this.plan = null;
        tell(reason.message, "error");
      } finally {
        if (this.asking === asking) {
          this.busy = false;
          this.asking = null;
        }
      }
    },
    get isEstimate() { return this.plan.is_exact === false; },
    async pollLimits() {
      const question = this.question;
      const found = await attempt(() => api("POST", "/api/plan/limits", question).catch((reason) => {
        if (reason.code === "superseded") return null;
        throw reason;
      }));
      if (JSON.stringify(question) !== JSON.stringify(this.question)) return;
      if (found && "longest_context" in found) this.limits = found;
      if (found && !found.ready) this.poll = setTimeout(() => this.pollLimits(), POLL_MS);
    },

    // Parts on the card, the largest scale being the card or what is needed.
    get parts() {
      if (!this.plan) return [];
      const whole = Math.max(this.plan.card_bytes, this.plan.peak_bytes);
      return this.plan.parts.filter((part) => part.place === "card").map((part, at) => ({
        key: part.name, name: part.name, gib: this.gib(part.n_bytes), share: format.percent(part.n_bytes / this.plan.peak_bytes, 1),
        title: `${part.name}: ${this.gib(part.n_bytes)} GiB`, colour: `colour c${at % 14}`, style: { width: `${(100 * part.n_bytes) / whole}%` },
      }));
    },
    get inRam() {
      return this.plan ? this.plan.parts.filter((part) => part.place !== "card").map((part) => ({ key: part.name, name: part.name, gib: this.gib(part.n_bytes) })) : [];
    },
    get edge() {
      const whole = this.plan ? Math.max(this.plan.card_bytes, this.plan.peak_bytes) : 1;
      return { left: `${(100 * (this.plan ? this.plan.card_bytes : 1)) / whole}%` };
    },
    gib(bytes) { return bytes && bytes < GIB / 200 ? "<0.01" : (bytes / GIB).toFixed(2); },
    size(bytes) { return `${this.gib(bytes)} GiB`; },
    get verdict() {
      const { fits, peak_bytes: peak, card_bytes: total, left_bytes: left } = this.plan;
      const values = { peak: this.size(peak), total: this.size(total), left: this.size(left) };
      if (this.isEstimate) return t(fits ? "model.about_fits" : "model.about_misfits", values);
      if (fits) return t("model.fits", values);
      return peak > total ? t("model.misfits", values) : t("model.ram_short", { need: this.size(this.plan.ram_bytes), there: this.size(this.plan.card_ram_bytes) });
    },
    get chart() { return t("model.chart", { peak: this.size(this.plan.peak_bytes), total: this.size(this.plan.card_bytes) }); },
    get about() { return t("model.weights", { n: weights(this.plan.n_weights), bits: this.plan.element_bits, rows: this.plan.rows }); },
    get contextLine() { return this.limits.longest_context ? t("model.context", { n: format.number(this.limits.longest_context) }) : t("model.no_context"); },
    get largestLine() { return this.limits.largest_known ? t("model.largest", { name: this.limits.largest_known }) : t("model.no_largest"); },

    get seconds() { return this.speed > 0 && this.nTokens > 0 ? (this.nTokens * this.epochs) / this.speed : 0; },
    get time() {
      if (!this.nTokens) return t("model.no_tokens");
      if (!this.seconds) return t("model.no_speed");
      return t("model.takes", { time: format.duration(this.seconds), end: format.date(Date.now() / 1000 + this.seconds) });
    },
    useSpeed(text) { this.speed = Number(text) || this.speed; },

    use() {
      const options = { ...this.options, model_path: this.isToy ? null : this.base, micro_batch: this.options.micro_batch || null, num_epoch: this.epochs };
      this.$store.draft.set(options);
      tell(t("model.used"), "done");
      this.$store.ui.show("train", { focus: true });
    },
  }));
}
