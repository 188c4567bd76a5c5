"""Publish a tuned model as its difference to a base, and get it back: exactly, or the classic float way.

onecard weight-diff make --base_path llama-2-7b-hf --tuned_path my-model --output_path my-model-diff
onecard weight-diff recover --base_path llama-2-7b-hf --diff_path my-model-diff --output_path my-model
onecard weight-diff verify --base_path llama-2-7b-hf --diff_path my-model-diff
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onecard.config.parsing import missing, parse_verb
from onecard.config.problems import Problem
from onecard.console import say
from onecard.export.io.output import ShardedOutputOptions, new_directory


@dataclass
class MakeDiffOptions(ShardedOutputOptions):
    """Write tuned - base. Memory: one output shard and three tensors."""

    base_path: str = ""
    """The base: a model directory or a Hub id."""
    tuned_path: str = ""
    """The tuned model (merged, not an adapter): a model directory or a Hub id."""
    mode: Literal["exact", "float"] = "exact"
    """exact: comes back bit for bit. float: tuned - base, which other programs read too; rounds."""

    def problems(self) -> list[Problem]:
        return missing(self, "base_path", "tuned_path", "output_path") + super().problems()


@dataclass
class DiffOptions:
    """A difference, and what it is one to."""

    base_path: str = ""
    """The base: a model directory or a Hub id."""
    diff_path: str = ""
    """The difference, of this tool or a classic float one: a directory or a Hub id."""
    new_rows: Literal["zeros", "mean"] = "zeros"
    """What a classic difference takes for the base's rows of added tokens: zeros (Vicuna), mean (Alpaca, WizardLM)."""

    def problems(self) -> list[Problem]:
        return missing(self, "base_path", "diff_path")


@dataclass
class RecoverOptions(ShardedOutputOptions, DiffOptions):
    """Write base + difference. Memory: one output shard and three tensors."""

    def problems(self) -> list[Problem]:
        return DiffOptions.problems(self) + missing(self, "output_path") + super().problems()


@dataclass
class VerifyDiffOptions(DiffOptions):
    """Recover in memory only, and compare. Writes nothing."""

    tuned_path: str = ""
    """The tuned model, to be compared too: a model directory or a Hub id."""


VERBS = {"make": MakeDiffOptions, "recover": RecoverOptions, "verify": VerifyDiffOptions}


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    verb, options = parse_verb(VERBS, argv, description=__doc__ or "")

    from onecard.export.io.weights import open_weights
    from onecard.export.weight_diff import diff as weight_diff
    from onecard.model.files import locate

    base = locate(options.base_path)
    if verb == "verify":
        diff = locate(options.diff_path, what="difference")
        tuned = locate(options.tuned_path, what="tuned model") if options.tuned_path else None
        say("\n".join(weight_diff.verify(base, diff, tuned, options.new_rows)))
        return
    name, what = (options.tuned_path, "tuned model") if verb == "make" else (options.diff_path, "difference")
    other, target = locate(name, what=what), Path(options.output_path)
    needed_bytes = open_weights(other).total_bytes
    with new_directory(target, overwrite=options.overwrite, inputs=[base, other], needed_bytes=needed_bytes) as partial:
        if verb == "make":
            lines = weight_diff.make(
                base, other, partial, options.mode, options.max_shard_bytes, base_name(options.base_path)
            )
        else:
            lines = weight_diff.recover(base, other, partial, options.max_shard_bytes, options.new_rows)
    say("\n".join([f"{base} and {other} -> {target}", *lines]))


def base_name(base_path: str) -> str:
    """The name that a stranger can look for: a Hub id, or the directory's own name without the way to it."""
    path = Path(base_path)
    return path.resolve().name if path.is_dir() else base_path
