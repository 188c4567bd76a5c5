"""What a run forgets: how far the tuned model has moved from its base on general texts that are nobody's task.

The texts are in forgetting_texts.yaml, in English and Chinese, of several kinds. The figure is KL(base || tuned) per
token in nats: 0 for an untrained adapter. It is measured with the adapter on and off, so no second model is in memory,
and draws no random numbers, so a run with it is bitwise the run without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import accumulate, chain, zip_longest
from typing import Any

import yaml
from torch import nn

from onecard.model.divergence import AdapterOff, BaseStates, kl_from_base, kl_of_rounding
from onecard.model.out_of_memory import give_back_memory, is_out_of_memory

LARGEST_SHARE = 0.02  # of the tokens that a run computes; those of short texts take longer than those of long rows
FEWEST_TEXTS = 16  # below which the figure would mean little
MOST_TOKENS = 96  # of a text; what a tokenizer without Chinese makes of a line is cut
ROWS_AT_ONCE = 32
EVERY = slice(None)
# With --kl_anchor: those that it holds in place, and those on which forgetting is measured.
ANCHORING, MEASURED = slice(1, None, 2), slice(0, None, 2)
NOISE_ROWS = 4  # each of which is asked alone, too
# Passes of a token: two forward here; in training one forward and one backward, which is two more.
PASSES, PASSES_IN_TRAINING = 2, 3


def forgetting_texts(of_each_kind: slice = EVERY) -> list[str]:
    """These texts of each kind, so ordered that any first part has both languages and all kinds."""
    text = files("onecard.train").joinpath("forgetting_texts.yaml").read_text(encoding="utf-8")
    kinds = [lines[of_each_kind] for language in yaml.safe_load(text).values() for lines in language.values()]
    return [line for line in chain.from_iterable(zip_longest(*kinds)) if line is not None]


def text_rows(tokenizer: Any, of_each_kind: slice = EVERY) -> list[list[int]]:
    """The token ids of `forgetting_texts`."""
    rows = (tokenizer(text)["input_ids"][:MOST_TOKENS] for text in forgetting_texts(of_each_kind))
    return [row for row in rows if len(row) > 1]


def affordable_rows(
    tokenizer: Any, training_tokens: int, n_evaluations: int, of_each_kind: slice = EVERY, *, at_any_cost: bool = False
) -> list[list[int]]:
    """The token ids of as many texts as may be asked at each of `n_evaluations`, as LARGEST_SHARE of its tokens.

    training_tokens: that pass through the model in the whole run. Empty where fewer than FEWEST_TEXTS are affordable;
    at_any_cost: so many then.
    """
    most = LARGEST_SHARE * training_tokens * PASSES_IN_TRAINING / PASSES / max(1, n_evaluations)
    rows = text_rows(tokenizer, of_each_kind)
    n_affordable = sum(n_tokens <= most for n_tokens in accumulate(map(len, rows)))
    if n_affordable < FEWEST_TEXTS:
        return rows[:FEWEST_TEXTS] if at_any_cost else []
    return rows[:n_affordable]


@dataclass(frozen=True)
class Forgetting:
    """KL(base || tuned) per token in nats, over so many tokens."""

    kl: float
    n_tokens: int


def measure_forgetting(
    model: nn.Module, rows: Sequence[Sequence[int]], device: Any, base: AdapterOff, known: BaseStates | None = None, *,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Forgetting | None:  # fmt: skip
    """The forgetting of the model on the texts of token ids `rows`; None where memory does not even take one of them.

    known: keeps what the base is asked, so that it is asked at the first evaluation only. The model is put back into
    training mode if it was in it.
    """
    was_training, total, n_tokens = model.training, 0.0, 0
    model.eval()
    waiting = [rows[start : start + rows_at_once] for start in range(0, len(rows), rows_at_once)]
    while waiting:
        some = waiting.pop(0)
        found = _within_memory(kl_from_base, model, some, device, base, known)
        if found is not None:
            total, n_tokens = total + found[0], n_tokens + found[1]
        elif len(some) > 1:
            waiting[:0] = [some[: len(some) // 2], some[len(some) // 2 :]]
        else:
            n_tokens, waiting = 0, []
    model.train(was_training)
    return Forgetting(total / n_tokens, n_tokens) if n_tokens else None


def noise_floor(model: nn.Module, rows: Sequence[Sequence[int]], device: Any, base: AdapterOff) -> float | None:
    """KL per token of the base from itself by rounding alone, on the first texts; None where memory does not take them.

    Forgetting below it means nothing.
    """
    was_training = model.training
    model.eval()
    found = _within_memory(kl_of_rounding, model, rows[:NOISE_ROWS], device, base)
    model.train(was_training)
    return None if found is None else found[0] / found[1]


def _within_memory(work: Callable[..., tuple[float, int]], *arguments: Any) -> tuple[float, int] | None:
    """What the work finds; None when memory ran out, of which the rest is then given back."""
    try:
        return work(*arguments)
    except (RuntimeError, MemoryError) as reason:
        if not is_out_of_memory(reason):
            raise
    give_back_memory()
    return None
