"""What can be made of a run, and with which words of the kit's own programs. Knows options; starts nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from onecard.installation import install_command
from onecard.serve.http_error import ApiError, bad_request
from onecard.studio.sources import ModelSource

RUNS = ("adapter", "tuned")  # kinds of sources that know how they were trained


@dataclass(frozen=True)
class ExportKind:
    """One way to hand a result on.

    words: those of the program, with {folder} of the source, {weights} (lora or model), {target} and the options in
    their places. options: of each the values it may have, the first is what is taken. writes: whether there is a
    target. takes: the kinds of sources that go in. needs_card: whether the model is computed with, and a card used
    where there is one. package: what must be installed, by which extra. module: what reads the words, where that is
    not `onecard`.
    """

    words: str
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    writes: bool = True
    takes: tuple[str, ...] = ("adapter", "tuned", "model")
    needs_card: bool = False
    package: str = ""
    extra: str = ""
    module: str = "onecard"

    def command(self, source: ModelSource, folder: Path, target: Path, options: Mapping[str, str]) -> list[str]:
        """The words for a source that lies in `folder`; a path stays one word, whatever is in it."""
        weights = "lora" if source.kind == "adapter" else "model"
        places = {"folder": folder, "weights": weights, "target": target, **options}
        return [word.format(**places) for word in self.words.split()]

    @property
    def missing(self) -> str:
        """How to install what this needs and is not there; empty where nothing is missing."""
        is_there = not self.package or importlib.util.find_spec(self.package) is not None
        return "" if is_there else f"this needs {self.package}: {install_command(self.extra)}"


# The values of each option are those of the program; tests/studio/test_export_api.py compares them.
KINDS: Mapping[str, ExportKind] = {
    "merge": ExportKind(
        "merge --lora_path {folder} --output_path {target} --dtype {dtype} --format {format}",
        {"dtype": ("auto", "fp16", "bf16", "fp32"), "format": ("hf", "pth")}, takes=("adapter",),
    ),
    "gguf": ExportKind(
        "gguf --{weights}_path {folder} --output_path {target} --gguf_type {gguf_type}",
        {"gguf_type": ("f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4", "bf16", "f32")},
    ),
    "gguf-adapter": ExportKind(
        "gguf --{weights}_path {folder} --output_path {target} --gguf_type {gguf_type} --adapter_only true",
        {"gguf_type": ("f16", "bf16", "f32")}, takes=("adapter",),
    ),
    "quantize-gptq": ExportKind(
        "quantize-gptq --{weights}_path {folder} --output_path {target} --bits {bits}",
        {"bits": ("4", "8", "3", "2")}, needs_card=True, package="gptqmodel", extra="gptq",
    ),
    "quantize-bnb": ExportKind(
        "quantize-bnb --{weights}_path {folder} --output_path {target} --bits {bits}", {"bits": ("4", "8")},
        needs_card=True,
    ),
    "adapter": ExportKind("{folder} {target}", takes=("adapter",), module="onecard.studio.adapter_copy"),
    "handover": ExportKind(
        "handover {engine} {folder} {target}", {"engine": ("vllm", "sglang", "llama.cpp", "ollama", "ray-serve")},
        takes=RUNS,
    ),
    "verify-server": ExportKind("verify-server {url} --run {folder}", writes=False, takes=RUNS),
}  # fmt: skip


def checked_options(kind: ExportKind, given: Any) -> dict[str, str]:
    """The options with what was not given filled in. Raises ApiError for unknown ones and values."""
    if not isinstance(given, dict):
        raise bad_request("options is an object", "options")
    for name, value in given.items():
        if name not in kind.options:
            raise bad_request(f"there is no option {str(name)[:50]!r} here", "options")
        if value not in kind.options[name]:
            raise bad_request(f"{name} is one of {', '.join(kind.options[name])}", f"options.{name}")
    return {name: values[0] for name, values in kind.options.items()} | given


def server_address(text: Any) -> str:
    """The address of a server to compare with. Raises ApiError for what is none."""
    try:
        parts = urlsplit(text if isinstance(text, str) else "")
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username
    except ValueError:
        is_address = False
    if not is_address or len(text) > 500:
        raise ApiError(400, "give the address of a server, such as http://127.0.0.1:8000/v1", param="url")
    return str(text)
