#!/usr/bin/env python
"""What it takes to read the prompt of a preference pair once, beside reading it with each answer, on a CPU.

    python benchmarks/shared_prompt.py

For prompts and answers of some lengths: forward and backward of dpo on one pair (the reference is cached), both ways in
turn. CPU time (median), bytes of tensors above what lies still, largest difference of a gradient, and what
`train/shared_prompt.py` expects of the products, by which --share_prompt auto decides. Random weights, fp32, rank 8.
Writes benchmarks/results/shared_prompt.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, say_table, write_result  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main  # noqa: E402

# Tokens of the prompt, the chosen and the rejected answer.
CASES = [
    (512, 32, 32),
    (512, 128, 96),
    (256, 256, 256),
    (64, 256, 224),
    (1536, 64, 64),
    (1024, 512, 448),
    (185, 305, 269),
]


@dataclass
class BenchmarkOptions:
    """What is measured."""

    hidden_size: int = 512
    """Of a Llama of four layers."""
    rounds: int = 3
    """Steps of each kind, in turn."""
    cases: int = len(CASES)
    """The first so many of the lengths."""
    output: str = str(RESULTS / "shared_prompt.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(BenchmarkOptions, argv, description=__doc__ or "")

    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.plan_accuracy import toy_config
    from onecard.config.lora import LoraOptions
    from onecard.model.lora.adapter import add_lora
    from onecard.model.memory.architecture import architecture_of
    from onecard.train.shared_prompt import relative_work

    torch.manual_seed(0)
    size = options.hidden_size
    sizes = toy_config("llama", hidden_size=size, intermediate_size=3 * size, num_hidden_layers=4,
                       num_attention_heads=8, max_position_embeddings=4096)  # fmt: skip
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes)).requires_grad_(False)
    model = add_lora(base, LoraOptions(lora_r=8)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.02))
    rows = []
    for prompt, chosen, rejected in CASES[: options.cases]:
        apart = pair_of(prompt, chosen, rejected, int(sizes["vocab_size"]))
        shared = replace(apart, n_shared=prompt - 1)
        lengths = np.array([[prompt + chosen, prompt + rejected]])
        rows.append({
            "prompt": prompt, "chosen": chosen, "rejected": rejected,
            "expected": round(relative_work(lengths, np.array([prompt - 1]), architecture_of(sizes)), 3),
            **measured(model, apart, shared, options.rounds),
        })  # fmt: skip
    write_result(options.output, {"rows": rows, "hidden_size": size, "threads": torch.get_num_threads(),
                                  "machine": machine("cpu")})  # fmt: skip
    say_table(["prompt", "answers", "tokens", "work expected", "CPU time", "memory", "gradients differ by"],
              [(row["prompt"], f"{row['chosen']}, {row['rejected']}", row["tokens"], row["expected"], row["cpu"],
                row["memory"], f"{row['gradient_difference']:.1e}") for row in rows])  # fmt: skip


def pair_of(prompt: int, chosen: int, rejected: int, vocab: int) -> Any:
    """A pair of random ids."""
    import torch

    from onecard.data.encode import IGNORE_INDEX, LabelledSample
    from onecard.objectives.preference import AnswerPair

    asked = torch.randint(3, vocab, (prompt,)).tolist()
    sides = []
    for n in (chosen, rejected):
        answer = torch.randint(3, vocab, (n,)).tolist()
        sides.append(LabelledSample([*asked, *answer], [IGNORE_INDEX] * prompt + answer, "a pair", 0))
    better, worse = sides
    return AnswerPair(better, worse, reference=torch.tensor([-3.0 * chosen, -3.0 * rejected]).numpy())


def measured(model: Any, apart: Any, shared: Any, rounds: int) -> dict[str, Any]:
    """Both ways: those of one row as shares of those of two."""
    import torch

    from onecard.objectives.registry import objective_named
    from tests.live_memory import peak_bytes

    dpo, trained = objective_named("dpo"), [each for each in model.parameters() if each.requires_grad]

    def step(pair: Any) -> list[torch.Tensor]:
        return list(torch.autograd.grad(dpo.loss_of(model, [pair], "cpu", chunk_tokens=1024)[0], trained))

    differences = [float((one - other).abs().max()) for one, other in zip(step(apart), step(shared), strict=True)]
    seconds: dict[str, list[float]] = {"apart": [], "shared": []}
    for _ in range(rounds):
        for name, pair in (("apart", apart), ("shared", shared)):
            began = time.process_time()
            step(pair)
            seconds[name].append(time.process_time() - began)
    taken = {name: statistics.median(each) for name, each in seconds.items()}
    held = {name: peak_bytes(lambda pair=pair: step(pair)) for name, pair in (("apart", apart), ("shared", shared))}
    return {
        "tokens": round(dpo.length(shared) / dpo.length(apart), 3),
        "cpu": round(taken["shared"] / taken["apart"], 3), "cpu_s": {name: round(s, 4) for name, s in taken.items()},
        "memory": round(held["shared"] / held["apart"], 3), "bytes": held,
        "gradient_difference": max(differences),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
