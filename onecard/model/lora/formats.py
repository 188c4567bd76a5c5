"""Adapter files as they are found: today's PEFT form and the older ones that earlier kits left behind.

Returns plain tensors under today's names and says what had to be assumed. It does not know peft or the model that the
tensors belong to: `adapter.py` does, and checks them against it. Nothing pickled is ever executed.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from onecard.config.given_paths import ADAPTER_WEIGHTS as WEIGHT_NAMES
from onecard.config.given_paths import is_tuned_model, newest_checkpoints, other_kind, trained_weights_in
from onecard.console import warn
from onecard.errors import ConfigError, ModelError
from onecard.installation import command
from onecard.model.files import locate, read_json, safetensors_header
from onecard.model.lora.methods import is_adapter_weight, starts_at_zero, why_never_merged
from onecard.model.rope_scaling import MARK
from onecard.storage import read_json_object

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ENCODER = "adapter_prompt_encoder.safetensors"  # what makes virtual tokens while they are trained; PEFT keeps none
ADAPTER_PREFIX = "adapter_"  # of the names of its files
STATE = "trainer_state.json"
MATRICES = ("lora_A", "lora_B")  # of a layer: A (rank, in) and B (out, rank)
LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?P<end>\.weight|\.bias)?"
)


@dataclass
class AdapterFiles:
    """An adapter as found: tensors under PEFT's names, where its configuration lies (if any), what was assumed."""

    directory: Path
    weights: Path
    tensors: dict[str, Tensor]
    config_directory: Path | None
    notes: list[str] = field(default_factory=list)


def read_adapter(source: str | Path, *, gives_reward: bool = False) -> AdapterFiles:
    """Read an adapter: run directory, checkpoint, older layout or Hub id.

    Raises ModelError: not found, damaged, code in a pickle, no LoRA tensors, NaN or Inf in them.
    """
    notes: list[str] = []
    _refuse_tuned(source)
    directory = _directory_of(str(source), notes)
    weights = next(directory / name for name in WEIGHT_NAMES if (directory / name).is_file())
    config_directory = _config_directory(directory, notes)
    kind = other_kind(read_config(config_directory) if config_directory else {}, gives_reward=gives_reward)
    if kind:
        raise ModelError(f"{directory} {kind}")
    found = _read_tensors(weights)
    tensors = {_todays_name(key): tensor for key, tensor in found.items() if is_adapter_weight(key)}
    if not tensors:
        raise ModelError(f"{weights} holds no LoRA tensors ({len(found)} others): {_kind_of_names(found)}")
    others = {key: tensor for key, tensor in found.items() if not is_adapter_weight(key)}
    if weights.name.startswith("adapter_model"):  # such as a head trained in full (modules_to_save)
        tensors |= others
    elif others:
        notes.append(f"{weights.name} holds {len(others)} tensors that are not LoRA's; they were left out")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(
            f"{weights} holds NaN or Inf in {len(broken)} of {len(tensors)} tensors, such as {broken[0]}: "
            "the run that wrote it diverged; take an earlier checkpoint"
        )
    if weights.name != WEIGHTS:
        notes.append(f"older layout: read {weights.name}")
    return AdapterFiles(directory, weights, tensors, config_directory, notes)


def _refuse_tuned(source: str | Path) -> None:
    """Raise ModelError for what a run left that trained weights of its base."""
    if is_tuned_model(Path(source)):
        raise ModelError(f"{source} is a whole model, whose own weights were trained (finetune --peft_method full or "
                         "freeze:N): there is no adapter in it, nothing to merge; give it as --model_path")  # fmt: skip
    if trained_weights_in(Path(source)) is not None:
        raise ModelError(f"{source} holds trained weights of its base (finetune --peft_method full or freeze:N), no "
                         "adapter. They can be chatted with and resumed; where the run ends, its directory is a whole "
                         "model, which goes into --model_path")  # fmt: skip


def _kind_of_names(names: Collection[str]) -> str:
    """What files without a configuration hold in place of LoRA, by the names of their tensors."""
    if any("adapter_down" in name for name in names):
        return f"it {other_kind({'peft_type': 'BOTTLENECK'})}"
    return "it is no adapter, or it was saved empty"


def infer_config(files: AdapterFiles) -> dict[str, Any]:
    """Return LoRA settings read off the tensors' shapes, for an adapter without adapter_config.json.

    lora_A (r, in) gives r, names give the targets; alpha is in no shape: 2 r, as most recipes have it.
    """
    ranks = {
        name.removeprefix(PREFIX).rsplit(".lora_A", 1)[0]: tensor.shape[0]
        for name, tensor in files.tensors.items()
        if ".lora_A" in name
    }
    if not ranks:
        raise ModelError(f"{files.weights} has no lora_A tensor, so its rank cannot be inferred; add its {CONFIG}")
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = 2 * r
    example = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha,
               "target_modules": sorted({name.rsplit(".", 1)[-1] for name in ranks})}  # fmt: skip
    files.notes.append(
        f"no {CONFIG}: took r = {r} and {len(ranks)} target layers from the shapes, and assumed lora_alpha = {alpha} "
        f"(2 r). If it was another, write it into {files.directory / CONFIG}: {json.dumps(example)}"
    )
    return {
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "task_type": "CAUSAL_LM",
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "use_dora": any(".lora_magnitude_vector" in name for name in files.tensors),
    }


def other_base(source: str | Path, base: str, fingerprint: str) -> str | None:
    """That an adapter was trained on other weights than `base` with this fingerprint; None: on these, or not kept."""
    kept = kept_fingerprint(source)
    if kept is None or kept == fingerprint:
        return None
    config = find_config(source)
    named = read_config(config).get("base_model_name_or_path") if config else None
    another = f"another base, {named}" if named else "another base"
    return (
        f"{source} was trained on {another}, not on {base}: the fingerprints of their files differ "
        f"({kept[:12]} and {fingerprint[:12]}). On other weights an adapter does something else than it learned"
    )


def kept_fingerprint(source: str | Path) -> str | None:
    """The fingerprint of its base that an adapter's run kept; None: of an old run, another kit or the Hub."""
    path = Path(source).expanduser()
    directory = path.parent if path.is_file() else path
    above = [directory.parent] if directory.name.startswith("checkpoint-") else []
    for place in (directory, *above, *sorted(directory.glob("checkpoint-*"))):
        identity = read_json_object(place / STATE).get("identity")  # another kit's Trainer has a file of this name, too
        if isinstance(identity, dict) and isinstance(identity.get("base"), str):
            return str(identity["base"])
    return None


def find_config(source: str | Path) -> Path | None:
    """Return the directory with an adapter's adapter_config.json without reading its weights; None: it has none."""
    return _config_directory(_directory_of(str(source), []), [])


def read_config(directory: Path) -> dict[str, Any]:
    """Return adapter_config.json of `directory`. Raises ModelError when it is no JSON object."""
    return read_json(directory / CONFIG)


def refuse_never_merged(files: AdapterFiles) -> None:
    """Raise ModelError for an adapter that can become no part of its base: virtual tokens, bottlenecks."""
    kind = read_config(files.config_directory).get("peft_type") if files.config_directory else None
    reason = why_never_merged(str(kind)) if kind else ""
    if reason:
        raise ModelError(
            f"{files.directory} is an adapter of the method {str(kind).lower()}, which is not merged here or anywhere: "
            f"{reason}. Answer with it beside its base "
            f"({command('chat')}, {command('serve')}), or train a LoRA adapter on the same data"
        )


def differences_of(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """One line for each name that only one side has, and for each other shape."""
    lines = [f"{name}: missing in the files" for name in sorted(expected.keys() - found.keys())]
    lines += [f"{name}: this base has no such layer" for name in sorted(found.keys() - expected.keys())]
    lines += [
        f"{name}: {tuple(found[name].shape)} in the files, {tuple(expected[name].shape)} needed here"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    return lines


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], where: Path) -> None:
    """Raise ModelError unless both hold the same names, shapes and values (fp16 files as the fp32 they become)."""
    differences = differences_of(expected, found)
    if not differences:
        differences = [
            f"{name}: other values"
            for name, tensor in expected.items()
            if not torch.equal(found[name].cpu(), tensor.cpu().to(found[name].dtype))
        ]
    if differences:
        raise ModelError(
            f"{where} does not hold what it should after a check: {'; '.join(differences[:3])}; check the disk"
        )


def refuse_useless(tensors: dict[str, Tensor]) -> None:
    """Raise ModelError for an adapter that must not be written: empty, or not finite. Warns of an untrained one."""
    if not tensors or any(tensor.numel() == 0 for tensor in tensors.values()):
        raise ModelError("the adapter is empty: there is nothing to save, so nothing was written")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(
            f"the adapter holds NaN or Inf in {len(broken)} of {len(tensors)} tensors, such as "
            f"{broken[0]}; it was not written"
        )
    second = {name: tensor for name, tensor in tensors.items() if starts_at_zero(name)}
    only_adapter = all(is_adapter_weight(name) for name in tensors)
    if second and only_adapter and not any(tensor.any() for tensor in second.values()):
        what = next(part for part in next(iter(second)).split(".") if starts_at_zero(part))
        warn(f"the adapter is saved untrained: every {what} is zero, so the model answers like its base")


def _directory_of(source: str, notes: list[str]) -> Path:
    path = Path(source).expanduser()
    if path.is_file() and path.name in (*WEIGHT_NAMES, CONFIG):
        path = path.parent
    if not path.is_dir():
        path = locate(source, what="adapter", patterns=(CONFIG, "adapter_model.*"))
    if _has_weights(path):
        return path
    newest = next(filter(_has_weights, newest_checkpoints(path)), None)
    if newest is not None:
        notes.append(f"{path} has no finished adapter; took its newest checkpoint, {newest.name}")
        return newest
    present = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
    raise ModelError(f"{path} holds no adapter ({WEIGHTS}); it holds: {present}")


def _has_weights(directory: Path) -> bool:
    return any((directory / name).is_file() for name in WEIGHT_NAMES)


def _config_directory(directory: Path, notes: list[str]) -> Path | None:
    """Where adapter_config.json lies: beside the weights, or one up where a checkpoint has none of its own."""
    if (directory / CONFIG).is_file():
        return directory
    if directory.name.startswith("checkpoint-") and (directory.parent / CONFIG).is_file():
        notes.append(f"{directory.name} has no {CONFIG}; took the one of {directory.parent}")
        return directory.parent
    return None


def _read_tensors(weights: Path) -> dict[str, Tensor]:
    if weights.suffix == ".safetensors":
        safetensors_header(weights)
        return load_file(weights)
    try:
        content = torch.load(weights, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as reason:
        raise ModelError(
            f"{weights} is refused: it is no plain pickle of tensors but holds code, or it is damaged. "
            "Nothing in it was run; ask its author for safetensors"
        ) from reason
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as reason:
        raise ModelError(f"{weights} is damaged ({str(reason).splitlines()[0]}); copy it again") from reason
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{weights} holds something else than named tensors; it is no adapter")
    return content


def _todays_name(key: str) -> str:
    """`module.model...q_proj.lora_A.default.weight` -> `base_model.model.model...q_proj.lora_A.weight`."""
    match = LORA_KEY.fullmatch(key.removeprefix("module."))
    if match is None:
        return key
    module = match["module"].removeprefix(PREFIX)
    return f"{PREFIX}{module}.{match['kind']}{match['end'] or ''}"


def base_of_adapter(source: str | Path) -> str | None:
    """Return the base model that an adapter's files name (a directory or a Hub id), or None where they do not.

    A whole model is its own.
    """
    if is_tuned_model(Path(source)):
        return str(source)
    file = trained_weights_in(Path(source))
    if file is not None:
        return safetensors_header(file).get("__metadata__", {}).get("base")
    directory = find_config(source)
    return read_config(directory).get("base_model_name_or_path") or None if directory else None


def adapter_scaling(source: str | Path) -> str:
    """The --rope_scaling that an adapter was trained with, by its own file; "none" where it says nothing."""
    if is_tuned_model(Path(source)) or trained_weights_in(Path(source)) is not None:
        return "none"  # a whole model's config.json holds it; a checkpoint's run has it in its options
    place = find_config(source)
    value = read_config(place).get(MARK) if place is not None else None
    return value if isinstance(value, str) else "none"


def scaling_of_adapters(adapters: Sequence[str]) -> str:
    """The one --rope_scaling that these adapters were trained with. Raises ConfigError where two of them differ."""
    found = {adapter: value for adapter in adapters if (value := adapter_scaling(adapter)) != "none"}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{adapter} with {value}" for adapter, value in found.items())
        raise ConfigError(
            "--lora_path", f"the adapters were trained under different --rope_scaling ({CONFIG}): {listed}"
        )
    return next(iter(found.values()), "none")


def average_adapters(checkpoints: Sequence[Path], target: Path) -> None:
    """Write the mean of the adapters of several checkpoints of one run to a directory, value by value.

    Of A and of B by themselves, as checkpoints of whole models are averaged (arXiv:1803.05407): the mean of their
    products would have a higher rank. Added up in fp64, rounded once to the format that they are stored in.
    """
    mean = mean_of_files([checkpoint / WEIGHTS for checkpoint in checkpoints])
    save_file(mean, target / WEIGHTS, metadata={"format": "pt"})
    (target / ENCODER).unlink(missing_ok=True)  # the mean of vectors is not what the mean of networks would give


def mean_of_files(files: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the tensors of several files, by name: added up in fp64, rounded once to the stored format."""
    stored = [load_file(file) for file in files]
    if len(stored) == 1:
        return stored[0]
    return {
        name: torch.stack([tensors[name].double() for tensors in stored]).mean(0).to(tensor.dtype)
        for name, tensor in stored[-1].items()
    }
