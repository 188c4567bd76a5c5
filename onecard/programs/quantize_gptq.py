"""Quantise a model to 2, 3, 4 or 8 bits by GPTQ: in AutoGPTQ's format, with what that costs measured.

onecard quantize-gptq --lora_path outputs/my-first-adapter --output_path outputs/my-model-gptq

Needs gptqmodel and optimum (requirements-gptq.txt, the extra gptq). To ask and chat, give the result as --model_path.
Killed half-way, the same command goes on behind the last finished layer (Llama and Qwen3-MoE models, not on
Windows; others start anew).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from onecard.config.parsing import parse
from onecard.export.quantize.options import CalibrationTextOptions, GptqOptions, SourceOptions


@dataclass
class GptqConfig:
    """Everything this tool needs; see the classes of its fields."""

    source: SourceOptions = field(default_factory=SourceOptions)
    gptq: GptqOptions = field(default_factory=GptqOptions)
    text: CalibrationTextOptions = field(default_factory=CalibrationTextOptions)


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    config = parse(GptqConfig, argv, description=__doc__)

    from onecard.export.quantize.run import export_gptq, with_base

    export_gptq(with_base(config.source), config.gptq, config.text)
