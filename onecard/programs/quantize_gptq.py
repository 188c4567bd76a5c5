"""Quantise a model to 2, 3, 4 or 8 bits by GPTQ: in AutoGPTQ's format, with what that costs measured.

onecard quantize-gptq --lora_path outputs/my-first-adapter --output_path outputs/my-model-gptq

Needs gptqmodel and optimum (requirements-gptq.txt, the extra gptq). To ask and chat, give the result as --model_path.
Killed half-way, the same command goes on behind the last finished layer (Llama and Qwen3-MoE models, not on
Windows; others start anew).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from onecard.config.parsing import parse
from onecard.config.problems import Problem
from onecard.export.quantize.options import GROUP_SIZES, CalibrationTextOptions, SourceOptions


@dataclass
class GptqOptions:
    """How weights are quantised."""

    bits: Literal[2, 3, 4, 8] = 4
    """Bits per weight."""
    group_size: int = 128
    """Weights of a row that share a scale: 16, 32, 64, 128, 256, 512 or 1024; -1: the whole row."""
    desc_act: bool = False
    """Act-order: quantise the columns with the largest inputs first. Often a little better; slower in some loaders."""
    sym: bool = True
    """Symmetric scales, which every loader reads. false may fit better, and some loaders misread it."""
    damp_percent: float = 0.05
    """Damping of the Hessian as a share of its mean diagonal; raise it where a layer cannot be solved."""

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if self.group_size not in GROUP_SIZES:
            listed = ", ".join(map(str, GROUP_SIZES))
            found.append(("--group_size", f"{self.group_size} is not packed by anyone; use one of {listed}"))
        if not 0 < self.damp_percent < 1:
            found.append(("--damp_percent", f"{self.damp_percent} is no share between 0 and 1; 0.05 is usual"))
        return found


@dataclass
class GptqConfig:
    """Everything this tool needs; see the classes of its fields."""

    source: SourceOptions = field(default_factory=SourceOptions)
    gptq: GptqOptions = field(default_factory=GptqOptions)
    text: CalibrationTextOptions = field(default_factory=CalibrationTextOptions)


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    config = parse(GptqConfig, argv, description=__doc__)

    quantize(config)


def quantize(config: GptqConfig) -> None:
    """Write what the options ask for."""
    from onecard.export.quantize.calibration import CalibrationOptions, tiny_corpus
    from onecard.export.quantize.gptq import GptqSettings
    from onecard.export.quantize.run import export_gptq, request_of, text_source_of
    from onecard.model.hardware import detect

    options, text = config.gptq, config.text
    settings = GptqSettings(
        options.bits, options.group_size, options.desc_act, options.sym, options.damp_percent,
        config.source.batch_size, str(detect(config.source.device).device),
    )  # fmt: skip
    amount = CalibrationOptions(text.calibration_samples, text.calibration_len, text.eval_samples, text.seed)
    corpus = text_source_of(text, lambda: tiny_corpus(text.seed))
    export_gptq(request_of(config.source), settings, corpus, amount)
