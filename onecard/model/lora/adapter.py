"""Adapters on a frozen base: add, load, save, restore. What is written is plain PEFT.

`PeftModel.from_pretrained(base, directory)` gives the same logits without this project, whatever the start was. Does
not know data, steps or optimizers.
"""

from __future__ import annotations

import json
import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from onecard.config.given_paths import SCORES
from onecard.config.lora import LoraOptions
from onecard.console import say
from onecard.errors import ModelError
from onecard.model.lora import init, vocabulary
from onecard.model.lora.bottleneck import BottleneckConfig, bottleneck_places
from onecard.model.lora.formats import (
    CONFIG,
    ENCODER,
    WEIGHTS,
    AdapterFiles,
    compare,
    differences_of,
    other_base,
    read_adapter,
    read_config,
    refuse_useless,
)
from onecard.model.lora.methods import MOVING_STARTS, AdaptedLayers, is_adapter_weight, layer_of, scale_adapter
from onecard.model.lora.peft_config import as_config_error, new_config, stored_config, trained_config
from onecard.model.lora.peft_model import (
    ADAPTER,
    PromptedModel,
    adaptable_layers,
    attach,
    base_name,
    check_trainable,
    give_memory,
    live_tensors,
    remove_adapter,
    unwrap,
)
from onecard.model.lora.rank_allocation import RankAllocation, widened
from onecard.model.lora.targets import ALL_LINEAR, target_modules, target_parameters
from onecard.model.lora.virtual_tokens import encoder_tensors
from onecard.model.model_layers import linear_layers
from onecard.model.quantization import n_elements
from onecard.model.reward_head import SCORE, add_reward_head
from onecard.model.rope_scaling import MARK, other_scaling

SETS = ("target_modules", "modules_to_save", "feedforward_modules")
_attaching = threading.Lock()
LISTED = 10  # differences shown to a person


@dataclass(frozen=True)
class LoadedAdapter:
    """A model with a trained adapter, and what had to be assumed about the adapter's files."""

    model: PeftModel
    notes: list[str]


# PiSSA's first matrices by model, in RAM. The saved form is the difference to them, so they live as long as it does.
_pissa_starts: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def add_lora(
    model: nn.Module, options: LoraOptions, *, new_ids: list[int] | None = None, gives_reward: bool = False
) -> PeftModel:
    """Attach fresh fp32 adapters; everything else stays frozen, but for what `vocabulary.py` knows of.

    pissa: https://arxiv.org/abs/2404.02948 olora: https://arxiv.org/abs/2406.01775 (16 and 32 bits)
    loftq: https://arxiv.org/abs/2310.08659 (4 bits)
    rslora: https://arxiv.org/abs/2312.03732 dora: https://arxiv.org/abs/2402.09353
    new_ids: for --train_new_tokens; None: those that the base's directory lists. gives_reward: with a scalar head.
    Raises ModelError for layers that do not exist (with the nearest names), ConfigError for contradicting options.
    """
    if options.has_virtual_tokens:
        return _add_virtual_tokens(model, options)
    linear = adaptable_layers(model)
    left_out = linear_layers(model).keys() - linear.keys()
    init.check_start(options, linear)
    layers = _adapted_layers(model, options, linear)
    beside = vocabulary.config_settings(model, options, new_ids)
    if gives_reward:
        add_reward_head(model)
        beside = {"modules_to_save": [SCORE]}
    moves_weights = options.lora_init in MOVING_STARTS
    with _repeatable(model, moves_weights), as_config_error(options):
        peft_model = attach(model, new_config(options, layers, **beside))
    if options.lora_init == "loftq":
        init.start_loftq(peft_model, ADAPTER)
    if moves_weights:
        live = live_tensors(peft_model)
        first = {name: tensor for name, tensor in live.items() if is_adapter_weight(name)}
        _pissa_starts[peft_model] = {name: tensor.to("cpu", copy=True) for name, tensor in first.items()}
    vocabulary.train_in_fp32(peft_model)
    vocabulary.check_both_ends(peft_model.get_base_model(), options)
    check_trainable(peft_model)
    if left_out and options.lora_target_modules.strip() == ALL_LINEAR and not options.sized_by_model:
        kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in left_out}))
        say(f"{len(left_out)} dense or shared layers ({kinds}) get no adapter: peft means the experts by these names")
    return peft_model


def _adapted_layers(model: nn.Module, options: LoraOptions, linear: dict[str, Any]) -> AdaptedLayers:
    if options.peft_method == "bottleneck":
        with as_config_error(options):
            form = new_config(options).form
        return AdaptedLayers(bottleneck_places(model, form), None, transposed=False)
    return AdaptedLayers(
        target_modules(model, options.lora_target_modules, linear),
        target_parameters(model, options.lora_target_parameters),
        transposed=any(isinstance(layer, Conv1D) for layer in linear.values()),
    )


def _add_virtual_tokens(model: nn.Module, options: LoraOptions) -> PeftModel:
    with as_config_error(options):
        config = new_config(options)
        peft_model = attach(model, config)
    check_trainable(peft_model)
    return peft_model


def load_adapter(
    model: nn.Module,
    source: str | Path,
    *,
    trainable: bool,
    fingerprint: str | None = None,
    scale: float = 1.0,
    gives_reward: bool = False,
) -> LoadedAdapter:
    """Attach a trained adapter from a run, a checkpoint, an older layout or the Hub.

    fingerprint: of the base that the model is; a note tells of an adapter that was trained on another one. scale: how
    strongly it is put on. gives_reward: it may be a reward model. Raises ModelError that lists every name and shape
    which differs from what this base needs, which is then left as it was; ConfigError for a scale that the method does
    not know.
    """
    loaded = attach_files(model, read_adapter(source, gives_reward=gives_reward), trainable=trainable, scale=scale)
    other = other_base(source, base_name(model), fingerprint) if fingerprint else None
    advice = "Give that base as --model_path, unless this one is the same in another form (GPTQ, other shards)"
    return replace(loaded, notes=[*loaded.notes, f"{other}. {advice}"]) if other else loaded


def attach_files(model: nn.Module, files: AdapterFiles, *, trainable: bool, scale: float = 1.0) -> LoadedAdapter:
    """`load_adapter` for files that were read already. On a model without memory (meta) only the adapter gets any.

    One at a time: for such a model peft changes for all threads where parameters are made.
    """
    with _attaching:
        return _attach_files(model, files, trainable=trainable, scale=scale)


def _attach_files(model: nn.Module, files: AdapterFiles, *, trainable: bool, scale: float) -> LoadedAdapter:
    config = stored_config(files, trainable)
    if files.config_directory is not None and config.peft_type == PeftType.ADALORA:
        files.tensors = dict(widened(files.tensors, read_config(files.config_directory).get("rank_pattern") or {}))
    notes = scale_adapter(config, scale, files.directory)
    vocabulary.check_indices(getattr(config, "trainable_token_indices", None), model, files.directory)
    has_no_memory = next(model.parameters()).is_meta
    if config.task_type == SCORES:
        config.task_type = "CAUSAL_LM"
        add_reward_head(model)
    try:
        peft_model = attach(model, config, has_no_memory=has_no_memory)
    except (ValueError, TypeError) as reason:  # TypeError: a setting of another type in adapter_config.json
        raise ModelError(f"{files.directory} does not fit this base: {str(reason).splitlines()[0]}") from reason
    differences = differences_of(live_tensors(peft_model), files.tensors)
    if differences:
        remove_adapter(peft_model)
        raise ModelError(_mismatch(files, differences, model))
    if trainable:
        vocabulary.train_in_fp32(peft_model)
    _fill(peft_model, files, has_no_memory=has_no_memory)
    if trainable:
        check_trainable(peft_model)
    else:
        peft_model.requires_grad_(False)  # peft wakes the rows of tokens when it makes them fp32
    return LoadedAdapter(peft_model, [*files.notes, *notes, *_other_positions(model, files)])


def _fill(peft_model: PeftModel, files: AdapterFiles, *, has_no_memory: bool) -> None:
    """Put the values of the files into a fresh adapter, and look whether they are there."""
    if _encoder(peft_model):  # of virtual tokens that are to be trained further
        _restore_encoder(peft_model, files.directory)
        return
    if has_no_memory:
        give_memory(peft_model, files.tensors)
    else:
        set_peft_model_state_dict(peft_model, files.tensors, ADAPTER)
    compare(live_tensors(peft_model), files.tensors, files.weights)


def save_adapter(model: nn.Module, directory: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, then reopen both and compare names, shapes, values.

    A PiSSA start is converted: [A | A0] and [B | -B0] at twice the rank are exactly what training added to the base.
    Raises ModelError for an adapter that is empty or not finite: nothing is written then.
    """
    peft_model = unwrap(model)
    tensors, config = _saved_form(peft_model)
    refuse_useless(tensors)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(directory))
    # peft writes sets in the order of their hashes; sorted, the same adapter gives the same file.
    written = read_config(directory)
    scaling = getattr(getattr(peft_model.get_base_model(), "config", None), MARK, None)
    written |= {MARK: scaling} if scaling else {}
    written |= {key: sorted(written[key]) for key in SETS if isinstance(written.get(key), list)}
    (directory / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    compare(load_file(directory / WEIGHTS), tensors, directory / WEIGHTS)
    if encoder := _encoder(peft_model):
        save_file({name: tensor.cpu() for name, tensor in encoder.items()}, directory / ENCODER)
        compare(load_file(directory / ENCODER), encoder, directory / ENCODER)
    if read_config(directory).get("r") != getattr(config, "r", None):
        raise ModelError(f"{directory / CONFIG} says another rank than was written; check the disk")


def restore_adapter(model: nn.Module, directory: Path) -> None:
    """Put the values that `save_adapter` wrote back into the live adapter, bit for bit, in place.

    The parameters stay the same objects, so an optimizer keeps its hold on them. Raises ModelError that lists what
    differs between the files and the live adapter (another rank, other targets, another base).
    """
    peft_model = unwrap(model)
    files = read_adapter(directory, gives_reward=True)
    expected, _ = _saved_form(peft_model)
    differences = differences_of(expected, files.tensors) or _other_tokens(peft_model, files)
    if differences:
        raise ModelError(_mismatch(files, differences, peft_model))
    if _encoder(peft_model):
        _restore_encoder(peft_model, directory)
        return
    tensors = files.tensors
    if peft_model in _pissa_starts:
        tensors, start = init.split_pissa(files.tensors)
        init.rebase_pissa(peft_model, ADAPTER, _pissa_starts[peft_model], start)
        _pissa_starts[peft_model] = start
    set_peft_model_state_dict(peft_model, tensors, ADAPTER)
    compare(live_tensors(peft_model), tensors, files.weights)


def _encoder(peft_model: PeftModel) -> dict[str, Tensor]:
    return encoder_tensors(peft_model, ADAPTER) if isinstance(peft_model, PromptedModel) else {}


def _restore_encoder(peft_model: PeftModel, directory: Path) -> None:
    """Raises ModelError where the network that makes virtual tokens is not there, or another one."""
    file = directory / ENCODER
    if not file.is_file():
        raise ModelError(f"{directory} has no {ENCODER}: its virtual tokens can answer, but they cannot be trained "
                         "further without the network that made them; take a checkpoint of that run")  # fmt: skip
    stored, live = load_file(file), _encoder(peft_model)
    if differences := differences_of(live, stored):
        raise ModelError(f"{file} does not fit: {'; '.join(differences[:LISTED])}")
    peft_model.prompt_encoder[ADAPTER].load_state_dict(stored)
    compare(_encoder(peft_model), stored, file)


def rank_allocation(model: nn.Module, options: LoraOptions) -> RankAllocation | None:
    """What cuts the ranks of AdaLoRA while it trains; None for every other method. Raises ConfigError."""
    if not isinstance(model, PeftModel) or model.peft_config[ADAPTER].peft_type != PeftType.ADALORA:
        return None
    return RankAllocation(model, model.peft_config[ADAPTER], options)


def describe_trainable(model: nn.Module) -> str:
    """One line: how many weights are trained, of how many, and on which layers."""
    peft_model = unwrap(model)
    n_all = sum(n_elements(parameter) for parameter in peft_model.parameters())
    n_trained = sum(n_elements(parameter) for parameter in peft_model.parameters() if parameter.requires_grad)
    found = dict.fromkeys(layer_of(name) for name, _ in peft_model.named_parameters())
    layers = [name.replace(".base_layer", "") for name in found if name is not None]
    kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
    config: Any = peft_model.peft_config[ADAPTER]
    if isinstance(peft_model, PromptedModel):
        kind = f"{config.peft_type.value}, {config.num_virtual_tokens} virtual tokens in front of every text"
        return f"{n_trained:,} of {n_all:,} weights are trained ({100 * n_trained / n_all:.2f} %): {kind}"
    kind = f"rank {config.r}" if config.peft_type == PeftType.LORA else config.peft_type.value
    kind = f"{kind} {config.form}" if isinstance(config, BottleneckConfig) else kind
    if not any(p.requires_grad and is_adapter_weight(name) for name, p in peft_model.named_parameters()):
        kind = f"nothing of {kind}"
    return (
        f"{n_trained:,} of {n_all:,} weights are trained ({100 * n_trained / n_all:.2f} %): {kind} on "
        f"{len(layers)} layers ({kinds}){vocabulary.describe(peft_model)}"
    )


@contextmanager
def _repeatable(model: nn.Module, wanted: bool) -> Iterator[None]:
    """PiSSA's start depends on the base alone, whatever was drawn before: a resumed run must meet the same one."""
    if not wanted:
        yield
        return
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def _saved_form(peft_model: PeftModel) -> tuple[dict[str, Tensor], PeftConfig]:
    """Return the tensors on CPU and the configuration as they belong into files that need no changed base."""
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in live_tensors(peft_model).items()}
    config = trained_config(peft_model.peft_config[ADAPTER], inference_mode=True)
    if SCORE in (config.modules_to_save or ()):
        config = replace(config, task_type=SCORES)
    if peft_model not in _pissa_starts:
        return tensors, config
    tensors = init.join_pissa(tensors, _pissa_starts[peft_model])
    alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)  # so that the scaling stays what it was
    return tensors, replace(config, r=2 * config.r, lora_alpha=alpha)


def _other_tokens(peft_model: PeftModel, files: AdapterFiles) -> list[str]:
    """Rows of as many tokens fit in shape, whichever tokens they are."""
    live: Any = peft_model.peft_config[ADAPTER]
    stored = read_config(files.config_directory).get("trainable_token_indices") if files.config_directory else None
    ours = getattr(live, "trainable_token_indices", None)
    return ["trainable_token_indices: other tokens"] if stored != ours else []


def _other_positions(model: Any, files: AdapterFiles) -> list[str]:
    """A note on an adapter that was trained under another --rope_scaling than the model has."""
    told = other_scaling(model.config, read_config(files.config_directory)) if files.config_directory else ""
    return [f"{files.directory}: {told}"] if told else []


def _mismatch(files: AdapterFiles, differences: list[str], model: Any) -> str:
    trained_on = read_config(files.config_directory).get("base_model_name_or_path") if files.config_directory else None
    here = base_name(model)
    rest = f"\n  ... and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
    return (
        f"{files.directory} does not fit: it was trained on {trained_on or 'an unknown base'}, here is {here}; "
        f"{len(differences)} tensors differ:\n  "
        + "\n  ".join(differences[:LISTED])
        + rest
        + vocabulary.vocabulary_hint(files.tensors, model)
    )
