// Chat with a model of this folder: alone, beside another one, or blind; and what training did to each token.
import { ApiFailure } from "/static/api.js";

const KEPT = "onecard.chat"; // in sessionStorage: the rounds, so that a reload loses nothing
const STRONG = [0.1, 0.5, 1, 2, 4]; // nats: from which difference on a colour is of level 1, 2, ...

export function levelOf(difference) {
  const size = Math.abs(difference);
  const level = STRONG.filter((limit) => size >= limit).length;
  return level ? (difference > 0 ? "p" : "n") + level : "z";
}

// Gives the data of server-sent events as they come.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    waiting += value;
    const events = waiting.split(/\r?\n\r?\n/);
    waiting = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (data.length && data[0] !== "[DONE]") yield JSON.parse(data.join("\n"));
    }
  }
}

function keptRounds() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT)) || [];
  } catch {
    return [];
  }
}

export default function ({ Alpine, api, attempt, newest, oneByOne, withNews, on, t, tell, format, focusFrom, focusOn }) {
  const sheet = document.createElement("link");
  sheet.rel = "stylesheet";
  sheet.href = "/static/views/use.css";
  document.head.append(sheet);

  const pairs = newest();

  Alpine.data("chatView", () => ({
    server: { state: "off", source: "", models: [], base: "", error: "" },
    sources: [], training: [], source: "", bits: "", isRead: false, isStarting: false,
    modes: ["one", "two", "blind"], mode: "one", chosen: ["", ""],
    temperature: 0.7, maxTokens: 512, question: "", rounds: keptRounds(),
    isAwaited: false, isAnswering: false, isVoting: false, abort: null,
    blind: { pair: null, n_votes: 0, n_pairs: 0, result: null, file: "" }, wasSame: false,

    load: null, // named here: what init adds to `this` becomes one for all views
    init() {
      this.load = oneByOne(() => this.readState());
      on("shown", (name) => { if (name === "chat") this.load(); });
      on("online", () => this.load());
      on("chat", (state) => {
        if (state.ended_for.length) tell(t("chat.ended_for", { runs: state.ended_for.join(", ") }));
        this.take(state);
      });
    },
    get isBusy() { return this.isStarting || this.server.state === "starting"; },
    get sides() { return this.mode === "one" ? [0] : [0, 1]; },
    get stateText() {
      return t(`chat.state_${this.server.state}`, { source: this.server.source });
    },
    get stateClass() { return { ready: "good", failed: "bad", starting: "warn" }[this.server.state] || "dim"; },
    get hasPieces() { return this.rounds.some((round) => round.answers.some((answer) => answer.pieces.length)); },
    kindText(one) { return one.kind === "adapter" ? "" : ` (${t(`chat.kind_${one.kind}`)})`; },
    baseText(name) { return name && name === this.server.base ? ` (${t("chat.base")})` : ""; },

    async readState() {
      const [told, news] = await withNews(["chat"], () => api("GET", "/api/chat"));
      Object.assign(this, { sources: told.sources, training: told.training, isRead: true });
      if (!this.sources.some((one) => one.path === this.source)) {
        this.source = told.source || (this.sources[0] ? this.sources[0].path : "");
      }
      this.take(news.length ? news.at(-1)[1] : told);
    },
    take(state) {
      const isNew = state.state === "ready" && (!this.chosen[0] || this.server.models.join() !== state.models.join());
      this.server = { state: state.state, source: state.source, models: state.models, base: state.base, error: state.error };
      if (isNew) {
        const [first, second] = [state.models[0], state.base || state.models[1] || ""];
        this.chosen = state.models.includes(this.chosen[0]) && this.chosen[0] !== this.chosen[1] ? this.chosen : [first, second];
        if (state.models.length < 2) this.mode = "one";
        if (this.mode === "blind") this.showBlind();
        if (this.isAwaited) focusFrom(["chat-start", "chat-anyway", "chat-stop"], "chat-question");
        this.isAwaited = false;
      }
    },
    async start(anyway) {
      this.isStarting = true;
      this.isAwaited = true;
      const body = { source: this.source, bits: this.bits ? Number(this.bits) : null, anyway };
      const state = await this.change("/api/chat/start", body);
      this.isStarting = false;
      if (state) {
        this.chosen = ["", ""];
        this.take(state);
      } else await this.load();
    },
    // The server's state after a request; what was heard of it before the answer came is newer than that.
    async change(path, body) {
      const told = await attempt(() => withNews(["chat"], () => api("POST", path, body)));
      if (!told) return undefined;
      const [state, news] = told;
      return news.length ? news.at(-1)[1] : state;
    },
    async stop() {
      this.halt();
      const state = await this.change("/api/chat/stop", {});
      if (state) this.take(state);
    },

    onMode() {
      this.halt();
      this.clear();
      if (this.mode === "blind") this.showBlind();
    },
    onModels() {
      if (this.mode === "blind") this.showBlind();
    },
    clear() {
      this.rounds = [];
      this.keep();
    },
    keep() {
      const rounds = this.rounds.map((round) => ({
        ...round, answers: round.answers.map((answer) => ({ ...answer, isOpen: false, isColouring: false })),
      }));
      try {
        sessionStorage.setItem(KEPT, JSON.stringify(rounds));
      } catch { /* too long to be kept: it stays on the page */ }
    },
    onQuestionKey(event) {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (this.question.trim() && !this.isAnswering) this.send();
    },
    // What a side has been asked and has answered, as messages; a round that it did not answer is left out.
    messagesOf(side, before) {
      const messages = [];
      for (const round of this.rounds.slice(0, before)) {
        const answer = round.answers.find((one) => one.side === side);
        if (answer && answer.text) messages.push({ role: "user", content: round.question }, { role: "assistant", content: answer.text });
      }
      return messages;
    },
    async send() {
      if (this.mode === "blind") return this.askBlind();
      const question = this.question.trim();
      this.question = "";
      const answers = this.sides.map((side) => ({
        side, model: this.chosen[side], text: "", error: "", isOpen: true, pieces: [], at: 0, isColouring: false,
      }));
      this.rounds.push({ id: Date.now(), question, answers });
      const at = this.rounds.length - 1;
      this.isAnswering = true;
      this.abort = new AbortController();
      await Promise.all(this.rounds[at].answers.map((answer) => this.stream(answer, at, question)));
      this.isAnswering = false;
      this.keep();
      focusFrom(["chat-send", "chat-halt"], "chat-question");
      return undefined;
    },
    async stream(answer, at, question) {
      const messages = [...this.messagesOf(answer.side, at), { role: "user", content: question }];
      const body = { model: answer.model, messages, temperature: this.temperature, max_tokens: this.maxTokens, stream: true };
      try {
        const language = document.documentElement.lang.startsWith("zh") ? "zh" : "en";
        const headers = { "Content-Type": "application/json", "X-Language": language };
        const response = await fetch("/api/chat/completions", {
          method: "POST", headers, body: JSON.stringify(body), signal: this.abort.signal,
        });
        if (!response.ok) throw new ApiFailure(response.status, (await response.json()).error || {});
        for await (const event of eventsOf(response)) {
          if (event.error) throw new ApiFailure(502, event.error);
          const choice = event.choices[0];
          if (choice && choice.delta && choice.delta.content) answer.text += choice.delta.content;
        }
      } catch (reason) {
        answer.error = reason.name === "AbortError" ? t("chat.halted") : reason.message;
      }
      answer.isOpen = false;
    },
    halt() {
      if (this.abort) this.abort.abort();
    },

    async colour(round, answer) {
      if (answer.pieces.length) {
        answer.pieces = [];
        this.keep();
        return;
      }
      answer.isColouring = true;
      const at = this.rounds.findIndex((one) => one.id === round.id);
      const messages = [...this.messagesOf(answer.side, at), { role: "user", content: round.question }];
      const body = { messages, answer: answer.text, tuned: answer.model, base: this.server.base };
      const told = await attempt(() => api("POST", "/api/chat/differences", body));
      if (told) {
        answer.pieces = told.pieces.map((piece) => ({ ...piece, level: levelOf(piece.difference) }));
        answer.at = 0;
      }
      answer.isColouring = false;
      this.keep();
    },
    pick(answer, at) { answer.at = at; },
    onPieceKey(event, answer) {
      const last = answer.pieces.length - 1;
      const goal = { ArrowRight: answer.at + 1, ArrowLeft: answer.at - 1, Home: 0, End: last }[event.key];
      if (goal === undefined) return;
      event.preventDefault();
      answer.at = Math.min(Math.max(goal, 0), last);
    },
    pieceText(answer) {
      const piece = answer.pieces[answer.at];
      if (!piece) return "";
      const size = format.number(Math.abs(piece.difference), 2);
      const signed = (Number(size) === 0 ? "" : piece.difference > 0 ? "+" : "−") + size;
      const share = (value) => format.percent(Math.exp(value), 2);
      return t("chat.piece", { text: JSON.stringify(piece.text), difference: signed, base: share(piece.base), tuned: share(piece.tuned) });
    },

    get blindQuestion() {
      return this.blind.pair ? this.blind.pair.messages.map((message) => message.content).join("\n") : "";
    },
    get blindStatus() {
      const told = t("chat.votes", { n: this.blind.n_votes, m: this.blind.n_pairs });
      return this.wasSame ? `${t("chat.same")} ${told}` : told;
    },
    get resultText() {
      const { result } = this.blind;
      if (!result) return "";
      const verdict = t(`chat.verdict_${result.result.split(" ")[0]}`, { b: result.b });
      if (!result.share_b) return verdict;
      const [share, low, high] = result.share_b.map((value) => format.percent(value));
      return `${t("chat.share", { b: result.b, share, low, high })} ${verdict}`;
    },
    names() { return { a: this.chosen[0], b: this.chosen[1] }; },
    takeBlind(view, wasSame = false) {
      this.wasSame = wasSame;
      if (view) this.blind = { result: null, file: "", ...view };
    },
    async showBlind(query = {}) {
      this.takeBlind(await pairs(() => api("GET", `/api/chat/blind?${new URLSearchParams({ ...this.names(), ...query })}`)));
    },
    result() { return this.showBlind({ result: "1" }); },
    async askBlind() {
      const { question } = this;
      const messages = [{ role: "user", content: question.trim() }];
      const body = { ...this.names(), messages, temperature: this.temperature, max_tokens: this.maxTokens };
      this.isAnswering = true;
      const view = await pairs(() => api("POST", "/api/chat/blind/ask", body));
      this.isAnswering = false;
      if (!view) return;
      if (this.question === question) this.question = ""; // another one was typed meanwhile
      this.takeBlind(view, view.is_same);
      if (view.pair) focusFrom(["chat-question", "chat-send"], "vote-1");
    },
    async vote(place) {
      const { pair } = this.blind;
      this.isVoting = true;
      const view = await pairs(() => api("POST", "/api/chat/blind/vote", { ...this.names(), key: pair.key, place }));
      this.isVoting = false;
      this.takeBlind(view);
      focusFrom(["vote-1", "vote-0", "vote-2"], "chat-question");
    },
    async undo() {
      this.takeBlind(await pairs(() => api("POST", "/api/chat/blind/undo", this.names())));
    },
  }));
}
