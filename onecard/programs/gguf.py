"""Write a model as GGUF for llama.cpp, with a Modelfile for Ollama: a plain one, or a base with adapters merged in.

onecard gguf --lora_path outputs/my-first-adapter --output_path outputs/my-gguf --gguf_type q8_0
onecard gguf --lora_path outputs/my-first-adapter --output_path outputs/my-lora --adapter_only

Families: LLaMA 1, 2 and 3, Mistral, Qwen2, Qwen3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onecard.config.given_paths import paths_in
from onecard.config.parsing import parse
from onecard.export.gguf.options import ExportOptions, OllamaOptions
from onecard.inference.run_files import stored_options


@dataclass
class Config:
    """Everything this tool needs; see the classes of its fields."""

    export: ExportOptions = field(default_factory=ExportOptions)
    ollama: OllamaOptions = field(default_factory=OllamaOptions)


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    config = parse(Config, argv, description=__doc__, stored=base_of_run)

    from onecard.export.gguf.adapter import export_adapter
    from onecard.export.gguf.export import export_gguf

    (export_adapter if config.export.adapter_only else export_gguf)(config.export, config.ollama)


def base_of_run(typed: Mapping[str, Any]) -> dict[str, Any]:
    """The base model that the run of the first adapter was trained on, where it says so."""
    adapters = paths_in(typed.get("lora_path"))
    stored = stored_options(adapters[0]) if adapters else {}
    return {name: value for name, value in stored.items() if name == "model_path"}
