"""The base model and its tokenizer, from a directory or the Hub onto this card, frozen.

Knows bits, dtypes and every way in which a download can be wrong. It does not know adapters, data or training. The
decoder layer stays the unit that is loaded, placed and recomputed; nothing here wraps or patches one.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from onecard.config.base_model import ModelOptions, memory_map
from onecard.console import say, warn
from onecard.errors import ConfigError, ModelError
from onecard.model.allocator import give_back_freed_ram
from onecard.model.attention import choose_kernel
from onecard.model.files import base_fingerprint, check_weights, locate, read_json
from onecard.model.gptq import (
    check_gptq_installed,
    is_gptq,
    quantized_model_config,
    quiet_gptqmodel,
    stored_quantization,
)
from onecard.model.hardware import Hardware, choose_dtype, count_gpus
from onecard.model.memory_saving.streamed_layers import place_beside_layers
from onecard.model.model_config import ignored_keys, read_model_config, without_chance
from onecard.model.model_layers import UNQUANTISED_SHARE
from onecard.model.quantised_loading import RanOutQuantizing, loading_config, quantization_config
from onecard.model.quantization import keep_one_arithmetic_on_cpu, unquantised
from onecard.model.rope_scaling import check_scaled, scale_rope

__all__ = ["LoadedBase", "base_fingerprint", "checkpoint_layers", "load_base", "load_tokenizer"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
)


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base model in eval mode, the dtype of its arithmetic, why that one, and which base it is."""

    model: PreTrainedModel
    dtype: torch.dtype
    dtype_reason: str
    fingerprint: str


def load_tokenizer(model_path: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a base model or of a run directory. Raises ModelError when there is none."""
    directory = locate(model_path, what="tokenizer", with_code=trust_remote_code)
    if not any(next(directory.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise ModelError(
            f"{directory} holds no tokenizer (tokenizer.json or tokenizer.model); copy the tokenizer "
            "files of the base model beside its weights"
        )
    try:
        return AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as reason:  # tokenizers raises bare Exception for a damaged tokenizer.json
        raise ModelError(f"the tokenizer in {directory} cannot be loaded: {_first_line(reason)}") from reason


def load_base(
    options: ModelOptions, hardware: Hardware, *, gptq: bool = False, dtype: torch.dtype | None = None
) -> LoadedBase:
    """Load the base model onto `hardware.device`, frozen, in `options.bits`; nothing in it is ever upcast.

    gptq: take weights in GPTQ form too, in the bits they lie in; they can answer and cannot be trained on.
    dtype: what is not quantised takes this type, whatever this card computes best; for a model that is saved.

    Norms stay in the model's dtype: every family computes them in fp32 inside and they are not trained. The base's own
    dropout is off: frozen weights need none, and its masks would depend on how a step is cut into micro-batches. The
    model keeps its key-value cache on for generation; `loss.summed_loss` turns it off per call. With --stream_layers on
    the layers and the embeddings are in RAM; `stream_layers` connects them with the device after adapters.

    Raises ModelError (files missing, damaged, unknown or unsafe) and ConfigError (bits, dtype, attention kernel).
    """
    directory = locate(options.model_path, with_code=options.trust_remote_code)
    config = _checked_config(directory, options)
    stored = stored_quantization(directory, config)
    in_gptq = gptq and is_gptq(stored)
    if in_gptq:
        check_gptq_installed(directory)
    if in_gptq and dtype is None and stored.get("bits") != options.bits:
        say(f"{directory} holds GPTQ weights of {stored.get('bits')} bits; --bits {options.bits} does not change them")
    files = check_weights(directory)
    if files[0].suffix == ".bin":
        say(f"{directory} holds pickled weights; they are read as plain tensors, and code in them is refused")
    bits = 4 if in_gptq else options.bits
    reason, is_saved = "as was asked for", dtype is not None
    if dtype is None:
        dtype, reason = choose_dtype(options.dtype, bits, hardware, str(config.get("model_type", "")))
    if in_gptq:
        with quiet_gptqmodel():
            model = _load(options, directory, dtype, hardware.device, stored=stored)
    else:
        quantization = None
        if stored:
            _check_stored_bits(options, directory, stored)
        elif is_saved:
            quantization = quantization_config(bits, dtype)  # what transformers alone can load again
        else:
            quantization = loading_config(bits, dtype, hardware.device if options.stream_layers == "on" else None)
        kept = _bitsandbytes_in(stored, dtype) if quantization is None else {}
        model = _load(options, directory, dtype, hardware.device, quantization=quantization, stored=kept)
    check_scaled(model, options.rope_scaling)
    choose_kernel(model, hardware, dtype)
    model.requires_grad_(False)
    model.eval()
    if bits < 16 and not in_gptq:
        _tell_unquantised(model, bits, dtype)
    if bits < 16 and not in_gptq and not hardware.is_gpu:
        keep_one_arithmetic_on_cpu(model)
    if options.stream_layers == "on":
        place_beside_layers(model, hardware.device)
    if options.gradient_checkpointing:
        checkpoint_layers(model, reentrant=options.bits == 8)
    return LoadedBase(model, dtype, reason, base_fingerprint(options.model_path))


def _checked_config(directory: Path, options: ModelOptions) -> dict[str, Any]:
    """Return config.json after checking that this transformers can load it as a causal language model."""
    if not (directory / "config.json").is_file():
        what = (
            "a LoRA adapter; its base goes into --model_path"
            if (directory / "adapter_config.json").is_file()
            else "no model in Hugging Face form (config.json is missing)"
        )
        raise ModelError(f"{directory} holds {what}")
    raw = read_json(directory / "config.json")
    if "auto_map" in raw and options.trust_remote_code:
        return raw
    config = read_model_config(raw, str(directory))
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{directory} is a {config.model_type} model, which is no causal language model: it cannot be trained to "
            "continue text"
        )
    ignored = ignored_keys(raw, config)
    if ignored:
        warn(
            f"{directory} was written by transformers {raw['transformers_version']}, and {transformers.__version__} "
            f"does not know {', '.join(ignored)} in its config.json: the model may compute something else here. "
            "Install that version or a newer one"
        )
    return raw


def check_stored_bits(options: ModelOptions) -> None:
    """Raise ConfigError for a directory whose weights lie quantised in another form than --bits; loads nothing."""
    directory = Path(options.model_path).expanduser()
    if stored := stored_quantization(directory):
        _check_stored_bits(options, directory, stored)


def _check_stored_bits(options: ModelOptions, directory: Path, stored: dict[str, Any]) -> None:
    method = stored.get("quant_method", "bitsandbytes")
    bits = 4 if stored.get("load_in_4bit") else 8 if stored.get("load_in_8bit") else stored.get("bits", "unknown")
    if method == "bitsandbytes" and bits == options.bits:
        return
    advice = f"use --bits {bits}" if method == "bitsandbytes" else "take the model's unquantised form, with --bits 4"
    raise ConfigError(
        "--bits",
        f"{options.bits} does not go with {directory}: its weights are quantised already "
        f"({method}, {bits} bits); {advice}",
    )


def _bitsandbytes_in(stored: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What a bitsandbytes checkpoint says, but with the arithmetic of this card: it may come from another one."""
    return {**stored, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")} if stored else {}


def _load(
    options: ModelOptions,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantization: Any = None,
    stored: dict[str, Any],
) -> PreTrainedModel:
    """Quantise to `quantization` while loading, or take weights that lie there quantised as `stored` says."""
    arguments: dict[str, Any] = {
        "dtype": dtype,
        **_placement(options, device),
        "trust_remote_code": options.trust_remote_code,
        "local_files_only": True,
        "weights_only": True,
        "output_loading_info": True,
    }
    if quantization is not None:
        arguments["quantization_config"] = quantization
    if options.attn_implementation != "auto":
        arguments["attn_implementation"] = options.attn_implementation
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # a bar that redraws itself fills a log file
    try:
        config = AutoConfig.from_pretrained(
            options.model_path, trust_remote_code=options.trust_remote_code, local_files_only=True
        )
        scale_rope(config, options.rope_scaling)
        arguments["config"] = without_chance(config)
        if stored:
            quantized_model_config(config, directory, stored)
        # By the name that was given, not by the directory it lies in: adapters remember a Hub id, not a cache path.
        loaded: Any = AutoModelForCausalLM.from_pretrained(options.model_path, **arguments)
    except pickle.UnpicklingError as reason:
        raise ModelError(f"{directory} holds pickled weights with code inside; refused, nothing was run") from reason
    except (torch.OutOfMemoryError, RanOutQuantizing) as reason:
        raise ModelError(
            f"{options.model_path} in {options.bits} bits does not fit on {device}; use fewer --bits or "
            f"a smaller model ({_first_line(reason)})"
        ) from reason
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError) as reason:
        raise _explained(reason, options, directory) from reason
    model, report = loaded
    _check_complete(report, directory)
    return model


def _placement(options: ModelOptions, device: torch.device) -> dict[str, Any]:
    """Where the layers go: all on one device or into RAM, or over several as far as each one's share reaches."""
    if options.stream_layers == "on":
        give_back_freed_ram()  # such a model may fill the RAM, and a heap would keep what each of its weights leaves
        return {"device_map": {"": "cpu"}}
    if options.max_memory is None:
        return {"device_map": {"": device}}
    shares = memory_map(options.max_memory) or {}
    n_gpus = count_gpus()
    missing = [place for place in shares if isinstance(place, int) and place >= n_gpus]
    if missing:
        raise ConfigError("--max_memory", f"names GPU {missing[0]}, but there are {n_gpus} (counted from 0)")
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--max_memory", "spreads the model of one process; start one process, or leave it out: each takes a card"
        )
    return {"device_map": "auto", "max_memory": shares}


def _tell_unquantised(model: PreTrainedModel, bits: int, dtype: torch.dtype) -> None:
    """Say how much of the model does not lie in `bits`, where that is more than a little.

    Raises ConfigError for a model of which nothing does.
    """
    small, large = unquantised(model)
    n_large = sum(large.values())
    if not small:
        raise ConfigError(
            "--bits",
            f"{bits} changes nothing in {type(model).__name__}: no layer of it was quantised; use 16",
        )
    if n_large < UNQUANTISED_SHARE * (small + n_large):
        return
    width = 8 * dtype.itemsize
    kinds = ", ".join(f"{count:,} in {kind}" for kind, count in [*large.items()][:3])
    tell = warn if n_large > small else say
    tell(
        f"only {100 * small / (small + n_large):.0f} % of the weights outside embeddings and head lie in {bits} bits; "
        f"{n_large:,} stay in {width} bits ({kinds}): they take {n_large * dtype.itemsize / 2**30:.2f} GiB"
    )


def _explained(reason: Exception, options: ModelOptions, directory: Path) -> ModelError | ConfigError:
    text = _first_line(reason)
    if options.attn_implementation != "auto" and ("attention" in text.lower() or "flash" in text.lower()):
        return ConfigError("--attn_implementation", f"{options.attn_implementation} cannot be used here: {text}")
    if "size mismatch" in str(reason) or "ignore_mismatched_sizes" in str(reason):
        text = "tensors in its weights have other shapes than its config.json says"
    return ModelError(f"{directory} cannot be loaded: {text}")


def _check_complete(report: dict[str, Any], directory: Path) -> None:
    """Transformers fills missing weights with random numbers and goes on; nobody wants to train on those."""
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} tensors that its config.json calls for, such as "
            f"{', '.join(missing[:3])}; the copy is incomplete or the config belongs to another model"
        )
    mismatched = sorted(str(entry) for entry in report.get("mismatched_keys", ()))
    if mismatched:
        raise ModelError(
            f"{directory} has {len(mismatched)} tensors of other shapes than its config.json says: "
            f"{'; '.join(mismatched[:3])}"
        )


def checkpoint_layers(model: PreTrainedModel, *, reentrant: bool) -> None:
    """Recompute each decoder layer in the backward pass; it takes effect in train mode only.

    Reentrant for 8-bit weights: bitsandbytes keeps the input of each 8-bit layer where no checkpoint sees it, so a
    first pass that records a graph would hold the inputs of all layers. A reentrant one records none.
    """
    if not model.supports_gradient_checkpointing:
        warn(f"{type(model).__name__} cannot recompute its layers; training it takes more memory")
        return
    # transformers 5.23 renamed the method and deprecates the old name; 5.20 has only the old one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    # Through a reentrant checkpoint no gradient reaches the adapters unless its input needs one. Elsewhere that would
    # only keep the embeddings' output alive: transformers switches it on for all.
    if reentrant:
        model.enable_input_require_grads()
    else:
        model.disable_input_require_grads()


def _first_line(reason: BaseException) -> str:
    lines = [line for line in str(reason).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(reason).__name__
