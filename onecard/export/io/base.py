"""A base model on the disk under the names of its model, which is built from config.json without any memory.

Knows names, shapes, tied heads and what keeps a directory from being a base. Does not know adapters. Nothing is loaded
but the tensor that is asked for; the model lies on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onecard.console import first_line
from onecard.errors import ModelError
from onecard.export.io.left_out import TABLES, has_own_head
from onecard.export.io.weights import Weights, open_weights, own_memory
from onecard.installation import command
from onecard.model.files import locate, read_json
from onecard.model.gptq import stored_quantization
from onecard.model.rope_scaling import scale_rope, scaled_json


@dataclass
class LazyCheckpoint:
    """A base model's files under the names of its model. Made by `open_base`."""

    directory: Path
    config: dict[str, Any]
    weights: Weights
    trust_remote_code: bool
    rope_scaling: str = "none"
    """The --rope_scaling under which its adapters were trained: of `config` and of what is built."""
    skeleton: Any = None
    """The model on the meta device, its computed tables on the CPU."""
    is_tied: bool = False
    """Whether the head is the embeddings' weight."""
    unties: bool = False
    """Whether the files hold another head than the embeddings although config.json says that they are one."""

    def build(self, rows: int | None = None) -> Any:
        """Another skeleton, with so many rows of vocabulary."""
        model = build_skeleton(
            self.directory, trust_remote_code=self.trust_remote_code, unties=self.unties,
            rope_scaling=self.rope_scaling,
        )  # fmt: skip
        if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that most of the weights are stored in."""
        n_bytes: dict[torch.dtype, int] = {}
        for entry in self.weights.entries.values():
            if entry.dtype.is_floating_point:
                n_bytes[entry.dtype] = n_bytes.get(entry.dtype, 0) + entry.n_bytes
        return max(n_bytes, key=lambda dtype: n_bytes[dtype], default=torch.float32)

    @property
    def embedding(self) -> str:
        """Name of the layer of input embeddings."""
        return _name_of(self.skeleton, self.skeleton.get_input_embeddings())

    @property
    def head(self) -> str:
        """Name of the output layer; empty where the model has none."""
        return _name_of(self.skeleton, self.skeleton.get_output_embeddings())

    @property
    def rows(self) -> int:
        """Rows of vocabulary."""
        return int(self.skeleton.get_input_embeddings().weight.shape[0])

    def own_name(self, parameter: str) -> str | None:
        """The name under which the files hold a parameter of the model, with or without the model's prefix."""
        prefix = f"{self.skeleton.base_model_prefix}."
        names = (parameter, parameter.removeprefix(prefix), prefix + parameter)
        return next((name for name in names if name in self.weights.entries), None)

    def stored_name(self, parameter: str) -> str | None:
        """`own_name`, or for one half of a tied pair the other's."""
        own = self.own_name(parameter)
        if own is None and self.is_tied:
            pair = {
                f"{self.embedding}.weight": f"{self.head}.weight",
                f"{self.head}.weight": f"{self.embedding}.weight",
            }
            own = self.own_name(pair[parameter]) if parameter in pair else None
        return own

    def required_name(self, parameter: str) -> str:
        """`stored_name` of what must be there. Raises ModelError where the files name it in another way."""
        name = self.stored_name(parameter)
        if name is None:
            raise ModelError(
                f"{self.directory} stores {parameter} under another name or in another form than today's model has it; "
                "load it with transformers, save it anew (save_pretrained) and merge into that. If this is said again, "
                "its family is always stored so: leave the adapter beside its base"
            )
        return name

    def own_parameters_of(self, layer: str) -> list[str]:
        """The names of what lies in a layer itself and not in a layer inside it."""
        return [f"{layer}.{name}" for name, _ in self.skeleton.get_submodule(layer).named_parameters(recurse=False)]

    def read(self, parameter: str) -> Tensor:
        """One parameter in fp32. Raises as `required_name` does."""
        stored = self.weights.mapped(self.required_name(parameter))
        return own_memory(stored.shape, torch.float32).copy_(stored)

    def unknown_names(self) -> list[str]:
        """Tensors of the files that are no parameter or table of the model, such as experts stored one by one."""
        known = {self.own_name(name) for name, _ in self.skeleton.named_parameters(remove_duplicate=False)}
        known |= {self.own_name(name) for name, _ in self.skeleton.named_buffers()}
        return [name for name in self.weights.entries if name not in known and not name.endswith(TABLES)]


def open_base(
    name: str, *, trust_remote_code: bool = False, rope_scaling: str = "none",
    remedy: str = "merge into the model it was made from, and quantise the result",
) -> LazyCheckpoint:  # fmt: skip
    """Look at a base, a directory or a Hub id, without loading it; remedy: what to do with one in few bits instead.

    Raises ModelError: no model there, quantised already, unknown family, missing or damaged files, other shapes.
    """
    directory = locate(name, with_code=trust_remote_code)
    raw = read_config(directory)
    code_source = str(directory) if trust_remote_code and "auto_map" in raw else None
    config = scaled_json(raw, str(directory), rope_scaling, code_source)
    refuse_quantized(directory, config, remedy)
    base = LazyCheckpoint(directory, config, open_weights(directory), trust_remote_code, rope_scaling)
    base.skeleton = base.build()
    if _is_tied(base.skeleton):
        names = (base.own_name(f"{base.embedding}.weight"), base.own_name(f"{base.head}.weight"))
        base.unties = has_own_head(base.weights, names[0] or "", names[1] or "")
        base.skeleton = base.build() if base.unties else base.skeleton
    base.is_tied = _is_tied(base.skeleton)
    _check_fits(base)
    return base


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory. Raises ModelError where there is no model, or an adapter."""
    if not (directory / "config.json").is_file():
        is_adapter = (directory / "adapter_config.json").is_file()
        advice = f"give it as --lora_path, or merge it first: {command('merge')} --lora_path"
        what = f"a LoRA adapter; {advice} {directory}" if is_adapter else "no model (config.json is missing)"
        raise ModelError(f"{directory} holds {what}")
    return read_json(directory / "config.json")


def refuse_quantized(directory: Path, config: dict[str, Any], remedy: str) -> None:
    """Raise ModelError, with what to do instead, for a model whose weights are packed in few bits."""
    stored = stored_quantization(directory, config)
    if stored:
        raise ModelError(f"{directory} is quantised already ({stored.get('quant_method', 'unknown')}); {remedy}")


def _check_fits(base: LazyCheckpoint) -> None:
    entries, missing = base.weights.entries, []
    for name, parameter in base.skeleton.named_parameters():
        stored = base.stored_name(name)
        if stored is None:
            missing.append(name)
        elif entries[stored].shape != tuple(parameter.shape):
            raise ModelError(
                f"{base.directory}: {stored} is {entries[stored].shape} in {entries[stored].file.name}, and "
                f"config.json calls for {tuple(parameter.shape)}; the config belongs to another model"
            )
    if missing and not base.unknown_names():
        raise ModelError(
            f"{base.directory} lacks {len(missing)} tensors that its config.json calls for, such as {missing[0]}; the "
            "copy is incomplete or the config belongs to another model"
        )
    if len(missing) == len(list(base.skeleton.named_parameters())):
        raise ModelError(
            f"{base.directory}: not one tensor has a name of {type(base.skeleton).__name__}, such as {missing[0]}; the "
            "weights and config.json belong to different models"
        )


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if wanted is not None and module is wanted), "")


def build_skeleton(
    directory: Path, *, trust_remote_code: bool = False, unties: bool = False, rope_scaling: str = "none"
) -> Any:
    """The model of a config.json on the meta device, its computed tables on the CPU.

    unties: give it a head of its own, whatever config.json says. Raises ModelError for what transformers cannot build.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
        scale_rope(config, rope_scaling)
        for part in (config, config.get_text_config()) if unties else ():
            part.update({"tie_word_embeddings": False})
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as reason:
        raise ModelError(
            f"{directory} is no causal language model that transformers can build: {first_line(reason)}"
        ) from reason
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()
