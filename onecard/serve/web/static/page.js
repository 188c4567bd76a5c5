// Each tab keeps its own chat under its own name, and holds a lock of that name while it is open: a tab that is opened
// anew takes up the newest chat that no open tab holds, and a duplicated tab goes on with a copy.
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

  // What was typed or chosen before the page was restored is not lost to the values that come then.
  const early = new Map();
  addEventListener("input", ({target}) => {
    early.delete(target); // the newest last: of several radio buttons it wins
    if (!ready) early.set(target, [target.value, target.checked]);
  }, true);
  const retype = () => {
    for (const [field, [value, checked]] of early) {
      if (field.checked !== checked) field.click();
      // A question that comes back is put in front of what was typed; a number is not.
      if (["number", "range"].includes(field.type) ? field.value === value : field.value.endsWith(value)) continue;
      field.value = value;
      for (const name of ["input", "change"]) field.dispatchEvent(new Event(name, {bubbles: true}));
    }
    early.clear();
  };

  // Keys of the page for blind votes: the button of the id oc-key-1 is pressed by 1.
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
    if (event.target.closest("input, textarea, select, [contenteditable]")) return;
    const button = document.getElementById("oc-key-" + event.key.toLowerCase());
    if (button && button.offsetParent && !button.disabled) button.click();
  });

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
    return !lost.length || confirm([terms().replace, ...lost.map((text) => text.slice(0, 300))].join("\n\n"));
  };
  const settings_in = (file) => {
    try {
      const chat = JSON.parse(file), stop = (chat.sampling || {}).stop || [];
      return [chat.system, stop.map((text) => text.replaceAll("\n", "\\n")).join("\n")];
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
      requestAnimationFrame(() => requestAnimationFrame(retype)); // once gradio has drawn what it was given
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
      return !box.trim() ? text : !text.trim() || box.startsWith(text) ? box : text + "\n\n" + box;
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
