"""A chat as a JSON file that belongs to the user: written whole, and checked from end to end when it comes back.

    {"onecard_chat": 1, "title": "...", "created": "2025-01-31T12:00:00+00:00", "adapter": "my-run",
     "prompt_type": "chatml", "system": "...", "sampling": {"temperature": 0.7, ...},
     "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Read too: a bare list of messages, or an object with nothing but `messages`, as OpenAI's clients write them.
A chat may come from a stranger, so nothing that it names is opened: the adapter is a name to look up among those that
are loaded, and a prompt type that is not built in is left out. Knows JSON, sessions and sampling options. It does not
know the engine, pages or terminals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from onecard.config.inference import SamplingOptions
from onecard.console import nearest
from onecard.data.built_in_templates import BUILT_IN
from onecard.data.messages import Turn, turns_to_messages
from onecard.errors import DataError
from onecard.inference.history import ChatHistory
from onecard.storage import write_whole

VERSION = 1
MAX_BYTES = 10_000_000
MAX_MESSAGES = 10_000
MAX_NAME_CHARS = 300
KEYS = ("onecard_chat", "title", "created", "adapter", "prompt_type", "system", "sampling", "messages")
MESSAGE_KEYS = ("role", "content", "input")
PROMPT_TYPES = ("auto", *BUILT_IN)  # others are files of a run, and mean nothing elsewhere
LARGEST_NUMBER = 2**53  # above it programs in other languages round


@dataclass(frozen=True)
class SavedChat:
    """A conversation and what it was held with. `created` is a time in ISO 8601; "" for what is not known."""

    session: ChatHistory = field(default_factory=ChatHistory)
    sampling: SamplingOptions | None = None
    adapter: str = ""
    prompt_type: str = ""
    title: str = ""
    created: str = ""


class LoadedChat(NamedTuple):
    """A chat that was read, and what a person should know about it: keys left out, a prompt type not taken."""

    chat: SavedChat
    notes: tuple[str, ...]


def now() -> str:
    """The time in ISO 8601, to the second, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def to_json(chat: SavedChat) -> str:
    """The text of the file; characters as they are, half characters (lone surrogates) replaced."""
    content: dict[str, Any] = {"onecard_chat": VERSION}
    if chat.title:
        content["title"] = chat.title[:MAX_NAME_CHARS]
    content["created"] = chat.created or now()
    if chat.adapter:
        content["adapter"] = chat.adapter
    if chat.prompt_type in PROMPT_TYPES:
        content["prompt_type"] = chat.prompt_type
    content["system"] = chat.session.system
    if chat.sampling is not None:
        content["sampling"] = asdict(chat.sampling)
    content["messages"] = turns_to_messages(chat.session.turns)
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def save_chat(chat: SavedChat, path: Path) -> None:
    """Write the file, whole or not at all; one that stands there is replaced. Raises DataError that names it."""
    # A link stays a link: the file that it points to is replaced.
    target = path.expanduser().resolve()
    try:
        write_whole(target, to_json(chat))
    except OSError as reason:
        raise DataError(
            f"the chat cannot be written there ({reason.strerror or reason}); give another place", str(path)
        ) from reason


def load_chat(path: Path) -> LoadedChat:
    """Read and check a file. Raises DataError that names it."""
    try:
        with path.expanduser().open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as reason:
        raise DataError(f"cannot be read ({reason.strerror or reason})", str(path)) from reason
    return read_chat(data, str(path))


def read_chat(data: bytes | str, name: str = "the chat") -> LoadedChat:
    """Check the content of a file called `name`. Raises DataError that says what is wrong, and where."""
    try:
        return _checked(_parsed(data))
    except DataError as reason:
        raise DataError(str(reason), name) from None


def _parsed(data: bytes | str) -> Any:
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(data) > MAX_BYTES:
        raise DataError(f"is larger than {MAX_BYTES / 1e6:.0f} MB, the most that a chat may have")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as reason:
        raise DataError(f"is not UTF-8 text (byte {reason.start + 1}); save it as UTF-8") from None
    except json.JSONDecodeError as reason:
        raise DataError(f"is not JSON (line {reason.lineno}, column {reason.colno}: {reason.msg})") from None
    except RecursionError:
        raise DataError("is nested too deep; a chat is a list of messages") from None
    except ValueError as reason:  # such as a number of 5,000 digits
        raise DataError(f"is not usable JSON ({reason})") from None


def _checked(content: Any) -> LoadedChat:
    if isinstance(content, list):
        content = {"messages": content}
    if not isinstance(content, dict):
        raise DataError(f"holds {_kind(content)}; a chat is an object with messages, or a list of messages")
    version = content.get("onecard_chat", VERSION)
    if type(version) is not int or version != VERSION:
        raise DataError(f"is a chat of version {_shown(version)}, and this program reads version {VERSION}")
    if "messages" not in content:
        raise DataError("holds no `messages`; it is no chat")
    notes: list[str] = []
    _note_unknown(content, KEYS, "the chat", notes)
    sampling = _sampling(content["sampling"], notes) if content.get("sampling") is not None else None
    names = {key: _text(content, key, MAX_NAME_CHARS) for key in ("title", "created", "adapter", "prompt_type")}
    if names["prompt_type"] not in ("", *PROMPT_TYPES):
        notes.append(f"the prompt type {_shown(names['prompt_type'])} is not built in and is not taken from the chat")
        names["prompt_type"] = ""
    session = _session(_text(content, "system"), content["messages"], notes)
    return LoadedChat(SavedChat(session, sampling, **names), tuple(dict.fromkeys(notes)))


def _session(system: str, messages: Any, notes: list[str]) -> ChatHistory:
    if not isinstance(messages, list):
        raise DataError(f"`messages` is {_kind(messages)}; a list of messages must stand there")
    if len(messages) > MAX_MESSAGES:
        raise DataError(f"holds {len(messages)} messages, and a chat may have {MAX_MESSAGES}")
    turns = [_turn(message, number, notes) for number, message in enumerate(messages, 1)]
    if turns and turns[0].role == "system":
        if system.strip() and system != turns[0].content:
            raise DataError("has two system prompts: `system` and the first message; remove one of them")
        system = turns.pop(0).content
    return ChatHistory(system, tuple(turns))


def _turn(message: Any, number: int, notes: list[str]) -> Turn:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise DataError(f"{where} is {_kind(message)}; an object with role and content must stand there")
    role = message.get("role")
    if role not in ("system", "user", "assistant"):
        raise DataError(f"{where}: the role is {_shown(role)}; use user, assistant, or system for the first message")
    if role == "system" and number > 1:
        raise DataError(f"{where}: the role is system, which only the first message may have")
    if "content" not in message:
        raise DataError(f"{where} has no content")
    _note_unknown(message, MESSAGE_KEYS, "a message", notes)
    content = {**message, "content": _joined_parts(message["content"], where)}
    extra = _text(message, "input", where=where) if role == "user" else ""
    return Turn(role, _text(content, "content", where=where), extra)


def _joined_parts(content: Any, where: str) -> Any:
    """OpenAI's list of text parts as one text; everything else as it is."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise DataError(f"{where}: the content has parts that are not text, such as images, which are not read here")
    return "".join(_text(part, "text", where=where) for part in content)


def _text(content: Mapping[str, Any], key: str, max_chars: int = MAX_BYTES, where: str = "the chat") -> str:
    value = content.get(key, "")
    if not isinstance(value, str):
        raise DataError(f"{where}: `{key}` is {_kind(value)}; a text must stand there")
    if len(value) > max_chars:
        raise DataError(f"{where}: `{key}` has {len(value)} characters; {max_chars} are allowed")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: `{key}` holds half a character (a lone surrogate); the file is damaged")
    return value


def _sampling(values: Any, notes: list[str]) -> SamplingOptions:
    """The options with the defaults of `SamplingOptions` for those that are not named."""
    if not isinstance(values, dict):
        raise DataError(f"`sampling` is {_kind(values)}; an object must stand there")
    defaults = SamplingOptions()
    names = [option.name for option in fields(SamplingOptions)]
    _note_unknown(values, names, "sampling", notes)
    known = {name: _number_or_stops(name, values[name], getattr(defaults, name)) for name in names if name in values}
    sampling = SamplingOptions(**known)
    problems = [f"{flag.lstrip('-')}: {message}" for flag, message in sampling.problems()]
    if problems:
        raise DataError("sampling: " + "; ".join(problems))
    return sampling


def _number_or_stops(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, list):
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            return list(value)
        raise DataError(f"sampling: {name} is {_kind(value)}; a list of texts must stand there")
    if type(value) in (int, float) and abs(value) > LARGEST_NUMBER:
        raise DataError(f"sampling: {name} is larger than any number that makes sense there")
    if isinstance(default, float) and type(value) in (int, float):
        return float(value)
    if isinstance(default, int) and type(value) is int:
        return value
    expected = "a number" if isinstance(default, float) else "a whole number"
    raise DataError(f"sampling: {name} is {_shown(value)}; {expected} must stand there")


def _note_unknown(content: Mapping[str, Any], known: list[str] | tuple[str, ...], where: str, notes: list[str]) -> None:
    for key in content:
        if key not in known:
            notes.append(f"{where}: {_shown(key)} is not known here and was left out{nearest(key, list(known))}")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _shown(value: Any) -> str:
    """A value in a message: short, in quotes where it is a text, its control characters escaped."""
    if isinstance(value, str):
        return ascii(value if len(value) <= 40 else f"{value[:40]}...")
    return f"{value}"[:40] if type(value) in (int, float) else _kind(value)
