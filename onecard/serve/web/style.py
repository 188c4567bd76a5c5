"""How the pages look: fonts, colours and places.

Rules for the browser only. Knows the ids that app.py gives to its components. It does not know what they do.
"""

from __future__ import annotations

FONTS = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Noto Sans", "PingFang SC", "Noto Sans SC", "sans-serif")
CODE_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

CSS = """
:root { --oc-comment: #24292f; --oc-string: #003d20; --oc-keyword: #003e6b; --oc-number: #5e2600; --oc-name: #431c6b; }
.dark { --oc-comment: #a9b4c2; --oc-string: #a5d6a7; --oc-keyword: #8ecbff; --oc-number: #ffc48a; --oc-name: #d7b5ff; }
.oc-hidden { display: none !important; }
.oc-unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap;
  user-select: none; }
.oc-apart { position: fixed; left: -200vw; width: 100vw; }
:root { --oc-notice: #fff7e6; --oc-notice-text: #7a4a05; --oc-notice-border: #f3d9a4; }
.dark { --oc-notice: #33270f; --oc-notice-text: #f6d9a0; --oc-notice-border: #5c4618; }
.gradio-container { width: 100%; max-width: 1400px !important; margin: 0 auto !important; padding: 0 !important; }
.gradio-container > .main { padding: 12px 24px !important; max-width: none !important; width: 100%; }
.gradio-container .column { flex-wrap: nowrap; gap: 10px; }
footer { display: none !important; }

#oc-head { align-items: center; gap: 8px; flex-wrap: nowrap; }
#oc-title { flex: 0 1 auto !important; width: auto !important; min-width: 0 !important; }
#oc-model { flex: 1 1 0 !important; min-width: 0 !important; color: var(--body-text-color-subdued); font-size: .95rem;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#oc-title h1 { font-size: 1.15rem; font-weight: 650; margin: 0; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
#oc-language { flex: 0 0 112px; min-width: 112px !important; }
#oc-theme { flex: 0 0 auto; min-width: 0 !important; height: 36px; padding: 0 12px; }
#oc-theme::before { content: "\\25D0"; margin-right: 6px; }

#oc-main { height: calc(100vh - 78px); height: calc(100dvh - 78px); }
#oc-main > * { flex: 0 0 auto; }
#oc-stop.hidden, #oc-submit.hidden, #oc-note.hidden { display: none !important; }
#oc-chat { border-radius: 14px; flex: 1 1 0 !important; height: auto !important; min-height: 260px !important; }
#oc-chat .message { overflow-wrap: anywhere; }
.oc-drawn .token { color: var(--body-text-color) !important; }
.oc-drawn .token:is(.comment, .prolog, .doctype, .cdata) { color: var(--oc-comment) !important; }
.oc-drawn .token:is(.string, .char, .attr-value, .regex, .inserted) { color: var(--oc-string) !important; }
.oc-drawn .token:is(.keyword, .tag, .atrule, .selector, .important) { color: var(--oc-keyword) !important; }
.oc-drawn .token:is(.number, .boolean, .constant, .symbol, .deleted) { color: var(--oc-number) !important; }
.oc-drawn .token:is(.function, .class-name, .builtin, .attr-name, .property) { color: var(--oc-name) !important; }
/* Each step of an answer sets `dir` on every row anew: what is not on the screen need not be styled for that. */
#oc-chat .message-row { position: relative; content-visibility: auto; contain-intrinsic-size: auto 90px; }
#oc-chat .message-buttons button, #oc-chat .message-buttons-right button, #oc-chat .message-buttons-left button,
#oc-answer .icon-button-wrapper button { min-width: 24px; min-height: 24px; }
#oc-actions > button { min-height: 30px; }
#oc-side input[type=number], #oc-side input[type=range] { min-height: 24px; }
#oc-side input[type=checkbox] { width: 24px; height: 24px; }
:is(#oc-chat .message, #oc-answer) table { display: block; max-width: 100%; overflow-x: auto; border: 0; }
:is(#oc-chat .message, #oc-answer) :is(th, td) { overflow-wrap: normal; word-break: normal; }
:is(#oc-chat .message, #oc-answer) .katex-display { overflow: auto hidden; padding: 2px 0; }
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
#oc-answer-label .html-container { padding: 0 4px !important; }
#oc-answer-label .oc-label { font-weight: 600; font-size: .86rem; margin: 0; }
#oc-answer { font-size: 1rem; line-height: 1.55; max-height: 60vh; overflow-y: auto; overflow-wrap: anywhere;
  padding: 10px 46px 10px 14px !important; border: 1px solid var(--border-color-primary); border-radius: 12px;
  background: var(--block-background-fill); }
#oc-flagging { align-items: flex-end; gap: 8px; }
#oc-flagging > .form { flex: 1 1 auto; }
#oc-flag { flex: 0 0 110px; min-width: 110px !important; height: 44px; }

#oc-side { position: sticky; top: 8px; max-height: calc(100vh - 78px); overflow-y: auto; padding-right: 6px;
  scrollbar-width: thin; }
#oc-side > * { flex: 0 0 auto; }
#oc-side .gr-accordion { padding: 9px 12px !important; }
#oc-side .label-wrap { min-height: 24px; }
#oc-side .label-wrap > span:first-child { font-weight: 650; }
#oc-side .form { border: 0; box-shadow: none; background: none; gap: 0; overflow: visible; }
#oc-side .form > .block { padding: 8px 0 !important; border: 0; }
#oc-side .form > .block + .block { border-top: 1px solid var(--border-color-primary); border-radius: 0; }
span[data-testid="block-info"] { font-weight: 600; font-size: .86rem; color: var(--body-text-color); }

@media (max-width: 768px) {
  .gradio-container > .main { padding: 8px 10px !important; }
  #oc-title { flex: 1 1 auto !important; }
  #oc-model { display: none; }
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
@media (max-height: 500px) {
  .gradio-container > .main { padding: 4px 10px !important; }
  .gradio-container .column { gap: 6px; }
  #oc-head { min-height: 0; }
  #oc-main { height: calc(100vh - 60px); height: calc(100dvh - 60px); }
  #oc-chat { min-height: 110px !important; }
  #oc-side { max-height: calc(100vh - 60px); overflow-y: auto; position: sticky; }
  #oc-actions { flex-wrap: nowrap; gap: 4px; }
  #oc-actions > button { flex: 1 1 auto; padding: 0 4px; }
  #oc-actions > :is(#oc-submit, #oc-stop) { flex: 0 0 96px; }
}
@media (pointer: coarse) {
  #oc-actions > button, #oc-theme, #oc-reset { min-height: 44px; }
  #oc-chat .message-buttons button, #oc-chat .message-buttons-right button, #oc-chat .message-buttons-left button,
  #oc-answer .icon-button-wrapper button { min-width: 44px; min-height: 44px; }
  #oc-answer { padding-right: 56px !important; }
  #oc-side input[type=number], #oc-side input[type=range], #oc-side .label-wrap { min-height: 44px; }
}
"""
