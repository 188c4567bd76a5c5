"""What a description says of a data set, in the form of LLaMA-Factory's dataset_info.json: where it lies, its columns.

Knows the keys of a description, and how a record of such a data set becomes one of the known shapes (formats.py).
Does not know files or the network. https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from onecard.console import nearest
from onecard.data.values import UnusableRecord, quoted
from onecard.errors import DataError

Formatting = Literal["alpaca", "sharegpt", "openai"]
COLUMNS = (
    "prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios", "chosen",
    "rejected", "kto_tag",
)  # fmt: skip
TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
# Keys of a description that are of no use here, and what is to be done about those that a data set needs.
_NOT_USED = frozenset(("om_hub_url", "file_sha1", "stage"))
_REFUSED = {
    "script_url": "it is made by a script of its own, and code of data sets is never run here; give its files",
    "cloud_file_name": "it lies in cloud storage; download it and give it as file_name",
}
_MEDIA = ("images", "videos", "audios")
# What each column is called in the shapes of formats.py.
_NAMES = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
    "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label",
}  # fmt: skip


@dataclass(frozen=True)
class DatasetDescription:
    """A data set by name: where it lies, how its records are read, and what is known of it."""

    name: str
    file_name: str = ""
    hf_hub_url: str = ""
    ms_hub_url: str = ""
    subset: str = ""
    split: str = "train"
    folder: str = ""
    num_samples: int = 0
    formatting: Formatting = "alpaca"
    ranking: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our names to theirs, as given; empty: the known shapes are found by themselves."""
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_parts(self) -> bool:
        """Whether only a part of its files is meant, which the card of the data set (README.md) knows."""
        return bool(self.subset) or self.split != "train"

    @property
    def is_plain(self) -> bool:
        """Whether records are read by their shape alone."""
        return not self.columns and not self.tags

    @property
    def reading(self) -> str:
        """What of it decides how records are read, as a text that stands for it in a hash."""
        parts = (self.subset, self.split, self.folder, self.num_samples, self.formatting)
        return repr((*parts, sorted(self.columns.items()), sorted(self.tags.items())))


def described(name: str, plain: Any, place: str) -> DatasetDescription:
    """The description under `name` in a file, `place`. Raises DataError: a key or a value that is not understood."""
    where = f'{place}, "{name}"'
    if not isinstance(plain, dict):
        raise DataError("a description is an object with keys such as file_name", where)
    for key, reason in _REFUSED.items():
        if plain.get(key):
            raise DataError(reason, where)
    known = [key for key in DatasetDescription.__dataclass_fields__ if key != "name"]
    for kind, keys, given in (
        ("key", known, [key for key in plain if key not in _NOT_USED]),
        ("column", list(COLUMNS), list(plain.get("columns") or ())),
        ("tag", list(TAGS), list(plain.get("tags") or ())),
    ):
        unknown = next((key for key in given if key not in keys), None)
        if unknown is not None:
            raise DataError(f"{unknown!r} is no {kind} of a description{nearest(str(unknown), keys)}", where)
    values = {key: plain[key] for key in known if plain.get(key) is not None}
    for key, value in values.items():
        _check_kind(key, value, where)
    if not any(values.get(key) for key in ("file_name", "hf_hub_url", "ms_hub_url")):
        raise DataError("it names neither file_name, hf_hub_url nor ms_hub_url", where)
    return DatasetDescription(name, **values)


def _check_kind(key: str, value: Any, where: str) -> None:
    """Raise DataError for a value of the wrong kind."""
    if key == "num_samples":
        is_right, expected = type(value) is int and value > 0, "a number of 1 or more"
    elif key == "ranking":
        is_right, expected = isinstance(value, bool), "true or false"
    elif key in ("columns", "tags"):
        is_right = isinstance(value, dict) and all(isinstance(name, str) for name in value.values())
        expected = "an object whose values are names"
    elif key == "formatting":
        is_right, expected = value in get_args(Formatting), f"one of {', '.join(get_args(Formatting))}"
    else:
        is_right, expected = isinstance(value, str), "a text"
    if not is_right:
        raise DataError(f"{key} is {value!r}, {expected} is expected", where)


def as_described(description: DatasetDescription, record: Any) -> tuple[Any, list[str]]:
    """The record under the names that formats.py reads, and the names of its fields that the description leaves out.

    columns {"prompt": "question", "response": "answer"}: {"question": "1+1?", "answer": "2", "id": 7}
        -> {"instruction": "1+1?", "output": "2"}, ["id"]
    Raises UnusableRecord: pictures or sounds, and a record without the column that holds its question.
    """
    if description.is_plain or not isinstance(record, dict):
        return record, []
    columns = dict(description.columns)
    for kind in _MEDIA:
        if record.get(columns.pop(kind, "")):
            raise UnusableRecord(f"it has {kind}, and only text can be learned")
    if description.formatting == "alpaca":
        return _alpaca(description, columns, record)
    messages = columns.setdefault("messages", "conversations")
    _require(description, "messages", messages, record)
    tags = {**TAGS, **description.tags}
    is_openai = description.formatting == "openai"
    found: dict[str, Any] = {}
    for ours, theirs in columns.items():
        value = record.get(theirs)
        if value is None:
            continue
        if ours == "messages" and is_openai:
            found["messages"] = value
        elif ours == "messages":
            found["conversations"] = [_turn(item, tags) for item in value] if isinstance(value, list) else value
        elif ours in _NAMES:
            found[_NAMES[ours]] = _turn(value, tags) if ours in ("chosen", "rejected") else value
    return found, _left_out(record, description)


def _alpaca(
    description: DatasetDescription, columns: Mapping[str, str], record: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    asked = columns.get("prompt", "")
    if asked:
        _require(description, "prompt", asked, record)
    if asked and not {"query", "response", "chosen", "rejected", "kto_tag"} & set(columns):
        return {"text": record[asked]}, _left_out(record, description)  # a document, of which all is learned
    found = {_NAMES[ours]: record[theirs] for ours, theirs in columns.items() if record.get(theirs) is not None}
    return found, _left_out(record, description)


def _require(description: DatasetDescription, ours: str, theirs: str, record: dict[str, Any]) -> None:
    if record.get(theirs) is None:
        seen = ", ".join(quoted(str(key)) for key in list(record)[:8]) or "none"
        raise UnusableRecord(
            f"it has no {quoted(theirs)}, which {description.name} is described to have as {ours}; keys seen: {seen}"
        )


def _left_out(record: dict[str, Any], description: DatasetDescription) -> list[str]:
    named = {*description.columns.values(), *(("conversations",) if description.formatting != "alpaca" else ())}
    return [key for key, value in record.items() if key not in named and value is not None]


def _turn(item: Any, tags: Mapping[str, str]) -> Any:
    """A turn under "from" and "value", its role under the name that every program knows; else as it is."""
    role_key, text_key = tags["role_tag"], tags["content_tag"]
    if not isinstance(item, dict) or role_key not in item:
        return item
    roles = {tags[name]: TAGS[name] for name in TAGS if name not in ("role_tag", "content_tag")}
    rest = {key: value for key, value in item.items() if key not in (role_key, text_key)}
    role = item[role_key]
    return {"from": roles.get(role, role) if isinstance(role, str) else role, "value": item.get(text_key), **rest}
