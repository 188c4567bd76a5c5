"""LLaMA's original layout: what params.json means, how tensors are named, shaped, split over shards and rotated.

Relied on: https://github.com/meta-llama/llama and https://github.com/meta-llama/llama-models (models/llama3/model.py,
models/checkpoint.py), whose layers come from fairscale: column-parallel weights are cut into rows, row-parallel ones
into columns. Knows no files: those are read and written by `llama_pth`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onecard.errors import ModelError

EMBEDDINGS, HEAD, ROPE_TABLE = "tok_embeddings.weight", "output.weight", "rope.freqs"
TOP_NAMES = {EMBEDDINGS: "model.embed_tokens.weight", "norm.weight": "model.norm.weight", HEAD: "lm_head.weight"}
LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
COLUMN_PARALLEL = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", HEAD)
ROW_PARALLEL = ("wo.weight", "w2.weight")
DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
# What Meta ships: (dim, n_layers) -> shards; every other size here is one shard.
SHIPPED_SHARDS = {(5120, 40): 2, (6656, 60): 4, (8192, 48): 4, (8192, 80): 8, (16384, 126): 8}
# Meta's code has these as constants (apply_scaling); only the factor of its 1B and 3B differs, and no file says so.
SCALED_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FACTOR_32 = ((2048, 16), (3072, 28))
LLAMA_3_VOCABULARY = 100_000  # LLaMA-1 and -2 have 32000 tokens (CodeLlama 32016), LLaMA-3 has 128256
# (ffn_dim_multiplier, multiple_of) of Meta's releases, tried in this order.
SHIPPED_FFN = ((None, 256), (1.3, 1024), (1.3, 4096), (1.5, 256), (1.0, 256), (1.2, 4096))
FOREIGN_KEYS = {
    "quantization_args": "quantised weights", "lora_args": "an adapter inside", "moe": "experts", "moe_args": "experts",
    "vision_chunk_size": "a part that sees pictures", "vision_model": "a part that sees pictures",
}  # fmt: skip


@dataclass(frozen=True)
class LlamaParams:
    """The numbers of a LLaMA, in Meta's words. `vocab_size` is -1 where params.json leaves it to the tensors."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    use_scaled_rope: bool
    intermediate_size: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def rope_factor(self) -> float:
        """How far the scaled rotary embedding of LLaMA-3.1 stretches: 8, and 32 in the 1B and 3B of LLaMA-3.2."""
        return 32.0 if (self.dim, self.n_layers) in FACTOR_32 else 8.0


def read_params(content: Mapping[str, Any], place: str) -> LlamaParams:
    """The params of a params.json of LLaMA-1, -2 or -3. Raises ModelError that names `place` and the key."""
    content = content.get("model", content)
    foreign = [f"{key} ({FOREIGN_KEYS[key]})" for key in content if key in FOREIGN_KEYS and content[key]]
    if foreign:
        raise ModelError(f"{place} has {', '.join(foreign)}, which is not converted; take the plain text model")
    dim, n_layers, n_heads = (_number(content, key, place) for key in ("dim", "n_layers", "n_heads"))
    n_kv_heads = _number(content, "n_kv_heads", place, n_heads)
    vocab_size = int(content.get("vocab_size", -1))
    is_llama_3 = vocab_size > LLAMA_3_VOCABULARY or "use_scaled_rope" in content
    params = LlamaParams(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=vocab_size,
        norm_eps=float(content.get("norm_eps", 1e-5)),
        rope_theta=float(content.get("rope_theta") or (500000.0 if is_llama_3 else 10000.0)),
        use_scaled_rope=bool(content.get("use_scaled_rope", False)),
        intermediate_size=intermediate_size(
            dim, content.get("ffn_dim_multiplier"), _number(content, "multiple_of", place, 256)
        ),
    )
    _check_heads(params, place)
    return params


def write_params(params: LlamaParams) -> dict[str, Any]:
    """The content of a params.json. Only keys that the model needs: older programs of Meta refuse what they don't know.

    Raises ModelError when no formula of Meta's gives the intermediate size.
    """
    multiplier, multiple_of = ffn_settings(params.dim, params.intermediate_size)
    content: dict[str, Any] = {"dim": params.dim, "n_layers": params.n_layers, "n_heads": params.n_heads}
    if params.n_kv_heads != params.n_heads:
        content["n_kv_heads"] = params.n_kv_heads
    content |= {"vocab_size": params.vocab_size, "multiple_of": multiple_of}
    if multiplier is not None:
        content["ffn_dim_multiplier"] = multiplier
    content["norm_eps"] = params.norm_eps
    if params.rope_theta != 10000.0 or params.use_scaled_rope or params.vocab_size > LLAMA_3_VOCABULARY:
        content["rope_theta"] = params.rope_theta
    if params.use_scaled_rope:
        content["use_scaled_rope"] = True
    return content


def intermediate_size(dim: int, ffn_dim_multiplier: float | None, multiple_of: int) -> int:
    """Width of the feed-forward layer: 8/3 of `dim`, times the multiplier, rounded up.

    >>> intermediate_size(4096, None, 256)
    11008
    >>> intermediate_size(4096, 1.3, 1024)
    14336
    """
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def ffn_settings(dim: int, size: int) -> tuple[float | None, int]:
    """(ffn_dim_multiplier, multiple_of) that give this intermediate size; those of Meta's releases come first."""
    for multiplier, multiple_of in (*SHIPPED_FFN, *((None, 2**power) for power in range(13, -1, -1))):
        if intermediate_size(dim, multiplier, multiple_of) == size:
            return multiplier, multiple_of
    multiple_of = min(256, size & -size)  # the largest power of two in it
    exact = (size + 1 - multiple_of / 2) / int(2 * (4 * dim) / 3)  # the middle of the range that is rounded to it
    for multiplier in (round(exact, digits) for digits in range(1, 17)):
        if intermediate_size(dim, multiplier, multiple_of) == size:
            return multiplier, multiple_of
    raise ModelError(f"no ffn_dim_multiplier gives an intermediate size of {size} at a hidden size of {dim}")


def params_of_config(config: Mapping[str, Any], place: str) -> LlamaParams:
    """The params of a Hugging Face config.json. Raises ModelError for what Meta's layout cannot say."""
    kind = config.get("model_type")
    if kind != "llama":
        raise ModelError(f"{place} is of the family {kind!r}; the original .pth layout is there for llama only")
    if config.get("quantization_config"):
        raise ModelError(f"{place} is quantised; convert the 16-bit model that it was made from")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    dim, n_layers, n_heads, size, vocab_size = (
        _number(config, key, place)
        for key in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"
        )
    )  # fmt: skip
    params = LlamaParams(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=_number(config, "num_key_value_heads", place, n_heads),
        vocab_size=vocab_size,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        use_scaled_rope=rope_type == "llama3",
        intermediate_size=size,
    )
    _check_heads(params, place)
    foreign = [f"{key} {config[key]}" for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if config.get("head_dim") not in (None, params.head_dim):
        foreign.append(f"head_dim {config['head_dim']} (not hidden_size / num_attention_heads)")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        foreign.append(f"hidden_act {config['hidden_act']}")
    expected = {**SCALED_ROPE, "factor": params.rope_factor}
    if rope_type not in ("default", "llama3") or (
        rope_type == "llama3" and any(float(rope.get(key, value)) != value for key, value in expected.items())
    ):
        foreign.append(f"rotary embeddings {dict(rope)}")
    if foreign:
        raise ModelError(f"{place} has {', '.join(foreign)}, which LLaMA's original layout cannot hold")
    ffn_settings(params.dim, params.intermediate_size)
    return params


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that begin and end a text; several may end one."""

    bos: int = 1
    eos: int | list[int] = 2


def config_of(
    params: LlamaParams, dtype: torch.dtype, *, tied: bool, max_positions: int, ids: SpecialIds
) -> dict[str, Any]:
    """A complete config.json, with the keys that transformers 4 and 5 and other programs read alike.

    tied: whether the head is the embeddings. max_positions: the longest text in tokens, which params.json lacks.
    """
    scaling = {"rope_type": "llama3", "factor": params.rope_factor, **SCALED_ROPE} if params.use_scaled_rope else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "head_dim": params.head_dim,
        "hidden_act": "silu",
        "hidden_size": params.dim,
        "initializer_range": 0.02,
        "intermediate_size": params.intermediate_size,
        "max_position_embeddings": max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": params.n_heads,
        "num_hidden_layers": params.n_layers,
        "num_key_value_heads": params.n_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": params.norm_eps,
        "rope_scaling": scaling,
        "rope_theta": params.rope_theta,
        "tie_word_embeddings": tied,
        "torch_dtype": DTYPE_NAMES[dtype],
        "use_cache": True,
        "vocab_size": params.vocab_size,
    }


def meta_names(n_layers: int) -> list[str]:
    """Every tensor by Meta's name, in the order in which the model uses them."""
    layers = [f"layers.{i}.{name}" for i in range(n_layers) for name in LAYER_NAMES]
    return [EMBEDDINGS, *layers, "norm.weight", HEAD]


def hf_name(name: str) -> str:
    """The Hugging Face name of a tensor with this Meta name."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    number, rest = re.fullmatch(r"layers\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
    return f"model.layers.{number}.{LAYER_NAMES[rest]}"


def full_shape(name: str, params: LlamaParams) -> tuple[int, ...]:
    """Shape of the whole tensor (rows, columns), as torch.nn.Linear has it; norms have one dimension."""
    dim, kv_dim, size = params.dim, params.n_kv_heads * params.head_dim, params.intermediate_size
    ends = {
        "wq.weight": (dim, dim), "wk.weight": (kv_dim, dim), "wv.weight": (kv_dim, dim), "wo.weight": (dim, dim),
        "w1.weight": (size, dim), "w2.weight": (dim, size), "w3.weight": (size, dim),
    }  # fmt: skip
    if name in (EMBEDDINGS, HEAD):
        return (params.vocab_size, dim)
    return ends.get(".".join(name.split(".")[-2:]), (dim,))


def split_dim(name: str, embeddings_dim: int) -> int | None:
    """The dimension along which the shards cut this tensor; None: every shard has the whole.

    `embeddings_dim` is 1 for LLaMA-1 and -2 (fairscale's ParallelEmbedding), 0 for LLaMA-3 (VocabParallelEmbedding).
    """
    if name == EMBEDDINGS:
        return embeddings_dim
    return 0 if name.endswith(COLUMN_PARALLEL) else 1 if name.endswith(ROW_PARALLEL) else None


def n_parts(name: str, n_shards: int, params: LlamaParams) -> int:
    """Into how many different parts the shards cut this tensor: fewer than shards where key-value heads repeat."""
    repeats = name.endswith(("wk.weight", "wv.weight"))
    return min(n_shards, params.n_kv_heads) if repeats else n_shards


def check_shards(params: LlamaParams, n_shards: int, embeddings_dim: int, place: str) -> None:
    """Raises ModelError when this model cannot be cut into `n_shards` equal parts."""
    kv_heads = max(params.n_kv_heads, n_shards)
    wholes = {"heads": params.n_heads, "key-value heads": kv_heads, "feed-forward rows": params.intermediate_size}
    wholes["tokens"] = params.vocab_size
    if embeddings_dim == 1:
        wholes["columns"] = params.dim
    if n_shards > params.n_kv_heads and n_shards % params.n_kv_heads:
        wholes["key-value heads"] = params.n_kv_heads
    odd = [f"{n} {what}" for what, n in wholes.items() if n % n_shards]
    if n_shards < 1 or odd:
        raise ModelError(f"{place} cannot be cut into {n_shards} equal shards: it has {', '.join(odd)}")


def to_half_split(name: str, tensor: Tensor, params: LlamaParams) -> Tensor:
    """Meta's rows of q and k (pairs that rotate together are neighbours) in Hugging Face's order (halves of a head).

    For a head of 4 rows: 0 1 2 3 becomes 0 2 1 3. Tensors of other names are returned as they are.
    """
    if not name.endswith(("wq.weight", "wk.weight")):
        return tensor
    half = params.head_dim // 2
    return tensor.view(-1, half, 2, params.dim).transpose(1, 2).reshape(tensor.shape)


def to_pairs(name: str, tensor: Tensor, params: LlamaParams) -> Tensor:
    """The inverse of `to_half_split`."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return tensor
    half = params.head_dim // 2
    return tensor.view(-1, 2, half, params.dim).transpose(1, 2).reshape(tensor.shape)


def _number(content: Mapping[str, Any], key: str, place: str, default: int | None = None) -> int:
    value = content.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{place} has {key} {value!r}, where a whole number above 0 belongs; is it a LLaMA's?")
    return value


def _check_heads(params: LlamaParams, place: str) -> None:
    fits = params.dim % params.n_heads == 0 and params.n_heads % params.n_kv_heads == 0 and params.head_dim % 2 == 0
    if not fits:
        raise ModelError(
            f"{place} disagrees with itself: a width of {params.dim} with {params.n_heads} heads and "
            f"{params.n_kv_heads} key-value heads"
        )
