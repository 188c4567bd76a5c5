"""--peft_option: settings of a PEFT method by PEFT's own names, checked against its configuration class.

Knows the fields of a configuration and what a text means as one of them. It imports no peft: the class is given.
"""

from __future__ import annotations

import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from onecard.config.lora import METHOD_SETTINGS, LoraOptions
from onecard.console import nearest
from onecard.errors import ConfigError

FLAG = "--peft_option"
# What has a flag here, by PEFT's name.
FLAG_OF = {
    "peft_type": "--peft_method", "target_modules": "--lora_target_modules", "use_rslora": "--use_rslora",
    "target_parameters": "--lora_target_parameters", "use_dora": "--use_dora", "init_lora_weights": "--lora_init",
    "modules_to_save": "--train_embeddings", "ensure_weight_tying": "--train_embeddings",
    "trainable_token_indices": "--train_new_tokens", "base_model_name_or_path": "--model_path",
    **{theirs: f"--{ours}" for taken in METHOD_SETTINGS.values() for ours, theirs in taken.items()},
}  # fmt: skip
ALWAYS_BY_FLAG = ("peft_type", "modules_to_save", "trainable_token_indices", "base_model_name_or_path")
SET_HERE = {
    "bias": "would train biases of the base, which an adapter's files cannot give to another copy of it",
    "layer_replication": "would make another base, with layers twice", "lora_bias": "is not counted by the plan",
    "total_step": "is the number of steps of the run", "task_type": "is CAUSAL_LM here",
    "inference_mode": "is for an adapter that is not trained",
    "prompt_tuning_init_text": "is a text, and --peft_option keeps no spaces",
    **dict.fromkeys(("num_layers", "token_dim", "num_attention_heads", "num_transformer_submodules"),
                    "follows from the base"),
    "auto_mapping": "is written by PEFT", "peft_version": "is written by PEFT", "revision": "belongs to the base",
}  # fmt: skip


def typed_options(config_class: Any, options: LoraOptions, ours: dict[str, Any]) -> dict[str, Any]:
    """--peft_option as the settings of this class; `ours` are those that flags give.

    Raises ConfigError for an unknown name (with the nearest), one that has a flag, and a value of another type.
    """
    hints = get_type_hints(config_class)
    known = sorted(config_class.__dataclass_fields__)
    found = {}
    for name, text in options.peft_options.items():
        if name not in known:
            text = f"{name} is no setting of {config_class.__name__}{nearest(name, known)}; it has {', '.join(known)}"
            raise ConfigError(FLAG, text)
        if name in FLAG_OF and (name in ours or name in ALWAYS_BY_FLAG):
            raise ConfigError(FLAG, f"{name} is given by {FLAG_OF[name]}")
        if name in ours or name in SET_HERE:
            raise ConfigError(FLAG, f"{name} cannot be set: it {SET_HERE.get(name, 'follows from the base')}")
        try:
            found[name] = _value(text, hints[name])
        except ValueError as reason:
            raise ConfigError(FLAG, f"{name}={text} is not {reason}") from None
    return found


def _value(text: str, kind: Any) -> Any:
    """A text as a value of this type. Raises ValueError that says what is asked for."""
    if get_origin(kind) in (Union, types.UnionType):
        asked = []
        named = [one for one in get_args(kind) if _is_enum(one)]  # beside their texts
        for one in sorted(named or get_args(kind), key=lambda each: _TRIED.index(each) if each in _TRIED else 1):
            try:
                return _value(text, one)
            except ValueError as reason:
                asked.append(str(reason))
        raise ValueError(" or ".join(asked))
    if get_origin(kind) is Literal:
        choices = {str(choice).lower(): choice for choice in get_args(kind)}
        if text.lower() not in choices:
            raise ValueError(f"one of {', '.join(map(str, get_args(kind)))}")
        return choices[text.lower()]
    if _is_enum(kind):
        return _value(text, Literal[tuple(one.value for one in kind)])
    if kind is bool or kind is type(None):
        words = {"true": True, "false": False} if kind is bool else {"none": None, "null": None}
        if text.lower() not in words:
            raise ValueError(" or ".join(list(words)[:2] if kind is bool else ["none"]))
        return words[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError("a whole number" if kind is int else "a number") from None
    if kind is str:
        return text
    raise ValueError("a list or table, which cannot be given here")


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


_TRIED = [type(None), bool, int, float, str]
