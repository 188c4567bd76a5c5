"""Attention of packed rows, text by text: what lies between two texts is not computed, and no mask is made.

transformers makes a mask of positions that begin anew in a row; SDPA then computes the scores of all pairs of tokens
and throws most away, and FlashAttention takes no mask. Here the place of the mask is taken by the lengths of the texts
(as FlexAttention's BlockMask takes it), and each text is a call of SDPA that is causal or, where a window is shorter
than the text, has that text's own mask. Knows transformers' two interfaces; does not know models or batches.
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from onecard.model.attention import NAME, attend

TEXTS, FAKE = "onecard_texts", "onecard_sizes"
FUNCTIONS = {"sdpa": sdpa_attention_forward, NAME: attend}  # that compute a text


@dataclass(frozen=True)
class PackedTexts:
    """The texts of a batch of packed rows, in the place of a mask.

    lengths: the tokens of each text, row after row; their sum is batch * seq. masks: for each text what its tokens see
    of it, bool (1, 1, length, length), or None where that is all before them.
    """

    lengths: tuple[int, ...]
    masks: tuple[Tensor | None, ...]


def attend_by_text(model: PreTrainedModel) -> bool:
    """Let `model` compute packed rows text by text where it uses SDPA; False where it has an attention of its own."""
    return _use(model, TEXTS, texts_or_mask)


def attend_by_mask(model: PreTrainedModel) -> None:
    """Take `attend_by_text` back."""
    kind = model.config._attn_implementation or ""
    if kind.startswith(f"{TEXTS}_"):
        model.set_attn_implementation(kind.removeprefix(f"{TEXTS}_"))


def plan_attention(model: PreTrainedModel, *, packed: bool) -> None:
    """Let a model without bytes make the masks that the real one makes, of rows of one text or (packed) of two.

    transformers looks into the positions for several texts in one row, and takes them for there where it cannot look.
    """
    _use(model, f"{FAKE}_{TEXTS}" if packed else FAKE, _two_texts if packed else _one_text)


def _use(model: PreTrainedModel, name: str, mask: Callable[..., Any]) -> bool:
    kind = getattr(model.config, "_attn_implementation", None)
    if kind not in FUNCTIONS:
        return False
    name = f"{name}_{kind}"  # transformers looks it up at each call: models of both kinds may be held
    AttentionInterface.register(name, partial(_attend, FUNCTIONS[kind]))
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
    return True


def texts_or_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, **options: Any
) -> PackedTexts | Tensor | None:
    """As transformers' `sdpa_mask`, with `PackedTexts` for rows of several texts.

    That is where no `is_causal` will do, and nothing but the tokens themselves decides who sees whom.
    """
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
    must_be_whole = options.get("allow_is_causal_skip", True) or options.get("use_vmap", False)
    if must_be_whole or options.get("attention_mask") is not None or (q_length, 0, 0) != sizes[2:]:
        return sdpa_mask(*sizes, **options)
    texts = _texts(options["mask_function"], batch_size, q_length, options.get("device", "cpu"))
    return sdpa_mask(*sizes, **options) if texts is None else texts


def _texts(sees: Callable[..., Tensor], n_rows: int, length: int, device: Any) -> PackedTexts | None:
    """The texts that a mask tells apart; None where a token sees what comes after it.

    sees(row, head, query, key): index tensors of transformers' masks -> bool. A text begins where a token does not see
    the one before it: with causal masks, windows and chunks nothing behind it sees further back either.
    """
    row, token = torch.arange(n_rows, device=device)[:, None], torch.arange(length, device=device)[None]
    head = torch.zeros((), dtype=torch.long, device=device)
    later, before = token[:, 1:], token[:, :-1]
    begins = torch.ones(n_rows, length, dtype=torch.bool, device=device)
    begins[:, 1:] = ~sees(row, head, later, before)
    looks_ahead = bool(sees(row, head, before, later).any())
    firsts = begins.flatten().nonzero().squeeze(1)
    lengths = torch.diff(firsts, append=firsts.new_tensor([n_rows * length]))
    rows, starts = firsts // length, firsts % length
    is_whole = sees(rows, head, starts + lengths - 1, starts).tolist()
    if looks_ahead:
        return None
    masks: list[Tensor | None] = [None] * len(is_whole)
    for number in (place for place, whole in enumerate(is_whole) if not whole):
        of_text = starts[number] + torch.arange(int(lengths[number]), device=device)
        masks[number] = sees(rows[number], head, of_text[:, None], of_text[None])[None, None]
    return PackedTexts(tuple(lengths.tolist()), tuple(masks))


def _attend(
    function: Callable[..., tuple[Tensor, None]], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: PackedTexts | Tensor | None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`function`, an attention of transformers' interface, over each text of packed rows; shapes as in `attend`."""
    if not isinstance(attention_mask, PackedTexts):
        return function(module, query, key, value, attention_mask, **options)
    if options.get("position_bias") is not None:
        raise ValueError("a bias of positions is for whole rows")
    n_rows, length = query.shape[0], query.shape[2]
    # Views of all rows as one: their gradients are put together once, where slices would each have a whole row's.
    sides = [side.transpose(1, 2).flatten(0, 1).split(attention_mask.lengths) for side in (query, key, value)]
    outputs = []
    for *text, mask in zip(*sides, attention_mask.masks, strict=True):
        here = None if mask is None else mask.to(query.device)  # a layer may lie on another card than the first
        outputs.append(function(module, *(side.transpose(0, 1)[None] for side in text), here, **options)[0])
    out = torch.cat(outputs, dim=1)
    return out.view(n_rows, length, *out.shape[2:]), None


def _one_text(*args: Any, **options: Any) -> Tensor | None:
    skip = options.get("allow_is_causal_skip", True) or not options.get("use_vmap", False)
    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": skip})


def _two_texts(*args: Any, **options: Any) -> PackedTexts | Tensor | None:
    """However many texts there are, they take the memory of two; masks of long ones within windows that of a whole."""
    n_rows, length, window = options["batch_size"], options["q_length"], options.get("local_size")
    if options.get("use_vmap", False) or length < 2 or (window is not None and length > window):
        return _one_text(*args, **options)
    lengths = (length // 2, length - length // 2) * n_rows
    return PackedTexts(lengths, (None,) * len(lengths))
