"""Options of data: where it is, how it is read, which template writes it. A field's docstring is its help text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from onecard.config.base_model import DEFAULT_BASE
from onecard.config.problems import Problem
from onecard.installation import SHIPPED

TOY_DATA = SHIPPED / "sample"  # what DEFAULT_BASE is good for
# The names of fields that --columns can give; data/formats.py says what they mean.
COLUMN_NAMES = (
    "answer", "ask", "completion", "content", "context", "conversation", "conversations", "from", "functions",
    "history", "input", "inputs", "instruction", "margin", "messages", "output", "prompt", "query", "question",
    "response", "role", "system", "target", "targets", "text", "thought", "tools", "value",
)  # fmt: skip
LARGEST_AMOUNT = 10_000
_PORTION = re.compile(r"(.+?)(?:#(\d+))?(?::(\d+(?:\.\d*)?|\.\d+))?")  # NAME#LIMIT:AMOUNT
# Files of onecard/data/templates, and what Chinese-Vicuna called two of them.
BUILT_IN_TEMPLATES = ("alpaca", "vicuna-chat", "chatml", "llama-2", "llama-3", "mistral", "none")
TEMPLATE_ALIASES = {"instruct": "alpaca", "chat": "vicuna-chat"}


@dataclass
class ReadingOptions:
    """How the files of --data_path are read."""

    columns: str = ""
    """Other names of fields, theirs:ours with commas between: ask:instruction,answer:output,cot:thought."""
    txt_split: Literal["auto", "line", "paragraph", "file", "uncut"] = "auto"
    """What cuts a txt into texts. auto: blank lines (paragraph) if it has any, else line; uncut: as in old runs."""

    def problems(self) -> list[Problem]:
        if column_names(self.columns) is None:
            text = f"{self.columns!r} is not of the form ask:instruction,answer:output; "
            return [("--columns", f"{text}ours are {', '.join(COLUMN_NAMES)}")]
        return []


@dataclass
class DataOptions(ReadingOptions):
    """What is learned from, and how it is put into words."""

    data_path: str | list[str] = str(SHIPPED / "sample" / "merge_sample.json")
    """Training data: json, jsonl, csv, parquet or txt files, folders of these, Hub dataset ids; one or several."""
    data: str | list[str] = ""
    """Several sources by name: NAME, NAME:0.2 (a fifth of its rows in each epoch), NAME:3 (each row three times) or
    NAME#500 (at most 500 records), with commas between them. A name is one of dataset_info.json in the folder
    --data_path, a file or folder, one of `onecard data list`, or a Hub dataset id."""
    prompt_type: str = "auto"
    """Prompt template: auto, alpaca, vicuna-chat, chatml, llama-2, llama-3, mistral, none, or a .jinja file."""
    dialogue: bool = False
    """The data are conversations: where --prompt_type auto finds no template in the tokenizer, it takes vicuna-chat."""
    cutoff_len: int = 1024
    """Longest sample in tokens. Longer ones lose whole oldest turns, then the end of the answer."""
    train_on: Literal["all", "last", "everything"] = "all"
    """Which tokens are learned: all answers, the last answer only, or every token, prompts too."""
    thinking: Literal["auto", "keep", "drop"] = "auto"
    """Thoughts of answers. auto: learned where there are any; keep: only answers with one are learned; drop: none."""
    test_size: float | Literal["auto"] = "auto"
    """Rows kept for evaluation: a count (200), a fraction (0.05) or 0, which turns it off. auto: 5 %, at most 1,000."""
    strict: bool = False
    """End at the first bad record instead of skipping and counting it."""
    cache_path: str | None = None
    """Folder for encoded data; the default is a folder `onecard` in the user's cache directory."""

    def problems(self) -> list[Problem]:
        found = super().problems()
        if not self.data_path:
            found.append(("--data_path", "is empty; give a file, a folder or a Hub dataset id"))
        found.extend(("--data", text) for text in map(portion_problem, data_portions(self.data)) if text)
        if self.cutoff_len < 8:
            found.append(("--cutoff_len", f"{self.cutoff_len} tokens leave no room for an answer; use 8 or more"))
        size = 0 if self.test_size == "auto" else self.test_size
        if not 0 <= size < math.inf or (size > 1 and size != int(size)):
            found.append(("--test_size", f"{size} is neither a fraction (0.05), a count (200), 0 nor auto"))
        return found


def column_names(text: str) -> tuple[tuple[str, str], ...] | None:
    """--columns as pairs: "ask:instruction,answer:output" -> (("ask", "instruction"), ...); None if it is wrong."""
    parts = [part.strip().rpartition(":") for part in text.split(",") if part.strip()]
    pairs = tuple((theirs.strip(), ours.strip()) for theirs, _, ours in parts)
    unclear = len(dict(pairs)) < len(pairs) or len({ours for _, ours in pairs}) < len(pairs)
    return None if unclear or any(not theirs or ours not in COLUMN_NAMES for theirs, ours in pairs) else pairs


class DataPortion(NamedTuple):
    """One part of --data: a name, at most how many of its records (0: all), and how often each is in an epoch."""

    name: str
    limit: int = 0
    amount: float = 1.0

    @property
    def suffix(self) -> str:
        """What stands behind the name."""
        return (f"#{self.limit}" if self.limit else "") + (f":{self.amount:g}" if self.amount != 1 else "")


def data_portions(data: str | list[str]) -> list[DataPortion]:
    """--data as its parts: "belle#500:0.2,my.jsonl:3" -> ("belle", 500, 0.2), ("my.jsonl", 0, 3.0)."""
    texts = [data] if isinstance(data, str) else data
    words = [word.strip() for text in texts for word in ([text] if _is_there(text) else text.split(","))]
    found = []
    for word in filter(None, words):
        match = None if _is_there(word) else _PORTION.fullmatch(word)
        name, limit, amount = match.groups() if match else (word, None, None)
        found.append(DataPortion(name, int(limit or 0), float(amount or 1)))
    return found


def _is_there(text: str) -> bool:
    """Whether a file or folder has this name; one that no file can have is not there."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def portion_problem(portion: DataPortion) -> str:
    """What is wrong with one part of --data, or an empty text."""
    if not 0 < portion.amount <= LARGEST_AMOUNT:
        return f"{portion.name}:{portion.amount:g} is not between 0 and {LARGEST_AMOUNT:,}: 0.2 is a fifth, 3 is thrice"
    return ""


def toy_base_problem(model_path: str, data_path: str | list[str]) -> str:
    """What is wrong with learning one's own data on the toy base, or an empty text."""
    paths = [Path(path).resolve() for path in ([data_path] if isinstance(data_path, str) else data_path)]
    if Path(model_path).resolve() != Path(DEFAULT_BASE) or all(TOY_DATA in path.parents for path in paths):
        return ""
    return (
        "the base is sample/tiny-llama, a toy of 4 million weights: it shows that all works and learns nothing of use "
        "from data of your own; give --model_path, a directory or a Hub id (settings by card: config-sample/)"
    )
