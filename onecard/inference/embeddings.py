"""Embeddings and log-probabilities: a vector for a whole text, and a probability for each of its tokens.

Knows one model and token ids. It does not know queues, limits (engine.py) or how clients name things
(serve/api/app.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from onecard.errors import ModelError
from onecard.inference.model_limits import go_together, reads_in_pieces
from onecard.inference.streamer import TokenLogprob, token_logprobs
from onecard.model.output_head import states_before_head

Check = Callable[[], None]  # called between pieces; raises when nobody waits any more
PIECE_TOKENS = 256  # logits of so many positions exist at once: 128 MB for a vocabulary of 128k


def embed(model: Any, prompts: Sequence[Sequence[int]], check: Check) -> list[Sequence[float]]:
    """For each text the mean over its tokens of the last hidden states, scaled to length 1, as float32. (n, hidden)

    Mean pooling, as for sentence embeddings (https://arxiv.org/abs/1908.10084); the model was not trained for it, so
    the vectors serve for rough comparison.
    """
    vectors: dict[int, Sequence[float]] = {}
    with torch.inference_mode():
        for numbers in _batches(model, [len(ids) for ids in prompts]):
            check()
            for number, total in zip(numbers, _summed(model, [prompts[k] for k in numbers], check), strict=True):
                vector = total / torch.linalg.vector_norm(total).clamp_min(1e-12)
                vectors[number] = array("f", vector.tolist())
    return [vectors[number] for number in range(len(prompts))]


def _batches(model: Any, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of texts that are read at once: short ones together, as many as PIECE_TOKENS hold with their padding."""
    most = PIECE_TOKENS if reads_in_pieces(model) and go_together(model, (1, 2)) else 0
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda k: lengths[k]):
        if batch and (len(batch) + 1) * lengths[number] > most:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _summed(model: Any, texts: Sequence[Sequence[int]], check: Check) -> Sequence[Tensor]:
    """For each text the sum over its tokens of the last hidden states. (texts, hidden)"""
    if not reads_in_pieces(model):
        return [_whole(model, ids)[0].double().sum(dim=0) for ids in texts]
    if len(texts) == 1:
        pieces = _pieces(model, texts[0], check, output_hidden_states=True)
        return [sum((out.hidden_states[-1][0].double().sum(dim=0) for out in pieces), torch.zeros(()))]
    # What stands behind a text is not seen by it, so padding on the right needs no mask.
    longest = max(map(len, texts))
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts], device=model.device)
    states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
    return [row[: len(text)].double().sum(dim=0) for row, text in zip(states, texts, strict=True)]


def score(model: Any, ids: Sequence[int], n_top: int, check: Check) -> list[TokenLogprob | None]:
    """The log-probability of each token after those before it, with the `n_top` likeliest; None for the first.

    ids A B C  ->  [None, log p(B | A), log p(C | A B)]
    """
    scores: list[TokenLogprob | None] = [None]
    if len(ids) < 2:
        return scores
    with torch.inference_mode():
        for logits in _logits(model, ids[:-1], check):
            following = torch.tensor(ids[len(scores) : len(scores) + len(logits)], device=logits.device)
            scores += token_logprobs(logits.float().log_softmax(dim=-1), following, n_top)
    return scores


def _logits(model: Any, ids: Sequence[int], check: Check) -> Iterator[Tensor]:
    """The logits (tokens, vocab) of some tokens after others."""
    if reads_in_pieces(model):
        for out in _pieces(model, ids, check):
            yield out.logits[0]
        return
    states, to_logits = _whole(model, ids)
    for some in states.split(PIECE_TOKENS):
        check()
        yield to_logits(some)


def _pieces(model: Any, ids: Sequence[int], check: Check, **wanted: bool) -> Iterator[Any]:
    """What the model says of each piece, which it reads after the cache of those before."""
    cache = None
    for start in range(0, len(ids), PIECE_TOKENS):
        check()
        piece = torch.tensor([list(ids[start : start + PIECE_TOKENS])], device=model.device)
        out = model(input_ids=piece, past_key_values=cache, use_cache=True, **wanted)
        cache = out.past_key_values
        yield out


def _whole(model: Any, ids: Sequence[int]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The last hidden states (tokens, hidden) of a text that is read at once, and the way from them to logits."""
    found = states_before_head(model, {"input_ids": torch.tensor([list(ids)], device=model.device)})
    if found is None:
        raise ModelError(f"{type(model).__name__} gives out no hidden states, so its texts cannot be measured here")
    return found[0][0], found[1]
