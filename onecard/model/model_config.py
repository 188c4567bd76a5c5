"""What the config.json of a base says to this transformers, and whether a model of that kind can be trained here.

Knows model types, encoders and decoders, and who wrote a file. It does not know weights, sizes or layers: those are
`load.py`'s and `architecture.py`'s, which both ask here, so that the plan and the loading say the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import transformers
from packaging.version import InvalidVersion, Version
from transformers import AutoConfig, PreTrainedConfig

from onecard.errors import ModelError

CONFIG = "config.json"
# Names under which families without an attribute_map entry for it write the same number.
OTHER_NAMES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "layers_block_type", "hybrid_override_pattern"),
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "vocab_size": (),
}
# Among the causal models of transformers, and yet nothing that learns to continue a text from the text alone.
NOT_TRAINED = {
    "blt": "has its bytes cut into patches by another model inside it",
    "cpmant": "reads its prompt in both directions",
    "gemma4_assistant": "drafts tokens for another model from that model's hidden states",
    "gemma4_unified_assistant": "drafts tokens for another model from that model's hidden states",
    "git": "captions images",
    "moshi": "speaks: it continues text and sound together",
    "musicgen": "makes music",
    "musicgen_melody": "makes music",
    "reformer": "is trained on rows of one fixed length only (axial_pos_shape)",
    "trocr": "reads text from images",
    "xlm": "reads in both directions",
    "xlnet": "reads in both directions (it predicts tokens in a shuffled order)",
}
# Their forward pass turns the hidden states into the dtype of the head's weights, which is bytes once it is quantised.
HEAD_READ_DIRECTLY = ("falcon_mamba", "hy_v4", "mamba", "mamba2", "xlstm")
# Numbers of config.json from which on attention works otherwise.
ATTENTION_WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size",
                     "local_attention")  # fmt: skip
WINDOWS = (*ATTENTION_WINDOWS, "original_max_position_embeddings", "max_position_embeddings")
# They write `is_decoder: false` and are decoders all the same.
DECODERS = ("gpt_neox", "gpt_neox_japanese")


@dataclass(frozen=True)
class ConfigSource:
    """Where an architecture comes from: the content of its config.json, its name, and its own code if that may run."""

    config: str
    name: str
    code: str | None = None

    def read(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """A new configuration object of the causal model, without chance, and how its class is to be asked for it."""
        whole = read_model_config(json.loads(self.config), self.name, self.code)
        causal = type(whole) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or self.code is not None
        config = whole if causal else whole.get_text_config()
        return without_chance(config), {"trust_remote_code": True} if self.code is not None else {}

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """Numbers of tokens beyond which attention works otherwise."""
        return _numbers(self.read()[0], WINDOWS)


def attention_window(config: PreTrainedConfig) -> int | None:
    """The tokens that layers with the narrowest window see; None where all see the whole row."""
    return next(iter(_numbers(config, ATTENTION_WINDOWS)), None)


def _numbers(config: PreTrainedConfig, names: tuple[str, ...]) -> tuple[int, ...]:
    """The values of these settings that are numbers above 1, ascending."""
    found = {getattr(config.get_text_config(), name, None) for name in names}
    return tuple(sorted(number for number in found if type(number) is int and number > 1))


def read_model_config(raw: dict[str, Any], name: str, code_source: str | None = None) -> PreTrainedConfig:
    """Return the configuration object for the content of a config.json; of a model that can be trained here.

    name: what messages call it. code_source: where the model's own Python code is, if it may run.
    Raises ModelError: a model type that this transformers does not know (with the version that wrote it), code that is
    not trusted, sizes missing or absurd, encoders and other models that do not continue a text.
    """
    if code_source is not None:
        trusted = True  # by the person: there is no code_source otherwise
        return attempt(name, lambda: AutoConfig.from_pretrained(code_source, trust_remote_code=trusted))
    family = str(raw.get("model_type") or "")
    if family not in transformers.CONFIG_MAPPING:
        raise ModelError(_unknown(raw, name, family))
    if family in NOT_TRAINED:
        raise ModelError(_refused(name, family, NOT_TRAINED[family]))
    # How a checkpoint is stored, and code that comes beside a known family, change no shape.
    plain = {key: _number(value) for key, value in raw.items() if key not in ("quantization_config", "auto_map")}
    config: PreTrainedConfig = attempt(name, lambda: transformers.CONFIG_MAPPING[family].from_dict(plain))
    reason = _no_decoder(config)
    if reason:
        raise ModelError(_refused(name, family, reason))
    _check_sizes(raw, name, type(config))
    return config


def without_chance(config: PreTrainedConfig) -> PreTrainedConfig:
    """Switch off, in place, what makes a base another one in training than in answering; nested parts, too.

    Dropout and jitter of routers: frozen weights need none, and the random numbers would depend on how a step is cut
    into micro-batches. RWKV scales its weights when it answers, and adapters beside them would not follow.
    """
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            without_chance(value)
        elif name == "rescale_every" or (isinstance(value, float) and ("drop" in name or "jitter" in name)):
            changes[name] = type(value)(0)
    if config.model_type == "phimoe":
        changes.pop("router_jitter_noise", None)  # it decides there how close two experts count as equal
    config.update(changes)
    return config


def ignored_keys(raw: dict[str, Any], config: PreTrainedConfig) -> list[str]:
    """Keys of a config.json that a newer transformers wrote and this one leaves out of account."""
    if not _is_newer(str(raw.get("transformers_version", ""))):
        return []
    known = {*type(config)().to_dict(), *PreTrainedConfig().to_dict(), *config.attribute_map}
    return sorted(raw.keys() - known - {"auto_map", "quantization_config", "torch_dtype", "use_cache"})


def attempt(name: str, build: Any) -> Any:
    """Call `build`. Raises ModelError that names the config.json, whatever the reason."""
    try:
        return build()
    except ImportError as reason:
        raise ModelError(f"{name} needs a package that is not installed: {str(reason).strip()}") from reason
    except Exception as reason:  # each config class has its own way to refuse numbers that contradict each other
        lines = [line for line in str(reason).splitlines() if line.strip()]
        why = ": ".join(line.strip().rstrip(":") for line in lines[:2]) or type(reason).__name__
        raise ModelError(f"the {CONFIG} of {name} describes no model that can be built: {why}") from reason


def _unknown(raw: dict[str, Any], name: str, family: str) -> str:
    if "auto_map" in raw:
        return (
            f"{name} brings its own Python code (model type {family!r}); read that code, and if you trust it, add "
            "--trust_remote_code true"
        )
    if not family:
        return f"the {CONFIG} of {name} names no model_type; it is not a config of transformers"
    here, written = transformers.__version__, str(raw.get("transformers_version") or "")
    known = f"transformers {here} does not know the model type {family!r} of {name}"
    if _is_newer(written):
        return f"{known}: its {CONFIG} was written by transformers {written}; install that version or a newer one"
    by = f"was written by transformers {written}" if written else "does not say which version wrote it"
    return (
        f"{known}; its {CONFIG} {by}. Install a newer transformers, or look on the model's page for the version or the "
        "code that it needs"
    )


def _is_newer(written: str) -> bool:
    try:
        return Version(written) > Version(transformers.__version__)
    except InvalidVersion:
        return False


def _number(value: Any) -> Any:
    """Undo how transformers writes what JSON has no number for: {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _number(each) for key, each in value.items()}
    return [_number(each) for each in value] if isinstance(value, list) else value


def _check_sizes(raw: dict[str, Any], name: str, config_class: type[PreTrainedConfig]) -> None:
    """Refuse a config that lacks a size: its class would silently put in those of another model.

    A nested text part may be sparse: Gemma 3's own configs write only what differs from the class.
    """
    if isinstance(raw.get("text_config"), dict):
        return
    spelled = getattr(config_class, "attribute_map", {})
    # A class without the size itself has it in its parts (BLT).
    own = {*getattr(config_class, "__dataclass_fields__", {}), *spelled.values()}
    missing = [
        size
        for size, others in OTHER_NAMES.items()
        if own & (names := {size, spelled.get(size, size), *others}) and not names & raw.keys()
    ]
    if missing:
        raise ModelError(f"the {CONFIG} of {name} does not say {', '.join(missing)}; copy or download it again")


def _refused(name: str, family: str, reason: str) -> str:
    return f"{name} is a {family} model, which {reason}: it cannot be trained to continue text"


def _no_decoder(config: PreTrainedConfig) -> str:
    """Why a model of this configuration cannot learn to continue a text; an empty string for one that can."""
    if config.is_encoder_decoder or type(config).is_encoder_decoder:  # the class, of one whose decoder stands alone
        return "is an encoder-decoder"
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and config.get_text_config() is config:
        return "is no causal language model"
    if getattr(config, "is_decoder", True) is False and config.model_type not in DECODERS:
        return "is an encoder: each token sees those behind it (is_decoder is false)"
    return ""
