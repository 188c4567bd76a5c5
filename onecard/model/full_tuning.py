"""Full fine-tuning and freeze tuning: weights of the base itself are trained, all of them or those of its last layers.

What is trained lies in fp32 beside 16-bit arithmetic, in which small steps of an optimizer would be lost; so it lies in
checkpoints, too. The result is a whole model in the base's dtype. Knows modules and files; no steps or optimizers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from onecard.config.given_paths import TRAINED_WEIGHTS, trained_weights_in
from onecard.config.lora import LoraOptions
from onecard.errors import ConfigError, ModelError
from onecard.model.files import locate, read_json, safetensors_header, write_json
from onecard.model.lora.formats import compare, differences_of, mean_of_files
from onecard.model.lora.vocabulary import keep_output_dtype
from onecard.model.model_layers import decoder_layers, text_part
from onecard.model.rope_scaling import MARK, scaled_json

LISTED = 3  # differences shown to a person
CONFIG, GENERATION = "config.json", "generation_config.json"


def tune_base(model: Any, options: LoraOptions) -> Any:
    """Let the base's own weights be trained, in fp32: all of its text part, or the last layers and the last norm.

    Raises ConfigError for more layers than there are, and for weights that lie quantised.
    """
    method = options.peft_method
    chosen = [*_last_layers(model, options.n_last_layers)] if options.n_last_layers else [model]
    frozen = set() if options.n_last_layers else set(_not_of_text(model))
    parameters = {id(p): p for module in chosen for p in module.parameters() if id(p) not in frozen}
    packed = [p for p in parameters.values() if not p.is_floating_point()]
    if packed:
        raise ConfigError("--peft_method", f"{method} cannot train weights that lie quantised; take the model's "
                          "unquantised form with --bits 16 or 32")  # fmt: skip
    dtype = model.dtype
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    for module in model.modules():
        # Norms and embeddings give out the dtype that they did: autocast sees to matrices alone.
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own and dtype != torch.float32 and (isinstance(module, nn.Embedding) or max(p.dim() for p in own) == 1):
            keep_output_dtype(module, dtype)
    model.config.dtype = dtype  # of the result
    return model


def trained_sizes(config: Any, options: LoraOptions, **own_code: Any) -> tuple[int, ...]:
    """Numbers of weights of each tensor that `tune_base` lets be trained, for a model of this configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **own_code).requires_grad_(False)
    return tuple(parameter.numel() for _, parameter in _trained(tune_base(model, options)))


def save_tuned(model: Any, directory: Path) -> None:
    """Write what is trained, fp32, under its names in the model; the file is read back and compared.

    Raises ModelError where it is not finite: nothing is written then.
    """
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in _trained(model)}
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(f"the trained weights hold NaN or Inf in {len(broken)} of {len(tensors)} tensors, such as "
                         f"{broken[0]}; they were not written")  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"base": str(model.config._name_or_path)}  # one entry: the order of several is drawn anew each time
    save_file(tensors, directory / TRAINED_WEIGHTS, metadata=metadata)
    compare(load_file(directory / TRAINED_WEIGHTS), tensors, directory / TRAINED_WEIGHTS)


def restore_tuned(model: Any, directory: Path) -> None:
    """Put what `save_tuned` wrote back, bit for bit, in place. Raises ModelError for other names or shapes."""
    _put(dict(_trained(model)), _read(directory / TRAINED_WEIGHTS), directory)


def load_tuned(model: Any, source: str | Path) -> None:
    """Put a checkpoint's trained weights into their base, in its dtype. Raises ModelError where they do not fit."""
    file = trained_weights_in(Path(source))
    if file is None:
        raise ModelError(f"{source} holds no {TRAINED_WEIGHTS}")
    tensors = _read(file)
    _put({name: p for name, p in model.named_parameters() if name in tensors}, tensors, file.parent)


def describe_tuned(model: Any) -> str:
    """One line: how many weights are trained, of how many."""
    n_all, n_trained = (sum(p.numel() for p in some) for some in (model.parameters(), dict(_trained(model)).values()))
    return f"{n_trained:,} of {n_all:,} weights are trained ({100 * n_trained / n_all:.2f} %), in fp32; no adapter"


def write_tuned_model(model: Any, checkpoints: Sequence[Path], directory: Path) -> None:
    """Write the model with the weights of a checkpoint, or the mean of several, as transformers loads it.

    In the dtype that the base was loaded in: the live model is rounded to it, and cannot be trained on afterwards.
    """
    mean = mean_of_files([checkpoint / TRAINED_WEIGHTS for checkpoint in checkpoints])
    _put(dict(_trained(model)), mean, checkpoints[-1])
    dtype = model.config.dtype
    for _, parameter in _trained(model):
        parameter.data = parameter.data.to(dtype)
    model.generation_config = GenerationConfig()  # save_pretrained refuses those of some bases
    model.save_pretrained(directory)
    (directory / GENERATION).unlink(missing_ok=True)
    # All else is the base's: training switches off dropout in the live settings, for one.
    base = locate(model.config._name_or_path)
    for file in (*base.glob(GENERATION), *base.glob("*.py")):
        shutil.copyfile(file, directory / file.name)
    settings = {key: value for key, value in read_json(base / CONFIG).items() if key != "torch_dtype"}
    settings = scaled_json(settings, str(base), str(getattr(model.config, MARK, "none")))
    write_json(directory / CONFIG, {**settings, "dtype": str(dtype).removeprefix("torch.")})


def _trained(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _read(file: Path) -> dict[str, Tensor]:
    safetensors_header(file)
    return load_file(file)


def _put(places: dict[str, nn.Parameter], tensors: dict[str, Tensor], directory: Path) -> None:
    differences = differences_of({name: place.detach() for name, place in places.items()}, tensors)
    if differences:
        rest = f"; and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
        raise ModelError(f"{directory} does not fit this base, or another method (finetune --peft_method): "
                         f"{'; '.join(differences[:LISTED])}{rest}")  # fmt: skip
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(tensors[name])


def _last_layers(model: Any, n_layers: int) -> list[nn.Module]:
    """The last layers, and the norms behind them."""
    layers = decoder_layers(model)
    if n_layers > len(layers):
        raise ConfigError("--peft_method", f"freeze:{n_layers}, but {type(model).__name__} has {len(layers)} layers")
    parent = next(m for m in model.modules() if any(list(child.children()) == layers for child in m.children()))
    norms = [
        child for name, child in parent.named_children()
        if "embed" not in name and (own := list(child.parameters())) and all(p.dim() == 1 for p in own)
    ]  # fmt: skip
    return [*layers[-n_layers:], *norms]


def _not_of_text(model: Any) -> Iterator[int]:
    """Parameters of what sees or hears beside the text part and its head."""
    inside, head = text_part(model), model.get_output_embeddings()
    kept = {id(p) for p in head.parameters()} if head is not None else set()
    return (id(p) for name, p in model.named_parameters() if not name.startswith(inside) and id(p) not in kept)
