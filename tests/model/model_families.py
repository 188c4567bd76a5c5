"""One tiny random model per family, saved as a person would have it on disk. All widths are multiples of 64."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf

VOCAB = 128
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES_MHA = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}


def family_configs() -> dict[str, tf.PretrainedConfig]:
    gemma = {**SIZES, "head_dim": 16}
    return {
        "llama": tf.LlamaConfig(**SIZES),
        "qwen2": tf.Qwen2Config(**SIZES),
        "qwen3": tf.Qwen3Config(**SIZES, head_dim=16),
        "mistral": tf.MistralConfig(**SIZES),
        "gemma": tf.GemmaConfig(**gemma),
        # A cap this low bends every logit: a loss that skips it is plainly wrong.
        "gemma2": tf.Gemma2Config(**gemma, query_pre_attn_scalar=16, sliding_window=32, final_logit_softcapping=2.0),
        "gemma3_text": tf.Gemma3TextConfig(**gemma, query_pre_attn_scalar=16, sliding_window=32),
        "phi": tf.PhiConfig(**SIZES),
        "phi3": tf.Phi3Config(**SIZES),
        "bloom": tf.BloomConfig(
            vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
        ),
        "gpt_neox": tf.GPTNeoXConfig(**SIZES_MHA),
        "gpt2": tf.GPT2Config(
            vocab_size=VOCAB,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "cohere": tf.CohereConfig(**SIZES, logit_scale=0.25),
        "granite": tf.GraniteConfig(**SIZES, logits_scaling=8.0),
    }


FAMILIES = tuple(family_configs())
N_FAMILIES = 14


def save_family(name: str, directory: Path, *, dtype: torch.dtype = torch.float32, **overrides: int) -> Path:
    config = family_configs()[name]
    config = type(config)(**{**config.to_dict(), **overrides})
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # larger than the usual start: logits should differ from one another
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    model.to(dtype).save_pretrained(directory)
    return directory


def small_batch(*, rows: int = 3, length: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    """Ragged rows, padded on the right; the first three tokens of each are prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :3] = -100
    for row in range(rows):
        end = length - 2 * row
        ids[row, end:], mask[row, end:], labels[row, end:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
