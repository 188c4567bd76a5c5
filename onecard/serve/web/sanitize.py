"""Text of a person or a model, made fit for a Markdown view: HTML, images and entities stay text, formulas are drawn.

The view (DOMPurify) and the page's Content-Security-Policy would stop scripts and foreign images too; this keeps them
from being anything but letters in the first place, and shows the reader what the model really wrote. Knows Markdown's
code fences and spans, and TeX's delimiters. It does not know pages, sessions or models.
"""

from __future__ import annotations

import re

# An invisible space behind the sign: Markdown no longer sees a tag, an image, an entity or an escape (of the signs that
# TeX puts behind a backslash), the view no stand-in of its own for a formula; the eye sees no difference.
INVISIBLE = "\u200b"
_SIGNS = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)|&(?=#?\w+;)|\\(?=[()\[\]{},;:&%=\\])|%(?=%%LATEX_BLOCK)")
MARKED = re.compile(rf"([<!&%\\$]|\\[(\[]){INVISIBLE}|{INVISIBLE}(?=\$|\\[)\]])")
_FENCE = re.compile(r"^( {0,3})(`{3,}|~{3,})(.*)$")
_SPAN = re.compile(r"(?<![`\\])(`+)(?!`)(.+?)(?<!`)\1(?!`)")
# A formula within a paragraph, where no code span comes first. A single dollar opens before a sign and closes behind
# one, with no digit after it, as in Pandoc (tex_math_dollars): "$5 and $6" is money.
_CODE_OR_MATH = re.compile(
    rf"{_SPAN.pattern}"
    r"|(?<![\\$])(\$\$)(?!\$)(.+?)(?<!\\)(\$\$)"
    r"|(?<!\\)(\\\[)((?:\\\\|(?!\\[\\\[]).)+?)(\\\])|(?<![\\A-Za-z0-9])(\\\()((?:\\\\|(?!\\[\\(]).)+?)(\\\))"
    r"|(?<![\\$A-Za-z0-9])(\$)(?![\s$])([^$\n]*?[^\s\\$])(\$)(?![A-Za-z0-9$])",
    re.DOTALL,
)
# What the view's formula renderer goes by: only what was found here, never a pair of signs that happens to stand there.
FORMULAS: tuple[dict[str, str | bool], ...] = tuple(
    {"left": left + INVISIBLE, "right": INVISIBLE + right, "display": left in ("$$", "\\[")}
    for left, right in (("$$", "$$"), ("$", "$"), ("\\[", "\\]"), ("\\(", "\\)"))
)
_LANGUAGE = re.compile(r"[A-Za-z0-9_+#.-]{1,20}")
_DRAWN = ("mermaid",)  # languages that the view would draw instead of showing


def plain_markdown(text: str) -> str:
    """`text` for a Markdown view, with signs outside code escaped; code and formulas are escaped by the view.

    "see <b>" -> "see <\\u200bb>";   "`<b>`" -> "`<b>`";   "$x$" -> "$\\u200bx\\u200b$"
    """
    lines: list[str] = []
    paragraph: list[str] = []
    fence, indent = "", 0
    has_formulas = INVISIBLE not in text  # with marks of its own, the view would find other formulas than are meant
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if fence:
            closes = match and match[2][0] == fence[0] and len(match[2]) >= len(fence) and not match[3].strip()
            fence = "" if closes else fence
            # A fence in a list ends with its list item, and this line may already stand behind it.
            shown = line if line[:indent].isspace() or not indent else _escaped(line)
            lines.append(shown.replace("%%%LATEX_BLOCK", f"%{INVISIBLE}%%LATEX_BLOCK"))
        elif match and not (match[2][0] == "`" and "`" in match[3]):
            lines += _paragraph(paragraph, has_formulas)
            fence, indent = match[2], len(match[1])
            lines.append(match[1] + fence + _label(match[3]))
        else:
            paragraph.append(line)
            if not line.strip():
                lines += _paragraph(paragraph, has_formulas)
    return "\n".join([*lines, *_paragraph(paragraph, has_formulas)])


def original(text: str) -> str:
    """What `plain_markdown` was given, from what a person made of its result in the view's edit box."""
    return MARKED.sub(lambda match: match[1] or "", text)


def _label(info: str) -> str:
    """A fence's language: a plain word, and none that would be drawn."""
    match = _LANGUAGE.match(info.strip())
    return match[0] if match and match[0].lower() not in _DRAWN else ""


def _paragraph(lines: list[str], has_formulas: bool) -> list[str]:
    """These lines escaped, their formulas marked; `lines` is empty afterwards."""
    if not lines:
        return []
    text, pieces, position = "\n".join(lines), [], 0
    lines.clear()
    loose = False  # a backtick of this paragraph still waits for its partner, so that no span can be trusted
    for found in _CODE_OR_MATH.finditer(text) if has_formulas else ():
        formula = [group for group in found.groups()[2:] if group is not None]
        if formula:
            left, tex, right = formula
            shown, loose = _outside_formulas(text[position : found.start()], loose)
            pieces += [shown, left, INVISIBLE, tex, INVISIBLE, right]
            position = found.end()
    shown, _ = _outside_formulas(text[position:], loose)
    return "".join([*pieces, shown]).split("\n")


def _outside_formulas(text: str, loose: bool) -> tuple[str, bool]:
    shown = []
    for line in text.split("\n"):
        escaped_line, is_open = (_escaped(line), False) if loose else _outside_spans(line)
        loose = loose or is_open
        shown.append(escaped_line)
    return "\n".join(shown), loose


def _outside_spans(line: str) -> tuple[str, bool]:
    """The line with the signs outside its code spans escaped; and whether a backtick outside of them is left."""
    pieces, position, rest = [], 0, ""
    for span in _SPAN.finditer(line):
        before = line[position : span.start()]
        pieces += [_escaped(before), span[0]]
        rest += before
        position = span.end()
    rest += line[position:]
    return "".join([*pieces, _escaped(line[position:])]), "`" in rest


def _escaped(text: str) -> str:
    return _SIGNS.sub(lambda match: match[0] + INVISIBLE, text)
