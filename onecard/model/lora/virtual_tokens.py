"""Virtual tokens: what prompt methods put in front of every text, in training, in scoring and in generation.

PEFT's forward pass puts them there; here what comes out is that of the text alone, as of any other model, and answers
go on behind a cache that holds them, whether prompts are padded, sampled or searched with beams. It imports no peft:
`adapter.py` joins this with PEFT's class.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from onecard.errors import ModelError
from onecard.installation import command


class VirtualTokens:
    """A PeftModel with virtual tokens that is called like one without: ids in, logits of these ids out."""

    @property
    def n_in_front(self) -> int:
        """Positions in front of every text; 0 while the adapter is switched off."""
        peft: Any = self
        return 0 if peft._adapters_disabled else int(peft.active_peft_config.num_virtual_tokens)

    @property
    def _in_cache(self) -> bool:
        """Whether they are keys and values alone, and no row of hidden states."""
        peft: Any = self
        return bool(peft.active_peft_config.peft_type.value == "PREFIX_TUNING")

    def forward(self, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; (batch, seq) ids give logits and hidden states of seq positions. A cache that is not empty holds
        the virtual tokens already. `logits_to_keep` counts positions of the text."""
        past, peft, inherited = kwargs.get("past_key_values"), cast(Any, self), cast(Any, super())
        if past is not None and past.get_seq_length():
            return peft.base_model(input_ids, *args, **kwargs)
        kept = kwargs.get("logits_to_keep")
        if isinstance(kept, Tensor) and not self._in_cache:
            kwargs["logits_to_keep"] = kept + self.n_in_front
        out: Any = inherited.forward(input_ids, *args, **kwargs)
        n_seq = input_ids.shape[1]
        if out.logits.shape[1] > n_seq:
            out.logits = out.logits[:, -n_seq:]
        if out.get("hidden_states"):
            out.hidden_states = tuple(states[:, -n_seq:] for states in out.hidden_states)
        return out

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any, **kwargs: Any) -> Any:
        """As that of the base, which goes on behind the virtual tokens: the mask is longer than the ids by them.

        Padding on the left stands between both, and counts as no position.
        """
        peft: Any = self
        if peft._adapters_disabled:
            return peft.base_model.generate(input_ids, attention_mask=attention_mask,
                                            generation_config=generation_config, **kwargs)  # fmt: skip
        n_each = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        in_front = attention_mask.new_ones(len(input_ids), self.n_in_front)
        return peft.base_model.generate(
            input_ids,
            attention_mask=torch.cat([in_front, attention_mask], dim=1),
            past_key_values=self._cache(len(input_ids) * n_each),
            generation_config=generation_config,
            **kwargs,
        )

    @torch.no_grad()
    def _cache(self, n_rows: int) -> Cache:
        """Keys and values of the virtual tokens, for so many texts."""
        peft: Any = self
        base = peft.base_model
        if self._in_cache:
            return cast(Cache, peft.get_prompt(n_rows))
        cache: Any = DynamicCache(config=base.config.get_text_config(decoder=True))
        dtype = base.get_input_embeddings().weight.dtype
        base(inputs_embeds=peft.get_prompt(1).to(dtype), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(n_rows)
        return cache


def encoder_tensors(peft_model: Any, adapter: str) -> dict[str, Tensor]:
    """The network that virtual tokens are made by while they are trained; empty where they are trained themselves.

    PEFT's files hold what it gave, with which no training can go on.
    """
    tensors: dict[str, Tensor] = peft_model.prompt_encoder[adapter].state_dict()
    return tensors if len(tensors) > 1 else {}


def check_base(base: Any, method: str) -> None:
    """Raise ModelError for a base that no virtual tokens can stand in front of, before anything is trained."""
    taken = inspect.signature(type(base).forward).parameters
    reason = ""
    if not {"inputs_embeds", "past_key_values"} <= taken.keys():
        reason = "takes no vectors in place of tokens, or no cache"
    elif not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in
                 DynamicCache(config=base.config.get_text_config(decoder=True)).layers):  # fmt: skip
        reason = "keeps states beside keys and values"
    if reason:
        raise ModelError(f"{type(base).__name__} {reason}, so {method} has no place in front of its texts; "
                         f"train a LoRA adapter ({command('finetune')})")  # fmt: skip
