"""Merge adapters into their base: a plain model that every program loads, in 16 bits, one shard in memory at a time.

onecard merge --lora_path outputs/my-first-adapter --output_path outputs/my-first-model
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onecard.config.parsing import comma_list, parse
from onecard.config.problems import Problem
from onecard.console import say, warn
from onecard.export.io.output import ShardedOutputOptions


@dataclass
class MergeOptions(ShardedOutputOptions):
    """What is merged, and how it is written."""

    model_path: str = "auto"
    """Base model: a directory or a Hub id. auto takes the one that the first adapter names."""
    lora_path: str = ""
    """Adapters, in the order in which they are merged, with commas between: runs, checkpoints or Hub ids."""
    adapter_scale: float = 1.0
    """How strongly the adapters are put on; 1 is what was trained. For LoRA, LoHa and LoKr."""
    output_path: str = ""
    """Directory of the result."""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Type of the written weights. auto: fp16 where weights and activations fit, else bf16, which is coarser."""
    format: Literal["hf", "pth"] = "hf"
    """hf: a directory with files up to --max_shard_size. pth: consolidated.0x.pth and params.json, as LLaMA came."""
    accept_other_base: bool = False
    """Merge although the adapter was trained on a base with other files."""
    verify: bool = True
    """Reopen the result, compare it and measure how much of the adapters' effect on predictions is kept."""
    trust_remote_code: bool = False
    """Run Python code that the base model brings along."""

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if not comma_list(self.lora_path):
            found.append(("--lora_path", "names no adapter; give a run, a checkpoint or a Hub id"))
        if not self.output_path:
            found.append(("--output_path", "is missing; give the directory of the result"))
        if not 0 < self.adapter_scale <= 10:
            found.append(
                ("--adapter_scale", f"{self.adapter_scale} is not above 0, which would be the base, and up to 10")
            )
        return found + super().problems()


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    options = parse(MergeOptions, argv, description=__doc__ or "")

    merge(options)


def merge(options: MergeOptions) -> None:
    """Write what the options ask for."""
    from onecard.export.merge.merge import MergeSettings, export_merged, find_base

    settings = MergeSettings(
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_bytes,
        accept_other_base=options.accept_other_base,
        verify=options.verify,
        trust_remote_code=options.trust_remote_code,
        adapter_scale=options.adapter_scale,
    )
    adapters = comma_list(options.lora_path)
    report = export_merged(
        Path(options.output_path),
        find_base(options.model_path, adapters[0]),
        adapters,
        settings,
        file_format=options.format,
        overwrite=options.overwrite,
    )
    for note in report.notes:
        warn(note)
    say(f"{options.output_path}: {report.n_tensors} tensors in {report.dtype}, {report.total_bytes / 2**30:.2f} GiB")
    say(report.proof or "not verified (--verify false)")
    if report.files_proof:
        say(f"consolidated.0x.pth: {report.files_proof}")
