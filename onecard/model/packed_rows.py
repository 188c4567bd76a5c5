"""Whether a model keeps the texts of one row apart, or two answers to one prompt, found by trying: names of families
would always be out of date.

Texts are kept apart by attention over each alone (packed_attention.py) or by the mask that transformers makes of
positions that begin anew in a row, which SDPA's memory-efficient kernel and the plain one take on every card, Turing
included; FlashAttention is not needed. Families with an attention or a state of their own (ALiBi, Mamba, RWKV) may look
at neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from onecard.console import warn
from onecard.errors import ModelError
from onecard.model.input_limits import embedding_rows
from onecard.model.model_config import attention_window
from onecard.model.packed_attention import attend_by_mask, attend_by_text
from onecard.model.shared_prompt import CHOSEN, PROMPT, REJECTED, forward_inputs
from onecard.model.trained import base_of

# Tokens of the two texts; some attention looks back in blocks of a few, which then do not end where a text does.
N_BEFORE, N_BEHIND = 13, 17
N_PROMPT, N_CHOSEN = 6, 4  # tokens of the prompt and the first of two answers behind it; the second has N_BEHIND
# Of the first text's effect on the second what may remain: numbers round otherwise in another place of a row.
LARGEST_SHARE, ROUNDING = 0.1, 1e-5
# And what another first text may change, where nothing rounds otherwise but in experts, by how many tokens each gets.
LARGEST_LEAK = 0.02


def keep_texts_apart(model: nn.Module, device: Any) -> None:
    """Let a model compute the texts of packed rows as it does each alone: text by text, or by a mask where it must.

    Raises ModelError where a text behind another one is not computed as it is alone in either way.
    """
    positions = {"position_ids": [*range(N_BEFORE), *range(N_BEHIND)]}
    base, name = base_of(model), type(base_of(model)).__name__
    tries = attend_by_text(base)
    if tries and _keeps_apart(model, 0, N_BEFORE, positions, device):
        return
    attend_by_mask(base)
    if not _keeps_apart(model, 0, N_BEFORE, positions, device):
        # Through transformers FlashAttention tells them apart in batches of a single row only.
        is_flash = "flash" in str(base.config._attn_implementation)
        out = "--packing out (for --objective pretrain: --pack_attention document)"
        raise ModelError(
            f"{name} cannot keep the texts of a packed row apart: in its attention a text sees the ones before it; "
            f"leave {'--attn_implementation out' if is_flash else out}"
        )
    if tries:
        warn(f"{name} needs a mask over whole packed rows, which takes more than was planned")


def why_prompts_stand_apart(model: nn.Module, device: Any, longest: int) -> str | None:
    """Why this model cannot take rows of up to `longest` tokens in which two answers share a prompt; None if it can."""
    window = attention_window(base_of(model).config)
    if window is not None and window < longest:
        return f"its attention has a window of {window:,} tokens, and the longest pair has {longest:,}"
    positions = [*range(N_PROMPT + N_CHOSEN), *range(N_PROMPT, N_PROMPT + N_BEHIND)]
    segments = [PROMPT] * N_PROMPT + [CHOSEN] * N_CHOSEN + [REJECTED] * N_BEHIND
    apart = _keeps_apart(model, N_PROMPT, N_CHOSEN, {"position_ids": positions, "segments": segments}, device)
    return None if apart else "in its attention the second answer sees the first one"


def _keeps_apart(model: nn.Module, n_prompt: int, n_between: int, told: dict[str, list[int]], device: Any) -> bool:
    """Whether the last tokens have the logits that they have behind the first `n_prompt` alone, and the same ones
    whatever the tokens between are.

    Tried in two rows at once, since some kernels look into the positions of a single row only. Measured by what the
    tokens between do where nothing is told. told: what is said of each token of a row, by name.
    """
    was_training, n_rows = model.training, embedding_rows(base_of(model))
    n_tokens = n_prompt + n_between + N_BEHIND
    ids = (torch.arange(2 * n_tokens).view(2, -1) * 7 + 3).remainder(n_rows).to(device)
    others = ids.clone()
    others[:, n_prompt : n_prompt + n_between] += 1
    others = others.remainder(n_rows)
    known = {name: torch.tensor([values, values], device=device) for name, values in told.items()}

    def logits(batch: dict[str, Tensor]) -> Tensor:
        found: Any = model(**forward_inputs(model, batch))
        behind: Tensor = found.logits[:, -N_BEHIND:].float()
        return behind

    model.eval()
    try:
        with torch.no_grad():
            alone = logits({"input_ids": torch.cat([ids[:, :n_prompt], ids[:, -N_BEHIND:]], dim=1)})
            seen, apart = logits({"input_ids": ids}), logits({"input_ids": ids, **known})
            leaked = logits({"input_ids": others, **known}) - apart
    except (AttributeError, TypeError, ValueError, RuntimeError):  # it takes no positions, or no such mask
        return False
    finally:
        model.train(was_training)
    effect, left, leak = (float(each.abs().max()) for each in (seen - alone, apart - alone, leaked))
    rounding = ROUNDING * float(alone.abs().max())
    return left <= max(LARGEST_SHARE * effect, rounding) and leak <= max(LARGEST_LEAK * effect, rounding)
