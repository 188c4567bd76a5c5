"""Looking into `model.generate` while it runs in a thread of its own, and stopping it, through its public hooks.

The generating thread hands over the ids it has whenever the reading thread wants some, and no more often: an answer
that nobody looks at costs nothing. Knows ids, scores and threads. It does not know text: `generate.py` does.

Where the ids come from: with one beam from the stopping criterion, which sees each new token at once; in both beam
modes from the logits processor, whose rows are the running beams of each prompt, the best one first (in the criterion
they would be candidates, among them some that are about to be dropped).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from onecard.model.model_layers import decoder_layers


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log of the probability that the model gave this token, and those of the likeliest ones, likeliest first.

    Before temperature, top-k and top-p; after repetition penalty and banned n-grams.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class GenerationCancelled(Exception):
    """Raised inside the model's forward pass when nobody waits for its result any more."""


class StreamState:
    """What the generating and the reading thread share.

    `cancel` may be set from anywhere and is only read here; `deadline` is a time of `time.monotonic`, or infinity.
    """

    def __init__(self, n_prompt: int, cancel: threading.Event, deadline: float) -> None:
        self.n_prompt, self.cancel, self.deadline = n_prompt, cancel, deadline
        self.abandoned = False  # the reader has closed its iterator
        self._wanted = True
        self._snapshot: list[list[int]] | None = None
        self._finished = False
        self._changed = threading.Condition()

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() >= self.deadline

    @property
    def must_end(self) -> bool:
        return self.abandoned or self.cancel.is_set() or self.out_of_time

    def offer(self, input_ids: Tensor) -> None:
        """Called at each step by the generating thread with input_ids (rows * beams, prompt + new)."""
        if not self._wanted:
            return
        snapshot = input_ids[:, self.n_prompt :].tolist()
        with self._changed:
            self._wanted, self._snapshot = False, snapshot
            self._changed.notify()

    def finish(self) -> None:
        """Called by the generating thread when it ends, whether it succeeded or not."""
        with self._changed:
            self._finished = True
            self._changed.notify()

    def snapshots(self, interval_seconds: float) -> Iterator[list[list[int]]]:
        """The new ids of all rows and beams, at most once per interval, until the generating thread ends."""
        while True:
            begun = time.monotonic()
            with self._changed:
                while self._snapshot is None and not self._finished:
                    self._changed.wait()
                snapshot, self._snapshot = self._snapshot, None
                if self._finished:
                    return
            if snapshot is not None:
                yield snapshot
            with self._changed:
                # Sleeps through the interval; the end of the answer cuts it short.
                while not self._finished and (left := begun + interval_seconds - time.monotonic()) > 0:
                    self._changed.wait(left)
                self._wanted = True


class BeamStreamer(LogitsProcessor):
    """Shows the running beams to who reads the answer, and changes nothing."""

    def __init__(self, stream_state: StreamState) -> None:
        self._state = stream_state

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (rows * beams, prompt + new), each row's best beam first."""
        self._state.offer(input_ids)
        return scores


class CancelCriteria(StoppingCriteria):
    """Ends all rows when nobody waits any more: `generate` then returns as if they had ended by themselves.

    shows: hand the rows, their newest tokens included, to the reader as well.
    """

    def __init__(self, stream_state: StreamState, *, shows: bool) -> None:
        self._state, self._shows = stream_state, shows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._shows:
            self._state.offer(input_ids)
        return torch.full((len(input_ids),), self._state.must_end, dtype=torch.bool, device=input_ids.device)


class EachStep(StoppingCriteria):
    """Calls a function with the ids after each step, and ends nothing."""

    def __init__(self, call: Callable[[Tensor], None]) -> None:
        self._call = call

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._call(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class LogprobsStreamer(LogitsProcessor):
    """Keeps the log-probabilities of each step until the token that was chosen is known.

    The first of our processors, so that it sees the scores before temperature; a criterion that sees the choice tells
    it to `take`. One beam only: beams change their past.
    """

    def __init__(self, n_rows: int, n_top: int) -> None:
        self.rows: list[list[TokenLogprob]] = [[] for _ in range(n_rows)]
        self._n_top = n_top
        self._logprobs: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (rows, vocab) -> the same."""
        self._logprobs = scores.float().log_softmax(dim=-1)
        return scores

    def take(self, chosen: Tensor) -> None:
        """chosen (rows,): the token that each row got."""
        assert self._logprobs is not None
        entries = token_logprobs(self._logprobs, chosen, self._n_top)
        for row, entry in zip(self.rows, entries, strict=True):
            row.append(entry)


def token_logprobs(logprobs: Tensor, chosen: Tensor, n_top: int) -> list[TokenLogprob]:
    """logprobs (rows, vocab), chosen (rows,) -> one entry per row with its `n_top` likeliest alternatives."""
    own = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(n_top, dim=-1) if n_top else (logprobs[:, :0], chosen[:, None][:, :0])
    return [
        TokenLogprob(token_id, logprob, tuple(zip(top_ids, top_values, strict=True)))
        for token_id, logprob, top_ids, top_values in zip(
            chosen.tolist(), own, ids.tolist(), values.tolist(), strict=True
        )
    ]


@contextmanager
def leaving_early(model: Any, stream_state: StreamState) -> Iterator[None]:
    """Inside, the model's forward pass raises `GenerationCancelled` between two decoder layers when nobody waits.

    The stopping criteria are asked only after a whole forward pass, and that of a long prompt takes seconds. Not for
    models whose layers lie partly in RAM (their own hooks must not be cut off halfway) or are compiled.
    """
    moved = {"cpu", "disk"} & {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    layers = [] if moved and len(model.hf_device_map) > 1 else decoder_layers(model)

    own = threading.get_ident()  # other threads compute with the model, too

    def check(*_: Any) -> None:
        if stream_state.must_end and threading.get_ident() == own:
            raise GenerationCancelled

    handles = [layer.register_forward_pre_hook(check) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
