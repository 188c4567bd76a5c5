"""The versions of a conversation that Undo can bring back: those that Clear, an edit, Regenerate or a file replaced.

They live in the browser, like the conversation, as [[a chat, the number of turns that took its place], ...]. By that
number Undo knows whether the replacement is the last step, or exchanges that came after it are. Knows chats and their
JSON. It does not know the page.
"""

from __future__ import annotations

import json

from onecard.errors import DataError
from onecard.inference.chat_file import SavedChat, read_chat, to_json

MAX_CHARS = 200_000  # each step of the page sends the versions along; the newest stays whatever its size


def kept(earlier: str, replaced: SavedChat, by: SavedChat) -> str:
    """`earlier` with one more version; the oldest go where there are too many."""
    if not replaced.session.turns:
        return earlier
    versions = [*_versions(earlier), (to_json(replaced), len(by.session.turns))]
    while len(versions) > 1 and sum(len(chat) for chat, _ in versions) > MAX_CHARS:
        versions.pop(0)
    return json.dumps(versions, ensure_ascii=False)


def taken(earlier: str, chat: SavedChat) -> tuple[SavedChat | None, str]:
    """The version that `chat` took the place of, and `earlier` without it; None where an exchange came after that."""
    versions = _versions(earlier)
    if not versions or versions[-1][1] != len(chat.session.turns):
        return None, earlier
    text, _ = versions.pop()
    try:
        return read_chat(text).chat, json.dumps(versions, ensure_ascii=False)
    except DataError:
        return None, json.dumps(versions, ensure_ascii=False)


def _versions(earlier: str) -> list[tuple[str, int]]:
    """What `kept` wrote; whatever else a browser sends is no version."""
    try:
        content = json.loads(earlier) if earlier else []
    except (ValueError, RecursionError):
        return []
    pairs = [pair for pair in content if isinstance(pair, list) and len(pair) == 2] if isinstance(content, list) else []
    return [(chat, n) for chat, n in pairs if isinstance(chat, str) and isinstance(n, int)]
