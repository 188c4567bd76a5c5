"""Style and scripts of the pages, as they are put into a page's head.

The scripts keep the chat, save and load files, and help who cannot see; they know the ids that app.py gives to its
components, and not what they do.
"""

from __future__ import annotations

import json

from onecard.serve.web.answer import letters
from onecard.serve.web.i18n import STATIC, word
from onecard.serve.web.sanitize import MARKED

TOO_LARGE = "too large"


def head(max_chat_bytes: int) -> str:
    """Style and script for the page's head; a file of more than `max_chat_bytes` is not read.

    Not through gradio's `css=`: it would give the rules for narrow pages another weight than those they overrule.
    """
    css, script, help_script = (
        (STATIC / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "accessibility.js")
    )
    for place, text in (("HELP", help_script), ("LIMIT", str(max_chat_bytes)), ("MARKED", MARKED.pattern)):
        script = script.replace(f"__{place}__", text)
    return f"<style>{css}</style><script>{script}</script>"


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
