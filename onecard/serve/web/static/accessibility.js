  // For keyboards and screen readers, what gradio leaves out: who speaks, the answer read out once it is whole, a focus
  // that goes on when its button is gone, Escape for Stop, and an Enter of an input method that sends nothing.
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
    const wide = ":is(#oc-chat, .oc-text) :is(table, pre, .katex-display), .oc-text, #oc-beams";
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
