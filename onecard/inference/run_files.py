"""What a run directory tells about the model in it, read before anything heavy is loaded.

A run keeps its tokenizer, template and options beside the adapter; a checkpoint inside it has only weights, so there
the directory above is asked. Imports no torch: `onecard generate --help` goes through here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from onecard.config.given_paths import is_tuned_model
from onecard.errors import ConfigError

OPTIONS_NAME, TEMPLATE_NAME = "onecard.yaml", "chat_template.jinja"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin")
# Not trust_remote_code: running foreign code is decided by who types the command, never by a file that was copied.
# Not device: the run may come from another machine.
STORED_NAMES = ("model_path", "bits", "dtype", "attn_implementation", "rope_scaling")
OBJECTIVE = "sft"  # of a base, and of runs from before there was a choice


def run_directory(lora_path: str | None) -> Path | None:
    """The directory with the run's files for an adapter that was typed, or None where there is none."""
    if lora_path is None:
        return None
    path = Path(lora_path).expanduser()
    path = path.parent if path.is_file() else path
    candidates = [path, path.resolve().parent] if path.name.startswith("checkpoint-") else [path]
    kept = (OPTIONS_NAME, TEMPLATE_NAME, *TOKENIZER_NAMES)
    return next((where for where in candidates if any((where / name).is_file() for name in kept)), None)


def stored_options(lora_path: str | None) -> dict[str, Any]:
    """The options about the base model that the run was trained with; empty where nothing readable is stored.

    4 and 8 bits are left out: they made the training fit, and `model/answer_bits.py` decides in what is answered.
    """
    stored = _stored(lora_path)
    return {name: value for name, value in stored.items() if name != "bits" or value >= 16}


def trained_bits(lora_path: str | None) -> int | None:
    """The bits per base weight that the run was trained with, where it says so."""
    return _stored(lora_path).get("bits")


def trained_objective(lora_path: str | None) -> str:
    """The name of what the run was trained for."""
    return _stored(lora_path, ("objective",)).get("objective", OBJECTIVE)


def _stored(lora_path: str | None, names: Sequence[str] = STORED_NAMES) -> dict[str, Any]:
    run = run_directory(lora_path)
    if run is None:
        return {}
    try:
        stored = yaml.safe_load((run / OPTIONS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(stored, Mapping):
        return {}
    if is_tuned_model(run):  # a whole model, which is its own base
        stored = {**stored, "model_path": str(run), "rope_scaling": "none"}  # its config.json holds it
    kinds = {"bits": int}
    return {name: stored[name] for name in names if isinstance(stored.get(name), kinds.get(name, str))}


def stored_template(run: Path | None) -> str | None:
    """The template that the run was trained with, as a path for `load_template`."""
    return str(run / TEMPLATE_NAME) if run is not None and (run / TEMPLATE_NAME).is_file() else None


def has_tokenizer(run: Path | None) -> bool:
    """Whether the run keeps tokenizer files of its own."""
    return run is not None and any((run / name).is_file() for name in TOKENIZER_NAMES)


def adapters_in(folder: str) -> dict[str, str]:
    """The adapters of a folder by the name of theirs, sorted. Raises ConfigError when there is none."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError("--adapters_path", f"{folder} is not a folder")
    found = {
        inner.name: str(inner)
        for inner in sorted(path.iterdir())
        if inner.is_dir() and any((inner / name).is_file() for name in ADAPTER_FILES)
    }
    if not found:
        raise ConfigError("--adapters_path", f"{folder} holds no folder with an adapter in it (adapter_config.json)")
    return found


def stored_by_first(typed: Mapping[str, Any]) -> dict[str, Any]:
    """`stored_options` of the adapter that was typed, else of the first one in --adapters_path, if that was typed."""
    lora_path, folder = typed.get("lora_path"), typed.get("adapters_path")
    if lora_path is None and folder is not None:
        with suppress(ConfigError):  # a folder without adapters is told with all else that is wrong
            lora_path = next(iter(adapters_in(folder).values()))
    return stored_options(lora_path)
