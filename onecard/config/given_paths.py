"""What a command line names and is not there: said with all else that is wrong, before anything heavy is loaded.

Knows names of options, files and folders. A Hub id cannot be told from a folder that is missing, so it is left to
whoever downloads it. Imports nothing heavy, and opens no weights.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from onecard.config.data import BUILT_IN_TEMPLATES, TEMPLATE_ALIASES
from onecard.config.lora import PeftMethodName
from onecard.config.problems import Problem
from onecard.config.rollouts import reward_file_parts
from onecard.console import nearest
from onecard.installation import SHIPPED, command
from onecard.storage import read_json_object

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
WRITTEN = ("output_path", "cache_path")
# Beside those of CHECKS and what ends in _path.
MORE_PATHS = (
    "a", "api_keys", "b", "baseline", "compare", "embed_model", "file", "index", "models", "output_root", "plot",
    "questions", "reports", "request_log", "run", "save_pairs", "stages",
)  # fmt: skip
BLOCKED = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
OWN_FOLDERS = ("outputs", "sample", "field-recipes")  # of this kit: no owner on the Hub is meant
SHIPPED_FOLDERS = ("sample", "config-sample", "field-recipes")
SCORES = "SEQ_CLS"  # task_type of a reward model in adapter_config.json
# Newest form first. The Trainer of 2023 wrote pytorch_model.bin into checkpoint-N when the model was a PeftModel.
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")
# Of a run that trains weights of the base itself: in its checkpoints. It ends as a whole model beside its options.
TRAINED_WEIGHTS = "trained_weights.safetensors"

# PEFT's names of the kinds of adapters, and which of them are no change of weights.
OTHER_KINDS = {
    "PREFIX_TUNING": "a prefix-tuning", "P_TUNING": "a p-tuning", "PROMPT_TUNING": "a prompt-tuning",
    "MULTITASK_PROMPT_TUNING": "a prompt-tuning", "ADAPTION_PROMPT": "an adaption-prompt",
    "BOTTLENECK": "another kit's bottleneck",
}  # fmt: skip
NOT_MERGEABLE = (
    "PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "BOTTLENECK"
)  # fmt: skip


def path_problems(values: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the files and folders that these options name; None, empty and auto name nothing."""
    found: list[Problem] = []
    for name, check in CHECKS.items():
        value = values.get(name)
        for part in paths_in(value):
            text = check(part) if part not in ("auto", "none") else ""
            found += [(f"--{name}", text)] if text else []
    return found


def impossible_paths(values: Mapping[str, Any]) -> list[Problem]:
    """What the system cannot even look for: the home of an unknown user, a name too long, a closed folder, a loop."""
    found: list[Problem] = []
    named = {name: paths_in(value) for name, value in values.items() if names_paths(name)}
    for name, part in ((name, part) for name, parts in named.items() for part in parts):
        try:
            Path(part).expanduser().stat()
        except RuntimeError:
            user = Path(part).parts[0]
            found.append((f"--{name}", f"the home directory of {user} is not known; write the whole path"))
        except ValueError as reason:  # a NUL in it
            found.append((f"--{name}", f"{part[:100]!r} cannot be looked for: {reason}"))
        except OSError as reason:
            if reason.errno in BLOCKED:  # whatever else is missing is told by whoever needs it
                found.append((f"--{name}", f"{part[:100]} cannot be looked for: {reason.strerror}"))
    return found


def with_homes(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the home directory for ~ in paths, which no shell writes behind = or in a file of settings."""
    found = dict(values)
    for name, value in values.items():
        if names_paths(name) and "~" in str(value):
            parts = [_with_home(part) for part in paths_in(value)]
            found[name] = parts if isinstance(value, list) else ",".join(parts)
    return found


def _with_home(text: str) -> str:
    """Earlier versions made a folder called ~ of it: what lies there stays in reach of the same command."""
    return text if not text.startswith("~") or Path(text).exists() else str(Path(text).expanduser())


def names_paths(option: str) -> bool:
    """Whether the values of an option of this name are files or folders, in any program."""
    return option in (*CHECKS, *MORE_PATHS) or option.endswith("_path")


def with_shipped_files(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with `shipped_file` for each that names something to be read."""
    found = dict(values)
    for name, value in values.items():
        if name in CHECKS or (name.endswith("_path") and name not in WRITTEN):
            if isinstance(value, list):
                found[name] = [shipped_file(str(part)) for part in value]
            elif isinstance(value, str):
                found[name] = shipped_file(value)
    return found


def shipped_file(text: str) -> str:
    """A path into one of SHIPPED_FOLDERS that is not here, as that of the file that comes with the program."""
    path = Path(text)
    is_here = not {*path.parts[:1]} & {*SHIPPED_FOLDERS} or path.exists()
    return text if is_here or not (SHIPPED / path).exists() else str(SHIPPED / path)


def paths_in(value: Any) -> list[str]:
    """The paths in a value: one (which may hold a comma where it exists), several with commas between, or a list."""
    if not value or not str(value).strip():
        return []
    if isinstance(value, list):
        return [str(part) for part in value]
    text, is_one = str(value), "," not in str(value)
    with suppress(OSError, RuntimeError):  # several, which together are too long for a name
        is_one = is_one or Path(text).expanduser().exists()
    return [text] if is_one else [part.strip() for part in text.split(",") if part.strip()]


def _data(text: str) -> str:
    path = Path(text).expanduser()
    near = "" if path.exists() else _near(path)
    # rows.jsn beside rows.json is a slip of the hand; a data set of the Hub that has a dot has an owner.
    is_slip = path.suffix and near and "/" not in text
    is_hub_id = HUB_ID.fullmatch(text) and path.suffix.lower() not in DATA_SUFFIXES and not is_slip
    return "" if is_hub_id and not _is_own(path) else _must_exist(text)


def _directory(text: str) -> str:
    path = Path(text).expanduser()
    if path.exists() or (HUB_ID.fullmatch(text) and not _is_own(path)):
        return ""
    return f"there is no directory {text}{_near(path)}"


def _adapter(text: str) -> str:
    path = Path(text).expanduser()
    if not path.is_dir():
        return _directory(text)
    places = [path, *path.glob("checkpoint-*")]
    if any((place / name).is_file() for place in places for name in (*ADAPTER_WEIGHTS, TRAINED_WEIGHTS)):
        kind = other_kind(read_json_object(path / "adapter_config.json"))
        return f"{text} {kind}" if kind else ""
    held = ", ".join(sorted(inner.name for inner in path.iterdir())[:6]) or "nothing"
    return f"{text} holds no adapter ({ADAPTER_WEIGHTS[0]}); it holds: {held}"


def other_kind(adapter_config: Mapping[str, Any], *, gives_reward: bool = False) -> str:
    """What to do with an adapter of a method that is not trained here, or of a model that writes nothing unless that is
    wanted, by its adapter_config.json; else empty."""
    if adapter_config.get("task_type") == SCORES and not gives_reward:
        return (f"is a reward model (finetune --objective reward): it gives answers a number and writes none. Choose "
                f"among answers with it: {command('generate')} --best_of 8 --reward RUN")  # fmt: skip
    kind = str(adapter_config.get("peft_type") or "LORA")
    # LLM-Adapters writes the same name for another form, which does not say where its networks stand.
    if kind.lower() in get_args(PeftMethodName) and (kind != "BOTTLENECK" or "form" in adapter_config):
        return ""
    message = f"is {OTHER_KINDS.get(kind, kind)} adapter, which cannot be loaded here"
    if kind in NOT_MERGEABLE:
        return f"{message}; it cannot be merged either: train a LoRA adapter on the same data"
    return f"{message}; merge it into its base with peft (merge_and_unload), and give the result as the base model"


def is_data_file(text: str) -> bool:
    """Whether this names a file of data, there or missing, and no model."""
    path = Path(text).expanduser()
    return path.is_file() or path.suffix.lower() in DATA_SUFFIXES


def is_tuned_model(path: Path) -> bool:
    """Whether this is the directory of a finished run that trained weights of its base: a whole model."""
    path = path.expanduser()
    return all((path / name).is_file() for name in ("config.json", "onecard.yaml"))


def trained_weights_in(path: Path) -> Path | None:
    """The trained weights of a base in a checkpoint, or in the newest one of a run; None: there are none."""
    places = [place / TRAINED_WEIGHTS for place in (path.expanduser(), *newest_checkpoints(path.expanduser()))]
    return next((file for file in places if file.is_file()), None)


def foreign_advice(path: Path) -> str:
    """What to do with a checkpoint of another program, or a directory that holds some; empty for our own."""
    foreign = next((place for place in (path, *newest_checkpoints(path)) if _is_foreign(place)), None)
    if foreign is None:
        return ""
    return (
        f"{foreign} was written by another program, whose optimizer cannot go on here. To start a new run from its "
        f"weights: --init_adapter {foreign}"
    )


def _is_foreign(checkpoint: Path) -> bool:
    """Whether a checkpoint was written by the Trainer of transformers, as those of other kits are."""
    state = read_json_object(checkpoint / "trainer_state.json")
    return "log_history" in state and "identity" not in state


def _checkpoint(text: str) -> str:
    return foreign_advice(Path(text).expanduser()) or _must_exist(text)


def newest_checkpoints(path: Path) -> list[Path]:
    """The checkpoints in a run's directory, the newest first."""
    numbered = {int(place.name[11:]): place for place in path.glob("checkpoint-*") if place.name[11:].isdigit()}
    return [numbered[step] for step in sorted(numbered, reverse=True)]


def _must_exist(text: str) -> str:
    path = Path(text).expanduser()
    return "" if path.exists() else f"there is no file or folder {text}{_near(path)}"


def _template(text: str) -> str:
    path, known = Path(text).expanduser(), ("auto", *BUILT_IN_TEMPLATES)
    if text in (*known, *TEMPLATE_ALIASES) or path.is_file():
        return ""
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        return f"there is no template file {text}{_near(path)}"
    return f"no template is called {text!r}{nearest(text, known)}; choose {', '.join(known)}, or give a .jinja file"


def _is_own(path: Path) -> bool:
    return path.parts[:1] != () and path.parts[0] in OWN_FOLDERS


def _near(path: Path) -> str:
    """The nearest name in the folder, where that is there."""
    try:
        return nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    except OSError:
        return f" (nor a folder {path.parent})"


CHECKS: dict[str, Callable[[str], str]] = {
    "model_path": _directory, "data_path": _data, "calibration_path": _data, "prompt_type": _template,
    "lora_path": _adapter, "init_adapter": _adapter, "lora_remote_checkpoint": _adapter, "adapters_path": _must_exist,
    "resume_from_checkpoint": _checkpoint, "deepspeed": _must_exist, "load_chat": _must_exist, "ask_file": _must_exist,
    "data_root": _must_exist, "documents": _must_exist,
    "reward_file": lambda text: _must_exist(reward_file_parts(text)[0]),
}  # fmt: skip
