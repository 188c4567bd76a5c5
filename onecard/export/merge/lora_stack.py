"""A base with adapters that takes no memory: every layer's name and shape, and one layer's weights at a time.

The model is built from config.json alone (on the meta device), so that peft's own checks and peft's own merge serve
every kind of adapter, while only the layer at hand has weights. Knows layers, tied heads and vocabularies that grew.
Does not know files that are written, dtypes of the result, or tokenizers. peft is reached through
`model/lora/adapter.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onecard.console import first_line
from onecard.errors import ModelError
from onecard.export.io.base import LazyCheckpoint
from onecard.export.merge.rounding import is_finite
from onecard.installation import command
from onecard.model.lora.adapter import attach_files
from onecard.model.lora.formats import AdapterFiles, read_adapter, read_config, refuse_never_merged
from onecard.model.lora.methods import is_mergeable
from onecard.model.lora.peft_model import ADAPTER, add_product
from onecard.model.lora.vocabulary import rows_in

PREFIX = "base_model.model."  # of a layer's name in an adapter's files
# What peft puts between the name of a layer and that of its weight.
WRAPPINGS = ("base_layer.", "original_module.", "token_adapter.")


@dataclass
class LoadedLora:
    """One adapter on a skeleton: the wrapped layers by their plain names, and what its files hold beside them."""

    files: AdapterFiles
    model: Any
    """The PeftModel: its adapter has weights, its base has none."""
    rows: int
    wrapped: dict[str, nn.Module]
    replaced: dict[str, Tensor]
    """Embeddings or head that were saved whole because the vocabulary had changed; they stand for the base's."""
    notes: list[str]

    def prepared(self, module: str, tensors: dict[str, Tensor], vocabulary: Sequence[str]) -> dict[str, Tensor]:
        """What this adapter works on: rows of vocabulary added (NaN until they get values) or cut away."""
        result = {}
        for name, tensor in tensors.items():
            if name in self.replaced:
                tensor = self.replaced[name].to(torch.float32, copy=True)  # merged in place later
            elif module in vocabulary and tensor.shape[0] != self.rows:
                kept = tensor[: self.rows]
                new = kept.new_full((self.rows - kept.shape[0], *kept.shape[1:]), torch.nan)
                tensor = torch.cat([kept, new])
            result[name] = tensor
        return result

    def merged(self, module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's weights with this adapter merged in, as peft does it, in fp32 and mostly in place.

        Raises ModelError.
        """
        if module not in self.wrapped:
            return tensors
        layer: Any = self.wrapped[module]
        with torch.no_grad():
            if f"{module}.weight" in tensors and add_product(layer, tensors[f"{module}.weight"]):
                return tensors
        if not hasattr(layer, "modules_to_save"):
            # A copy, because a merged layer would count as merged for ever; it has no weights yet.
            layer = copy.deepcopy(layer)
            fill(layer, {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items()})
        try:
            with torch.no_grad():
                plain = _unwrapped(layer)
        except (RuntimeError, ValueError) as reason:  # a kind of adapter that peft cannot merge
            raise ModelError(f"{self.files.directory} cannot be merged into {module}: {first_line(reason)}") from reason
        return {f"{module}.{name}": parameter.detach() for name, parameter in plain.named_parameters()}


class LoraStack:
    """A base and its adapters in order; `module` is always a layer's name in the plain model."""

    def __init__(self, base: LazyCheckpoint, stages: list[LoadedLora], scale: float = 1.0) -> None:
        self.base, self.stages, self.scale = base, stages, scale
        vocabulary = [name for name in (base.embedding, base.head) if name]
        self.vocabulary = vocabulary
        touched = {name: None for stage in stages for name in stage.wrapped}
        for stage in stages:
            touched |= {name.rpartition(".")[0]: None for name in stage.replaced}
        self.targets = list(touched)
        """Layers that an adapter changes."""
        if any(stage.rows != base.rows for stage in stages):
            touched |= dict.fromkeys(vocabulary)
        if base.is_tied and any(name in touched for name in vocabulary):
            touched |= dict.fromkeys(vocabulary)  # the two must be looked at together
        self.touched = touched
        """Layers whose weights come out other than they are stored, or may."""

    @property
    def rows(self) -> int:
        return self.stages[-1].rows if self.stages else self.base.rows

    def parameters_of(self, module: str) -> list[str]:
        layer = self.base.skeleton.get_submodule(module)
        return [f"{module}.{name}" for name, _ in layer.named_parameters()]

    def owner_of(self, layer: str) -> str:
        """The touched layer that this one is or lies in; else the layer itself."""
        return (
            layer
            if layer in self.touched
            else next((outer for outer in parents_of(layer) if outer in self.touched), layer)
        )

    def advance(self, module: str, tensors: dict[str, Tensor], start: int, n_stages: int) -> dict[str, Tensor]:
        """The layer's weights in fp32 after `n_stages` adapters, ready for the next one; `tensors` after `start`.

        Works in place where peft does.
        """
        for stage in self.stages[start:n_stages]:
            tensors = stage.merged(module, stage.prepared(module, tensors, self.vocabulary))
        if n_stages < len(self.stages):
            return self.stages[n_stages].prepared(module, tensors, self.vocabulary)
        self._check_finite(module, tensors)
        return tensors

    def read(self, module: str) -> dict[str, Tensor]:
        """The layer's weights as the base has them, in fp32; a touched one with the layers inside it."""
        names = self.parameters_of if module in self.touched else self.base.own_parameters_of
        return {name: self.base.read(name) for name in names(module)}

    def merged(self, layer: str) -> dict[str, Tensor]:
        """The layer's weights in fp32 after all adapters. Raises ModelError for rows that nobody has values for."""
        module = self.owner_of(layer)
        tensors = self.read(module)
        return self.advance(module, tensors, 0, len(self.stages)) if module in self.touched else tensors

    def _check_finite(self, module: str, tensors: dict[str, Tensor]) -> None:
        broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
        if broken and module in self.vocabulary and self.rows > self.base.rows:
            raise ModelError(
                f"the adapters were trained with {self.rows} rows of vocabulary, the base has {self.base.rows}, and no "
                f"adapter holds the new rows of {module}; merge into the base with the grown vocabulary that they "
                "were trained on"
            )
        if broken:
            raise ModelError(f"{broken[0]} holds NaN or Inf; the base or an adapter is broken")


def adapt(base: LazyCheckpoint, adapters: Sequence[str], scale: float = 1.0) -> LoraStack:
    """Attach each adapter to a skeleton of its own, `scale` times as strongly.

    Raises ModelError that lists what does not fit this base; ConfigError for a scale that an adapter does not know.
    """
    stages: list[LoadedLora] = []
    for source in adapters:
        stages.append(_stage(base, source, stages[-1].rows if stages else base.rows, scale))
    return LoraStack(base, stages, scale)


def _stage(base: LazyCheckpoint, source: str, rows_before: int, scale: float) -> LoadedLora:
    files = read_adapter(source)
    kind = str((read_config(files.config_directory) if files.config_directory else {}).get("peft_type") or "LORA")
    refuse_never_merged(files)
    if not is_mergeable(kind):
        raise ModelError(
            f"{files.directory} is an adapter of the method {kind.lower()}, which is not merged here: leave it beside "
            "its base, or merge it with peft (merge_and_unload)"
        )
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in files.tensors.items()}
    tensors, replaced = _without_saved_base(base, files, tensors)
    tensors = _with_tied_head(base, files, tensors)
    rows = _rows_of(base, tensors, replaced) or rows_before
    model = base.build(rows)
    loaded = attach_files(
        model,
        AdapterFiles(files.directory, files.weights, tensors, files.config_directory, files.notes),
        trainable=False,
        scale=scale,
    )
    if getattr(loaded.model.peft_config[ADAPTER], "target_parameters", None):
        raise ModelError(
            f"{files.directory} adapts experts ({command('finetune')} --lora_target_parameters), whose tensors cannot "
            "be merged here: leave the adapter beside its base"
        )
    plain = loaded.model.get_base_model()
    wrapped: dict[str, nn.Module] = {}
    for name, module in plain.named_modules():
        if _is_wrapper(module) and not any(outer in wrapped for outer in parents_of(name)):
            wrapped[name] = module
    loaded.model.eval()
    return LoadedLora(files, loaded.model, rows, wrapped, replaced, loaded.notes)


def _without_saved_base(
    base: LazyCheckpoint, files: AdapterFiles, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part an adapter's own tensors from the embeddings that peft saves beside them for a changed vocabulary."""
    config = read_config(files.config_directory) if files.config_directory else {}
    trained_whole = [str(name) for name in config.get("modules_to_save") or []]
    own, replaced = dict(tensors), {}
    for module in (name for name in (base.embedding, base.head) if name):
        is_trained = any(module == name or module.endswith(f".{name}") for name in trained_whole)
        for end in ("weight", "bias"):
            copied = own.pop(f"{PREFIX}{module}.modules_to_save.{end}", None)
            if copied is not None:
                own.setdefault(f"{PREFIX}{module}.{end}", copied)
            forms = [f"{wrapping}{end}" for wrapping in (*WRAPPINGS, "token_adapter.base_layer.")]
            forms += [] if is_trained else [end]
            found = [own.pop(f"{PREFIX}{module}.{form}", None) for form in forms]
            values = [tensor for tensor in found if tensor is not None]
            if values:
                replaced[f"{module}.{end}"] = values[0]
    return own, replaced


def _with_tied_head(base: LazyCheckpoint, files: AdapterFiles, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of embeddings and a head that were trained as one (peft's ensure_weight_tying), the files hold the former."""
    config = read_config(files.config_directory) if files.config_directory else {}
    embedding = tensors.get(f"{PREFIX}{base.embedding}.weight")
    if not (config.get("ensure_weight_tying") and base.is_tied) or embedding is None:
        return tensors
    return {f"{PREFIX}{base.head}.weight": embedding, **tensors}


def _rows_of(base: LazyCheckpoint, tensors: dict[str, Tensor], replaced: dict[str, Tensor]) -> int | None:
    """Rows of vocabulary that an adapter's tensors were trained with; None where none of them tells."""
    found: set[int] = {tensor.shape[0] for tensor in replaced.values()}
    for module in (name for name in (base.embedding, base.head) if name):
        found |= rows_in(tensors, f"{PREFIX}{module}")
    if len(found) > 1:
        raise ModelError(f"the adapter's tensors disagree about the rows of vocabulary: {sorted(found)}")
    return found.pop() if found else None


def fill(layer: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Give the empty parameters inside `layer` these weights, by their names without peft's wrappings.

    Returns the names of those that were filled, for `empty`.
    """
    wanted = [name for name, parameter in layer.named_parameters(remove_duplicate=False) if parameter.is_meta]
    filled = [name for name in wanted if plain_name(name) in tensors]
    for name in filled:
        _put(layer, name, tensors[plain_name(name)])
    return filled


def empty(layer: nn.Module, names: Sequence[str]) -> None:
    """Take the weights of these parameters away again."""
    for name in names:
        _put(layer, name, layer.get_parameter(name).detach().to("meta"))


def parents_of(name: str) -> Iterator[str]:
    """The names of the modules that a module lies in, the nearest first."""
    while name := name.rpartition(".")[0]:
        yield name


def plain_name(name: str) -> str:
    """The name of a parameter without what peft put into it: q_proj.base_layer.weight -> q_proj.weight."""
    for wrapping in WRAPPINGS:
        name = name.replace(f".{wrapping}", ".").removeprefix(wrapping)
    return name


def _put(layer: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    layer.get_submodule(owner).register_parameter(own, nn.Parameter(tensor, requires_grad=False))


def _is_wrapper(module: Any) -> bool:
    return hasattr(module, "unload_and_optionally_merge_module") or (
        hasattr(module, "base_layer") and hasattr(module, "merge")
    )


def _unwrapped(layer: Any) -> nn.Module:
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    layer.merge(safe_merge=False)
    return layer.get_base_layer()
