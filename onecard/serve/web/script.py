"""What the browser does on its own: keeping the chat, saving and loading files, light and dark, and who cannot see.

A script for the browser only. Knows the ids that app.py gives to its components. It does not know what they do.
"""

from __future__ import annotations

import json

from onecard.serve.web.answer import letters
from onecard.serve.web.i18n import word
from onecard.serve.web.sanitize import MARKED
from onecard.serve.web.style import CSS

# Each tab keeps its own chat under its own name, and holds a lock of that name while it is open: a tab that is opened
# anew takes up the newest chat that no open tab holds, and a duplicated tab goes on with a copy.
SCRIPT = """
<script>
window.onecard = (() => {
  const PREFIX = "onecard.chat.", TAB = "onecard.tab", EARLIER = "onecard.earlier", QUESTION = "onecard.question";
  const MOST = 20, LIMIT = __LIMIT__;
  let name = null, memory = {}, ready = false, timer = null, in_tab = false, back = 0, loaded = [];

  const read = (key) => { try { return JSON.parse(localStorage.getItem(key)) || {}; } catch { return {}; } };
  const kept = () => Object.keys(localStorage).filter((key) => key.startsWith(PREFIX))
    .map((key) => [key.slice(PREFIX.length), read(key)])
    .sort((one, other) => (other[1].time || 0) - (one[1].time || 0));
  const has_words = (chat) => String(chat.chat).includes('"role"') || String(chat.box || "").trim();
  const fresh = () => Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");

  const hold = (wanted, patience) => new Promise((resolve) => {
    if (!navigator.locks) return resolve(true);
    const options = patience ? {signal: AbortSignal.timeout(patience)} : {ifAvailable: true};
    navigator.locks.request(PREFIX + wanted, options, (lock) => {
      resolve(lock !== null);
      return lock === null ? undefined : new Promise(() => {});
    }).catch(() => resolve(false));
  });

  const claim = async () => {
    const own = sessionStorage.getItem(TAB);
    const entry = performance.getEntriesByType("navigation")[0];
    if (own && await hold(own, entry && entry.type === "reload" ? 1500 : 0)) return own;
    const name = fresh();
    await hold(name, 0);
    if (own) {
      localStorage.setItem(PREFIX + name, localStorage.getItem(PREFIX + own) || "{}");
      return name;
    }
    for (const [orphan, chat] of navigator.locks ? kept() : []) {
      if (has_words(chat) && await hold(orphan, 0)) return orphan;
    }
    return name;
  };

  const flush = () => {
    clearTimeout(timer);
    timer = null;
    if (ready && in_tab) try { sessionStorage.setItem(QUESTION, JSON.stringify(memory)); } catch {}
    if (!ready || name === null) return;
    const text = JSON.stringify({...memory, time: Date.now()});
    const others = kept().filter(([other]) => other !== name).reverse();
    while (others.length >= MOST) localStorage.removeItem(PREFIX + others.shift()[0]);
    for (;;) {
      try { return localStorage.setItem(PREFIX + name, text); }
      catch { if (!others.length) return; localStorage.removeItem(PREFIX + others.shift()[0]); }
    }
  };

  const paint = (dark) => document.body.classList.toggle("dark", dark);

  const appearance = () => {
    const theme = localStorage.getItem("onecard.theme");
    if (theme) paint(theme === "dark");
  };

  addEventListener("pagehide", flush);

  // The invisible spaces of sanitize.py are not copied, and of a drawn formula what was written.
  const written = (text) => text.replace(/__MARKED__/g, (mark, sign) => sign || "");
  const unformulate = (part) => {
    for (const formula of part.querySelectorAll(".katex")) {
      const mark = formula.closest(".katex-display") ? "$$" : "$";
      formula.replaceWith(mark + formula.querySelector("annotation").textContent + mark);
    }
  };
  const selected = () => {
    const selection = getSelection();
    if (!selection.rangeCount) return "";
    const part = document.createElement("div");
    part.append(selection.getRangeAt(0).cloneContents());
    if (!part.querySelector(".katex annotation")) return String(selection);
    unformulate(part);
    part.className = "oc-apart";
    document.body.append(part);
    const text = part.innerText;
    part.remove();
    return text;
  };
  addEventListener("copy", (event) => {
    const text = written(selected());
    if (text === String(getSelection())) return;
    event.clipboardData.setData("text/plain", text);
    event.preventDefault();
  });
  __HELP__
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(written(text));
  }

  const numbered = (line) => [Number(line.split(" ", 1)[0]), line.slice(line.indexOf(" ") + 1)];
  // Whether these texts may be replaced: blank and known ones at once, others when the person says so.
  const agree = (typed, known) => {
    const lost = typed.filter((text) => text && text.trim() && ![...known, ...loaded].includes(text));
    return !lost.length || confirm([terms().replace, ...lost.map((text) => text.slice(0, 300))].join("\\n\\n"));
  };
  const settings_in = (file) => {
    try {
      const chat = JSON.parse(file), stop = (chat.sampling || {}).stop || [];
      return [chat.system, stop.map((text) => text.replaceAll("\\n", "\\\\n")).join("\\n")];
    } catch { return []; }
  };

  return {
    agree: (typed, known) => agree(typed, known) ? "yes" : "",
    // For a page without a chat: what was typed stays in this tab.
    look: () => {
      appearance();
      in_tab = true;
      try { memory = JSON.parse(sessionStorage.getItem(QUESTION)) || {}; } catch {}
      const language = localStorage.getItem("onecard.language");
      return [JSON.stringify({...memory, language}), navigator.language || "en"];
    },
    open: async () => {
      appearance();
      try {
        name = await claim();
        sessionStorage.setItem(TAB, name);
        memory = read(PREFIX + name);
      } catch { name = name || "only"; }
      const language = localStorage.getItem("onecard.language");
      const earlier = sessionStorage.getItem(EARLIER) || "";
      return [JSON.stringify({...memory, earlier, language}), navigator.language || "en"];
    },
    opened: (language) => {
      document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
      ready = true;
    },
    is_ready: () => ready,
    keep: (part) => {
      Object.assign(memory, part);
      timer = timer || setTimeout(flush, 150);
    },
    // What Undo can bring back goes with the tab: a chat that was cleared does not stay on the machine.
    keep_earlier: (earlier) => { try { sessionStorage.setItem(EARLIER, earlier); } catch {} },
    taken: (sent, box) => {
      const [number, text] = numbered(sent);
      return box === text && number > back ? "" : box;
    },
    // What comes back to the box stands before what was typed there meanwhile.
    returned: (line, box) => {
      const [number, text] = numbered(line);
      back = number;
      return !box.trim() ? text : !text.trim() || box.startsWith(text) ? box : text + "\\n\\n" + box;
    },
    speak: (language) => {
      localStorage.setItem("onecard.language", language);
      document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
    },
    theme: () => {
      paint(!document.body.classList.contains("dark"));
      localStorage.setItem("onecard.theme", document.body.classList.contains("dark") ? "dark" : "light");
    },
    download: (content) => {
      if (!content) return;
      const file = JSON.parse(content), link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([file.text], {type: "application/json"}));
      link.download = file.name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    },
    pick: (typed, start) => new Promise((resolve) => {
      const input = document.createElement("input");
      input.type = "file";
      input.accept = ".json,application/json";
      input.oncancel = () => resolve("");
      input.onchange = async () => {
        const file = input.files[0];
        if (!file || file.size > LIMIT) return resolve(file ? "too large" : "");
        const text = await file.text(), inside = settings_in(text);
        if (inside.length && !agree(typed, [...start, ...inside])) return resolve("");
        loaded = inside;
        resolve(text);
      };
      input.click();
    }),
  };
})();
</script>
"""
# For keyboards and screen readers, what gradio leaves out: who speaks, the answer read out once it is whole, a focus
# that goes on when its button is gone, Escape for Stop, and an Enter of an input method that sends nothing.
HELP = """
  const terms = () => JSON.parse(document.querySelector("#oc-terms [data-terms]")?.dataset.terms || "null");
  const find = (selector) => document.querySelector(selector);
  const set = (part, name, value) => { if (part && part.getAttribute(name) !== value) part.setAttribute(name, value); };
  const seen = (id) => { const part = find(id); return part && part.offsetParent ? part : null; };
  let last = null, busy = false, noted = "", waiting = false;

  const speakers = (words) => {
    const log = find("#oc-chat [role=log]");
    set(log, "aria-label", words.chat);
    set(log, "aria-live", "off");
    for (const row of document.querySelectorAll("#oc-chat .message-row")) {
      const name = (row.querySelector(".message.user, .user.message") ? words.you : words.model) + ":";
      let mark = row.querySelector(":scope > .oc-unseen");
      if (!mark) row.prepend(mark = Object.assign(document.createElement("span"), {className: "oc-unseen"}));
      if (mark.textContent !== name) mark.textContent = name;
      set(row.querySelector("[data-testid=user], [data-testid=bot]"), "aria-label", name);
    }
    for (const name of ["title", "aria-label"]) set(find("#oc-answer .top-panel button"), name, words.copy);
    const wide = ":is(#oc-chat, #oc-answer) :is(table, pre, .katex-display), #oc-answer, #oc-beams";
    for (const part of document.querySelectorAll(wide)) {
      // Of what is not on the screen, the size would have to be found out first.
      if (part.checkVisibility && !part.checkVisibility({contentVisibilityAuto: true})) continue;
      const scrolls = part.scrollWidth > part.clientWidth || part.scrollHeight > part.clientHeight;
      if (scrolls) set(part, "tabindex", "0");
    }
  };

  const announce = (words) => {
    let live = find("#oc-live");
    if (!live) {
      live = Object.assign(document.createElement("div"), {id: "oc-live", className: "oc-unseen"});
      set(live, "role", "status");
      set(live, "aria-live", "polite");
      document.body.append(live);
    }
    const note = (seen("#oc-note") || {innerText: ""}).innerText.trim(), said = [];
    if (note && note !== noted) said.push(note);
    noted = note;
    const works = seen("#oc-stop") !== null;
    if (works && !busy) said.push(words.working);
    if (busy && !works) {
      const answers = document.querySelectorAll("#oc-chat .bot.message, #oc-answer [data-testid=markdown]");
      const answer = answers.length ? answers[answers.length - 1].cloneNode(true) : document.createElement("div");
      unformulate(answer);
      said.push(words.model + ": " + answer.textContent.trim());
    }
    busy = works;
    if (said.length) live.textContent = written(said.join(" "));
  };

  const refocus = () => {
    if (!last || document.activeElement !== document.body || !last.isConnected) return;
    if (!last.disabled && last.offsetParent) return;
    const next = seen("#oc-stop") || seen("#oc-submit");
    if (next) next.focus();
  };

  const gone = (words) => {
    for (const toast of document.querySelectorAll("[data-testid=toast-body]")) {
      const texts = document.createTreeWalker(toast, NodeFilter.SHOW_TEXT);
      for (let text = texts.nextNode(); text; text = texts.nextNode()) {
        const own = words.gradio[text.data.trim()];
        if (own && own !== text.data) text.data = own;
      }
    }
  };

  const look_after = () => {
    waiting = false;
    const words = terms();
    if (!words) return;
    speakers(words);
    announce(words);
    refocus();
    gone(words);
    // A list that holds buttons and no items is no list.
    for (const list of document.querySelectorAll("#oc-chat .examples[role=list]")) set(list, "role", "group");
  };
  const notice = () => {
    if (!waiting) setTimeout(look_after, 50);
    waiting = true;
  };
  addEventListener("contentvisibilityautostatechange", notice, true);
  // A box that grows while somebody types changes nothing of this.
  new MutationObserver((all) => all.some((one) => one.target.nodeName !== "TEXTAREA") && notice()).observe(
    document.documentElement, {subtree: true, childList: true, characterData: true, attributes: true});

  // A dropped file would open in the place of the page.
  for (const name of ["dragover", "drop"]) {
    addEventListener(name, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.dataTransfer.dropEffect = "none";
      event.preventDefault();
    });
  }
  addEventListener("focusin", (event) => { last = event.target; });
  addEventListener("pointerdown", (event) => {
    if (!event.target.closest("button, input, textarea, a, label, [tabindex]")) last = null;
  });
  let composing = false;
  addEventListener("keydown", (event) => {
    composing = event.isComposing || event.keyCode === 229;
    const elsewhere = find("ul[role=listbox]") || event.target.closest?.(".edit-textarea");
    if (event.key === "Escape" && !composing && !elsewhere) seen("#oc-stop")?.click();
  }, true);
  addEventListener("keypress", (event) => {
    if (event.key === "Enter" && (composing || event.isComposing)) event.stopImmediatePropagation();
  }, true);
"""
TOO_LARGE = "too large"


def head(max_chat_bytes: int) -> str:
    """Style and script for the page's head; a file of more than `max_chat_bytes` is not read.

    Not through gradio's `css=`: it would give the rules for narrow pages another weight than those they overrule.
    """
    script = SCRIPT
    for place, text in (("HELP", HELP), ("LIMIT", str(max_chat_bytes)), ("MARKED", MARKED.pattern)):
        script = script.replace(f"__{place}__", text)
    return f"<style>{CSS}</style>" + script


def script_terms(language: str) -> str:
    """The words that the script needs, for a hidden place on the page."""
    names = ("you", "model", "chat", "working", "replace", "copy")
    terms: dict[str, object] = {name: word(language, f"script.{name}") for name in names}
    # What gradio says in English whatever the language.
    terms["gradio"] = {
        "Connection Lost": word(language, "script.gone"),
        "Connection to the server was lost. Attempting reconnection...": word(language, "script.reconnecting"),
        "Connection errored out.": word(language, "script.gone"),
    }
    return f'<span data-terms="{letters(json.dumps(terms))}"></span>'
