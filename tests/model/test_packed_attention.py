"""Attention text by text is that of a mask over whole rows, and a text is a call of SDPA of its own length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from onecard.errors import ModelError
from onecard.model.attention import avoid_flash
from onecard.model.load import checkpoint_layers
from onecard.model.packed_attention import PackedTexts, attend_by_mask, attend_by_text, texts_or_mask
from onecard.model.packed_rows import keep_texts_apart
from tests.model.every_family import MODEL_TYPES, save_small
from tests.model.test_every_family import NOT_BUILT, REFUSED, loaded

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
LENGTHS = ((5, 11, 1, 3), (20,))  # of the texts of two rows


def models() -> dict[str, Any]:
    """Plain, with queries that share keys, and with windows and chunks shorter than the longest text."""
    gemma = {**SIZES, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    chunked = {**SIZES, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 4, "num_local_experts": 2}
    return {
        "llama": tf.LlamaConfig(**SIZES),
        "mistral": tf.MistralConfig(**SIZES, sliding_window=4),
        "gemma3_text": tf.Gemma3TextConfig(**gemma),
        "llama4_text": tf.Llama4TextConfig(**chunked),
    }


def made(name: str) -> Any:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(models()[name], attn_implementation="sdpa")


def rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
    return {"input_ids": ids, "position_ids": positions}


def learned(model: Any) -> list[torch.Tensor]:
    """Logits and the gradients of all weights."""
    model.zero_grad()
    logits = model(**rows(), use_cache=False).logits
    (logits.float() * torch.arange(logits.numel()).view_as(logits).sin()).sum().backward()
    return [logits.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("no_flash", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", [*models()])
def test_it_is_the_attention_of_a_mask(
    name: str, recomputes: bool, no_flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(name).train()
    if no_flash:
        assert avoid_flash(model)
    if recomputes:
        checkpoint_layers(model, reentrant=False)
    whole = learned(model)
    kernel, sizes = torch.nn.functional.scaled_dot_product_attention, set()

    def noted(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        sizes.add((query.shape[0], query.shape[2], key.shape[2]))
        return kernel(query, key, *rest, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", noted)
    assert attend_by_text(model)
    by_text = learned(model)
    assert {(1, n, n) for lengths in LENGTHS for n in lengths} <= sizes or name == "llama4_text"
    assert all(n_rows == 1 and n <= max(map(max, LENGTHS)) for n_rows, n, _ in sizes)
    assert len(whole) == len(by_text) > 10
    for one, other in zip(whole, by_text, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    attend_by_mask(model)
    assert torch.equal(learned(model)[0], whole[0])


def test_texts_and_their_masks() -> None:
    """A text within the window is causal, a longer one has a mask of its own; a row that must be whole stays whole."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    model = made("mistral")
    assert attend_by_text(model)
    given: Any = {"config": model.config, "inputs_embeds": torch.zeros(2, 20, 32), "attention_mask": None,
                  "past_key_values": None, "position_ids": rows()["position_ids"]}  # fmt: skip
    found: Any = create_causal_mask(**given)
    assert isinstance(found, PackedTexts)
    assert found.lengths == (5, 11, 1, 3, 20) and found.masks == (None,) * 5
    windows: Any = create_sliding_window_causal_mask(**given)
    assert windows.lengths == found.lengths
    assert [None if mask is None else mask.shape[-1] for mask in windows.masks] == [5, 11, None, None, 20]
    own = torch.ones(5, 5, dtype=torch.bool).tril() & torch.ones(5, 5, dtype=torch.bool).triu(-3)
    assert torch.equal(windows.masks[0], own[None, None])
    plain = {**given, "position_ids": torch.arange(20)[None]}
    assert create_causal_mask(**plain) is None
    both: Any = create_causal_mask(**given, block_sequence_ids=torch.zeros(2, 20, dtype=torch.long))
    assert both.shape == (2, 1, 20, 20), "tokens that see what comes after them are of no one text"
    decoding: Any = texts_or_mask(2, 1, 20, 19, 0, mask_function=lambda b, h, q, k: k <= q, allow_is_causal_skip=False)
    assert decoding.shape == (2, 1, 1, 20)


def test_where_texts_cannot_stand_alone_there_is_a_mask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a model hands its attention something else than the mask that was made."""
    model = made("llama")
    monkeypatch.setattr("onecard.model.packed_attention._texts", lambda *given: PackedTexts((20, 20), (None, None)))
    keep_texts_apart(model, "cpu")
    assert model.config._attn_implementation == "sdpa"
    assert "LlamaForCausalLM needs a mask over whole packed rows" in capsys.readouterr().err


def test_a_kernel_that_keeps_texts_apart_in_single_rows_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlashAttention through transformers, which looks into the positions of a batch of one row."""
    model = made("llama")
    forward = type(model).forward

    def looks_at_one_row(self: Any, input_ids: torch.Tensor, position_ids: Any = None, **options: Any) -> Any:
        return forward(self, input_ids, position_ids=position_ids if len(input_ids) == 1 else None, **options)

    monkeypatch.setattr(type(model), "forward", looks_at_one_row)
    with pytest.raises(ModelError, match=r"cannot keep the texts of a packed row apart.*leave --packing out"):
        keep_texts_apart(model, "cpu")


def test_flash_attention_that_was_asked_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, **_: self.lm_head(self.mixed(input_ids)))
    monkeypatch.setattr(type(model), "mixed", lambda self, ids: self.model.embed_tokens(ids).cumsum(1), raising=False)
    with pytest.raises(ModelError, match="leave --attn_implementation out"):
        keep_texts_apart(model, "cpu")


# How the families that do not compute packed rows text by text keep texts apart, by transformers' model types.
OWN_MASKS = ("axk2", "deepseek_v32", "doge", "dots3_note_text", "glm_moe_dsa")
WITHOUT_SDPA = (
    "codegen", "flint", "gemma2", "got_ocr2", "gpt_neo", "gpt_neox_japanese", "gptj", "granite_swa",
    "granitemoe_swa", "hy_v4", "mimo_v2_flash", "vaultgemma",
)  # fmt: skip
CANNOT = (
    "afmoe", "bailing_hybrid", "bamba", "biogpt", "bloom", "deepseek_v4", "falcon", "falcon_h1", "falcon_mamba",
    "gpt_oss", "granitemoehybrid", "inkling2_text", "inkling_text", "jamba", "kimi_linear", "lfm2", "lfm2_moe",
    "lfm3", "mamba", "mamba2", "minimax", "mpt", "nemotron_h", "olmo_hybrid", "openai-gpt", "opt", "qwen3_5",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text",
    "recurrent_gemma", "rwkv", "xglm", "xlstm", "zamba", "zamba2", "zaya",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in {*REFUSED, *NOT_BUILT}])
def test_how_each_family_keeps_texts_apart(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence on families in docs/en/training.md, family by family."""
    model = loaded(save_small(model_type, tmp_path))
    if model_type in CANNOT:
        with pytest.raises(ModelError, match="cannot keep the texts of a packed row apart"):
            keep_texts_apart(model, "cpu")
        return
    keep_texts_apart(model, "cpu")
    by_text = model_type not in (*OWN_MASKS, *WITHOUT_SDPA)
    assert (model.config._attn_implementation == "onecard_texts_sdpa") == by_text
    assert ("needs a mask over whole packed rows" in capsys.readouterr().err) == (model_type in OWN_MASKS)
    if model_type in WITHOUT_SDPA:
        assert model.config._attn_implementation == "eager"


def test_a_little_of_a_text_in_a_state_behind_it_is_refused(tmp_path: Path) -> None:
    """Beside its attention Falcon-H1 has a state, which carries 7 % of the first text's effect into the second."""
    with pytest.raises(ModelError, match="cannot keep the texts of a packed row apart"):
        keep_texts_apart(loaded(save_small("falcon_h1", tmp_path)), "cpu")
