"""How many positions a model takes: held against what its forward pass takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from onecard.model.input_limits import embedding_rows, head_rows, position_limit, rotary_limit


def small_model(family: str, **changes: Any) -> Any:
    config = transformers.AutoConfig.for_model(family)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "rotary_dim": 4,
             "num_key_value_heads": 2, "intermediate_size": 48, "ffn_dim": 48, "word_embed_proj_dim": 32,
             "max_position_embeddings": 16, "decoder_layers": 1, "d_model": 32, "decoder_attention_heads": 4,
             "attention_types": [[["global"], 1]], "attention_layers": ["global"], "max_seq_len": 16, "n_heads": 4,
             "n_layers": 1, "pad_token_id": 1} | changes  # fmt: skip
    for name, value in sizes.items():
        if getattr(config, name, None) is not None or name in changes:
            setattr(config, name, value)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def takes(model: Any, length: int) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 5), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neo", "gpt_bigcode", "biogpt", "gptj", "codegen", "ctrl", "mpt",
                                    "bart", "roberta", "openai-gpt"])  # fmt: skip
def test_the_limit_of_positions_is_where_the_model_ends(family: str) -> None:
    model = small_model(family)
    limit = position_limit(model)
    assert limit is not None and takes(model, limit) and not takes(model, limit + 1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "bloom", "gpt_neox", "xglm"])
def test_models_that_compute_their_positions_have_no_limit(family: str) -> None:
    model = small_model(family)
    assert position_limit(model) is None and takes(model, 40)
    assert (embedding_rows(model), head_rows(model)) == (64, 64)


def test_scaled_rotary_positions_are_no_reason_to_warn() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    assert rotary_limit(small_model("llama")) == 16
    assert rotary_limit(small_model("llama", rope_parameters=yarn)) is None
    assert rotary_limit(small_model("gpt2")) is None
