"""LoRA adapters on a frozen base: attach, load, save, restore. Of all files only it and bottleneck.py import peft.

Knows tensor names, shapes and PEFT's files. It does not know data, steps or optimizers. What it writes is plain PEFT:
`PeftModel.from_pretrained(base, directory)` gives the same logits without this project, whatever the start was.
"""

from __future__ import annotations

import copy
import json
import math
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from onecard.config.given_paths import SCORES
from onecard.config.lora import LoraOptions
from onecard.console import first_line, say
from onecard.errors import ConfigError, ModelError
from onecard.model.lora import init as adapter_starts
from onecard.model.lora import vocabulary as adapter_tokens
from onecard.model.lora.bottleneck import BottleneckConfig, bottleneck_places, register_bottleneck
from onecard.model.lora.formats import (
    CONFIG,
    ENCODER,
    PREFIX,
    WEIGHTS,
    AdapterFiles,
    compare,
    differences_of,
    infer_config,
    other_base,
    read_adapter,
    read_config,
    refuse_useless,
)
from onecard.model.lora.methods import (
    METHODS,
    MOVING_STARTS,
    AdaptedLayers,
    is_adapter_weight,
    layer_of,
    peft_settings,
    scale_adapter,
)
from onecard.model.lora.peft_options import typed_options
from onecard.model.lora.rank_allocation import RankAllocation, widened
from onecard.model.lora.routing import LoraProduct
from onecard.model.lora.sparse import skip_drawing
from onecard.model.lora.targets import ALL_LINEAR, check_experts, target_modules, target_parameters
from onecard.model.lora.virtual_tokens import VirtualTokens, check_base, encoder_tensors
from onecard.model.model_layers import linear_layers
from onecard.model.quantization import n_elements, weight_bits
from onecard.model.reward_head import SCORE, add_reward_head
from onecard.model.rope_scaling import MARK, other_scaling

ADAPTER = "default"
SETS = ("target_modules", "modules_to_save", "feedforward_modules")
_attaching = threading.Lock()
LISTED = 10  # differences shown to a person


@dataclass(frozen=True)
class LoadedAdapter:
    """A model with a trained adapter, and what had to be assumed about the adapter's files."""

    model: PeftModel
    notes: list[str]


class PromptedModel(VirtualTokens, PeftModelForCausalLM):
    """A base with virtual tokens in front of its texts."""


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
    adapter_starts.check_start(options, linear)
    layers = _adapted_layers(model, options, linear)
    beside = adapter_tokens.config_settings(model, options, new_ids)
    if gives_reward:
        add_reward_head(model)
        beside = {"modules_to_save": [SCORE]}
    moves_weights = options.lora_init in MOVING_STARTS
    with _repeatable(model, moves_weights), _as_config_error(options):
        peft_model = _attach(model, _new_config(options, layers, beside))
    if options.lora_init == "loftq":
        adapter_starts.start_loftq(peft_model, ADAPTER)
    if moves_weights:
        live = _live_tensors(peft_model)
        first = {name: tensor for name, tensor in live.items() if is_adapter_weight(name)}
        _pissa_starts[peft_model] = {name: tensor.to("cpu", copy=True) for name, tensor in first.items()}
    adapter_tokens.train_in_fp32(peft_model)
    adapter_tokens.check_both_ends(peft_model.get_base_model(), options)
    _check_trainable(peft_model)
    if left_out and options.lora_target_modules.strip() == ALL_LINEAR and not options.sized_by_model:
        kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in left_out}))
        say(f"{len(left_out)} dense or shared layers ({kinds}) get no adapter: peft means the experts by these names")
    return peft_model


def _adapted_layers(model: nn.Module, options: LoraOptions, linear: dict[str, Any]) -> AdaptedLayers:
    if options.peft_method == "bottleneck":
        with _as_config_error(options):
            form = _new_config(options, AdaptedLayers([], None, transposed=False), {}).form
        return AdaptedLayers(bottleneck_places(model, form), None, transposed=False)
    return AdaptedLayers(
        target_modules(model, options.lora_target_modules, linear),
        target_parameters(model, options.lora_target_parameters),
        transposed=any(isinstance(layer, Conv1D) for layer in linear.values()),
    )


def _add_virtual_tokens(model: nn.Module, options: LoraOptions) -> PeftModel:
    with _as_config_error(options):
        config = _new_config(options, AdaptedLayers([], None, transposed=False), {})
        peft_model = _attach(model, config)
    _check_trainable(peft_model)
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
    other = other_base(source, _name_of(model), fingerprint) if fingerprint else None
    advice = "Give that base as --model_path, unless this one is the same in another form (GPTQ, other shards)"
    return replace(loaded, notes=[*loaded.notes, f"{other}. {advice}"]) if other else loaded


def attach_files(model: nn.Module, files: AdapterFiles, *, trainable: bool, scale: float = 1.0) -> LoadedAdapter:
    """`load_adapter` for files that were read already. On a model without memory (meta) only the adapter gets any.

    One at a time: for such a model peft changes for all threads where parameters are made.
    """
    with _attaching:
        return _attach_files(model, files, trainable=trainable, scale=scale)


def _attach_files(model: nn.Module, files: AdapterFiles, *, trainable: bool, scale: float) -> LoadedAdapter:
    config = _config_of(files, trainable)
    if files.config_directory is not None and config.peft_type == PeftType.ADALORA:
        files.tensors = dict(widened(files.tensors, read_config(files.config_directory).get("rank_pattern") or {}))
    notes = scale_adapter(config, scale, files.directory)
    adapter_tokens.check_indices(getattr(config, "trainable_token_indices", None), model, files.directory)
    has_no_memory = next(model.parameters()).is_meta
    if config.task_type == SCORES:
        config.task_type = "CAUSAL_LM"
        add_reward_head(model)
    try:
        peft_model = _attach(model, config, has_no_memory=has_no_memory)
    except (ValueError, TypeError) as reason:  # TypeError: a setting of another type in adapter_config.json
        raise ModelError(f"{files.directory} does not fit this base: {str(reason).splitlines()[0]}") from reason
    differences = differences_of(_live_tensors(peft_model), files.tensors)
    if differences:
        remove_adapter(peft_model)
        raise ModelError(_mismatch(files, differences, model))
    if trainable:
        adapter_tokens.train_in_fp32(peft_model)
    _fill(peft_model, files, has_no_memory=has_no_memory)
    if trainable:
        _check_trainable(peft_model)
    else:
        peft_model.requires_grad_(False)  # peft wakes the rows of tokens when it makes them fp32
    return LoadedAdapter(peft_model, [*files.notes, *notes, *_other_positions(model, files)])


def _fill(peft_model: PeftModel, files: AdapterFiles, *, has_no_memory: bool) -> None:
    """Put the values of the files into a fresh adapter, and look whether they are there."""
    if _encoder(peft_model):  # of virtual tokens that are to be trained further
        _restore_encoder(peft_model, files.directory)
        return
    if has_no_memory:
        _give_memory(peft_model, files.tensors)
    else:
        set_peft_model_state_dict(peft_model, files.tensors, ADAPTER)
    compare(_live_tensors(peft_model), files.tensors, files.weights)


def remove_adapter(model: Any) -> Any:
    """Return the base without its adapter, ready for another one; a base alone is returned as it is."""
    if not isinstance(model, PeftModel):
        return model
    if isinstance(model, PromptedModel):
        return model.get_base_model()
    originals = adapter_tokens.untouched_modules(model.get_base_model())
    base: Any = model.unload()
    for name, module in originals.items():  # peft leaves the trained copies of whole modules in their place
        base.set_submodule(name, module)
    return base


def lora_products(model: PeftModel) -> dict[str, LoraProduct] | None:
    """What a plain LoRA adds to each linear layer, by the layer's name in the base; None for an adapter that is more.

    Only of layers that read a whole row: the head reads its last tokens, and experts those that are sent to them.
    """
    base: Any = model.get_base_model()
    found: dict[str, LoraProduct] = {}
    for name, layer in base.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if type(layer) is not LoraLinear or layer.lora_variant or layer is base.get_output_embeddings():
            return None
        above = name.split(".")[:-1]
        if any(hasattr(base.get_submodule(".".join(above[:k])), "experts") for k in range(1, len(above) + 1)):
            return None
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        if a.bias is not None or b.bias is not None:
            return None
        dtype = torch.float32 if a.weight.dtype.itemsize < 4 else a.weight.dtype  # as peft casts them
        product = LoraProduct(a.weight.detach().to(dtype), b.weight.detach().to(dtype), float(layer.scaling[ADAPTER]))
        found[name] = product
    return found if 2 * len(found) == len(_live_tensors(model)) else None


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
        tensors, start = adapter_starts.split_pissa(files.tensors)
        adapter_starts.rebase_pissa(peft_model, ADAPTER, _pissa_starts[peft_model], start)
        _pissa_starts[peft_model] = start
    set_peft_model_state_dict(peft_model, tensors, ADAPTER)
    compare(_live_tensors(peft_model), tensors, files.weights)


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
        f"{len(layers)} layers ({kinds}){adapter_tokens.describe(peft_model)}"
    )


def add_product(layer: Any, weight: Tensor) -> bool:
    """Add W += B A * scale to a weight of (out, in) in fp32, as `layer.merge` would, but without two more of its size.

    False, and nothing is done, for all but a plain LoRA on a linear layer.
    """
    if type(layer) is not LoraLinear or layer.lora_variant or layer.fan_in_fan_out or layer.merged:
        return False
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    factors: list[tuple[Any, Any, float]] = [
        (layer.lora_A[name], layer.lora_B[name], layer.scaling[name]) for name in active
    ]
    if any(part.weight.dtype != weight.dtype or part.bias is not None for a, b, _ in factors for part in (a, b)):
        return False
    for a, b, scale in factors:
        weight.addmm_(b.weight, a.weight, alpha=scale)
    return True


def adaptable_layers(model: Any) -> dict[str, Any]:
    """Return the linear layers that plain peft gives an adapter by their name, and finds again in an adapter's files.

    In most mixtures of experts they are fewer than `linear_layers`: peft takes gate_proj, up_proj and down_proj for the
    experts', whatever layer they are asked for, so dense and shared layers of these names cannot be said.
    https://huggingface.co/docs/peft/developer_guides/lora (mixture of experts, transformers 5)
    """
    linear = linear_layers(model)
    taken = {name for name in {name.rsplit(".", 1)[-1] for name in linear} if _means_experts(model, name)}
    kept = {name: layer for name, layer in linear.items() if name.rsplit(".", 1)[-1] not in taken}
    # Renamed as transformers renames the base's own tensors when it loads them, some names become others'.
    files = {f"{PREFIX}{name}.lora_A.weight": torch.empty(0) for name in kept}
    found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), files)
    return {name: layer for name, layer in kept.items() if f"{PREFIX}{name}.lora_A.weight" in found}


def _means_experts(model: Any, name: str) -> bool:
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of two names that are fused into one tensor
        return True
    return name not in (config.target_modules or ())


def unwrap(model: Any) -> PeftModel:
    """Return the PeftModel inside DDP and the like. Raises ModelError when there is none."""
    while not isinstance(model, PeftModel) and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if not isinstance(model, PeftModel):
        raise ModelError(f"{type(model).__name__} has no adapter; call add_lora or load_adapter first")
    return model


def trained_part(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that an adapter brought into a model, by name; nothing for a base alone."""
    for name, parameter in model.named_parameters():
        if is_adapter_weight(name) or adapter_tokens.is_trained_vocabulary(name):
            yield name, parameter


def _config_class(options: LoraOptions) -> Any:
    """PEFT's configuration of the chosen method. Raises ConfigError for what beside the adapter it cannot train."""
    register_bottleneck()
    kind: Any = options.peft_method.upper()  # PEFT's kinds are texts; one of them is none of its own
    found: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if options.train_new_tokens and "trainable_token_indices" not in found.__dataclass_fields__:
        raise ConfigError("--train_new_tokens", f"does not go with --peft_method {options.peft_method}")
    return found


def _new_config(options: LoraOptions, layers: AdaptedLayers, vocabulary: dict[str, Any]) -> Any:
    config_class, settings = _config_class(options), {**peft_settings(options, layers), **vocabulary}
    settings |= typed_options(config_class, options, settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not save basis_A.*")  # see `methods.py`
        return config_class(task_type="CAUSAL_LM", **settings)


@contextmanager
def _as_config_error(options: LoraOptions) -> Iterator[None]:
    """What peft says of settings that do not go together, or not with this base, as an error of the option."""
    try:
        yield
    except (ValueError, TypeError) as reason:
        if options.peft_method == "lora" and not options.peft_option:
            raise
        flag = "--peft_option" if options.peft_option else "--peft_method"
        raise ConfigError(flag, f"{options.peft_option or options.peft_method}: {first_line(reason)}") from reason


def check_peft_option(options: LoraOptions) -> None:
    """Raise ConfigError for a --peft_option that the method does not take, before there is a base."""
    with _as_config_error(options):
        _new_config(options, AdaptedLayers([], None, transposed=False), {})


def attach_to_layers(layers: Any, names: list[str], options: LoraOptions) -> PeftModel:
    """Attach a fresh adapter to linear layers that are no language model. Raises ConfigError, as `add_lora` does."""
    with _as_config_error(options):
        config = replace(_new_config(options, AdaptedLayers(names, None, transposed=False), {}), task_type=None)
        skip_drawing(layers, config)
        return get_peft_model(layers, config)


def _attach(model: Any, config: PeftConfig, *, has_no_memory: bool = False) -> PeftModel:
    linear = linear_layers(model).values()
    converted = copy.deepcopy(config)
    convert_peft_config_for_transformers(converted, model, None)  # older adapters name experts as layers
    if getattr(converted, "target_parameters", None):
        check_experts(model)
    if getattr(config, "use_dora", False) and any(
        layer.weight.device.type == "cpu" and weight_bits(layer) == 8 for layer in linear
    ):
        raise ConfigError(
            "--bits",
            "8 does not work with DoRA on CPU: peft loses the scales of 8-bit weights there; use --bits 4, 16 or 32",
        )
    if not has_no_memory:  # its adapter would get some
        skip_drawing(model, config)
    with warnings.catch_warnings():
        # Between peft and transformers, and of no use to the person who trains: peft asks under the old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")  # see `adapter_tokens.check_both_ends`
        peft_model = (
            _in_front(model, config)
            if config.is_prompt_learning
            else get_peft_model(model, config, low_cpu_mem_usage=has_no_memory)
        )
    for name, rank in peft_model.named_parameters():
        if ".ranknum." in name:  # AdaLoRA's: over 16-bit weights peft lets it be trained, but saves it nowhere
            rank.data = rank.data.float()
            rank.requires_grad_(False)
    if not any(weight_bits(layer) == 8 for layer in linear) and hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()  # peft switches it on; see `load.py`
    return peft_model


def _in_front(model: Any, config: Any) -> PromptedModel:
    if (config.num_virtual_tokens or 0) < 1:
        raise ValueError(f"num_virtual_tokens={config.num_virtual_tokens} would train nothing; use 1 or more")
    check_base(model, config.peft_type.value.lower())
    config.base_model_name_or_path = _name_of(model)  # as `get_peft_model` does
    peft_model = PromptedModel(model, config, ADAPTER)
    # Not where the plan builds models without memory: PEFT takes these numbers to the device of the vectors.
    peft_model.prompt_tokens[ADAPTER] = torch.arange(config.num_virtual_tokens, device="cpu")
    return peft_model


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


def _check_trainable(peft_model: PeftModel) -> None:
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    if not trained:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(peft_model.get_base_model())})
        raise ModelError(f"0 trainable parameters: no adapter was attached; the linear layers are {', '.join(known)}")
    wrong = {parameter.dtype for parameter in trained} - {torch.float32}
    if wrong:
        raise ModelError(f"adapters must be fp32 to be trained, but some are {wrong}; please report this model")


def _live_tensors(peft_model: PeftModel) -> dict[str, Tensor]:
    # save_embedding_layers: the default "auto" would ask the Hub for the base's vocabulary size.
    state = get_peft_model_state_dict(peft_model, adapter_name=ADAPTER, save_embedding_layers=False)
    return {name: tensor.detach() for name, tensor in state.items()}


def _give_memory(peft_model: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Put `tensors` in the places of an adapter on the meta device, where peft itself would move them to the base."""
    state = peft_model.state_dict(keep_vars=True)
    places = get_peft_model_state_dict(peft_model, state, ADAPTER, save_embedding_layers=False)
    given = {id(places[name]): tensor for name, tensor in tensors.items()}
    # By identity: a tied pair is one tensor under two names.
    values = {key: given[id(place)] for key, place in state.items() if id(place) in given}
    first = getattr(peft_model.peft_config[ADAPTER], "init_r", 0)  # what AdaLoRA divides by is in no file
    ranks = {key: place for key, place in state.items() if ".ranknum." in key}
    values |= {key: torch.full_like(place, first, device="cpu") for key, place in ranks.items()}
    peft_model.load_state_dict(values, strict=False, assign=True)


def _saved_form(peft_model: PeftModel) -> tuple[dict[str, Tensor], PeftConfig]:
    """Return the tensors on CPU and the configuration as they belong into files that need no changed base."""
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in _live_tensors(peft_model).items()}
    config = _trained_config(peft_model.peft_config[ADAPTER], inference_mode=True)
    if SCORE in (config.modules_to_save or ()):
        config = replace(config, task_type=SCORES)
    if peft_model not in _pissa_starts:
        return tensors, config
    tensors = adapter_starts.join_pissa(tensors, _pissa_starts[peft_model])
    alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)  # so that the scaling stays what it was
    return tensors, replace(config, r=2 * config.r, lora_alpha=alpha)


def _config_of(files: AdapterFiles, trainable: bool) -> PeftConfig:
    if files.config_directory is None:
        return LoraConfig(**infer_config(files), inference_mode=not trainable)
    register_bottleneck()
    stored = read_config(files.config_directory)
    start = stored.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda")):
        raise ModelError(
            f"{files.directory} was started with {start} and saved unconverted: it needs a changed base. "
            "Convert it with peft's path_initial_model_for_weight_conversion first"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not save basis_A.*")
            warnings.filterwarnings("ignore", message=f".*{MARK}.*")  # peft does not know it; `_other_positions` does
            config: Any = PeftConfig.from_pretrained(str(files.config_directory))
        # The base it is attached to now is named anew.
        return _trained_config(replace(config, base_model_name_or_path=None), inference_mode=not trainable)
    except (ValueError, TypeError, KeyError) as reason:
        raise ModelError(f"{files.config_directory / CONFIG} cannot be used: {str(reason).splitlines()[0]}") from reason


def _trained_config(config: Any, *, inference_mode: bool) -> Any:
    """The configuration of an adapter that has its values: a start such as "gaussian" no longer matters."""
    return replace(config, inference_mode=inference_mode, **METHODS[config.peft_type.value.lower()].stored)


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


def _name_of(model: Any) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def _mismatch(files: AdapterFiles, differences: list[str], model: Any) -> str:
    trained_on = read_config(files.config_directory).get("base_model_name_or_path") if files.config_directory else None
    here = _name_of(model)
    rest = f"\n  ... and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
    return (
        f"{files.directory} does not fit: it was trained on {trained_on or 'an unknown base'}, here is {here}; "
        f"{len(differences)} tensors differ:\n  "
        + "\n  ".join(differences[:LISTED])
        + rest
        + adapter_tokens.vocabulary_hint(files.tensors, model)
    )
