"""What a model makes of a text without answering it: a vector for the whole, and a probability for each token.

Knows one model and token ids. It does not know queues, limits (engine.py) or how clients name things (server.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from onecard.talk.watching import TokenLogprob, token_logprobs

Check = Callable[[], None]  # called between pieces; raises when nobody waits any more
PIECE_TOKENS = 256  # logits of so many positions exist at once: 128 MB for a vocabulary of 128k


def embed(model: Any, ids: Sequence[int], check: Check) -> list[float]:
    """The mean over the tokens of the last hidden states, scaled to length 1. (hidden,)

    Mean pooling, as for sentence embeddings (https://arxiv.org/abs/1908.10084); the model was not trained for it, so
    the vectors serve for rough comparison.
    """
    total: Any = 0.0
    cache = None
    with torch.inference_mode():
        for start in range(0, len(ids), PIECE_TOKENS):
            check()
            piece = torch.tensor([list(ids[start : start + PIECE_TOKENS])], device=model.device)
            out = model(input_ids=piece, past_key_values=cache, use_cache=True, output_hidden_states=True)
            cache = out.past_key_values
            total = total + out.hidden_states[-1][0].double().sum(dim=0)
        vector = total / torch.linalg.vector_norm(total).clamp_min(1e-12)
    return [float(value) for value in vector.tolist()]


def score(model: Any, ids: Sequence[int], n_top: int, check: Check) -> list[TokenLogprob | None]:
    """The log-probability of each token after those before it, with the `n_top` likeliest; None for the first.

    ids A B C  ->  [None, log p(B | A), log p(C | A B)]
    """
    scores: list[TokenLogprob | None] = [None]
    cache = None
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, PIECE_TOKENS):
            check()
            read = list(ids[start : min(start + PIECE_TOKENS, len(ids) - 1)])
            piece = torch.tensor([read], device=model.device)
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            following = torch.tensor(ids[start + 1 : start + 1 + len(read)], device=out.logits.device)
            scores += token_logprobs(out.logits[0].float().log_softmax(dim=-1), following, n_top)
    return scores
