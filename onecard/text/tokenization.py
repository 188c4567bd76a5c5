"""Segments to token ids: each segment alone, the same way in training and in generation.

Takes any tokenizer that behaves like a Hugging Face one. Knows its habits: who adds a space in front of a text
(SentencePiece), who is fast in batches, which texts are control tokens. Does not know masks, truncation or files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from onecard.text.conversation import Turn
from onecard.text.template import Segment, Template, Writer, single_token, special_tokens


class SegmentTokenizer:
    """A tokenizer bound to a template; holds what would be costly to find out for every record.

    bos_id, eos_id: ids or None. end_id: the id that closes an answer; None where ordinary tokens spell the end.
    """

    def __init__(self, template: Template, tokenizer: Any) -> None:
        self.writer = Writer(template, tokenizer)
        self.bos_id: int | None = tokenizer.bos_token_id if tokenizer.bos_token else None
        self.eos_id: int | None = tokenizer.eos_token_id
        self.end_id = single_token(self.writer.end, tokenizer)
        self._tokenizer = tokenizer
        self._adds_space, self._swallows_space = self._habits()

    def ids(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Token ids of each segment, an answer's end included."""
        batch = self.texts_to_ids([self.text_of(segment) for segment in segments])
        if self.end_id is not None:
            for ids, segment in zip(batch, segments, strict=True):
                if segment.end:
                    ids.append(self.end_id)
        return batch

    def text_of(self, segment: Segment, *, with_end: bool = True) -> str:
        """The text that is tokenised for a segment; the end is in it only where it is not one token."""
        lead = "" if self._adds_space else segment.lead
        end = segment.end if with_end and self.end_id is None else ""
        return lead + segment.text + end

    def texts_to_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, tokenised alone, without the tokenizer's own BOS or EOS.

        A tokenizer that takes a leading space for the one it would add itself gets a second one, so that decoding
        the ids gives the text back: " Hello" -> ids of "  Hello" -> decoded " Hello".
        """
        if not texts:
            return []
        if self._swallows_space:
            texts = [" " + text if text.startswith(" ") else text for text in texts]
        return self._batch(list(texts))

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids of a sample's beginning with exactly one BOS, if the tokenizer has one."""
        if self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """What generation is fed for the next answer."""
        segments = self.writer.segments(turns, add_generation_prompt=True)
        return self.with_bos([token_id for ids in self.ids(segments) for token_id in ids])

    def _batch(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _habits(self) -> tuple[bool, bool]:
        """Whether a space is added before every text, and whether a text's own first space is taken for it.

        Llama 2 as transformers 5 loads it: "a" -> "▁a", " a" -> "▁a": adds one, swallows one. Byte-level: neither.
        """
        plain, spaced, newline, after_newline = self._batch(["a", " a", "\n", "\na"])
        return plain != after_newline[len(newline) :], plain == spaced


class FastSegmentTokenizer(SegmentTokenizer):
    """The same ids through the tokenizer's Rust backend, which skips offsets, masks and dictionaries."""

    def _batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def segment_tokenizer(template: Template, tokenizer: Any) -> SegmentTokenizer:
    """The fastest kind that gives this tokenizer's own ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    splits = getattr(tokenizer, "split_special_tokens", False)
    if not hasattr(backend, "encode_batch_fast") or splits:
        return SegmentTokenizer(template, tokenizer)
    slow, fast = SegmentTokenizer(template, tokenizer), FastSegmentTokenizer(template, tokenizer)
    # A class may do more in __call__ than its backend does; then its own way is the right one.
    probe = [" Übung 你好\n\n", slow.writer.end, f"a{slow.writer.end} b", " ".join(special_tokens(tokenizer).values())]
    return fast if fast.texts_to_ids(probe) == slow.texts_to_ids(probe) else slow


def control_tokens(template: Template, tokenizer: Any) -> list[str]:
    """Texts with a meaning to the tokenizer, and the end of an answer: in a message they would teach a false stop."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = [str(token) for token in added.values() if getattr(token, "special", False)]
    return sorted({*special, *tokenizer.all_special_tokens, template.end_text(tokenizer)} - {""})


def any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """One compiled expression that finds any of these texts, the longest first; None for no texts."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over everything that decides token ids: vocabulary, merges, normaliser, special tokens."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    digest.update(json.dumps(special_tokens(tokenizer), sort_keys=True).encode())
    digest.update(f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # These two are left behind by the last call and decide nothing here.
        state.pop("padding", None)
        state.pop("truncation", None)
        digest.update(json.dumps(state, sort_keys=True).encode())
        return digest.hexdigest()
    digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    model_file = getattr(tokenizer, "vocab_file", None)
    if model_file and Path(model_file).is_file():
        digest.update(Path(model_file).read_bytes())
    return digest.hexdigest()
