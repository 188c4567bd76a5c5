"""When an answer ends, and what of the generated tokens is shown.

An answer ends at a stop id (the template's end token), at a stop text, or at `max_new_tokens`. Knows token ids and
their text (`detokenize.py`). It does not know models or templates. Nothing is stripped from a text but what ended it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria

from onecard.inference.detokenize import decode, decode_after, without_cut_character, without_open_end

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class FinishedAnswer:
    """An answer's text, why it ended (None: it has not), and the number of its tokens, the end included."""

    text: str
    reason: FinishReason | None
    n_tokens: int


class StopAtText(StoppingCriteria):
    """Ends the rows in whose newest tokens a stop text stands.

    Only the tail is decoded at each step: a stop text of n bytes lies in the last n tokens, and one more goes before
    them because SentencePiece drops the space in front of the first. Keeps no state, so it serves beams as well.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any, n_prompt: int) -> None:
        self._texts, self._tokenizer, self._n_prompt = texts, tokenizer, n_prompt
        self.n_tail = max(len(text.encode("utf-8")) for text in texts) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids (rows, prompt + new) -> (rows,), True where the row is done."""
        start = max(self._n_prompt, input_ids.shape[1] - self.n_tail)
        hits = [self.is_in(ids) for ids in input_ids[:, start:].tolist()]
        return torch.tensor(hits, dtype=torch.bool, device=input_ids.device)

    def is_in(self, new_ids: Sequence[int]) -> bool:
        """Whether a stop text stands in the newest of these tokens."""
        tail = decode(new_ids[-self.n_tail :], self._tokenizer)
        return any(text in tail for text in self._texts)


class MaxNewTokensPerRow(StoppingCriteria):
    """Ends each row at a length of its own, so that a long prompt does not shorten the answers beside it."""

    def __init__(self, limits: Sequence[int], n_prompt: int) -> None:
        self._limits, self._n_prompt = torch.tensor(limits), n_prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids (rows, prompt + new), several beams of a row one after another -> (rows,)."""
        limits = self._limits.repeat_interleave(len(input_ids) // len(self._limits)).to(input_ids.device)
        return input_ids.shape[1] - self._n_prompt >= limits


def ended_answer(
    new_ids: Sequence[int],
    tokenizer: Any,
    *,
    stop_ids: Sequence[int],
    stop_texts: Sequence[str],
    max_new_tokens: int,
    before: Sequence[int] = (),
    lead: str = "",
    hidden: Set[int] | None = None,
) -> FinishedAnswer:
    """What is shown of a row's new ids, padding behind its end included.

    `before`: ids whose text the answer continues. `lead`: what is not shown at its beginning. `hidden`: see `decode`.

    stop id 2, ids  7 8 9 2 0 0        -> text of 7 8 9, "stop", 4 tokens
    stop text "\\nUser:", text "Yes.\\nUser: and"  -> "Yes.", "stop"
    max_new_tokens 3, ids 7 8 226       -> text of 7 8, "length": 226 alone is no whole character
    """
    ids = list(new_ids[:max_new_tokens])
    end = next((place for place, token_id in enumerate(ids) if token_id in stop_ids), None)
    answer = ids if end is None else ids[:end]
    text = answer_text(answer, tokenizer, before, lead, hidden)
    cut = _first_stop(text, stop_texts)
    if cut is not None:
        # The shortest beginning that holds a stop text; more tokens never make it go away.
        lengths = range(1, len(answer) + 1)
        n_tokens = 1 + bisect_left(
            lengths,
            True,
            key=lambda n: _first_stop(answer_text(answer[:n], tokenizer, before, lead, hidden), stop_texts) is not None,
        )
        return FinishedAnswer(text[:cut], "stop", n_tokens)
    if end is not None:
        return FinishedAnswer(text, "stop", end + 1)
    return FinishedAnswer(without_cut_character(text), "length", len(ids))


def answer_so_far(
    new_ids: Sequence[int], tokenizer: Any, *, stop_texts: Sequence[str], max_new_tokens: int, **ends: Any
) -> FinishedAnswer:
    """`ended_answer` while more tokens may come: `reason` None, and nothing in the text that they can still change."""
    ended = ended_answer(new_ids, tokenizer, stop_texts=stop_texts, max_new_tokens=max_new_tokens, **ends)
    if ended.reason == "stop" or len(new_ids) >= max_new_tokens:
        return ended
    return FinishedAnswer(without_open_end(ended.text, stop_texts), None, ended.n_tokens)


def answer_text(
    ids: Sequence[int], tokenizer: Any, before: Sequence[int] = (), lead: str = "", hidden: Set[int] | None = None
) -> str:
    """The text of an answer's ids behind `before`, without the `lead` or the part of it that is there so far."""
    text = decode_after(before, ids, tokenizer, hidden)
    return "" if lead.startswith(text) else text.removeprefix(lead)


def _first_stop(text: str, stop_texts: Sequence[str]) -> int | None:
    """Where the first stop text begins, or None."""
    found = [place for place in (text.find(stop) for stop in stop_texts) if place >= 0]
    return min(found, default=None)
