#!/usr/bin/env python
"""What a token of an answer costs on a CPU, in 32, 16, 8 and 4 bits per weight: seconds of processor time.

    python benchmarks/answering_on_cpu.py [--rounds 5]

A Llama of SmolLM-135M's shape with random weights, made in the process: speed does not depend on the values. In each
round every number of bits answers once, so a machine that slows down slows all. Processor time, because other programs
on the machine change only the time on the clock. Writes benchmarks/results/answering_on_cpu.json.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, say_table, write_result  # noqa: E402
from onecard.config.base_model import ModelOptions  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main  # noqa: E402

SHAPE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
BITS = (32, 16, 8, 4)


@dataclass
class BenchmarkOptions:
    """What is measured."""

    layers: int = 30
    """Decoder layers of the model; 30 make 135 million weights."""
    prompt_tokens: int = 64
    """Length of the question."""
    new_tokens: int = 32
    """Length of each answer, which no end token cuts short."""
    threads: int = 1
    """Threads of torch."""
    rounds: int = 5
    """Answers in each number of bits; medians are reported."""
    output: str = str(RESULTS / "answering_on_cpu.json")
    """Where the result is written."""


def main(argv: list[str] | None = None) -> None:
    options = parse(BenchmarkOptions, argv, description=__doc__)

    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    measured = measure(options)
    rows = [[bits, one["seconds_per_token"], one["weight_mib"]] for bits, one in measured.items()]
    say_table(["bits", "processor seconds per token", "MiB of weights"], rows)
    result = {
        "model": {**SHAPE, "num_hidden_layers": options.layers}, "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens, "rounds": options.rounds, "bits": measured, "machine": machine("cpu"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    write_result(options.output, result)
    torch.set_num_threads(threads)


def measure(options: BenchmarkOptions) -> dict[int, dict[str, Any]]:
    """Seconds of processor time per new token, the question aside, and what the weights take, by number of bits."""
    from benchmarks.random_models import random_base
    from onecard.model.hardware import detect
    from onecard.model.quantization import keep_one_arithmetic_on_cpu

    shape = {**SHAPE, "num_hidden_layers": options.layers}
    found: dict[int, dict[str, Any]] = {bits: {"rounds": []} for bits in BITS}
    for number in range(options.rounds + 1):
        for bits in BITS:
            model_options = ModelOptions(bits=bits, device="cpu", gradient_checkpointing=False)  # type: ignore[arg-type]
            model: Any = random_base(shape, model_options, detect("cpu")).model
            if bits < 16:
                keep_one_arithmetic_on_cpu(model)  # as `load_base` does
            seconds = seconds_per_token(model, options)
            if number:  # the first round warms up
                found[bits]["rounds"].append(round(seconds, 5))
            found[bits]["weight_mib"] = round(model.get_memory_footprint() / 2**20, 1)
            del model
            gc.collect()
    for one in found.values():
        one["seconds_per_token"] = round(statistics.median(one["rounds"]), 5)
    return found


def seconds_per_token(model: Any, options: BenchmarkOptions) -> float:
    """The difference of two answers, of one token and of all, so that reading the question is not in it."""
    import torch

    ids = torch.arange(options.prompt_tokens).unsqueeze(0) + 3

    def answer(n: int) -> float:
        begun = time.process_time()
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                           do_sample=False, pad_token_id=0)  # fmt: skip
        return time.process_time() - begun

    answer(1)
    return (answer(options.new_tokens) - answer(1)) / (options.new_tokens - 1)


if __name__ == "__main__":
    sys.exit(run_main(main))
