"""What the three steps of a larger vocabulary share: the corpus, the kinds of tokenizer, and tokens per character.

Knows texts, held-out texts and what a tokenizer directory holds. Does not know how pieces are learned
(train.py), joined (bpe_growth.py), written (merge.py) or given rows
(resize.py).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from onecard.data.messages import Conversation
from onecard.data.sources import ReadReport, Source, read
from onecard.errors import DataError, ModelError
from onecard.model.files import SMALL_FILES, locate, read_json

Kind = Literal["sentencepiece", "bytelevel"]
SPACE = "\u2581"  # SentencePiece writes a space like this
HELD_OUT = "held_out.jsonl"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
MAX_LINE = 1000  # characters; SentencePiece silently drops sentences longer than its limit, so they are cut instead
MAX_HELD_OUT = 4000  # texts
LONG_TEXT = 10_000  # characters

# Scripts by the first word of a character's Unicode name, under the names that people use.
SCRIPTS = {
    "CJK": "Chinese", "LATIN": "Latin", "FULLWIDTH": "Latin", "HIRAGANA": "Japanese", "KATAKANA": "Japanese",
    "HANGUL": "Korean",
}  # fmt: skip


def texts_of(source: str | Source, report: ReadReport) -> Iterator[str]:
    """Every text of a corpus in any form that training reads; the turns of a conversation are texts of their own.

    Streams. Text that is not Unicode (lone surrogates) or holds NUL is left out, because no trainer takes it; a
    record of nothing else counts as bad in `report`. Raises DataError where nothing can be used.
    """
    for sample in read(source, report=report):
        parts = _parts(sample) if isinstance(sample, Conversation) else [sample.text]
        usable = [part for part in parts if part.strip() and _is_clean(part)]
        if not usable:
            report.reject(sample.record, "holds no text: it is empty, or has NUL or broken Unicode in it")
        yield from usable


def lines_of(texts: Iterable[str]) -> Iterator[str]:
    """Lines of at most 1000 characters, without the empty ones."""
    for line in chain.from_iterable(text.splitlines() for text in texts):
        pieces = (line[start : start + MAX_LINE] for start in range(0, len(line), MAX_LINE))
        yield from (piece for piece in pieces if piece.strip())


@dataclass
class Corpus:
    """A corpus read once: `lines()` are for learning; a share of the texts is kept apart in `held_out`.

    Which text is held out depends on the text alone, so a text that occurs twice never lies on both sides. Of a text
    that is long, such as a whole file, lines are held out.
    """

    source: Source
    held_out_share: float = 0.02
    report: ReadReport = field(default_factory=ReadReport)
    held_out: list[str] = field(default_factory=list)
    n_lines: int = 0
    n_characters: int = 0
    error: DataError | None = None

    def lines(self) -> Iterator[str]:
        for line in lines_of(self._learned()):
            self.n_lines += 1
            self.n_characters += len(line)
            yield line

    def guarded_lines(self) -> Iterator[str]:
        """The same; an error in the data ends the lines and is kept in `error`, so that it can be raised outside.

        A trainer in another language would wrap it into an error of its own.
        """
        try:
            yield from self.lines()
        except DataError as reason:
            self.error = reason

    def check(self) -> None:
        """Raise what stopped the reading, and DataError where nothing is left to learn from."""
        if self.error is not None:
            raise self.error
        if not self.n_lines:
            raise DataError("no text is left to learn from; give a larger corpus", self.source.name)

    def _learned(self) -> Iterator[str]:
        texts = texts_of(self.source, self.report)
        for text in chain.from_iterable([t] if len(t) < LONG_TEXT else t.splitlines() for t in texts):
            if not is_held_out(text, self.held_out_share):
                yield text
            elif len(self.held_out) < MAX_HELD_OUT:
                self.held_out.append(text)


def is_held_out(text: str, share: float) -> bool:
    """Whether this text belongs to the held-out share; decided by its SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def write_held_out(directory: Path, texts: Sequence[str]) -> None:
    """Leave them where `eval_texts` finds them."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (directory / HELD_OUT).write_text("".join(lines), encoding="utf-8", newline="\n")


def eval_texts(eval_path: str, new_path: Path) -> list[str]:
    """The texts to measure on: of `eval_path`, or those that `train` held out. Empty where there are none."""
    held_out = new_path / HELD_OUT
    source = eval_path or (str(held_out) if held_out.is_file() and held_out.stat().st_size else "")
    texts: list[str] = []
    for text in texts_of(source, ReadReport()) if source else ():
        texts.append(text)
        if len(texts) == MAX_HELD_OUT:
            break
    return texts


def locate_tokenizer(name: str) -> Path:
    """The directory of a tokenizer, a directory here or a Hub id. Raises ModelError."""
    return locate(name, what="tokenizer", patterns=SMALL_FILES)


def kind_of(directory: Path) -> Kind:
    """Which of the two kinds lies in a directory. Raises ModelError for any other, and where there is none."""
    model_file = directory / "tokenizer.model"
    if model_file.is_file() and not is_tiktoken(model_file):
        read_proto(model_file)
        return "sentencepiece"
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ModelError(
            f"{directory} holds no tokenizer that can grow: neither a tokenizer.model of SentencePiece nor a "
            "tokenizer.json"
        )
    content = read_json(file)
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ModelError(f"{file} holds no BPE vocabulary (LLaMA and Qwen kind); other kinds cannot grow here")
    if "ByteLevel" in json.dumps([content.get("decoder"), content.get("pre_tokenizer")]):
        return "bytelevel"
    raise ModelError(
        f"{file} is no byte-level BPE; for a SentencePiece one its tokenizer.model is needed, copy it beside it"
    )


def read_proto(file: Path) -> Any:
    """The ModelProto of a SentencePiece file. Raises ModelError.

    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as reason:
        raise ModelError(f"{file} is no SentencePiece model, or a damaged one; copy or download it again") from reason
    except OSError as reason:
        raise ModelError(f"{file} cannot be read: {reason.strerror or reason}") from reason
    if not proto.pieces:
        raise ModelError(f"{file} is a SentencePiece model without pieces; copy or download it again")
    return proto


def is_tiktoken(file: Path) -> bool:
    """Whether a tokenizer.model is LLaMA-3's: lines of a base64 token and its rank."""
    with file.open("rb") as stream:
        words = stream.readline(512).split()
    if len(words) != 2 or not words[1].isdigit():
        return False
    try:
        return bool(base64.b64decode(words[0], validate=True))
    except binascii.Error:
        return False


def open_tokenizer(directory: Path) -> Any:
    """The tokenizer as AutoTokenizer loads it. Raises ModelError where there is none, or none with a Rust backend."""
    from onecard.model.load import load_tokenizer  # brings torch, which learning pieces has no use for

    if not any((directory / name).is_file() for name in VOCABULARY_FILES):
        # With its settings alone transformers makes a tokenizer of three tokens, without a word.
        raise ModelError(f"{directory} holds no tokenizer ({', '.join(VOCABULARY_FILES)}); copy its files there")
    tokenizer = load_tokenizer(str(directory))
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(f"the tokenizer in {directory} has no tokenizer.json form, which is needed here")
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text without BOS and EOS."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids as it is: control tokens shown, no space tidied away."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass
class Efficiency:
    """Tokens that the held-out lines of one script take, before and after."""

    script: str
    n_lines: int = 0
    n_characters: int = 0
    n_before: int = 0
    n_after: int = 0

    def add(self, other: Efficiency) -> None:
        self.n_lines += other.n_lines
        self.n_characters += other.n_characters
        self.n_before += other.n_before
        self.n_after += other.n_after


@dataclass
class TokenizerComparison:
    """Held-out text under two tokenizers: by script (the last row is all), and which of the new tokens it used."""

    rows: list[Efficiency]
    used: set[int]


def compare(old: Any, new: Any, texts: Iterable[str], new_ids: set[int]) -> TokenizerComparison:
    """Encode every line with both tokenizers; a line counts for the script that most of its letters are of."""
    rows: dict[str, Efficiency] = {}
    used: set[int] = set()
    total = Efficiency("all")
    for line in lines_of(texts):
        ids = encode(new, line)
        one = Efficiency(script_of(line), 1, len(line), len(encode(old, line)), len(ids))
        rows.setdefault(one.script, Efficiency(one.script)).add(one)
        total.add(one)
        used.update(new_ids.intersection(ids))
    ordered = sorted(rows.values(), key=lambda row: -row.n_characters)
    return TokenizerComparison([*ordered, total] if len(ordered) > 1 else ordered, used)


def script_of(text: str) -> str:
    """The script of most letters of a text; "other" without letters."""
    counts = Counter(script for script in map(_script, text) if script)
    return counts.most_common(1)[0][0] if counts else "other"


@cache
def _script(character: str) -> str:
    if not character.isalpha():
        return ""
    first = unicodedata.name(character, "other").split(" ")[0]
    return SCRIPTS.get(first, first.capitalize())


def table(comparison: TokenizerComparison) -> str:
    """Tokens per character before and after, a line for each script."""
    lines = [f"{'held-out text':<14}{'lines':>8}{'characters':>12}{'tokens/char before':>20}{'after':>8}{'change':>9}"]
    for row in comparison.rows:
        before, after = row.n_before / row.n_characters, row.n_after / row.n_characters
        change = f"{after / before - 1:+.1%}" if before else "-"
        lines.append(f"{row.script:<14}{row.n_lines:>8,}{row.n_characters:>12,}{before:>20.3f}{after:>8.3f}{change:>9}")
    return "\n".join(lines)


def _parts(sample: Conversation) -> list[str]:
    return [part for turn in sample.turns for part in (turn.content, turn.input)]


def _is_clean(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
