"""A LoRA adapter as GGUF, without its base: llama.cpp and Ollama put it on when they start.

What such a file cannot hold is refused by name. The order of things is told here; the format is writer.py's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.console import say, warn
from onecard.errors import ConfigError, ModelError
from onecard.export.gguf import writer
from onecard.export.gguf.export import chat_template_for, modelfile_for, open_source
from onecard.export.gguf.layout import EMBEDDING, HEAD, GgufLayout, expected_shapes, permuted
from onecard.export.gguf.options import ExportOptions, OllamaOptions
from onecard.export.io import output
from onecard.installation import command
from onecard.model.files import locate
from onecard.model.lora.formats import (
    LORA_KEY,
    MATRICES,
    PREFIX,
    AdapterFiles,
    adapter_scaling,
    infer_config,
    read_adapter,
    read_config,
    refuse_never_merged,
)

FLAG = "--adapter_only"
KINDS = ("f32", "f16", "bf16")  # rows of a small rank are no whole blocks of the others
TEMPLATE_NAME = "chat_template.jinja"
BASE_FILE = "base.gguf"
ADVICE = "leave --adapter_only out: merged into its base it can be written"
MIB = 2**20


def export_adapter(options: ExportOptions, for_ollama: OllamaOptions) -> Path:
    """Write DIRECTORY/adapter-TYPE.gguf, the chat template and a Modelfile; returns the file.

    Raises ModelError and ConfigError: more than one adapter, what a GGUF adapter cannot hold, another base.
    """
    if len(options.adapters) != 1:
        raise ConfigError(
            FLAG, f"{len(options.adapters)} adapters are given; give the one that is written as --lora_path"
        )
    if options.gguf_type not in KINDS:
        raise ConfigError("--gguf_type", f"{options.gguf_type} is no kind of number for an adapter; use f16 or f32")
    files = read_adapter(options.adapters[0])
    refuse_never_merged(files)
    for note in files.notes:
        warn(note)
    base = locate(options.model_path)
    has_tokenizer = any((files.directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    scaling = adapter_scaling(files.directory)
    source = open_source(base, options, files.directory if has_tokenizer else None, scaling)
    alpha, factors = adapter_factors(files, source.layout, options.adapter_scale)
    n_bytes = sum(tensor.numel() * 4 for tensor in factors.values())
    inputs = [base, files.directory]
    with output.new_directory(
        options.target, overwrite=options.overwrite, inputs=inputs, needed_bytes=n_bytes
    ) as partial:
        file = partial / f"adapter-{options.gguf_type}.gguf"
        writer.write_adapter(file, source.layout, alpha, factors, options.gguf_type)
        jinja = chat_template_for(source.template, source.tokenizer)
        if jinja is not None:
            (partial / TEMPLATE_NAME).write_text(jinja, encoding="utf-8", newline="")
        if for_ollama.modelfile:
            text = modelfile_for(BASE_FILE, source, for_ollama, adapter=file.name)
            (partial / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
        size = file.stat().st_size
    written = options.target / file.name
    say(f"wrote {written}: {len(factors) // 2} layers, alpha {alpha:g}, {size / MIB:.1f} MiB; read back and compared")
    say(
        f"for llama.cpp: llama-server -m BASE.gguf --lora {written}"
        + f" --chat-template-file {TEMPLATE_NAME}" * bool(jinja)
        + _position_flags(source.layout) * (scaling != "none")
    )
    if scaling != "none":
        warn(f"the adapter was trained under --rope_scaling {scaling}, which a GGUF adapter does not hold: give "
             f"llama-server those flags; Ollama has none for it, so {ADVICE}")  # fmt: skip
    if for_ollama.modelfile:
        made = f"{command('gguf')} --model_path {options.model_path}"
        say(f"for Ollama: put the base beside it as {BASE_FILE} ({made}), then "
            f"ollama create NAME -f {options.target / 'Modelfile'}")  # fmt: skip
    return written


def _position_flags(layout: GgufLayout) -> str:
    """https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md"""
    original = layout.rope.get("original_max_position_embeddings")
    flags = f" --rope-scaling {layout.rope_kind} --rope-scale {layout.rope_factor:g}"
    return flags + (f" --yarn-orig-ctx {original}" if original else "")


def adapter_factors(files: AdapterFiles, layout: GgufLayout, scale: float = 1.0) -> tuple[float, dict[str, Tensor]]:
    """(alpha, lora_a and lora_b of each layer by their names in the file), so that alpha / rank is what PEFT applies.

    Raises ModelError for what a GGUF adapter cannot hold, and for layers or sizes that the base does not have.
    """
    config = read_config(files.config_directory) if files.config_directory is not None else infer_config(files)
    modules = _modules(files, config)
    alpha = float(config.get("lora_alpha") or 0) * scale
    if not alpha:
        raise ModelError(f"{files.directory} has lora_alpha 0, by which it changes nothing")
    shapes = expected_shapes(layout)
    factors: dict[str, Tensor] = {}
    for module, (a, b) in modules.items():
        weight = f"{module}.weight"
        name = writer.adapter_name(layout, module) if weight in shapes else None
        if name is None or (weight == HEAD and layout.tied):
            raise ModelError(f"{module} is no layer of its own in {layout.architecture} models of llama.cpp; {ADVICE}")
        if (b.shape[0], a.shape[1]) != tuple(shapes[weight]):
            raise ModelError(f"{module} of the adapter is for a weight of {[b.shape[0], a.shape[1]]}, the base has "
                             f"{list(shapes[weight])}: it was trained on another base (--model_path)")  # fmt: skip
        # Where a layer's own rank or alpha, or rsLoRA, asks for another factor than alpha / rank, B takes it.
        more = scale * _scaling(module, a.shape[0], config) * a.shape[0] / alpha
        b = b.float() if math.isclose(more, 1.0) else b.float() * more
        n_heads = layout.heads_of(weight)
        factors[f"{name}.lora_a"] = a.float().contiguous()
        factors[f"{name}.lora_b"] = (permuted(b, n_heads) if n_heads else b).contiguous()
    return alpha, factors


def _modules(files: AdapterFiles, config: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """A (rank, in) and B (out, rank) of each layer. Raises ModelError naming what is more than that."""
    kind = str(config.get("peft_type") or "LORA").upper()
    if kind != "LORA":
        raise ModelError(f"{files.directory} is a {kind} adapter; GGUF has a form for LoRA only: {ADVICE}")
    if config.get("use_dora"):
        raise ModelError(f"{files.directory} is a DoRA adapter, whose magnitudes a GGUF adapter cannot hold; {ADVICE}")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in files.tensors.items():
        match = LORA_KEY.fullmatch(name)
        part = match["kind"] if match else ""
        if match is None or part not in MATRICES or match["end"] == ".bias" or tensor.dim() != 2:
            what = "trained embeddings" if EMBEDDING.split(".")[-2] in name or "embedding" in part else "more than LoRA"
            raise ModelError(f"{files.directory} holds {what} ({name}), which a GGUF adapter cannot hold; {ADVICE}")
        found.setdefault(match["module"].removeprefix(PREFIX), {})[part] = tensor
    lonely = next((module for module, parts in found.items() if len(parts) < 2), None)
    if lonely is not None:
        raise ModelError(f"{files.weights} has only one of the two matrices of {lonely}; copy the adapter again")
    if not all(torch.is_floating_point(tensor) for tensor in files.tensors.values()):
        raise ModelError(f"{files.weights} holds matrices that are no floats; save the adapter in fp32 or 16 bits")
    return {module: (parts[MATRICES[0]], parts[MATRICES[1]]) for module, parts in found.items()}


def _scaling(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """What PEFT multiplies B A by: alpha / rank, or alpha / sqrt(rank) with rsLoRA; a layer may have its own alpha.

    https://github.com/huggingface/peft/blob/main/src/peft/utils/other.py (get_pattern_key)
    """
    patterns = config.get("alpha_pattern") or {}
    own = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(config["lora_alpha"] if own is None else own)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
