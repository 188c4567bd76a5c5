"""The pages in the browser: the components there are, and the server that hands them out.

The only file that knows gradio. What stands behind a button is in events.py, chat.py and ask.py, the
words, style and scripts in static/; who may come in, in security.py and browsers.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.middleware import Middleware

from onecard.config.inference import DOCUMENTS_MODEL, PageOptions, SamplingOptions
from onecard.inference.engine import InferenceEngine
from onecard.serve.web.answer import as_html
from onecard.serve.web.ask import FLAG_FILE, AskPage
from onecard.serve.web.blind import PLACES, BlindWiring
from onecard.serve.web.browsers import SessionGuard, SessionRegistry
from onecard.serve.web.chat import ChatPage
from onecard.serve.web.events import (
    HIDDEN,
    AskWiring,
    Change,
    ChatWiring,
    GradioHooks,
    TranslatedComponents,
    Words,
    has_thought_switch,
    prompt_choices,
    repeating,
)
from onecard.serve.web.examples import examples_in
from onecard.serve.web.i18n import LANGUAGES, word
from onecard.serve.web.sanitize import FORMULAS
from onecard.serve.web.script import head, script_terms
from onecard.serve.web.server import serve_page
from onecard.serve.web.settings import NAMES, THINKING, SettingsReader
from onecard.serve.web.votes import BlindVotes

FONTS = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Noto Sans", "PingFang SC", "Noto Sans SC", "sans-serif")
CODE_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
MAX_GRADIO_QUEUE = 1000  # steps of all pages together; the answers have the engine's own queue


@dataclass(frozen=True)
class WebPage:
    """A page, and who has it open."""

    blocks: gr.Blocks
    presence: SessionRegistry


def chat_page(
    engine: InferenceEngine, sampling: SamplingOptions, page: PageOptions, *, system: str = "",
    show_beams: bool = False, examples: Sequence[str] = (),
) -> WebPage:  # fmt: skip
    """The chat. `sampling`, `system`, `show_beams`: what each browser begins with; `examples`: first messages."""
    handlers = ChatPage(engine, system, sampling, show_beams=show_beams)
    labels = TranslatedComponents(_first_language(page))
    with gr.Blocks(title="OneCard", analytics_enabled=False) as blocks:
        names = ("chat", "partial", "earlier", "sent", "returned", "stored", "browser_language", "file")
        parts: dict[str, Any] = {name: _hidden(name) for name in names}
        parts["known"] = list(examples)
        parts["tries"] = gr.Number(0, elem_classes="oc-hidden", container=False)
        parts |= _header(labels, engine.names[0], "chat.title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320, elem_id="oc-main"):
                parts |= _conversation(labels, examples) | _lines() | _beam_boxes(labels, engine)
                parts |= _message_row(labels) | _chat_buttons(labels)
            with gr.Column(scale=1, min_width=300, elem_id="oc-side"):
                parts |= _settings(labels, handlers.reader, engine)
        wiring = ChatWiring(handlers, parts, labels, page.language, GradioHooks(_on, _tell))
        wiring.connect(blocks)
    return WebPage(_queued(blocks), wiring.presence)


def ask_page(
    engine: InferenceEngine, sampling: SamplingOptions, page: PageOptions, *, system: str = "",
    show_beams: bool = False, examples: Sequence[Sequence[str]] = (), flag_path: Path = Path(FLAG_FILE),
) -> WebPage:  # fmt: skip
    """Single questions. `examples` are [instruction, input]; flagged answers are appended to `flag_path`."""
    handlers = AskPage(engine, system, sampling, show_beams=show_beams, flag_path=flag_path)
    labels = TranslatedComponents(_first_language(page))
    with gr.Blocks(title="OneCard", analytics_enabled=False) as blocks:
        parts: dict[str, Any] = {name: _hidden(name) for name in ("stored", "browser_language")}
        parts |= _header(labels, engine.names[0], "ask.title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                parts |= _question(labels)
                parts["answer"] = _markdown(labels, "answer", "oc-answer", buttons=["copy"], min_height=112)
                parts |= _lines() | _beam_boxes(labels, engine) | _flag(labels)
                parts |= _examples(labels, parts, examples) if examples else {}
                parts["known"] = [text for pair in examples for text in pair]
            with gr.Column(scale=1, min_width=300, elem_id="oc-side"):
                parts |= _settings(labels, handlers.reader, engine)
        wiring = AskWiring(handlers, parts, labels, page.language, GradioHooks(_on, _tell))
        wiring.connect(blocks)
    return WebPage(_queued(blocks), wiring.presence)


def blind_page(votes: BlindVotes, page: PageOptions) -> WebPage:
    """Two answers to each question, to choose between without knowing whose they are."""
    labels = TranslatedComponents(_first_language(page))
    with gr.Blocks(title="OneCard", analytics_enabled=False) as blocks:
        parts: dict[str, Any] = {name: _hidden(name) for name in ("stored", "browser_language", "pair")}
        parts |= _header(labels, "", "blind.title") | _lines() | _pair(labels)
        wiring = BlindWiring(votes, parts, labels, page.language, GradioHooks(_on, _tell))
        wiring.connect(blocks)
    return WebPage(_queued(blocks), wiring.presence)


def launch(web_page: WebPage, page: PageOptions, *, max_body_bytes: int = 2_000_000) -> None:
    """Serve the page by itself until Ctrl-C. Raises ConfigError when the address cannot be listened on."""
    # A step sends the chat and its newest answer, as JSON in JSON: what is loaded must leave room for that.
    mounting = partial(mount, web_page=web_page, auth=page.auth, max_chat_bytes=max_body_bytes // 3)
    serve_page(mounting, page, max_body_bytes=max_body_bytes, public_link=public_link)


def mount(app: FastAPI, web_page: WebPage, *, auth: str | None = None, max_chat_bytes: int = 1_000_000) -> None:
    """Serve the page at `/` of `app`, behind the app's own routes. `auth` is USER:PASSWORD.

    The app's layers (`security.Protection`) are the caller's; the page's own guard is set here.
    """
    user, _, password = (auth or "").partition(":")
    closed = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", radius_size="lg", font=FONTS, font_mono=CODE_FONTS)
    # Each colour of words has a contrast of 4.5 or more on what it stands on.
    theme.set(
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_800",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_600", input_placeholder_color_dark="*neutral_300",
    )  # fmt: skip
    gr.mount_gradio_app(
        app, web_page.blocks, path="/", auth=(user, password) if auth else None,
        app_kwargs={"middleware": [Middleware(SessionGuard, presence=web_page.presence)], **closed},
        allowed_paths=[], blocked_paths=["/"], show_error=False, max_file_size=1, footer_links=[], run_history=False,
        enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
        theme=theme, head=head(max_chat_bytes),
    )  # fmt: skip


def public_link(host: str, port: int, token: str) -> str:
    """The address of a tunnel from gradio's servers to this port. Raises RuntimeError where there is none to be had."""
    return gr.networking.setup_tunnel(host, port, token, None, None)


def _header(labels: TranslatedComponents, model: str, title: str) -> dict[str, Any]:
    with gr.Row(elem_id="oc-head"):
        labels(gr.HTML, {"value": lambda language: f"<h1>{word(language, title)}</h1>"}, elem_id="oc-title")
        shown_model = gr.HTML(as_html(model, "oc-model"), elem_id="oc-model")
        labels(gr.HTML, {"value": script_terms}, elem_id="oc-terms", elem_classes="oc-hidden")
        choices = [(shown, code) for code, shown in LANGUAGES.items()]
        language = gr.Dropdown(
            choices, value=labels.language, container=False, filterable=False, elem_id="oc-language",
            label=word(labels.language, "language"), interactive=True,
        )  # fmt: skip
        theme = labels(gr.Button, {"value": "theme"}, size="sm", elem_id="oc-theme", scale=0)
    return {"language": language, "theme": theme, "model": shown_model}


def _conversation(labels: TranslatedComponents, examples: Sequence[str]) -> dict[str, Any]:
    def first_words(language: str) -> Any:
        return [{"text": text} for text in examples_in(examples, language)] or None

    chatbot = labels(
        gr.Chatbot, {"placeholder": "chat.empty", "examples": first_words}, elem_id="oc-chat", show_label=False,
        editable="user", height=520, sanitize_html=True, allow_tags=False, render_markdown=True, buttons=["copy"],
        latex_delimiters=list(FORMULAS), feedback_options=None, allow_file_downloads=False, layout="bubble",
        group_consecutive_messages=False, elem_classes="oc-drawn",
    )  # fmt: skip
    return {"chatbot": chatbot}


def _lines() -> dict[str, Any]:
    status = gr.HTML(as_html(" ", "oc-line"), elem_id="oc-status")
    return {"status": status, "note": gr.HTML(visible=HIDDEN, elem_id="oc-note")}


def _beam_boxes(labels: TranslatedComponents, engine: InferenceEngine) -> dict[str, Any]:
    with gr.Column(visible=False, elem_id="oc-beams") as column:
        boxes = [
            labels(
                gr.Textbox, {"label": partial(word, key="beam", n=k + 1)}, visible=False, interactive=False, lines=1,
                max_lines=6,
            )
            for k in range(engine.limits.max_beams)
        ]  # fmt: skip
    return {"beams": column, "beam_boxes": boxes}


def _message_row(labels: TranslatedComponents) -> dict[str, Any]:
    with gr.Row(elem_id="oc-ask"):
        box = labels(
            gr.Textbox, {"placeholder": "box.hint", "label": "box"}, container=False, show_label=False, lines=1,
            max_lines=8, autofocus=True, elem_id="oc-box",
        )  # fmt: skip
        return {"box": box} | _submit_and_stop(labels, "submit")


def _submit_and_stop(labels: TranslatedComponents, submit: str) -> dict[str, Any]:
    return {
        "submit": labels(gr.Button, {"value": submit}, variant="primary", elem_id="oc-submit", scale=0),
        "stop": labels(gr.Button, {"value": "stop"}, variant="stop", visible=HIDDEN, elem_id="oc-stop", scale=0),
    }


def _chat_buttons(labels: TranslatedComponents) -> dict[str, Any]:
    with gr.Row(elem_id="oc-actions"):
        return {
            name: labels(gr.Button, {"value": name}, size="sm", elem_id=f"oc-{name}")
            for name in ("regenerate", "undo", "clear", "save", "load")
        }


def _question(labels: TranslatedComponents) -> dict[str, Any]:
    fields = {
        name: labels(
            gr.Textbox, {"label": name, "placeholder": f"{name}.hint"}, lines=2, max_lines=12, elem_id=f"oc-{name}"
        )
        for name in ("instruction", "input")
    }
    with gr.Row(elem_id="oc-actions"):
        return fields | _submit_and_stop(labels, "ask")


def _markdown(labels: TranslatedComponents, key: str, elem_id: str, **more: Any) -> gr.Markdown:
    """A place for a text of a person or a model, with a heading."""
    heading = {"value": lambda language: f'<h2 class="oc-label">{word(language, key)}</h2>'}
    labels(gr.HTML, heading, elem_id=f"{elem_id}-label", elem_classes="oc-heading")
    return gr.Markdown(
        elem_id=elem_id, elem_classes=["oc-drawn", "oc-text"], container=True, latex_delimiters=list(FORMULAS),
        sanitize_html=True, **more,
    )  # fmt: skip


def _pair(labels: TranslatedComponents) -> dict[str, Any]:
    parts: dict[str, Any] = {"question": _markdown(labels, "blind.question", "oc-question")}
    with gr.Row(elem_id="oc-pair") as parts["answers"]:
        for place, key in ((1, "blind.first"), (2, "blind.second")):
            with gr.Column(min_width=280):
                parts[f"answer_{place}"] = _markdown(labels, key, f"oc-answer-{place}", min_height=112)
    with gr.Row(elem_id="oc-votes") as parts["votes"]:
        for place in PLACES:
            words = {"value": f"blind.vote_{place}"}
            parts[f"vote_{place}"] = labels(gr.Button, words, variant="primary", elem_id=f"oc-key-{place}")
    parts["result"] = gr.HTML(visible=HIDDEN, elem_id="oc-result")
    with gr.Row(elem_id="oc-actions"):
        parts["undo"] = labels(gr.Button, {"value": "blind.undo"}, size="sm", elem_id="oc-key-u")
        parts["reveal"] = labels(gr.Button, {"value": "blind.reveal"}, size="sm", elem_id="oc-reveal")
    return parts


def _examples(labels: TranslatedComponents, parts: dict[str, Any], examples: Sequence[Sequence[str]]) -> dict[str, Any]:
    # Not gr.Examples: it calls the server past the queue, which the session guard refuses.
    fields = [parts["instruction"], parts["input"]]
    samples = {"samples": lambda language: [list(pair) for pair in examples_in(examples, language)]}
    headers = {"headers": lambda language: [word(language, name) for name in ("instruction", "input")]}
    words: dict[str, Any] = {"label": "examples", **headers, **samples}
    return {"examples": labels(gr.Dataset, words, components=fields, elem_id="oc-examples")}


def _flag(labels: TranslatedComponents) -> dict[str, Any]:
    with gr.Row(elem_id="oc-flagging"):
        words = {"label": "comment", "placeholder": "comment.hint", "info": "flag.help"}
        comment = labels(gr.Textbox, words, lines=1, max_lines=4, elem_id="oc-comment")
        return {"comment": comment, "flag": labels(gr.Button, {"value": "flag"}, scale=0, elem_id="oc-flag")}


def _settings(labels: TranslatedComponents, reader: SettingsReader, engine: InferenceEngine) -> dict[str, Any]:
    start = dict(zip(NAMES, reader.start.values(), strict=True))

    def setting(kind: Any, name: str, more: dict[str, Words] | None = None, **arguments: Any) -> Any:
        words: dict[str, str | Words] = {"label": name, "info": f"{name}.help", **(more or {})}
        return labels(kind, words, value=start[name], interactive=True, elem_id=f"oc-{name}", **arguments)

    def numbers(*names: str) -> dict[str, Any]:
        bounds = {name: reader.bounds[name] for name in names}
        return {
            name: setting(gr.Slider, name, minimum=b.least, maximum=b.most, step=b.step, buttons=[])
            for name, b in bounds.items()
        }

    parts: dict[str, Any] = {}
    with labels(gr.Accordion, {"label": "part.model"}, open=True):
        # Any choice, also one that a server before this one offered: settings.py says what is wrong with it.
        listed: dict[str, Any] = {"filterable": False, "allow_custom_value": True}
        parts["adapter"] = setting(gr.Dropdown, "adapter", choices=list(engine.names), **listed)
        if engine.has(DOCUMENTS_MODEL):
            words: dict[str, str | Words] = {"label": "documents", "info": "documents.help"}
            parts["documents"] = labels(gr.Checkbox, words, elem_id="oc-documents")
        choices = prompt_choices(engine, reader.start.adapter, labels.language)
        parts["prompt_type"] = setting(gr.Dropdown, "prompt_type", choices=choices, **listed)
        parts["system"] = setting(gr.Textbox, "system", lines=2, max_lines=8)
        choices_of_thinking = {"choices": lambda language: [(word(language, f"thinking.{v}"), v) for v in THINKING]}
        shown = has_thought_switch(engine, reader.start.adapter, reader.start.prompt_type) or HIDDEN
        parts["thinking"] = setting(gr.Radio, "thinking", choices_of_thinking, visible=shown)
    with labels(gr.Accordion, {"label": "part.sampling"}, open=True):
        parts |= numbers("temperature", "top_p", "top_k", "num_beams")
        parts["show_beams"] = setting(gr.Checkbox, "show_beams")
        # Without bounds: gradio would refuse a number outside of them in words that say nothing.
        parts["seed"] = setting(gr.Number, "seed")
    with labels(gr.Accordion, {"label": "part.length"}, open=True):
        parts |= numbers("max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size")
        parts["stop_texts"] = setting(gr.Textbox, "stop_texts", lines=1, max_lines=6)
    parts["reset"] = labels(gr.Button, {"value": "reset"}, size="sm", elem_id="oc-reset")
    return parts


def _hidden(name: str) -> gr.Textbox:
    # Drawn, but not shown: a component that is not drawn has no events.
    return gr.Textbox("", container=False, elem_classes="oc-hidden", elem_id=f"oc-kept-{name}")


def _on(trigger: Any, handler: Any, inputs: list[Any], outputs: list[Any], *, event: str = "", **options: Any) -> Any:
    """Call handler(browser, *values of inputs) at this event, and put its changes into `outputs`.

    event: "edit" or "example" for those that bring something along; "stop" for the one that must get through while all
        threads wait for the model; "stay" for the one that lasts as long as the page.
    """
    if inspect.isgeneratorfunction(handler):
        listener = (_editing if event == "edit" else _streaming)(handler, len(outputs))
    else:
        listener = {"example": _example, "stop": _at_once, "stay": _staying}.get(event, _plain)(handler)
    return trigger(listener, inputs, outputs, show_progress="hidden", api_visibility="private", **options)


def _plain(handler: Any) -> Any:
    def call(request: gr.Request, *values: Any) -> Any:
        return _applied(handler(_browser(request), *values))

    return call


def _at_once(handler: Any) -> Any:
    async def call(request: gr.Request, *values: Any) -> Any:
        return _applied(handler(_browser(request), *values))

    return call


def _tell(text: str) -> None:
    gr.Info(text, duration=6, title="OneCard")


def _staying(handler: Any) -> Any:
    async def call(request: gr.Request) -> None:
        await handler(_browser(request))

    return call


def _streaming(handler: Any, n_outputs: int) -> Any:
    def call(request: gr.Request, *values: Any) -> Iterator[Any]:
        for changes in repeating(handler(_browser(request), *values), n_outputs):
            yield _applied(changes)

    return call


def _editing(handler: Any, n_outputs: int) -> Any:
    def call(request: gr.Request, event: gr.EditData, *values: Any) -> Iterator[Any]:
        place = event.index if isinstance(event.index, int) else event.index[0]
        for changes in repeating(handler(_browser(request), place, str(event.value), *values), n_outputs):
            yield _applied(changes)

    return call


def _example(handler: Any) -> Any:
    def call(chosen: gr.SelectData, *values: Any) -> Any:
        return _applied(handler(chosen.value, *values))

    return call


def _applied(changes: list[Change]) -> Any:
    updates = [gr.skip() if change is None else gr.update(**change) for change in changes]
    return updates[0] if len(updates) == 1 else updates or None


def _browser(request: gr.Request) -> str:
    return str(request.session_hash)


def _queued(blocks: gr.Blocks) -> gr.Blocks:
    # Each answer waits in the engine's queue, which tells its place; gradio's own lets everything through.
    return blocks.queue(api_open=False, max_size=MAX_GRADIO_QUEUE, default_concurrency_limit=None)


def _first_language(page: PageOptions) -> str:
    return page.language if page.language in LANGUAGES else "en"
