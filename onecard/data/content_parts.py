"""The content of a message as a list of parts, and what of a record cannot be read as text: images, audio, video.

Knows the names that other programs give to parts and to media. Does not know roles or shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from onecard.data.values import UnusableRecord, kind_of, quoted, text_of

_TEXT_PARTS = ("text", "input_text", "output_text")
_TEXT_KEYS = ("text", "value", "content")
_MEDIA_LISTS = ("images", "audios", "videos")
_MEDIA = ("image", "audio", "video", *_MEDIA_LISTS)
_PLACEHOLDER = re.compile(r"<(image|audio|video)>")

PLACEHOLDER_AS_TEXT = "<image>, <audio> or <video> was taken as text: the record names no such file"


def joined_parts(parts: list[Any] | tuple[Any, ...], where: str, notes: list[str]) -> str:
    """The text of content parts, one per line: texts, or {"type": "text", "text" or "value" or "content": ...}.

    Parts of any other type are refused.
    """
    texts = []
    for number, part in enumerate(parts, start=1):
        place = f"{where}, part {number},"
        if isinstance(part, str):
            texts.append(text_of(part, place, notes))
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in (None, *_TEXT_PARTS):
            what = f"of type {quoted(kind)}" if isinstance(kind, str) else kind_of(part)
            raise UnusableRecord(f"{place} is {what}; only text can be learned")
        key = next((key for key in _TEXT_KEYS if part.get(key) is not None), None)
        if key is None:
            seen = ", ".join(quoted(str(key)) for key in list(part)[:6]) or "nothing"
            raise UnusableRecord(f'{place} has no text: its keys are {seen}, and "text" is expected')
        texts.append(text_of(part[key], f'{place} "{key}"', notes))
    return "\n".join(texts)


def refuse_media(record: Mapping[str, Any], texts: Iterable[str], notes: list[str]) -> None:
    """Refuse a record that is about images, audio or video: a list of them, or one that a text has a place for.

    {"image": "a.png", ...} with the text "<image>What is it?" is refused; with the text "A cat" it is one more field.
    Raises UnusableRecord.
    """
    named = [key for key in _MEDIA if not _is_nothing(record.get(key))]
    place = next((found[0] for text in texts if (found := _PLACEHOLDER.search(text))), "")
    key = next((key for key in named if place or key in _MEDIA_LISTS), None)
    if key is not None:
        raise UnusableRecord(f"{quoted(key)} names {key.rstrip('s')} files; only text can be learned")
    if place:
        notes.append(PLACEHOLDER_AS_TEXT)


def _is_nothing(value: Any) -> bool:
    """Whether a field names no file: null, NaN, an empty text, or a list of such."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_nothing, value))
    return value is None or value != value or value == "" or value == {}
