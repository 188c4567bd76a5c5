"""What a model makes of a text without answering it: a vector for the whole, and a probability for each token.

Knows one model and token ids. It does not know queues, limits (engine.py) or how clients name things (server.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from onecard.console import ModelError
from onecard.model.loss import states_before_head
from onecard.talk.model_limits import reads_in_pieces
from onecard.talk.watching import TokenLogprob, token_logprobs

Check = Callable[[], None]  # called between pieces; raises when nobody waits any more
PIECE_TOKENS = 256  # logits of so many positions exist at once: 128 MB for a vocabulary of 128k


def embed(model: Any, ids: Sequence[int], check: Check) -> list[float]:
    """The mean over the tokens of the last hidden states, scaled to length 1. (hidden,)

    Mean pooling, as for sentence embeddings (https://arxiv.org/abs/1908.10084); the model was not trained for it, so
    the vectors serve for rough comparison.
    """
    total: Any = 0.0
    with torch.inference_mode():
        if reads_in_pieces(model):
            for out in _pieces(model, ids, check, output_hidden_states=True):
                total = total + out.hidden_states[-1][0].double().sum(dim=0)
        else:
            total = _whole(model, ids)[0].double().sum(dim=0)
        vector = total / torch.linalg.vector_norm(total).clamp_min(1e-12)
    return [float(value) for value in vector.tolist()]


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
