#!/usr/bin/env python
"""How many greedy answers are the same in a batch as alone, by the bits of the weights, and where the others part.

    python benchmarks/batched_answers.py --bits 32,16,8,4

The questions come from the sample data; all are asked at once of an engine with a batch, and one after another of one
without. In 32 bits all are the same; in fewer the sums of a batch are rounded otherwise than those of a row, and of two
tokens that are about as likely the other one may win. Writes benchmarks/results/batched_answers.json.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, say_table, write_result  # noqa: E402
from onecard.config.base_model import DEFAULT_BASE, ModelOptions  # noqa: E402
from onecard.config.inference import InferenceOptions, LimitOptions, ParallelOptions, SamplingOptions  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main  # noqa: E402


@dataclass
class AnswerOptions:
    """What is compared."""

    model_path: str = DEFAULT_BASE
    """A directory."""
    bits: str = "32,16,8,4"
    """Bits per base weight, one row each."""
    questions: int = 48
    """How many are asked."""
    max_parallel: int = 16
    """Answers at once."""
    new_tokens: int = 24
    """The longest answer."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    output: str = str(RESULTS / "batched_answers.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(AnswerOptions, argv, description=__doc__ or "")
    rows = []
    for bits in options.bits.split(","):
        before = os.times()
        rows.append({"bits": int(bits), **compared(options, int(bits))})
        after = os.times()
        rows[-1]["cpu_seconds"] = round(after.user + after.system - before.user - before.system, 1)
    given = asdict(options) | {name: Path(getattr(options, name)).name for name in ("output", "model_path")}
    write_result(options.output, {"options": given, "rows": rows, "machine": machine(options.device)})
    columns = ("bits", "dtype", "answers", "same", "share", "first_difference", "cpu_seconds")
    say_table(columns, [[row[name] for name in columns] for row in rows])


def compared(options: AnswerOptions, bits: int) -> dict[str, Any]:
    """How many answers are the same, and of the others the tokens that they share at their beginning."""
    from onecard.inference.engine import GenerationRequest, InferenceEngine, open_engine

    engines = {}
    for n in (1, options.max_parallel):
        given: Any = bits
        model = ModelOptions(options.model_path, bits=given, device=options.device, gradient_checkpointing=False)
        engines[n] = open_engine(model, InferenceOptions(), LimitOptions(), parallel=ParallelOptions(n))
    sampling = SamplingOptions(max_new_tokens=options.new_tokens, temperature=0.0)
    requests = [GenerationRequest(turns=turns, sampling=sampling) for turns in questions(options.questions)]

    def answer(engine: InferenceEngine, request: GenerationRequest) -> Any:
        return list(engine.stream(request))[-1][0]

    with ThreadPoolExecutor(options.max_parallel) as clients:
        together = list(clients.map(lambda one: answer(engines[options.max_parallel], one), requests))
    alone = [answer(engines[1], one) for one in requests]
    assert {chunk.path for chunk in together} == {"batched"}
    tokenizer = engines[1].tokenizer()
    parted = [
        shared(*(tokenizer(chunk.text, add_special_tokens=False)["input_ids"] for chunk in pair))
        for pair in zip(together, alone, strict=True)
        if pair[0].text != pair[1].text
    ]
    dtype = str(engines[1]._adapters.model.dtype).removeprefix("torch.")
    for engine in engines.values():
        engine.close()
    n_same = len(requests) - len(parted)
    return {"dtype": dtype, "answers": len(requests), "same": n_same, "share": round(n_same / len(requests), 3),
            "first_difference": min(parted, default=None), "differences": sorted(parted)}  # fmt: skip


def questions(n: int) -> list[Any]:
    """So many of the sample data, as turns."""
    from onecard.data.messages import Turn

    records = json.loads((ROOT / "sample" / "merge_sample.json").read_text(encoding="utf-8"))
    step = max(len(records) // n, 1)
    texts = [f"{one['instruction']} {one.get('input') or ''}".strip() for one in records[::step][:n]]
    return [(Turn("user", text),) for text in texts]


def shared(one: list[int], other: list[int]) -> int:
    """Tokens that are the same at the beginning of both."""
    return next(
        (k for k, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
