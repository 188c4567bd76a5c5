"""Every causal language model of transformers, built small: its default configuration with the numbers made smaller.

`small_config` knows what most families call their sizes (SIZES), and what a few need besides (OWN). A family that a
new transformers brings is in the table by itself; if its numbers are called otherwise, the test says that it is large.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 128
MOST_WEIGHTS = 12_000_000
MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_NAMES = {
    64: "hidden_size d_model n_embd emb_dim lru_width embedding_dim moe_intermediate_size expert_ffn_hidden_size "
    "shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size ple_embed_dim",
    128: "vocab_size shape_vocab_size pronunciation_vocab_size vocab_size_per_layer_input max_position_embeddings "
    "n_positions intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dim_ff feed_forward_size "
    "mamba_d_ssm attention_hidden_size",
    2: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_blocks num_key_value_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k n_group num_expert_group linear_num_key_heads "
    "index_n_heads indexer_n_heads zero_expert_num heads_per_ngram ngram_size hc_count altup_num_inputs eos_token_id",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "n_routed_experts num_local_experts moe_num_experts linear_num_value_heads linear_num_heads num_query_groups "
    "indexer_compress_ratio",
    1: "topk_group n_shared_experts first_k_dense_replace num_dense_layers mamba_n_groups n_groups indexer_kv_heads "
    "split_ngram_parts bos_token_id",
    16: "head_dim dim_head qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
    "linear_head_dim mamba_d_state mamba_d_head mamba_headdim mamba_chunk_size state_size query_pre_attn_scalar "
    "hidden_size_per_layer_input global_head_dim attention_head_size kv_channels router_hidden_size hc_lowrank",
    32: "q_lora_rank kv_lora_rank qk_head_dim index_head_dim indexer_head_dim attention_head_dim index_topk",
    8: "sliding_window attention_window_size window_size indexer_budget mamba_n_heads n_mamba_heads "
    "chunk_size time_step_rank mamba_dt_rank rotary_dim laurel_rank adapter_rank",
    0: "num_kv_shared_layers pad_token_id",
    28: "image_size",
    14: "patch_size",
}
SIZES = {name: number for number, names in _NAMES.items() for name in names.split()}
# What bends or scales the logits, so strongly that a loss which leaves it out is plainly wrong.
SIZES |= {
    "final_logit_softcapping": 2.0, "logits_soft_cap": 2.0, "output_logit_soft_cap": 2.0, "logit_scale": 0.25,
    "logits_scaling": 8.0, "lm_head_multiplier": 0.5, "dim_model_base": 16,
}  # fmt: skip
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "head_dim": 16}
_MLA = {"num_key_value_heads": 4}  # latent attention has as many
_SHARED = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3"), _MLA),
    **dict.fromkeys(("youtu", "longcat_flash"), _MLA),
    **dict.fromkeys(("hunyuan_v1_dense", "ministral"), _ROPE),
    "bailing_hybrid": {**_MLA, "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE["rope_parameters"])
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "deepseek_v2": {**_MLA, "topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"max_window_layers": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1},
    "dots3_note_text": {
        **_MLA, "head_dim": 32, "layer_types": ["indexed_attention", "sliding_attention"], "per_layer_config": {},
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"], "intermediate_size": [128, 128],
        "activation_sparsity_pattern": [0.95, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_moe": {**_ROPE, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_MLA, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "num_hidden_layers": 4},
    **{name: {"num_hidden_layers": 4} for name in ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")},
    "qwen4_exp_text": {
        "num_hidden_layers": 4, "ngram_vocab_size_base": 64, "num_experts": 4, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 4},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
    },
    "rwkv": {"attention_hidden_size": 64},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": _SHARED,
    "zamba2": {**_SHARED, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_hidden_layers": 4, "num_experts_per_tok": 1},
}  # fmt: skip


def small_config(model_type: str, **changes: int) -> tf.PreTrainedConfig:
    """The family's default configuration, small, without dropout; `changes` are other SIZES."""
    return _shrunk(tf.CONFIG_MAPPING[model_type], {**SIZES, **changes})


def _shrunk(config_class: type[tf.PreTrainedConfig], small: dict[str, Any]) -> tf.PreTrainedConfig:
    default = config_class()
    stored = default.to_dict()
    sizes = {
        name: size
        for name, size in small.items()
        if name in stored and (stored[name] is not None or name in TOKENS) and not isinstance(stored[name], list | dict)
    }
    dropout = {name: 0.0 for name, value in stored.items() if "drop" in name and isinstance(value, float)}
    parts = {
        name: _shrunk(type(part), small)
        for name, part in vars(default).items()
        if isinstance(part, tf.PreTrainedConfig)
    }
    return config_class(**{**sizes, **dropout, **parts, **OWN.get(default.model_type, {})})


def save_small(model_type: str, directory: Path, **changes: int) -> Path:
    """Save a small model with random weights, larger than the usual start: logits should differ from one another."""
    config = small_config(model_type, **changes)
    with torch.device("meta"):
        n_weights = sum(weight.numel() for weight in tf.AutoModelForCausalLM.from_config(config).parameters())
    assert n_weights < MOST_WEIGHTS, f"{model_type} has {n_weights:,} weights: give it the names of its sizes"
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(directory)
    if type(model.config) is not type(config):  # the text part of a model that also sees: loaded by the whole's type
        config.save_pretrained(directory)
    return directory


def save_config_alone(model_type: str, directory: Path) -> Path:
    """A directory of a model that is refused before anything but its config.json is read."""
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return directory
