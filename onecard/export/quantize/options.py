"""The options of the quantising tools, as they are typed and as they are carried out. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onecard.config.data import ReadingOptions
from onecard.config.given_paths import paths_in
from onecard.config.problems import Problem, too_small
from onecard.export.io.output import ShardedOutputOptions

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # weights of a row that share a scale; -1: the whole row


@dataclass
class SourceOptions(ShardedOutputOptions):
    """The model to quantise, and where the result goes."""

    model_path: str = ""
    """Base or merged model: a directory or a Hub id; with --lora_path it may be left to the adapter to name it."""
    lora_path: str = ""
    """Adapter to merge first (a run, one of its checkpoints, a Hub id); several with commas, in this order."""
    accept_other_base: bool = False
    """Merge although the adapter was trained on another base."""
    output_path: str = ""
    """Directory to write."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""
    batch_size: int = 4
    """Samples that pass through the model at once; less takes less memory."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @property
    def adapters(self) -> list[str]:
        """In the order in which they are merged; none: the model is taken as it is."""
        return paths_in(self.lora_path)

    @property
    def inputs(self) -> list[Path]:
        """The directories that are read."""
        return [path for path in map(Path, (self.model_path, *self.adapters)) if path.exists()]

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if not self.model_path and not self.lora_path:
            found.append(("--model_path", "is needed: the model to quantise (or --lora_path, which names its base)"))
        if not self.output_path:
            found.append(("--output_path", "is needed: the directory to write"))
        if self.batch_size < 1:
            found.append(("--batch_size", f"{self.batch_size} does nothing; use 1 or more"))
        return found + super().problems()


@dataclass
class CalibrationTextOptions(ReadingOptions):
    """The text that weights are fitted to, and other text that the result is measured on."""

    calibration: Literal["text", "data"] = "text"
    """Fit to plain text, or to training data (data) as the model saw it, through its template."""
    calibration_path: str = ""
    """File, folder or Hub data set (txt, jsonl, parquet, ...). Without it, text: the corpus of sample/tiny-llama."""
    prompt_type: str = "auto"
    """For data: the template. auto takes the one stored with the adapter or the model."""
    calibration_samples: int = 256
    """Samples of full length to fit to; of shorter ones more are taken."""
    calibration_len: int = 512
    """Longest sample in tokens."""
    eval_path: str = ""
    """Text to measure on. Without it some of the calibration text is kept back and never fitted to."""
    eval_samples: int = 64
    """Held-out samples of full length to measure on; of shorter ones more are taken."""
    seed: int = 42
    """Which samples are drawn."""

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.calibration == "data" and not self.calibration_path:
            found.append(("--calibration_path", "is needed with --calibration data: the training data"))
        return found + too_small(self, calibration_samples=1, calibration_len=16, eval_samples=1)


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
class BnbOptions(ReadingOptions):
    """How weights are quantised, and what the result is measured on."""

    bits: Literal[4, 8] = 4
    """Bits per weight: 4 (NF4 with double quantisation) or 8 (LLM.int8)."""
    eval_path: str = ""
    """Text to measure on: a file, a folder or a Hub data set. Without it: the pages of docs, English and Chinese."""
    eval_samples: int = 64
    """Samples to measure on, at most."""
    eval_len: int = 512
    """Longest sample in tokens."""

    def problems(self) -> list[Problem]:
        return super().problems() + too_small(self, eval_samples=1, eval_len=16)
