"""Options of the base model: which one, and how it lies in memory. A field's docstring is its help text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from onecard.config.problems import Problem
from onecard.installation import SHIPPED

ROPE_KINDS = ("yarn", "linear", "dynamic")
DEFAULT_BASE = str(SHIPPED / "sample" / "tiny-llama")


@dataclass
class ModelOptions:
    """The base model and how it lies in memory."""

    model_path: str = DEFAULT_BASE
    """Base model: a directory in Hugging Face form or a Hub id; auto (to generate): the one the adapter names."""
    bits: Literal[4, 8, 16, 32] = 4
    """Bits per base weight: 4 (NF4 with double quantisation), 8 (LLM.int8), 16 or 32."""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Number format of the arithmetic. auto: bf16 where the card has it natively, fp16 on older cards, fp32 on CPU."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel. auto lets transformers choose; sdpa works on every card."""
    gradient_checkpointing: Literal["auto", True, False] = field(default="auto", metadata={"bare": "true"})
    """Recompute each layer in the backward pass (on, off): several times less memory, slower. auto: on where needed."""
    max_memory: str | None = None
    """Spread the model over several GPUs, so much of each: 0:10GiB,1:10GiB. cpu:30GiB: the rest in RAM, to answer."""
    stream_layers: Literal["auto", "on", "off"] = "auto"
    """Keep frozen layers in RAM; they pass through the card, one layer ahead. auto: where nothing else fits."""
    rope_scaling: str = "auto"
    """Read longer texts: yarn:F, linear:F or dynamic:F, F times the model's positions. none: as the base is; auto: as
    the adapter was trained, or as the base is."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: only architectures of transformers itself are loaded."""

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if not self.model_path:
            found.append(("--model_path", "is empty; give a directory or a Hub id"))
        if self.bits == 32 and self.dtype in ("fp16", "bf16"):
            found.append(("--bits", f"32 contradicts --dtype {self.dtype}; use --bits 16 or --dtype fp32"))
        if self.max_memory is not None and memory_map(self.max_memory) is None:
            found.append(("--max_memory", f"{self.max_memory!r} is not of the form 0:10GiB,1:10GiB,cpu:30GiB"))
        if self.bits == 16 and self.dtype == "fp32":
            found.append(("--bits", "16 contradicts --dtype fp32; use --bits 32 or another --dtype"))
        try:
            rope_scaling_of(self.rope_scaling)
        except ValueError as reason:
            found.append(("--rope_scaling", str(reason)))
        if self.stream_layers == "on" and self.max_memory is not None:
            found.append(("--stream_layers", "on does not go with --max_memory: layers pass through one card"))
        return found


def rope_scaling_of(value: str) -> tuple[str, float] | None:
    """--rope_scaling as (kind, factor): "yarn:4" -> ("yarn", 4.0); None for auto and none. Raises ValueError."""
    if value in ("auto", "none"):
        return None
    kind, _, number = value.partition(":")
    if kind not in ROPE_KINDS or not re.fullmatch(r"\d{1,3}(\.\d{1,3})?", number):
        raise ValueError(f"{value!r} is none of auto, none, yarn:4, linear:4, dynamic:4")
    if float(number) <= 1:
        raise ValueError(f"{value!r} stretches nothing; the factor is more than 1")
    return kind, float(number)


def memory_map(text: str) -> dict[int | str, str] | None:
    """--max_memory as accelerate takes it: "0:10GiB,cpu:30GiB" -> {0: "10GiB", "cpu": "30GiB"}; None if it is wrong."""
    found: dict[int | str, str] = {}
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+|cpu):(\d+(?:\.\d+)?[KMG]i?B)", part)
        if match is None:
            return None
        place, amount = match.groups()
        found[place if place == "cpu" else int(place)] = amount
    return found


def n_gpus_of(max_memory: str | None) -> int:
    """GPUs that one process uses under this --max_memory: those that it names, else one."""
    named = memory_map(max_memory or "") or {}
    return max(1, sum(isinstance(place, int) for place in named))
