"""Convert a LLaMA between Meta's original files and a Hugging Face directory: bit for bit.

onecard convert-llama hf --model_path llama-2-7b --output_path llama-2-7b-hf
onecard convert-llama pth --model_path llama-2-7b-hf --output_path llama-2-7b
onecard convert-llama reshard --model_path llama-2-70b --n_shards 1 --output_path llama-2-70b-in-one
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onecard.config.parsing import missing, parse_verb
from onecard.config.problems import Problem, too_small
from onecard.console import say
from onecard.export.io.output import OutputOptions, ShardedOutputOptions, new_directory


@dataclass
class HfOptions(ShardedOutputOptions):
    """Original .pth files to a Hugging Face directory. Memory: one output shard."""

    model_path: str = ""
    """Directory with consolidated.00.pth (all shards) and params.json."""
    max_positions: int = 0
    """Longest text in tokens, which params.json does not say. 0: what its generation has (2048, 4096, 8192, ...)."""
    instruct: bool = False
    """LLaMA-3 Instruct: the end of a turn also ends an answer."""

    def problems(self) -> list[Problem]:
        return missing(self, "model_path", "output_path") + too_small(self, max_positions=0) + super().problems()


@dataclass
class PthOptions(OutputOptions):
    """A Hugging Face LLaMA to original .pth files. Memory: one .pth shard."""

    model_path: str = ""
    """A model directory or a Hub id."""
    n_shards: int = 0
    """Number of .pth files (one per GPU that runs them). 0: what Meta ships: 1, and 2, 4, 8 for 13B, 30B, 65B."""

    def problems(self) -> list[Problem]:
        return missing(self, "model_path", "output_path") + too_small(self, n_shards=0)


@dataclass
class ReshardOptions(OutputOptions):
    """Original .pth files to another number of .pth files. Memory: one .pth shard."""

    model_path: str = ""
    """Directory with consolidated.00.pth (all shards) and params.json."""
    n_shards: int = 0
    """Number of .pth files to write."""

    def problems(self) -> list[Problem]:
        found = missing(self, "model_path", "output_path")
        if self.n_shards < 1:
            found.append(("--n_shards", "say how many .pth files to write: 1 or more"))
        return found


VERBS = {"hf": HfOptions, "pth": PthOptions, "reshard": ReshardOptions}


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    verb, options = parse_verb(VERBS, argv, description=__doc__ or "")

    from onecard.export.io.weights import open_weights
    from onecard.export.llama_pth.pth import (
        HfConfigChoices,
        directory_of,
        hf_to_pth,
        open_checkpoint,
        pth_to_hf,
        reshard,
    )
    from onecard.model.files import locate

    source = locate(options.model_path, what="model") if verb == "pth" else directory_of(options.model_path)
    needed_bytes = (open_weights if verb == "pth" else open_checkpoint)(source).total_bytes
    target = Path(options.output_path)
    with new_directory(target, overwrite=options.overwrite, inputs=[source], needed_bytes=needed_bytes) as partial:
        if verb == "hf":
            choices = HfConfigChoices(options.max_positions, options.instruct)
            lines = pth_to_hf(source, partial, options.max_shard_bytes, choices)
        elif verb == "pth":
            lines = hf_to_pth(source, partial, n_shards=options.n_shards or None)
        else:
            lines = reshard(source, partial, options.n_shards)
    say("\n".join([f"{source} -> {target}", *lines]))
