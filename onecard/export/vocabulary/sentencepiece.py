"""A SentencePiece BPE tokenizer (LLaMA 1 and 2, Mistral) that grows: its tokenizer.model and its merges.

https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
Knows pieces, types and scores. Does not know which pieces are worth adding (bpe_growth.py).
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onecard.errors import ModelError
from onecard.export.vocabulary.bpe_growth import PieceRules, VocabularyExtension, grow
from onecard.export.vocabulary.corpus import SPACE, encode, read_proto

MODEL = "tokenizer.model"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
BPE = 2
LINE_BREAKS_AND_CONTROL = ("Cc", "Zl", "Zp", "Cs")  # Unicode categories


def open_old(directory: Path, vocab: Mapping[str, int]) -> Any:
    """The ModelProto of a tokenizer, checked against what AutoTokenizer loads from the same directory.

    Raises ModelError: not BPE, or other ids than tokenizer.json.
    """
    proto = read_proto(directory / MODEL)
    if proto.trainer_spec.model_type != BPE:
        raise ModelError(f"{directory / MODEL} is no BPE model (LLaMA, Mistral); pieces cannot be added to other kinds")
    different = [p.piece for i, p in enumerate(proto.pieces) if vocab.get(p.piece) != i]
    if different:
        raise ModelError(
            f"{directory / MODEL} and the tokenizer.json beside it disagree: {len(different)} pieces have other ids, "
            f"such as {different[0]!r}; take both from one source"
        )
    return proto


def candidates(new_path: Path, old: Any, old_directory: Path) -> tuple[list[str], Counter[str]]:
    """The pieces of a newly trained model that the old one could read, the best first, and why others are not."""
    import sentencepiece

    new = read_proto(new_path / MODEL)
    normaliser = sentencepiece.SentencePieceProcessor(model_file=str(old_directory / MODEL))
    left_out: Counter[str] = Counter()
    ranked: list[tuple[float, int, str]] = []
    for i, piece in enumerate(new.pieces):
        reason = _unusable(piece, old.trainer_spec, normaliser)
        if reason:
            left_out[reason] += 1
        else:
            ranked.append((-piece.score, i, piece.piece))
    return [text for _, _, text in sorted(ranked)], left_out


def _unusable(piece: Any, old: Any, normaliser: Any) -> str:
    """Why a piece could never or should never be read by the old tokenizer; empty when it is fine."""
    text = piece.piece
    if piece.type != NORMAL:
        return "control tokens of the new model"
    if any(unicodedata.category(c) in LINE_BREAKS_AND_CONTROL for c in text):
        return "with line breaks or control characters"
    if SPACE in text.lstrip(SPACE) and old.split_by_whitespace:
        return "across words"
    if old.split_digits and len(text) > 1 and any(c.isdigit() for c in text):
        return "with digits, which the old tokenizer keeps apart"
    if normaliser.normalize(text.replace(SPACE, " ")) not in (text, SPACE + text):
        return "changed by the old tokenizer's normalisation"
    return ""


def grown(
    proto: Any, pieces: Sequence[str], vocab: Mapping[str, int], max_new: int, moved_on: Callable[[int], object]
) -> VocabularyExtension:
    """What to add to the old model."""
    normal = [p for p in proto.pieces if p.type == NORMAL]
    by_score = sorted(range(len(normal)), key=lambda i: (-normal[i].score, i))
    rules = PieceRules({normal[i].piece: rank for rank, i in enumerate(by_score)})
    return grow(pieces, rules, vocab, max_new=max_new, characters_may_be_new=True, moved_on=moved_on)


def write_model(
    proto: Any,
    growth: VocabularyExtension,
    added: Mapping[int, tuple[str, bool]],
    fillers: Mapping[str, int],
    file: Path,
) -> list[tuple[str, str]]:
    """Write tokenizer.model with the new pieces at the end; returns the joins by which they and the old ones form.

    In this format a piece's place is its id. So tokens that were added outside of it (a pad token at 32000) get
    their place in it, and a hole in the ids an unused piece. New scores lie below all old ones and fall with the id:
    raw SentencePiece goes by the score, a conversion to tokenizer.json by the id, and the two must agree.
    """
    outside = {i: token for i, token in added.items() if i >= len(proto.pieces)}
    holes = {i: name for name, i in fillers.items() if i >= len(proto.pieces)}
    lowest = min(p.score for p in proto.pieces)
    for i in range(len(proto.pieces), len(proto.pieces) + len(outside) + len(holes)):
        text, special = outside.get(i, (holes.get(i, ""), False))
        kind = UNUSED if i in holes else CONTROL if special else USER_DEFINED
        _append(proto, text, 0.0, kind)
    for n, piece in enumerate(growth.pieces, start=1):
        _append(proto, piece, lowest - n, NORMAL)
    proto.trainer_spec.MergeFrom(type(proto.trainer_spec)(vocab_size=len(proto.pieces)))
    file.write_bytes(proto.SerializeToString())
    return joins_of(proto, set(growth.pieces))


def _append(proto: Any, text: str, score: float, kind: int) -> None:
    # `add` takes the fields at once: nothing is assigned to another library's attributes.
    proto.pieces.add(piece=text, score=score, type=kind)


def joins_of(proto: Any, new: set[str]) -> list[tuple[str, str]]:
    """Every pair of normal pieces that makes a normal piece and has a new one in it, in the order of the result's id.

    SentencePiece joins by the text that results, tokenizer.json lists pairs: so all pairs are listed.
    """
    ids = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == NORMAL}
    found: list[tuple[int, int, str, str]] = []
    for text, i in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids and not new.isdisjoint((text, left, right)):
                found.append((i, cut, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]


def insert_merges(content: dict[str, Any], joins: Sequence[tuple[str, str]], old_vocab: Mapping[str, int]) -> None:
    """Put the joins into tokenizer.json: those of new pieces at the end, those of an old piece behind its old ones."""
    merges = content["model"]["merges"]
    as_text = bool(merges) and isinstance(merges[0], str)
    results = ["".join(m.split(" ")) if as_text else "".join(m) for m in merges]
    reached = [0] * len(results)
    highest = 0
    for place, result in enumerate(results):
        highest = reached[place] = max(highest, old_vocab.get(result, 0))
    listed = list(enumerate(merges))
    at_end: list[Any] = []
    for left, right in joins:
        merge = f"{left} {right}" if as_text else [left, right]
        if left + right in old_vocab:
            listed.append((bisect_right(reached, old_vocab[left + right]) - 1, merge))
        else:
            at_end.append(merge)
    content["model"]["merges"] = [m for _, m in sorted(listed, key=lambda item: item[0])] + at_end


def check_files(old: Any, grown: Any, directory: Path, texts: Sequence[str]) -> None:
    """Compare raw SentencePiece with AutoTokenizer wherever the two agreed before. Raises ModelError."""
    import sentencepiece

    raw_old = sentencepiece.SentencePieceProcessor(model_file=str(old.directory / MODEL))
    raw_new = sentencepiece.SentencePieceProcessor(model_file=str(directory / MODEL))
    for text in texts:
        agreed = raw_old.encode(text) == encode(old.tokenizer, text)
        if agreed and raw_new.encode(text) != encode(grown, text):
            raise ModelError(
                f"tokenizer.model and tokenizer.json of the new tokenizer disagree on {text[:80]!r}; nothing was "
                "written. Please report this with the name of the tokenizer"
            )
