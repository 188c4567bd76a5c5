"""Whether a model keeps the texts of one row apart, found by trying: names of families would always be out of date.

What does it is transformers: of positions that begin anew in a row it makes a mask (create_causal_mask), which SDPA's
memory-efficient kernel and the plain one take on every card, Turing included; FlashAttention is not needed. Families
with an attention or a state of their own (ALiBi, Mamba, RWKV) may not look at positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from onecard.errors import ModelError
from onecard.model.input_limits import embedding_rows
from onecard.model.trained import base_of

N_BEFORE, N_BEHIND = 7, 5  # tokens of the two texts
# What may remain of the first text's effect on the second: numbers round otherwise in another place of a row.
LARGEST_SHARE, ROUNDING = 0.1, 1e-5


def check_packing(model: nn.Module, device: Any) -> None:
    """Raise ModelError where a text behind another one in a row is not computed as it is alone."""
    was_training, base = model.training, base_of(model)
    model.eval()
    try:
        with torch.no_grad():
            is_apart = _keeps_apart(model, embedding_rows(base), device)
    except (TypeError, ValueError):  # it takes no positions
        is_apart = False
    finally:
        model.train(was_training)
    if not is_apart:
        raise ModelError(
            f"{type(base).__name__} cannot keep the texts of a packed row apart: in its attention a text sees the ones "
            "before it; leave --packing out (for --objective pretrain: --pack_attention document)"
        )


def _keeps_apart(model: nn.Module, n_rows: int, device: Any) -> bool:
    """Whether the second text has the logits that it has alone, measured by what the first one does without a mask."""
    ids = (torch.arange(N_BEFORE + N_BEHIND) * 7 + 3).remainder(n_rows).unsqueeze(0).to(device)
    positions = torch.cat([torch.arange(N_BEFORE), torch.arange(N_BEHIND)]).unsqueeze(0).to(device)

    def logits(tokens: Tensor, **more: Any) -> Tensor:
        found: Any = model(input_ids=tokens, attention_mask=None, use_cache=False, **more)
        behind: Tensor = found.logits[0, -N_BEHIND:].float()
        return behind

    alone, seen, apart = logits(ids[:, N_BEFORE:]), logits(ids), logits(ids, position_ids=positions)
    effect, left = (float((each - alone).abs().max()) for each in (seen, apart))
    return left <= max(LARGEST_SHARE * effect, ROUNDING * float(alone.abs().max()))
