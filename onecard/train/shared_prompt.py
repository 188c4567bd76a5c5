"""Whether the two answers of a pair share a row behind one prompt (--share_prompt), by what that saves.

Decided before the plan, by the data and the sizes of the base alone, so that a run that goes on does as it did. Whether
the base keeps both answers apart is tried once it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.console import say, warn
from onecard.errors import ModelError
from onecard.model.memory.architecture import Architecture
from onecard.model.model_config import attention_window
from onecard.model.packed_rows import keep_texts_apart, why_prompts_stand_apart
from onecard.model.trained import base_of
from onecard.objectives.base import SampleView
from onecard.objectives.preference import PairView
from onecard.objectives.shared_prompt import pair_lengths, shared_tokens

# Of the products that two rows take: with more, what the mask takes beside them may be more than is saved
# (benchmarks/shared_prompt.py).
WORTH_SHARING = 0.9


def resolve_shared_prompt(
    config: FinetuneConfig, train: SampleView, test: SampleView, model: Architecture
) -> FinetuneConfig:
    """Fill in --share_prompt, and let the pairs share their prompts where it is on; the plan counts rows and mask."""
    wanted = config.train.share_prompt
    if not isinstance(train, PairView) or not isinstance(test, PairView):
        return config
    shares = wanted is True
    if shares or (wanted == "auto" and not config.keeps_prompts_apart):
        pairs = np.arange(len(train.dataset)).reshape(-1, 2)
        n_shared, lengths = shared_tokens(train.dataset, pairs), train.dataset.lengths[pairs]
        together, apart = pair_lengths(lengths, n_shared), pair_lengths(lengths)
        work, window = relative_work(lengths, n_shared, model), attention_window(model.source.read()[0])
        shares = shares or (work <= WORTH_SHARING and (window is None or together.max() <= window))
        if shares:
            train.share(n_shared)
            test.share(n_shared)
            say(f"both answers of a pair are in one row behind one prompt: {together.sum():,} tokens in the place of "
                f"{apart.sum():,}, {work:.0%} of the work (--share_prompt off: a row for each)")  # fmt: skip
    return replace(config, train=replace(config.train, share_prompt=shares))


def relative_work(lengths: np.ndarray, n_shared: np.ndarray, model: Architecture) -> float:
    """The products of pairs in a row each, over those of two rows each; lengths (n, 2), n_shared (n,).

    A weight of a linear layer takes one product per token; attention takes two per token seen and number of its heads.
    In one row the mask hides half of what is computed all the same; in two, kernels pass over what is not before a
    token.
    """
    per_seen = 2 * model.n_heads * model.head_dim * model.n_layers / max(1, model.n_linear)
    shared, longest = pair_lengths(lengths, n_shared).astype(float), lengths.max(axis=1).astype(float)
    together, apart = shared * (1 + per_seen * shared), 2 * longest * (1 + per_seen * longest / 2)
    return float(together.sum() / apart.sum())


def check_shared_rows(
    options: TrainOptions, model: Any, device: Any, views: Sequence[SampleView], *, must_share: bool
) -> None:
    """Raise ModelError where the base does not keep apart what shares a row; two answers get a row each instead, unless
    --share_prompt was typed (must_share)."""
    if options.packs_texts:
        keep_texts_apart(model, device)
    pairs = [view for view in views if isinstance(view, PairView) and view.shares_prompt]
    longest = max((int(view.lengths.max()) for view in pairs if len(view)), default=0)
    why = why_prompts_stand_apart(model, device, longest) if pairs else None
    if why is None:
        return
    said = f"{type(base_of(model)).__name__} cannot read the prompt of a pair once: {why}"
    if must_share:
        raise ModelError(f"{said}; leave --share_prompt out")
    warn(f"{said}. Each answer is a row, which is more than was planned")
    for view in pairs:
        view.share(None)
