"""What a model must look like for llama.cpp: its family, its sizes, its tensors, and the order of its Q and K rows.

Knows config.json, and which tensors llama.cpp reads for each family. Does not know the GGUF format (writer.py) or
tokens (tokenizer.py). https://github.com/ggml-org/llama.cpp/tree/master/src/models
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.console import few, first_line
from onecard.errors import ModelError
from onecard.export.io.base import read_config, refuse_quantized
from onecard.export.io.left_out import has_own_head, left_out
from onecard.export.io.weights import Weights
from onecard.model.rope_scaling import scale_rope

# Family of config.json -> architecture of llama.cpp, which reads Mistral as a Llama.
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPE_KINDS = ("default", "linear", "yarn", "llama3")
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # what llama.cpp and transformers take where nothing is said
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GgufLayout:
    """The numbers that llama.cpp needs. rope: kind and its settings; notes: what a person should be told.

    attention_factor: what YaRN multiplies sines and cosines with, 1 elsewhere.
    """

    family: str
    architecture: str
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_eps: float
    rope_theta: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    rope: Mapping[str, Any] = field(default_factory=dict)
    attention_factor: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def permutes(self) -> bool:
        """Whether llama.cpp turns neighbouring rows of a head together, as Meta did, and not a head's two halves."""
        return self.architecture == "llama"

    @property
    def rope_kind(self) -> str:
        return str(self.rope.get("rope_type", "default"))

    @property
    def rope_factor(self) -> float:
        """How much longer texts are than those of the first training."""
        original = self.rope.get("original_max_position_embeddings") or self.context_length
        return float(self.rope.get("factor") or self.context_length / original)

    @property
    def unusual_betas(self) -> dict[str, float]:
        """YaRN's betas where they are not the usual ones."""
        given = {name: float(self.rope.get(name) or usual) for name, usual in YARN_BETAS.items()}
        is_yarn = self.rope_kind == "yarn"
        return {name: value for name, value in given.items() if is_yarn and value != YARN_BETAS[name]}

    def heads_of(self, name: str) -> int:
        """How many heads the rows of this tensor are permuted in; 0: its rows stay as they are."""
        if not self.permutes:
            return 0
        module = name.rpartition(".")[0]
        return self.n_heads if module.endswith("q_proj") else self.n_kv_heads if module.endswith("k_proj") else 0


def read_layout(directory: Path, rope_scaling: str = "none") -> GgufLayout:
    """The layout of a model directory. Raises ModelError for what llama.cpp would not compute the same way.

    rope_scaling: under which its adapter was trained.
    """
    raw = _checked_config(directory)
    from transformers import AutoConfig  # fills in what older configs leave out

    try:
        config: Any = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as reason:  # several kinds; each means that config.json cannot be used
        raise ModelError(f"{directory}/config.json cannot be used: {first_line(reason)}") from reason
    scale_rope(config, rope_scaling)
    family = str(raw["model_type"])
    n_heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    if hidden % n_heads and not getattr(config, "head_dim", None):
        raise ModelError(f"{directory}/config.json: hidden_size {hidden} is no multiple of {n_heads} attention heads")
    biased = bool(getattr(config, "attention_bias", False))
    rope = dict(config.rope_parameters or {})
    layout = GgufLayout(
        family=family, architecture=FAMILIES[family], n_layers=int(config.num_hidden_layers), hidden_size=hidden,
        intermediate_size=int(config.intermediate_size), n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // n_heads), vocab_size=int(config.vocab_size),
        context_length=int(config.max_position_embeddings), rms_eps=float(config.rms_norm_eps),
        rope_theta=float(rope.get("rope_theta", 10000.0)), tied=bool(config.tie_word_embeddings),
        qkv_bias=biased or family == "qwen2", output_bias=biased and family != "qwen2",
        mlp_bias=bool(getattr(config, "mlp_bias", False)), rope=rope, notes=_notes(config),
    )  # fmt: skip
    _refuse_differences(directory, layout, str(config.hidden_act))
    if layout.rope_kind != "yarn":
        return layout
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # knows every way to say this factor

    _, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    layout = replace(layout, attention_factor=float(factor))
    flags = " ".join(f"--yarn-{name.replace('_', '-')} {value:g}" for name, value in layout.unusual_betas.items())
    if not flags:
        return layout
    note = f"llama.cpp does not read YaRN's betas from a {family} file, though they are in it: start it with {flags}"
    return replace(layout, notes=(*layout.notes, note))


def with_own_head(layout: GgufLayout, weights: Weights) -> GgufLayout:
    """The layout of these weights: with a head of its own where they hold one, whatever config.json says."""
    if not layout.tied or not has_own_head(weights, EMBEDDING, HEAD):
        return layout
    note = (
        f"config.json says that {HEAD} is {EMBEDDING}, but the weights hold another one: it is exported too, as "
        "transformers loads it"
    )
    return replace(layout, tied=False, notes=(*layout.notes, note))


def expected_shapes(layout: GgufLayout) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor the file is made of, by its name in the Hugging Face checkpoint."""
    hidden, inner = layout.hidden_size, layout.intermediate_size
    n_q, n_kv = layout.n_heads * layout.head_dim, layout.n_kv_heads * layout.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (layout.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not layout.tied:
        shapes[HEAD] = (layout.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (n_q, hidden, layout.qkv_bias), "self_attn.k_proj": (n_kv, hidden, layout.qkv_bias),
        "self_attn.v_proj": (n_kv, hidden, layout.qkv_bias), "self_attn.o_proj": (hidden, n_q, layout.output_bias),
        "mlp.gate_proj": (inner, hidden, layout.mlp_bias), "mlp.up_proj": (inner, hidden, layout.mlp_bias),
        "mlp.down_proj": (hidden, inner, layout.mlp_bias),
    }  # fmt: skip
    for i in range(layout.n_layers):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (hidden,)
        if layout.family == "qwen3":
            for norm in ("q_norm", "k_norm"):
                shapes[f"{layer}.self_attn.{norm}.weight"] = (layout.head_dim,)
        for module, (n_out, n_in, bias) in linears.items():
            shapes[f"{layer}.{module}.weight"] = (n_out, n_in)
            if bias:
                shapes[f"{layer}.{module}.bias"] = (n_out,)
    return shapes


def check_tensors(directory: Path, layout: GgufLayout, weights: Weights) -> tuple[list[str], list[str]]:
    """The names to export, in the order of the files, and lines about those that are left out.

    Raises ModelError: missing, unknown, other shapes or kinds.
    """
    shapes, entries = expected_shapes(layout), weights.entries
    missing = sorted(shapes.keys() - entries.keys())
    if missing:
        raise ModelError(f"{directory} lacks {few(missing)}, which its config.json ({layout.family}) asks for")
    remedy = (
        f": a plain {layout.family} model has none; an adapter must be merged first, and a quantised model cannot be "
        "converted"
    )
    notes = left_out(directory, entries, shapes, weights.read, remedy=remedy)
    wrong = [name for name in shapes if entries[name].shape != shapes[name]]
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{directory}: {name} has the shape {list(entries[name].shape)}, and config.json asks for "
            f"{list(shapes[name])}" + (f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else "")
        )
    odd = [name for name in shapes if entries[name].dtype not in FLOATS]
    if odd:
        raise ModelError(f"{directory}: {odd[0]} is stored as {entries[odd[0]].dtype}; 16-bit or 32-bit is needed")
    return [name for name in entries if name in shapes], notes


def permuted(tensor: Tensor, n_heads: int) -> Tensor:
    """Rows (or biases) of Q or K in the order of llama.cpp's Llama: the two halves of each head take turns.

    One head of 4 rows a, b, c, d: Hugging Face turns a with c and b with d, so they become a, c, b, d.
    """
    halves = tensor.reshape(n_heads, 2, tensor.shape[0] // n_heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def rope_divisors(layout: GgufLayout) -> Tensor:
    """(head_dim // 2,) fp32: what each frequency is divided by under the scaling of LLaMA 3.1.

    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py (llama3)
    """
    settings = layout.rope
    factor, low, high = (float(settings[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    old_context = float(settings["original_max_position_embeddings"])
    exponents = torch.arange(0, layout.head_dim, 2, dtype=torch.float64) / layout.head_dim
    wavelengths = 2 * math.pi * layout.rope_theta**exponents
    # 1 below old_context / high, factor above old_context / low, and a smooth way between.
    share = ((old_context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()


def _checked_config(directory: Path) -> dict[str, Any]:
    raw = read_config(directory)
    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        raise ModelError(f"{directory} is a {family} model; this tool writes GGUF for {', '.join(FAMILIES)}")
    refuse_quantized(directory, raw, "give the 16-bit model that it was made from")
    return raw


def _refuse_differences(directory: Path, layout: GgufLayout, activation: str) -> None:
    """Refuse what llama.cpp's graph of this architecture leaves out: it would load, and talk nonsense."""
    reason = ""
    nested = [name for name, value in layout.rope.items() if isinstance(value, (dict, list))]
    if layout.rope_kind not in ROPE_KINDS or (layout.rope_kind == "llama3" and layout.architecture != "llama"):
        reason = f"its positions are scaled by {layout.rope_kind!r}"
    elif nested:
        reason = f"its positions are turned by {few(nested)}"
    elif layout.rope_kind == "yarn" and layout.rope.get("truncate") is False:
        reason = "its YaRN does not round the range of dimensions ('truncate' is false)"
    elif float(layout.rope.get("partial_rotary_factor", 1.0)) != 1.0:
        reason = "only a part of each head is turned by its position"
    elif activation not in ("silu", "swish"):
        reason = f"its MLP uses {activation!r}"
    elif layout.architecture == "qwen2" and layout.head_dim * layout.n_heads != layout.hidden_size:
        reason = f"{layout.n_heads} heads of {layout.head_dim} are not the hidden size {layout.hidden_size}"
    elif layout.output_bias and layout.architecture == "qwen3":
        reason = "its attention has biases"
    if reason:
        raise ModelError(f"{directory}: {reason}, which llama.cpp does not compute for {layout.family} models")


def _notes(config: Any) -> tuple[str, ...]:
    window = getattr(config, "sliding_window", None)
    slides = window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings
    if not slides:
        return ()
    return (
        f"this model looks back {window} tokens; llama.cpp looks back over everything, so answers are the same up to "
        f"{window} tokens and may differ beyond",
    )
