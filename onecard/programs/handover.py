"""Write what vLLM, SGLang, llama.cpp, Ollama or Ray Serve needs to serve a run: model, template, stops, start command.

onecard handover vllm outputs/my-first-adapter outputs/for-vllm

Where one card is outgrown. HANDOVER.md in the new directory says how the engine is started, and the line of onecard
verify-server that compares it with the run afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onecard.config.parsing import missing, parse, words_by_name
from onecard.config.problems import Problem, too_small
from onecard.export.io.output import OutputOptions

WORDS = ("--engine", "--run", "--output_path")


@dataclass
class HandoverOptions(OutputOptions):
    """Which engine, which run, and where to."""

    engine: Literal["vllm", "sglang", "llama.cpp", "ollama", "ray-serve"] = "vllm"
    """What is to serve; the first word of the command."""
    run: str = ""
    """Directory of the run, the second word."""
    output_path: str = ""
    """A new directory, the third word."""
    model_path: str = "auto"
    """Base model: a directory or a Hub id; auto: the one that the run was trained on."""
    context: int = 0
    """Context in tokens; 0: the model's own, at most 8,192."""
    gguf_type: Literal["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "q8_0"
    """Kind of number of the GGUF file for llama.cpp and Ollama."""

    def problems(self) -> list[Problem]:
        found = missing(self, "run", "output_path")
        if self.run and not Path(self.run).expanduser().is_dir():
            found.append(("--run", f"{self.run} is not a directory"))
        return found + too_small(self, context=0)


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    options = parse(HandoverOptions, words_by_name(argv, *WORDS), description=__doc__ or "")

    from onecard.serve.handover import hand_over

    hand_over(
        options.engine, Path(options.run).expanduser(), Path(options.output_path).expanduser(),
        model_path=options.model_path, context=options.context, gguf_type=options.gguf_type,
        overwrite=options.overwrite,
    )  # fmt: skip
