"""How the pages look, and what the browser does on its own: keeping the chat, saving and loading files, light and dark.

Texts for the browser only. Knows the ids that web.py gives to its components. It does not know what they do.
"""

from __future__ import annotations

from onecard.talk.page_text import MARKED

FONTS = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Noto Sans", "PingFang SC", "Noto Sans SC", "sans-serif")
CODE_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

CSS = """
.oc-hidden { display: none !important; }
.oc-apart { position: fixed; left: -200vw; width: 100vw; }
:root { --oc-notice: #fff7e6; --oc-notice-text: #7a4a05; --oc-notice-border: #f3d9a4; }
.dark { --oc-notice: #33270f; --oc-notice-text: #f6d9a0; --oc-notice-border: #5c4618; }
.gradio-container { width: 100%; max-width: 1400px !important; margin: 0 auto !important; padding: 0 !important; }
.gradio-container > .main { padding: 12px 24px !important; max-width: none !important; width: 100%; }
.gradio-container .column { flex-wrap: nowrap; gap: 10px; }
footer { display: none !important; }

#oc-head { align-items: center; gap: 8px; flex-wrap: nowrap; }
#oc-title { flex: 1 1 auto; min-width: 0; }
#oc-title h1 { font-size: 1.15rem; font-weight: 650; margin: 0; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
#oc-title .oc-model { font-weight: 400; color: var(--body-text-color-subdued); margin-left: .6em; font-size: .95rem; }
#oc-language { flex: 0 0 112px; min-width: 112px !important; }
#oc-theme { flex: 0 0 auto; min-width: 0 !important; height: 36px; padding: 0 12px; }
#oc-theme::before { content: "\\25D0"; margin-right: 6px; }

#oc-main { height: calc(100vh - 78px); height: calc(100dvh - 78px); }
#oc-main > * { flex: 0 0 auto; }
#oc-stop.hidden, #oc-submit.hidden, #oc-note.hidden { display: none !important; }
#oc-chat { border-radius: 14px; flex: 1 1 0 !important; height: auto !important; min-height: 260px !important; }
#oc-chat .message { overflow-wrap: anywhere; }
#oc-chat .message table { display: block; max-width: 100%; overflow-x: auto; }
#oc-chat .message :is(th, td) { overflow-wrap: normal; word-break: normal; }
#oc-chat .message .katex-display { overflow: auto hidden; padding: 2px 0; }
#oc-chat .edit-textarea { width: min(70vw, 480px) !important; min-height: 3.4em !important; }
#oc-chat .top-panel { display: none; }
#oc-status, #oc-note, #oc-status .html-container, #oc-note .html-container { padding: 0 !important; min-height: 0; }
#oc-status .oc-line { font-size: .8rem; line-height: 1.4em; min-height: 1.4em; padding: 0 4px;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
#oc-note .oc-notice { font-size: .88rem; line-height: 1.45; padding: 8px 13px; border-radius: 10px;
  background: var(--oc-notice); color: var(--oc-notice-text); border: 1px solid var(--oc-notice-border);
  overflow-wrap: anywhere; }
#oc-beams { max-height: max(34vh, 150px); overflow-y: auto; gap: 6px; }
#oc-beams .form { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
  flex: 0 0 auto; height: auto; overflow: visible; }

#oc-ask { align-items: flex-end; gap: 8px; flex-wrap: nowrap; }
#oc-ask > .form, #oc-ask > .block { flex: 1 1 auto; min-width: 0 !important; border-radius: 12px; }
#oc-box textarea { min-height: 44px; padding: 11px 14px; border-radius: 12px; }
#oc-submit, #oc-stop { flex: 0 0 96px; min-width: 96px !important; height: 44px; border-radius: 12px; }
#oc-actions { gap: 8px; flex-wrap: wrap; }
#oc-actions > button { flex: 1 1 auto; min-width: 0 !important; }
#oc-answer textarea { font-size: 1rem; line-height: 1.55; }
#oc-flagging { align-items: flex-end; gap: 8px; }
#oc-flagging > .form { flex: 1 1 auto; }
#oc-flag { flex: 0 0 110px; min-width: 110px !important; height: 44px; }

#oc-side { position: sticky; top: 8px; max-height: calc(100vh - 78px); overflow-y: auto; padding-right: 6px;
  scrollbar-width: thin; }
#oc-side > * { flex: 0 0 auto; }
#oc-side .gr-accordion { padding: 9px 12px !important; }
#oc-side .label-wrap > span:first-child { font-weight: 650; }
#oc-side .form { border: 0; box-shadow: none; background: none; gap: 0; overflow: visible; }
#oc-side .form > .block { padding: 8px 0 !important; border: 0; }
#oc-side .form > .block + .block { border-top: 1px solid var(--border-color-primary); border-radius: 0; }
span[data-testid="block-info"] { font-weight: 600; font-size: .86rem; color: var(--body-text-color); }

@media (max-width: 768px) {
  .gradio-container > .main { padding: 8px 10px !important; }
  #oc-title .oc-model { display: none; }
  #oc-main { height: calc(100vh - 66px); height: calc(100dvh - 66px); }
  #oc-language { flex-basis: 104px; min-width: 104px !important; }
  #oc-theme { flex-basis: 40px; width: 40px; padding: 0; font-size: 0; }
  #oc-theme::before { font-size: 1rem; margin: 0; }
  #oc-side { position: static; max-height: none; overflow: visible; padding: 0; }
  #oc-submit, #oc-stop { flex-basis: 74px; min-width: 74px !important; }
  #oc-actions > button { flex: 1 1 28%; }
  textarea, input { font-size: 16px !important; }
  #oc-language input { font-size: 14px !important; }
}
"""

# Each tab keeps its own chat under its own name, and holds a lock of that name while it is open: a tab that is opened
# anew takes up the newest chat that no open tab holds, and a duplicated tab goes on with a copy.
SCRIPT = """
<script>
window.onecard = (() => {
  const PREFIX = "onecard.chat.", TAB = "onecard.tab", EARLIER = "onecard.earlier", MOST = 20, LIMIT = __LIMIT__;
  let name = null, memory = {}, ready = false, timer = null;

  const read = (key) => { try { return JSON.parse(localStorage.getItem(key)) || {}; } catch { return {}; } };
  const kept = () => Object.keys(localStorage).filter((key) => key.startsWith(PREFIX))
    .map((key) => [key.slice(PREFIX.length), read(key)])
    .sort((one, other) => (other[1].time || 0) - (one[1].time || 0));
  const has_words = (chat) => typeof chat.chat === "string" && chat.chat.includes('"role"');
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

  // The invisible spaces of page_text.py are not copied, and of a drawn formula what was written.
  const written = (text) => text.replace(/__MARKED__/g, (mark, sign) => sign || "");
  const selected = () => {
    const selection = getSelection();
    if (!selection.rangeCount) return "";
    const part = document.createElement("div");
    part.append(selection.getRangeAt(0).cloneContents());
    if (!part.querySelector(".katex annotation")) return String(selection);
    for (const formula of part.querySelectorAll(".katex")) {
      const mark = formula.closest(".katex-display") ? "$$" : "$";
      formula.replaceWith(mark + formula.querySelector("annotation").textContent + mark);
    }
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
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(written(text));
  }

  return {
    // For a page that keeps nothing but language and theme.
    look: () => {
      appearance();
      return [JSON.stringify({language: localStorage.getItem("onecard.language")}), navigator.language || "en"];
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
    opened: () => { ready = true; },
    is_ready: () => ready,
    keep: (part) => {
      Object.assign(memory, part);
      timer = timer || setTimeout(flush, 150);
    },
    // What Undo can bring back goes with the tab: a chat that was cleared does not stay on the machine.
    keep_earlier: (earlier) => { try { sessionStorage.setItem(EARLIER, earlier); } catch {} },
    taken: (sent, box) => box === sent.slice(sent.indexOf(" ") + 1) ? "" : box,
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
    pick: () => new Promise((resolve) => {
      const input = document.createElement("input");
      input.type = "file";
      input.accept = ".json,application/json";
      input.oncancel = () => resolve("");
      input.onchange = async () => {
        const file = input.files[0];
        resolve(!file ? "" : file.size > LIMIT ? "too large" : await file.text());
      };
      input.click();
    }),
  };
})();
</script>
"""
TOO_LARGE = "too large"


def head(max_chat_bytes: int) -> str:
    """Style and script for the page's head; a file of more than `max_chat_bytes` is not read.

    Not through gradio's `css=`: it would give the rules for narrow pages another weight than those they overrule.
    """
    script = SCRIPT.replace("__LIMIT__", str(max_chat_bytes)).replace("__MARKED__", MARKED.pattern)
    return f"<style>{CSS}</style>" + script
