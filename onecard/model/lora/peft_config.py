"""PEFT's configuration of an adapter: a new one out of the options, or a trained one out of its files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig

from onecard.config.lora import LoraOptions
from onecard.console import first_line
from onecard.errors import ConfigError, ModelError
from onecard.model.lora.bottleneck import register_bottleneck
from onecard.model.lora.formats import CONFIG, AdapterFiles, infer_config, read_config
from onecard.model.lora.methods import METHODS, AdaptedLayers, peft_settings
from onecard.model.lora.peft_options import typed_options
from onecard.model.rope_scaling import MARK

NO_LAYERS = AdaptedLayers([], None, transposed=False)


def new_config(options: LoraOptions, layers: AdaptedLayers = NO_LAYERS, **beside: Any) -> Any:
    """The configuration of a fresh adapter on these layers; `beside` are settings of what is trained beside it.

    Raises ConfigError for options that do not go together, and what PEFT does (ValueError, TypeError).
    """
    config_class, settings = _config_class(options), {**peft_settings(options, layers), **beside}
    settings |= typed_options(config_class, options, settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not save basis_A.*")  # see `methods.py`
        return config_class(task_type="CAUSAL_LM", **settings)


def _config_class(options: LoraOptions) -> Any:
    """PEFT's configuration of the chosen method. Raises ConfigError for what beside the adapter it cannot train."""
    register_bottleneck()
    kind: Any = options.peft_method.upper()  # PEFT's kinds are texts; one of them is none of its own
    found: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if options.train_new_tokens and "trainable_token_indices" not in found.__dataclass_fields__:
        raise ConfigError("--train_new_tokens", f"does not go with --peft_method {options.peft_method}")
    return found


def stored_config(files: AdapterFiles, trainable: bool) -> PeftConfig:
    """The configuration of a trained adapter. Raises ModelError for one that cannot be used."""
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
        return trained_config(replace(config, base_model_name_or_path=None), inference_mode=not trainable)
    except (ValueError, TypeError, KeyError) as reason:
        raise ModelError(f"{files.config_directory / CONFIG} cannot be used: {str(reason).splitlines()[0]}") from reason


def trained_config(config: Any, *, inference_mode: bool) -> Any:
    """The configuration of an adapter that has its values: a start such as "gaussian" no longer matters."""
    return replace(config, inference_mode=inference_mode, **METHODS[config.peft_type.value.lower()].stored)


@contextmanager
def as_config_error(options: LoraOptions) -> Iterator[None]:
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
    with as_config_error(options):
        new_config(options)
