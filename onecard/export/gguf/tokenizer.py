"""A tokenizer as llama.cpp stores one: texts, scores, types and merges by id, special ids, and who adds BOS.

Knows the two kinds that the Llama, Mistral and Qwen families use: SentencePiece BPE with byte fallback, and byte-level
BPE. Does not know the GGUF format; hands over plain lists. llama.cpp leaves Unicode normalisation (Qwen's NFC) to
the caller. Of SentencePiece it can be told one thing only: whether a space is written before a text and after every
control token alike. What is told is what holds at the beginning, so that first questions get the ids that they have
here; after an earlier answer there may be one space token more or less.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.console import warn
from onecard.errors import ModelError
from onecard.export.vocabulary.corpus import SPACE
from onecard.storage import read_json_object

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
# (expression that cuts a text into words, whether a word that is a token skips the merges) -> llama.cpp's name.
PRE_TOKENIZERS = {
    (_CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _TAIL, True): "llama-bpe",
    (_CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _TAIL, False): "dbrx",
    (_CONTRACTIONS + _WORDS + r"|\p{N}" + _TAIL, False): "qwen2",
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
     r"|\s+(?!\S)|\s+", False): "qwen35",
    (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
     r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
     r"|\s+(?!\S)|\s+", True): "tekken",
    ("gpt-2", False): "gpt-2",
    ("digits, gpt-2", False): "smollm",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """One entry per embedding row. model: llama (SentencePiece) or gpt2 (byte-level); pre: llama.cpp's name of how a
    text is cut into words; scores and merges: whichever the model needs. bos_id is set even where none is added.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    bos_id: int
    eos_id: int
    eot_id: int | None
    unk_id: int | None
    pad_id: int | None
    adds_bos: bool
    adds_eos: bool
    adds_space: bool

    @property
    def n_unused(self) -> int:
        """Embedding rows that no token has."""
        return self.types.count(UNUSED)


def read_vocabulary(
    tokenizer: Any, directory: Path, n_rows: int, *, beginning: str = "", end_id: int | None = None
) -> Vocabulary:
    """The vocabulary of a loaded tokenizer, padded to the `n_rows` rows of the embedding.

    Args:
        directory: where tokenizer.model and generation_config.json are looked for.
        beginning: what stands before the words of a prompt: the text of BOS where the chat template writes it, as
            "<s>Hello" may lack the space that "Hello" gets.
        end_id: the token that closes an answer in the chat template, where that is one token.

    Raises ModelError: a kind llama.cpp has no name for, more tokens than rows, two tokens of one text, no end token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"the tokenizer in {directory} has no tokenizer.json form; save it with a newer transformers")
    state = json.loads(backend.to_str())
    model = state["model"]
    parts = {part["type"] for part in _parts(state.get("pre_tokenizer"))}
    if model.get("type") != "BPE":
        raise ModelError(
            f"the tokenizer in {directory} is of the kind {model.get('type')}; the Llama and Qwen families use BPE"
        )
    added = {int(token["id"]): token for token in state.get("added_tokens", [])}
    texts = {int(token_id): text for text, token_id in model["vocab"].items()}
    texts |= {token_id: token["content"] for token_id, token in added.items()}
    _check_ids(texts, n_rows, directory)
    byte_level = "ByteLevel" in parts
    pre = _pre_tokenizer(state, directory) if byte_level else _sentencepiece(state, parts, directory)
    tokens, types = _tokens_and_types(texts, added, n_rows, None if byte_level else tokenizer.unk_token_id)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    plain = {token_id: text for token_id, text in texts.items() if token_id not in added}
    scores = [] if byte_level else _scores(tokens, types, plain, merges, directory)
    bos_id, eos_id, eot_id = _special_ids(tokenizer, directory, n_rows, end_id)
    ids = tokenizer("a")["input_ids"]
    return Vocabulary(
        model="gpt2" if byte_level else "llama", pre=pre, tokens=tuple(tokens), types=tuple(types),
        scores=tuple(scores), merges=tuple(" ".join(merge) for merge in merges) if byte_level else (),
        bos_id=bos_id, eos_id=eos_id, eot_id=eot_id, unk_id=tokenizer.unk_token_id, pad_id=tokenizer.pad_token_id,
        adds_bos=tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        adds_eos=ids[-1] == eos_id, adds_space=not byte_level and _adds_space(tokenizer, beginning),
    )  # fmt: skip


def _tokens_and_types(
    texts: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], n_rows: int, unk_id: int | None
) -> tuple[list[str], list[int]]:
    """Text and type of every row. `unk_id` is None for byte-level tokenizers, which have no byte tokens either."""
    tokens, types = [], []
    spelled = set(texts.values())
    for row in range(n_rows):
        text = texts.get(row)
        if text is None:
            kind, text = UNUSED, f"[PAD{row}]"
            while text in spelled:
                text = f"[{text}]"
        elif row == unk_id:
            kind = UNKNOWN
        elif row in added:
            kind = CONTROL if added[row].get("special") else USER_DEFINED
            # llama.cpp looks for these in the text as it was typed, before spaces are rewritten.
            text = text.replace(SPACE, " ") if kind == USER_DEFINED and unk_id is not None else text
        else:
            kind = BYTE if unk_id is not None and _BYTE_TOKEN.fullmatch(text) else NORMAL
        tokens.append(text)
        types.append(kind)
    twice = [text for text, n in Counter(tokens).items() if n > 1]
    if twice:  # llama.cpp ends the whole process at a repeated text
        raise ModelError(f"the tokenizer has two tokens with the text {twice[0]!r}; llama.cpp cannot tell them apart")
    stripping = [token["content"] for token in added.values() if token.get("lstrip") or token.get("rstrip")]
    if stripping:
        warn(f"{len(stripping)} added tokens swallow spaces beside them (such as {stripping[0]!r}); llama.cpp does not")
    return tokens, types


def _scores(
    tokens: Sequence[str], types: Sequence[int], plain: Mapping[int, str], merges: Sequence[tuple[str, ...]],
    directory: Path,
) -> list[float]:  # fmt: skip
    """Scores by id: llama.cpp joins the pair whose result has the highest one.

    Those of tokenizer.model where it tells the same pieces; else made from the order of the merges.
    """
    stored = _stored_scores(directory / "tokenizer.model", plain)
    if stored is None:
        stored = {}
        for rank, merge in enumerate(merges):
            stored.setdefault("".join(merge), -float(rank))
    never = -float(len(merges) + 1)
    scores = []
    for token, kind in zip(tokens, types, strict=True):
        if kind == UNUSED:
            scores.append(UNUSED_SCORE)
        elif kind in (NORMAL, BYTE):
            scores.append(stored.get(token, never if len(token) > 1 and kind == NORMAL else 0.0))
        else:
            scores.append(stored.get(token, ADDED_SCORE if kind == USER_DEFINED else 0.0))
    return scores


def _stored_scores(file: Path, plain: Mapping[int, str]) -> dict[str, float] | None:
    """Score by piece, or None where the file is missing, unreadable or of another vocabulary."""
    if not file.is_file():
        return None
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromFile(str(file))
    except (RuntimeError, OSError):
        warn(f"{file} cannot be read; the scores of its pieces are made from tokenizer.json instead")
        return None
    pieces = {i: processor.IdToPiece(i) for i in range(processor.GetPieceSize())}
    if any(pieces.get(token_id) != text for token_id, text in plain.items()):
        return None
    return {piece: processor.GetScore(i) for i, piece in pieces.items()}


def _special_ids(tokenizer: Any, directory: Path, n_rows: int, end_id: int | None) -> tuple[int, int, int | None]:
    """(BOS, EOS, end of turn or None). Without ids of its own llama.cpp takes 11, an ordinary token, for both."""
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise ModelError(f"the tokenizer in {directory} has no eos token; llama.cpp would never stop")
    configured = read_json_object(directory / "generation_config.json")
    named = [configured.get("bos_token_id"), read_json_object(directory / "config.json").get("bos_token_id"), eos_id]
    usable = [i for i in (tokenizer.bos_token_id, *named) if isinstance(i, int) and 0 <= i < n_rows]
    ends = configured.get("eos_token_id")
    others = [i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int) and 0 <= i < n_rows]
    candidates = [end_id] if end_id is not None else others
    return usable[0], eos_id, next((i for i in candidates if i != eos_id), None)


def _pre_tokenizer(state: Mapping[str, Any], directory: Path) -> str:
    """llama.cpp's name of how this byte-level tokenizer cuts a text into words."""
    found: list[str] = []
    for part in _parts(state.get("pre_tokenizer")):
        if part["type"] == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            found.append(part["pattern"].get("Regex", "a fixed text"))
        elif part["type"] == "Digits" and part.get("individual_digits"):
            found.append("digits")
        elif part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
            found += ["gpt-2"] if part.get("use_regex", True) else []
        else:
            found.append(json.dumps(part))
    rule = ", ".join(found)
    name = PRE_TOKENIZERS.get((rule, bool(state["model"].get("ignore_merges"))))
    if name is None:
        raise ModelError(
            f"the tokenizer in {directory} cuts words in a way that has no name here ({rule[:200]!r}); known are "
            f"those of {', '.join(PRE_TOKENIZERS.values())}. With a wrong name llama.cpp would read other tokens"
        )
    _warn_of_normaliser(state, allowed=("NFC",))
    return name


def _sentencepiece(state: Mapping[str, Any], parts: set[str], directory: Path) -> str:
    writes_spaces = "Metaspace" in parts or any(
        part.get("content") == SPACE for part in _parts(state.get("normalizer")) if part["type"] == "Replace"
    )
    if not writes_spaces or parts - {"Metaspace"} or not state["model"].get("byte_fallback"):
        raise ModelError(
            f"the tokenizer in {directory} is neither byte-level BPE nor SentencePiece BPE with byte fallback "
            f"(parts: {', '.join(sorted(parts)) or 'none'}); llama.cpp has no equal for it"
        )
    _warn_of_normaliser(state, allowed=("Prepend", "Replace"))
    return "default"


def _adds_space(tokenizer: Any, beginning: str) -> bool:
    n_before = len(tokenizer(beginning, add_special_tokens=False)["input_ids"]) if beginning else 0
    ids = tokenizer(beginning + "a", add_special_tokens=False)["input_ids"]
    return str(tokenizer.convert_ids_to_tokens(ids[n_before])).startswith(SPACE)


def _warn_of_normaliser(state: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    others = sorted({part["type"] for part in _parts(state.get("normalizer"))} - set(allowed))
    if others:
        warn(f"the tokenizer normalises texts first ({', '.join(others)}); llama.cpp does not, so some tokens differ")


def _parts(node: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, with sequences laid flat."""
    if node and node.get("type") == "Sequence":
        for inner in node.get("pretokenizers") or node.get("normalizers") or []:
            yield from _parts(inner)
    elif node:
        yield node


def _check_ids(texts: Mapping[int, str], n_rows: int, directory: Path) -> None:
    beyond = sorted(token_id for token_id in texts if token_id >= n_rows)
    if beyond:
        raise ModelError(
            f"the tokenizer in {directory} has {len(texts)} tokens, and the model {n_rows} embedding rows: no row for "
            f"{texts[beyond[0]]!r} (id {beyond[0]}); take the tokenizer that belongs to this model, or resize the model"
        )
