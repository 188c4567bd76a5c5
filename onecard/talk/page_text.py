"""Text of a person or a model, made fit for a Markdown view: what looks like HTML, an image or an entity stays text.

The view (DOMPurify) and the page's Content-Security-Policy would stop scripts and foreign images too; this keeps them
from being anything but letters in the first place, and shows the reader what the model really wrote. Knows Markdown's
code fences and spans. It does not know pages, sessions or models.
"""

from __future__ import annotations

import re

# An invisible space behind the sign: Markdown no longer sees a tag, an image or an entity, the eye sees no difference.
INVISIBLE = "\u200b"
_SIGNS = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)|&(?=#?\w+;)")
_MARKED = re.compile(f"([<!&]){INVISIBLE}")
_FENCE = re.compile(r"^( {0,3})(`{3,}|~{3,})(.*)$")
_SPAN = re.compile(r"(?<![`\\])(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_LANGUAGE = re.compile(r"[A-Za-z0-9_+#.-]{1,20}")
_DRAWN = ("mermaid",)  # languages that the view would draw instead of showing


def plain_markdown(text: str) -> str:
    """`text` for a Markdown view, with signs outside code made harmless; code is escaped by the view itself.

    "see <b>" -> "see <\\u200bb>";   "`<b>`" -> "`<b>`"
    """
    lines = []
    fence, indent = "", 0
    loose = False  # a backtick of this paragraph still waits for its partner, so that no span can be trusted
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if fence:
            closes = match and match[2][0] == fence[0] and len(match[2]) >= len(fence) and not match[3].strip()
            fence = "" if closes else fence
            # A fence in a list ends with its list item, and this line may already stand behind it.
            lines.append(line if line[:indent].isspace() or not indent else _harmless(line))
        elif match and not (match[2][0] == "`" and "`" in match[3]):
            fence, indent, loose = match[2], len(match[1]), False
            lines.append(match[1] + fence + _label(match[3]))
        else:
            shown, is_open = (_harmless(line), "`" in line) if loose else _outside_spans(line)
            loose = (loose or is_open) and bool(line.strip())
            lines.append(shown)
    return "\n".join(lines)


def original(text: str) -> str:
    """What `plain_markdown` was given, from what a person made of its result in the view's edit box."""
    return _MARKED.sub(r"\1", text)


def _label(info: str) -> str:
    """A fence's language: a plain word, and none that would be drawn."""
    match = _LANGUAGE.match(info.strip())
    return match[0] if match and match[0].lower() not in _DRAWN else ""


def _outside_spans(line: str) -> tuple[str, bool]:
    """The line with the signs outside its code spans made harmless; and whether a backtick outside of them is left."""
    pieces, position, rest = [], 0, ""
    for span in _SPAN.finditer(line):
        before = line[position : span.start()]
        pieces += [_harmless(before), span[0]]
        rest += before
        position = span.end()
    rest += line[position:]
    return "".join([*pieces, _harmless(line[position:])]), "`" in rest


def _harmless(text: str) -> str:
    return _SIGNS.sub(lambda match: match[0] + INVISIBLE, text)
