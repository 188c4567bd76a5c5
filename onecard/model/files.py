"""The files of a base model: where they are, whether they are whole, and a fingerprint that tells two bases apart.

Reads names, sizes and headers; loads no weights. A Hub id is downloaded (safetensors, configuration and tokenizer
only) or found in the cache, so that a Hub id and a directory are checked alike.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from onecard.config.given_paths import HUB_ID
from onecard.console import nearest
from onecard.errors import ModelError
from onecard.hub_errors import hub_problem

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
SAMPLE_BYTES = 4096  # read at each of SAMPLES places of a weight file for the fingerprint
SAMPLES = 16
Header = dict[str, Any]


def locate(name: str, *, what: str = "base model", patterns: tuple[str, ...] = (), with_code: bool = False) -> Path:
    """Return the directory that holds `name`, a directory or a Hub id; the latter is downloaded if need be.

    `patterns` are the files wanted from the Hub; empty: a base model's. Raises ModelError: no such directory (with
    the nearest name), a file instead of a directory, no such Hub id, no network.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"{what} {name} is a file; give the directory that holds it: {path.parent}")
    if not HUB_ID.fullmatch(name) or _looks_local(path):
        raise ModelError(f"{what}: no directory {name}{_nearest_directory(path)}; give a directory or a Hub id")
    of_base = (*SMALL_FILES, "*.safetensors", *(["*.py"] if with_code else []))
    return _from_hub(name, what, patterns or of_base, weights_wanted=not patterns)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ModelError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise ModelError(f"{path} cannot be read as JSON ({reason}); copy or download it again") from reason
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object; copy or download it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object for people to read: indented, in UTF-8, with the same bytes on every system."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def weight_files(directory: Path) -> list[Path]:
    """Return the weight files that will be loaded: safetensors where there are any, else pickled ones.

    Raises ModelError when there are none, or when an index names files that are missing.
    """
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _indexed(directory, directory / index)
    named_by_autogptq = sorted(directory.glob("gptq_model-*.safetensors"))
    if len(named_by_autogptq) == 1:
        return named_by_autogptq
    present = ", ".join(sorted(p.name for p in directory.iterdir())[:12]) or "nothing"
    raise ModelError(f"{directory} holds no weights (model.safetensors or shards of it); it holds: {present}")


def safetensors_header(path: Path) -> Header:
    """Return the header of a safetensors file after checking that all bytes it speaks of are there.

    https://github.com/huggingface/safetensors#format  Raises ModelError that names the file, sizes in bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        n_header = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if n_header > size - 8:
            raise _damaged(path, size, f"its header alone needs {n_header + 8} bytes")
        try:
            header: Header = json.loads(file.read(n_header))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as reason:
            raise _damaged(path, size, "its header is not readable") from reason
    needed = 8 + n_header + max(ends, default=0)
    if size != needed:
        raise _damaged(path, size, f"its header speaks of {needed} bytes")
    return header


def check_weights(directory: Path) -> list[Path]:
    """Return the weight files after checking each; see `weight_files` and `safetensors_header`."""
    files = weight_files(directory)
    for file in files:
        if file.suffix == ".safetensors":
            safetensors_header(file)
    return files


def base_fingerprint(model_path: str) -> str:
    """Return a SHA-256 that differs between two bases, cheap even for 100 GB.

    It covers config.json (without the fields that only say who wrote it), each weight file's size, header and 64 KiB
    of it, taken at even distances: a base and its instruction-tuned sister differ everywhere.
    """
    directory = locate(model_path)
    digest = hashlib.sha256()
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    for volatile in ("transformers_version", "_name_or_path", "use_cache"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in check_weights(directory):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        _digest_samples(file, digest)
    return digest.hexdigest()


def _digest_samples(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if file.suffix == ".safetensors":
            n_header = struct.unpack("<Q", stream.read(8))[0]
            digest.update(stream.read(n_header))
        for i in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))


def _indexed(directory: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map; copy or download it again")
    files = [directory / Path(name).name for name in sorted(set(map(str, weight_map.values())))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing[:5])}; "
            "copy or download them again"
        )
    return files


def _damaged(path: Path, size: int, why: str) -> ModelError:
    return ModelError(f"{path} is damaged: it has {size} bytes, but {why}; copy or download it again")


def _looks_local(path: Path) -> bool:
    """Whether a missing path was meant as one: its folder exists and holds something of nearly this name."""
    parent = path.parent
    return parent != Path() and parent.is_dir() and bool(_nearest_directory(path))


def _nearest_directory(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        known = {entry.name: str(entry) for entry in parent.iterdir() if entry.is_dir()}
    except OSError:
        return ""
    hint = nearest(path.name, list(known))
    return hint.replace("mean ", f"mean {parent}/", 1) if hint and parent != Path() else hint


def _from_hub(name: str, what: str, patterns: tuple[str, ...], *, weights_wanted: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def download(allowed: tuple[str, ...]) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(allowed), ignore_patterns=["*/*", "consolidated*"]))

    try:
        found = download(patterns)
        if weights_wanted and not list(found.glob("*.safetensors")):
            found = download((*patterns, "*.bin"))
        return found
    except (HfHubHTTPError, OSError) as reason:
        elsewhere = f"a directory here{_nearest_directory(Path(name))}"
        raise ModelError(hub_problem(reason, f"{what} {name}", name, elsewhere=elsewhere)) from reason
