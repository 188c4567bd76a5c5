// The shell: words, tabs, messages, the one stream of news, and the views that are loaded into it.
import Alpine from "/static/vendor/alpine-csp.esm.min.js";
import { api, ApiFailure } from "/static/api.js";
import { focusFrom, focusOn, keepFocus } from "/static/focus.js";
import * as format from "/static/format.js";

const VIEWS = ["data", "model", "train", "runs", "chat", "export"];
const LANGUAGES = ["en", "zh"];

function stored(name, allowed, otherwise) {
  const value = localStorage.getItem(`onecard.${name}`);
  return allowed.includes(value) ? value : otherwise;
}

const browserLanguage = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
let words = { en: {}, zh: {} };
let nextToast = 1;

const ui = {
  tabs: VIEWS,
  tab: VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "data",
  language: stored("language", LANGUAGES, browserLanguage),
  theme: stored("theme", ["light", "dark"], "auto"),
  online: true,
  toasts: [],

  show(name, { focus = false } = {}) {
    this.tab = name;
    history.replaceState(null, "", `#${name}`);
    scrollTo(0, 0);
    if (focus) document.getElementById(`tab-${name}`).focus();
    emit("shown", name);
  },
  // https://www.w3.org/WAI/ARIA/apg/patterns/tabs/
  onTabKey(event) {
    const at = VIEWS.indexOf(this.tab);
    const goal = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: VIEWS.length - 1 }[event.key];
    if (goal === undefined) return;
    event.preventDefault();
    this.show(VIEWS[(goal + VIEWS.length) % VIEWS.length], { focus: true });
  },
  setLanguage(language) {
    this.language = language;
    localStorage.setItem("onecard.language", language);
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
    emit("language", language);
  },
  setTheme(theme) {
    this.theme = theme;
    if (theme === "auto") {
      localStorage.removeItem("onecard.theme");
      delete document.documentElement.dataset.theme;
    } else {
      localStorage.setItem("onecard.theme", theme);
      document.documentElement.dataset.theme = theme;
    }
    emit("theme", theme);
  },
  // kind: "error", "done" or "note". What is no error goes away by itself.
  tell(text, kind = "note") {
    const id = nextToast++;
    this.toasts.push({ id, text, kind });
    if (this.toasts.length > 5) this.toasts.shift();
    if (kind !== "error") setTimeout(() => this.dismiss(id), 6000);
  },
  dismiss(id) {
    if (document.getElementById(`toast-${id}`)?.contains(document.activeElement)) document.getElementById("main").focus();
    this.toasts = this.toasts.filter((toast) => toast.id !== id);
  },
};

// The settings of the next run: flag without dashes -> value. Data and Model put theirs in; Train shows and queues them.
const draft = {
  options: JSON.parse(sessionStorage.getItem("onecard.draft") || "{}"),
  set(options) {
    for (const [name, value] of Object.entries(options)) {
      if (value === null || value === "") delete this.options[name];
      else this.options[name] = value;
    }
    sessionStorage.setItem("onecard.draft", JSON.stringify(this.options));
  },
  clear() {
    this.options = {};
    sessionStorage.removeItem("onecard.draft");
  },
};

// t(KEY, {n: 5}): the text in the page's language with its places filled.
function t(key, values = {}) {
  const text = words[Alpine.store("ui").language][key] ?? words.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (place, name) => (name in values ? String(values[name]) : place));
}

function emit(name, detail) {
  window.dispatchEvent(new CustomEvent(`studio:${name}`, { detail }));
}

// News of the studio by name (`job`, `run`, `rows`, `queue`), and of the shell: shown, language, theme, online.
function on(name, listener) {
  const heard = (event) => listener(event.detail);
  window.addEventListener(`studio:${name}`, heard);
  return () => window.removeEventListener(`studio:${name}`, heard);
}

const NEWS = ["job", "run", "gone", "rows", "queue", "asked", "chat", "data"];

// What comes within a moment is told at once: views are then put right once, not for each of ten runs.
const MOMENT_MS = 50;
let untold = [];

function hear(name, data) {
  if (!untold.length) {
    setTimeout(() => {
      const told = untold;
      untold = [];
      told.forEach(([each, text]) => emit(each, JSON.parse(text)));
    }, MOMENT_MS);
  }
  untold.push([name, data]);
}

function listen() {
  const source = new EventSource("/api/events");
  source.addEventListener("hello", () => {
    Alpine.store("ui").online = true;
    emit("online", true); // views load anew: what happened in between was not heard
  });
  for (const name of NEWS) source.addEventListener(name, (event) => hear(name, event.data));
  source.onerror = () => {
    Alpine.store("ui").online = false;
    // A server that answers with an error ends the stream for good; where it only is away the browser asks again.
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  };
}

// attempt(work): what the work gives; an error is told and gives undefined.
async function attempt(work) {
  try {
    return await work();
  } catch (reason) {
    if (reason.name !== "AbortError") Alpine.store("ui").tell(reason.message, "error");
    if (!(reason instanceof ApiFailure) && reason.name !== "AbortError") console.error(reason);
    return undefined;
  }
}

// Requests of one kind, of which the newest counts: ask(work) is `attempt`, but gives undefined, and tells no error, where
// it was asked once more before the answer came. An early answer that comes late then replaces no later one.
function newest() {
  let number = 0;
  return async (work) => {
    const mine = ++number;
    const found = await attempt(() => work().catch((reason) => {
      if (mine === number) throw reason;
    }));
    return mine === number ? found : undefined;
  };
}

// A function that does the work, once more where it was called before that ended: its answer may be older than the call.
function oneByOne(work) {
  let going = null;
  let isAsked = false;
  const whileAsked = async () => {
    while (isAsked) {
      isAsked = false;
      await attempt(work);
    }
  };
  return () => {
    isAsked = true;
    going ??= whileAsked().finally(() => { going = null; });
    return going;
  };
}

// [what the work gives, the news of these names that came before it did]: they may be later than what it tells.
async function withNews(names, work) {
  const news = [];
  const stops = names.map((name) => on(name, (content) => news.push([name, content])));
  try {
    return [await work(), news];
  } finally {
    stops.forEach((stop) => stop());
  }
}

async function text(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.text();
}

async function start() {
  const [found, ...views] = await Promise.all([
    api("GET", "/api/words"),
    ...VIEWS.map((name) => Promise.all([text(`/static/views/${name}.html`), import(`/static/views/${name}.js`)])),
  ]);
  words = found;
  Alpine.store("ui", ui);
  Alpine.store("draft", draft);
  Alpine.magic("t", () => t);
  Alpine.magic("format", () => format);
  Alpine.magic("attempt", () => attempt);
  const studio = { Alpine, api, attempt, newest, oneByOne, withNews, on, t, format, focusFrom, focusOn, tell: (...parts) => Alpine.store("ui").tell(...parts) };
  const main = document.getElementById("main");
  views.forEach(([html, module], at) => {
    const panel = document.createElement("div");
    panel.id = `view-${VIEWS[at]}`;
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", `tab-${VIEWS[at]}`);
    panel.setAttribute("x-show", `$store.ui.tab === '${VIEWS[at]}'`);
    panel.innerHTML = html; // a file of this program
    main.append(panel);
    module.default(studio);
  });
  format.useLanguage(() => Alpine.store("ui").language);
  Alpine.store("ui").setLanguage(Alpine.store("ui").language);
  window.onecard = { studio };
  Alpine.start();
  keepFocus(main);
  document.body.dataset.ready = "yes";
  window.addEventListener("hashchange", () => {
    const name = location.hash.slice(1);
    if (VIEWS.includes(name) && name !== Alpine.store("ui").tab) Alpine.store("ui").show(name);
  });
  emit("shown", Alpine.store("ui").tab);
  listen();
}

start().catch((reason) => {
  const shown = document.createElement("p");
  shown.textContent = `The studio could not be loaded: ${reason.message}`;
  document.body.removeAttribute("x-cloak");
  document.getElementById("main").replaceChildren(shown);
});
