"""Merge adapters into their base: a plain model that every program loads, in 16 bits, one shard in memory at a time.

onecard merge --lora_path outputs/my-first-adapter --output_path outputs/my-first-model
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from onecard.config.given_paths import paths_in
from onecard.config.parsing import parse
from onecard.config.problems import Problem
from onecard.console import say, warn
from onecard.export.io.output import OutputOptions
from onecard.export.merge.options import MergeSettings


@dataclass
class MergeOptions(OutputOptions):
    """What is merged, and in which form it is written."""

    model_path: str = "auto"
    """Base model: a directory or a Hub id. auto takes the one that the first adapter names."""
    lora_path: str = ""
    """Adapters, in the order in which they are merged, with commas between: runs, checkpoints or Hub ids."""
    format: Literal["hf", "pth"] = "hf"
    """hf: a directory with files up to --max_shard_size. pth: consolidated.0x.pth and params.json, as LLaMA came."""

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if not paths_in(self.lora_path):
            found.append(("--lora_path", "names no adapter; give a run, a checkpoint or a Hub id"))
        if not self.output_path:
            found.append(("--output_path", "is missing; give the directory of the result"))
        return found


@dataclass
class MergeConfig:
    """Everything this tool needs; see the classes of its fields."""

    merge: MergeOptions = field(default_factory=MergeOptions)
    how: MergeSettings = field(default_factory=MergeSettings)


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    config = parse(MergeConfig, argv, description=__doc__ or "")

    from onecard.export.merge.merge import export_merged, find_base

    options, adapters = config.merge, paths_in(config.merge.lora_path)
    report = export_merged(
        options.target, find_base(options.model_path, adapters[0]), adapters, config.how,
        file_format=options.format, overwrite=options.overwrite,
    )  # fmt: skip
    for note in report.notes:
        warn(note)
    say(f"{options.output_path}: {report.n_tensors} tensors in {report.dtype}, {report.total_bytes / 2**30:.2f} GiB")
    say(report.proof or "not verified (--verify false)")
    if report.files_proof:
        say(f"consolidated.0x.pth: {report.files_proof}")
