"""Segments to token ids: the same way in training and in generation, and as Hugging Face reads the whole text.

No token crosses the border between two segments. Apart from that a segment is tokenised as what it is: the beginning of
a text, what follows a control token, or the middle of a text, where no space of its own is put in front of it.

Takes any tokenizer that behaves like a Hugging Face one. Does not know masks, truncation or files.
"""

from __future__ import annotations

import hashlib
import json
import re
import weakref
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from onecard.console import warn
from onecard.data.chat_template import PromptRenderer, Segment, Template
from onecard.data.continuation import MARK, ContinuationTokenizer, continuing
from onecard.data.messages import Turn
from onecard.data.special_tokens import added_tokens, beginning_ids, single_token, special_tokens

_ANCHORS = ("\n", MARK, "。", "0", "|")
_PROBES = ("a", " a", "\n", "\na", "1", "你", "é🙂", "</")
_made: weakref.WeakKeyDictionary[Any, tuple[int, ContinuationTokenizer | None]] = weakref.WeakKeyDictionary()


class Border(Enum):
    """What a segment follows."""

    START = "nothing"
    TOKEN = "an added token"
    STRIPPING = "an added token that takes the blanks behind it with it"
    BLANK = "text that ends with a blank"
    TEXT = "text that ends with anything else"


class SegmentTokenizer:
    """A tokenizer bound to a template; holds what would be costly to find out for every record.

    beginning: ids that the tokenizer puts in front of a text, such as BOS. eos_id: id or None. end_id: the id that
    closes an answer; None where ordinary tokens spell the end.
    """

    def __init__(self, template: Template, tokenizer: Any) -> None:
        self.writer = PromptRenderer(template, tokenizer)
        self.beginning = beginning_ids(tokenizer)
        self.eos_id: int | None = tokenizer.eos_token_id
        self.end_id = single_token(self.writer.end, tokenizer)
        self._tokenizer = tokenizer
        self._beginning_text = tokenizer.decode(self.beginning[:1]).strip() if self.beginning else ""
        tokens = added_tokens(tokenizer).values()
        self._added = tuple(str(token) for token in tokens)
        self._stripping = tuple(str(token) for token in tokens if getattr(token, "rstrip", False))

    def ids(self, samples: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """Token ids of each segment of each sample, an answer's end included."""
        segments = list(chain.from_iterable(samples))
        texts = [segment.text if self.end_id is not None else segment.text + segment.end for segment in segments]
        borders = self._borders(samples) if self._sees_borders else [Border.START] * len(texts)
        if self._stripping:
            # Such a token takes the blanks behind it, but nothing is taken from an answer.
            takes = [b is Border.STRIPPING and not s.is_answer for b, s in zip(borders, segments, strict=True)]
            texts = [text.lstrip() if taken else text for text, taken in zip(texts, takes, strict=True)]
        encoded = self._encode(texts, borders)
        if self.end_id is not None:
            for segment, ids in zip(segments, encoded, strict=True):
                if segment.end:
                    ids.append(self.end_id)
        each = iter(encoded)
        return [list(islice(each, len(sample))) for sample in samples]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text that stands alone, as `tokenizer(text)` gives them, but without an EOS behind it."""
        return [*self.beginning_of(text), *self._encode([text], [Border.START])[0]]

    def beginning_of(self, text: str) -> list[int]:
        """What the tokenizer puts in front of this text: BOS, for most; nothing where the text brings it."""
        return [] if self._beginning_text and text.lstrip().startswith(self._beginning_text) else self.beginning

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """What generation is fed for the next answer."""
        segments = self.writer.segments(turns, add_generation_prompt=True)
        beginning = self.beginning_of(segments[0].text if segments else "")
        return [*beginning, *chain.from_iterable(self.ids([segments])[0])]

    def continued_ids(self, turns: Sequence[Turn]) -> list[int]:
        """What generation is fed to go on with the last turn, an answer: as training reads it, without its end."""
        *history, answer = self.writer.prompt_and_answer(turns)
        segments = [*history, answer._replace(end="")]
        return [*self.beginning_of(segments[0].text), *chain.from_iterable(self.ids([segments])[0])]

    def continues(self, prompt_ids: Sequence[int]) -> bool:
        """Whether an answer behind these ids goes on in their text, so that a space it begins with is its own."""
        return bool(self._anchors) and bool(prompt_ids) and prompt_ids[-1] not in added_tokens(self._tokenizer)

    @property
    def _sees_borders(self) -> bool:
        """Whether it matters what a segment follows; for most byte-level tokenizers it does not."""
        return bool(self._anchors) or bool(self._stripping)

    def _borders(self, samples: Sequence[Sequence[Segment]]) -> list[Border]:
        borders: list[Border] = []
        for segments in samples:
            border = Border.START
            for segment in segments:
                borders.append(border)
                border = self._border_after(segment, border)
        return borders

    def _border_after(self, segment: Segment, before: Border) -> Border:
        text = segment.text + segment.end
        if not text:
            return before
        if self._stripping and text.rstrip().endswith(self._stripping):
            return Border.STRIPPING
        if text.endswith(self._added):
            return Border.TOKEN
        return Border.BLANK if text[-1].isspace() else Border.TEXT

    def _encode(self, texts: Sequence[str], borders: Sequence[Border]) -> list[list[int]]:
        """Token ids of each text behind its border: read behind another text, whose ids are then cut off."""
        if not self._anchors:
            return self._plain(texts)
        return [self._behind(border, text) for text, border in zip(texts, borders, strict=True)]

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text alone, without what the tokenizer puts around it."""
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _behind(self, border: Border, text: str) -> list[int]:
        after_token = border in (Border.TOKEN, Border.STRIPPING)
        anchors = () if border is Border.START else (self._tokenizer.eos_token,) if after_token else self._anchors
        for anchor in filter(None, anchors):
            ids = _cut_off(*self._plain([anchor, anchor + text]))
            if ids is not None:
                return ids
        return self._plain([text])[0]  # the same in training and in generation, if not quite as in the whole text

    @cached_property
    def _anchors(self) -> tuple[str, ...]:
        """Texts with which none of the probes makes a common token; none where nothing is put in front of a text."""
        usable: dict[str, list[list[int] | None]] = {}
        for anchor in _ANCHORS:
            alone, *behind = self._plain([anchor, *(anchor + probe for probe in _PROBES)])
            usable[anchor] = [_cut_off(alone, ids) for ids in behind]
        good = {anchor: ids for anchor, ids in usable.items() if None not in ids}
        if not good:
            warn(f"{type(self._tokenizer).__name__} joins every text with the next one: its segments are read alone")
        return tuple(good) if any(ids != self._plain(_PROBES) for ids in good.values()) else ()


class FastSegmentTokenizer(SegmentTokenizer):
    """The same ids through the tokenizer's Rust backend, which skips offsets, masks and dictionaries."""

    def __init__(self, template: Template, tokenizer: Any) -> None:
        super().__init__(template, tokenizer)
        self._continuing = _continuing_of(tokenizer)
        self._marked: set[Border] = set()
        if self._continuing is not None:
            self._marked |= {Border.TEXT} if self._continuing.by_words else {Border.TEXT, Border.BLANK}
            self._marked |= {Border.TOKEN, Border.STRIPPING} if self._continuing.after_tokens else set()

    @property
    def _sees_borders(self) -> bool:
        return self._continuing is not None or bool(self._stripping)

    def continues(self, prompt_ids: Sequence[int]) -> bool:
        if self._continuing is None or not prompt_ids:
            return False
        return self._continuing.after_tokens or prompt_ids[-1] not in added_tokens(self._tokenizer)

    def _encode(self, texts: Sequence[str], borders: Sequence[Border]) -> list[list[int]]:
        if self._continuing is None:
            return self._plain(texts)
        marked = [MARK + text if text and b in self._marked else text for text, b in zip(texts, borders, strict=True)]
        return [encoding.ids for encoding in _without_extras(self._continuing.backend, marked)]

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in _without_extras(self._tokenizer.backend_tokenizer, texts)]


def segment_tokenizer(template: Template, tokenizer: Any) -> SegmentTokenizer:
    """The fastest kind that gives this tokenizer's own ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "encode_batch_fast") or getattr(tokenizer, "split_special_tokens", False):
        return SegmentTokenizer(template, tokenizer)
    # A class may do more in __call__ than its backend does; then its own way is the right one.
    end = template.end_text(tokenizer)
    probe = [" Übung 你好\n\n", end, f"a{end} b", " ".join(special_tokens(tokenizer).values())]
    own = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
    same = [encoding.ids for encoding in _without_extras(backend, probe)] == own
    return (FastSegmentTokenizer if same else SegmentTokenizer)(template, tokenizer)


def control_tokens(template: Template, tokenizer: Any) -> list[str]:
    """Texts with a meaning to the tokenizer, and the end of an answer: in a message they would teach a false stop."""
    added = added_tokens(tokenizer)
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
    digest.update(f"{tokenizer.bos_token_id} {tokenizer.eos_token_id} {beginning_ids(tokenizer)}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # These two are left behind by the last call and decide nothing here.
        state.pop("padding", None)
        state.pop("truncation", None)
        digest.update(json.dumps(state, sort_keys=True).encode())
        return digest.hexdigest()
    digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    digest.update(repr(added_tokens(tokenizer)).encode())
    model_file = getattr(tokenizer, "vocab_file", None)
    if model_file and Path(model_file).is_file():
        digest.update(Path(model_file).read_bytes())
    return digest.hexdigest()


def _continuing_of(tokenizer: Any) -> ContinuationTokenizer | None:
    """The copy that `continuing` makes, made once per tokenizer: with a large vocabulary it takes a second."""
    n_tokens = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True)
    known = _made.get(tokenizer)
    if known is None or known[0] != n_tokens:
        known = _made[tokenizer] = (n_tokens, continuing(tokenizer.backend_tokenizer))
    return known[1]


def _without_extras(backend: Any, texts: Sequence[str]) -> list[Any]:
    return backend.encode_batch_fast(list(texts), add_special_tokens=False)


def _cut_off(anchor: list[int], both: list[int]) -> list[int] | None:
    return both[len(anchor) :] if both[: len(anchor)] == anchor else None
