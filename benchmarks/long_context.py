#!/usr/bin/env python
"""The loss of tokens by their position, far beyond the positions that a model was trained on: --rope_scaling compared.

    python benchmarks/long_context.py [--texts 60]

sample/tiny-llama was trained on texts of up to 88 tokens. A copy that names --length positions reads longer ones, made
of the documents of its corpus with another seed: without scaling, and with each kind of it, untrained. A fact that is
asked for is no measure here: this base finds one in 26 % of texts of 48 tokens, and in those of 96 by chance alone.
Writes benchmarks/results/long_context.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, say_table, write_result  # noqa: E402
from onecard.config.base_model import DEFAULT_BASE, ModelOptions  # noqa: E402
from onecard.config.parsing import comma_list, parse  # noqa: E402
from onecard.console import run_main  # noqa: E402


@dataclass
class LongContextOptions:
    """What is read, and how."""

    length: int = 96
    """Positions that the base is held to; texts are four times as long."""
    scalings: str = "none,dynamic:4,linear:4,yarn:2,yarn:4"
    """Values of --rope_scaling, with commas between them."""
    texts: int = 60
    """Texts that are read."""
    seed: int = 9
    """Of the texts; the corpus was made with others."""
    output: str = str(RESULTS / "long_context.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the result."""
    options = parse(LongContextOptions, argv, description=__doc__ or "")
    edges = [0, *(options.length * part // 2 for part in (1, 2, 4, 8))]
    windows = {f"{first}-{last}": slice(first, last) for first, last in pairwise(edges)}
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        base = held_to(options.length, Path(folder) / "base")
        rows = texts_of(options.texts, edges[-1], options.seed)
        found = {scaling: losses(base, scaling, rows) for scaling in comma_list(options.scalings)}
    by_window = {
        scaling: {name: round(fmean(each[window]), 4) for name, window in windows.items()}
        for scaling, each in found.items()
    }
    say_table(["loss, by position", *windows], [[name, *each.values()] for name, each in by_window.items()])
    told = {name: value for name, value in asdict(options).items() if name not in ("output", "debug")}
    write_result(options.output, {"options": told, "losses": by_window, "machine": machine("cpu")})


def held_to(n_positions: int, target: Path) -> Path:
    """A copy of the base whose config.json names so many positions."""
    shutil.copytree(DEFAULT_BASE, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"max_position_embeddings": n_positions}), encoding="utf-8")
    return target


def texts_of(n_texts: int, n_tokens: int, seed: int) -> list[list[int]]:
    """Ids of texts: documents of the corpus, one below the other; each row has one token more than is judged."""
    from onecard.model.load import load_tokenizer
    from tools.tiny_corpus.build import documents

    tokenizer, source = load_tokenizer(DEFAULT_BASE), documents(seed)
    rows: list[list[int]] = []
    while len(rows) < n_texts:
        row: list[int] = [tokenizer.bos_token_id]
        while len(row) <= n_tokens:
            text, answer = next(source)
            row += tokenizer(f"{text}\n{answer}\n", add_special_tokens=False)["input_ids"]
        rows.append(row[: n_tokens + 1])
    return rows


def losses(base: Path, scaling: str, rows: list[list[int]]) -> list[float]:
    """The mean loss of the token behind each position, in nats."""
    import torch

    from onecard.model.hardware import detect
    from onecard.model.load import load_base

    options = ModelOptions(str(base), bits=32, device="cpu", gradient_checkpointing=False, rope_scaling=scaling)
    model: Any = load_base(options, detect("cpu")).model.eval()
    total = torch.zeros(len(rows[0]) - 1)
    for row in rows:
        ids = torch.tensor([row])
        with torch.inference_mode():
            logits = model(ids[:, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return (total / len(rows)).tolist()


if __name__ == "__main__":
    sys.exit(run_main(main))
