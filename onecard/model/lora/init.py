"""The arithmetic of two initialisations of LoRA: LoftQ and PiSSA.

Knows matrices. W is a base weight (out, in), A (r, in) and B (out, r) the adapter, s its scaling: the layer computes
W + s B A. It writes no files and imports no peft; `adapter.py` decides when what is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from onecard.config.lora import LoraOptions
from onecard.errors import ConfigError, ModelError
from onecard.model.files import locate, weight_files
from onecard.model.lora.formats import PREFIX
from onecard.model.quantization import dequantize_4bit, weight_bits


def check_start(options: LoraOptions, linear: dict[str, Any]) -> None:
    """Raise ConfigError for a start that these linear layers, or the other options, cannot have."""
    if options.lora_init == "default":
        return
    bits = min((weight_bits(layer) for layer in linear.values()), default=16)
    if options.use_dora:
        raise ConfigError(
            "--use_dora",
            f"and --lora_init {options.lora_init} contradict each other: both decide what "
            "the first weights are; use one of them",
        )
    if options.lora_init in ("pissa", "olora") and bits < 16:
        raise ConfigError(
            "--lora_init",
            f"{options.lora_init} moves part of the base weights into the adapter, which {bits}-bit "
            "weights cannot follow; use --bits 16 or 32, or loftq with --bits 4",
        )
    if options.lora_init == "loftq" and bits != 4:
        raise ConfigError(
            "--lora_init",
            f"loftq makes up for the error of 4-bit weights; this base has {bits} bits; "
            "use --bits 4, or --lora_init default",
        )


@torch.no_grad()
def start_loftq(peft_model: Any, adapter: str) -> None:
    """Let A and B make up for what quantisation lost: s B A is the best rank-r likeness of W - Q.

    https://arxiv.org/abs/2310.08659 with one iteration. The base in memory stays the plain 4-bit one (peft's own
    function needs CUDA and leaves s out), so the saved adapter works on any copy of the base in 4 bits. It is worse
    than nothing on 16-bit weights, where there is no loss to make up for.
    """
    original = _OriginalWeights(peft_model.get_base_model())
    for name, layer in peft_model.named_modules():
        if not hasattr(layer, "lora_A") or weight_bits(layer.get_base_layer()) != 4:
            continue
        base = layer.get_base_layer()
        weight = original.read(name.removeprefix(PREFIX) + ".weight").to(base.weight.device).float()
        if getattr(base, "source_cls", None) is Conv1D:  # stored (in, out), quantised (out, in)
            weight = weight.T
        u, s, vh = torch.linalg.svd(weight - dequantize_4bit(base.weight), full_matrices=False)
        r, root = layer.r[adapter], s[: layer.r[adapter]].sqrt()
        layer.lora_A[adapter].weight.copy_(root[:, None] * vh[:r])
        layer.lora_B[adapter].weight.copy_(u[:, :r] * root / layer.scaling[adapter])


def join_pissa(tensors: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a plain LoRA of rank 2r for the untouched base: A' = [A; A0], B' = [B, -B0].

    W_res = W - s B0 A0, so W_res + s B A = W + s (B A - B0 A0) = W + s B' A'. Peft's subtract_mutated_init does the
    same by loading a second adapter into the live model, which a running optimizer should not see.
    """
    joined = {}
    for name, tensor in tensors.items():
        if name not in start:  # rows of tokens, whole embeddings
            joined[name] = tensor
            continue
        first = start[name]
        joined[name] = torch.cat([tensor, first]) if ".lora_A" in name else torch.cat([tensor, -first], dim=1)
    return joined


def split_pissa(joined: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Undo `join_pissa`: return the trained matrices and the first ones, bit for bit."""
    trained, start = {}, {}
    for name, tensor in joined.items():
        if ".lora_" not in name:
            trained[name] = tensor
            continue
        dim, sign = (0, 1) if ".lora_A" in name else (1, -1)
        half = tensor.shape[dim] // 2
        trained[name] = tensor.narrow(dim, 0, half).contiguous()
        start[name] = sign * tensor.narrow(dim, half, half).contiguous()
    return trained, start


@torch.no_grad()
def rebase_pissa(peft_model: Any, adapter: str, live: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Move the base weights from the start `live` to the start `wanted`: another card's SVD ends in other digits.

    Where both are equal, as they are on the same machine, nothing is touched and a resumed run stays bitwise the same.
    """
    for name, layer in peft_model.named_modules():
        key_a, key_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if key_a not in wanted:
            continue
        weight = layer.get_base_layer().weight
        live_a, live_b = live[key_a].to(weight.device), live[key_b].to(weight.device)
        new_a, new_b = wanted[key_a].to(weight.device), wanted[key_b].to(weight.device)
        if torch.equal(live_a, new_a) and torch.equal(live_b, new_b):
            continue
        change = layer.scaling[adapter] * (live_b @ live_a - new_b @ new_a)
        weight.copy_(weight.float() + (change.T if layer.fan_in_fan_out else change))


class _OriginalWeights:
    """The unquantised weights of a base, read one at a time from its safetensors files."""

    def __init__(self, model: Any) -> None:
        self.base_prefix = f"{model.base_model_prefix}."
        self.files: dict[str, Path] = {}
        for file in weight_files(locate(model.config._name_or_path)):
            if file.suffix != ".safetensors":
                raise ConfigError(
                    "--lora_init",
                    f"loftq reads the base's weights one by one, which {file.name} does "
                    "not allow; convert the base to safetensors, or use --lora_init default",
                )
            with safe_open(file, framework="pt") as opened:
                self.files |= dict.fromkeys(opened.keys(), file)

    def read(self, name: str) -> Tensor:
        stored = name if name in self.files else name.removeprefix(self.base_prefix)
        if stored not in self.files:
            raise ModelError(f"loftq: the base's files hold no tensor {name}; use --lora_init default for this family")
        with safe_open(self.files[stored], framework="pt") as opened:
            return opened.get_tensor(stored)
