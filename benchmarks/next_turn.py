#!/usr/bin/env python
"""Time to the first token of a conversation's later turns, with and without the keys and values of the turns before.

    python benchmarks/next_turn.py [--turns 13 --rounds 5]

One process, one model of random weights; both ways take turns in each round, and what counts is the ratio of one round.
On a CPU the time is that of the process, in CPU seconds. Writes benchmarks/results/next_turn.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.streaming import machine  # noqa: E402
from onecard.config.base_model import DEFAULT_BASE, ModelOptions  # noqa: E402
from onecard.config.inference import InferenceOptions, LimitOptions, SamplingOptions  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402

QUESTION = "Tell me about the capital of a country, its rivers, its trains and what people eat there. "


@dataclass
class BenchmarkOptions:
    """What is measured."""

    hidden_size: int = 512
    """Width of the model."""
    layers: int = 8
    """Its layers."""
    turns: int = 13
    """Turns of the conversation."""
    new_tokens: int = 48
    """Length of each answer, which no end token cuts short."""
    rounds: int = 5
    """Times that both ways hold the conversation; medians are reported."""
    output: str = str(ROOT / "benchmarks" / "results" / "next_turn.json")
    """Where the result is written."""


def main() -> None:
    options = parse(BenchmarkOptions, description=__doc__)

    from onecard.inference.adapters import open_adapters
    from onecard.inference.engine import InferenceEngine

    with tempfile.TemporaryDirectory() as folder:
        save_model(options, Path(folder))
        model = ModelOptions(model_path=folder, bits=32, device="cpu")
        adapters = open_adapters(model, InferenceOptions(prompt_type="vicuna-chat"), None, "random")
    seconds: dict[str, list[list[float]]] = {"kept": [], "read anew": []}
    for _ in range(options.rounds):
        for name, gib in (("kept", 2.0), ("read anew", 0.0)):
            seconds[name].append(conversation(InferenceEngine(adapters, LimitOptions(prefix_cache_gib=gib)), options))
    medians = {
        name: [statistics.median(turn) for turn in zip(*rounds, strict=True)] for name, rounds in seconds.items()
    }
    ratios = [anew[-1] / kept[-1] for kept, anew in zip(seconds["kept"], seconds["read anew"], strict=True)]
    for name, values in medians.items():
        say(f"{name}: first token after {values[0]:.2f} CPU s at turn 1, {values[-1]:.2f} at turn {options.turns}")
    say(f"read anew / kept at turn {options.turns}: {statistics.median(ratios):.1f}")
    result = {
        "model": f"{options.layers} layers of {options.hidden_size}, fp32, random",
        "turns": options.turns, "rounds": options.rounds, "new_tokens": options.new_tokens,
        "first_token_cpu_seconds": {name: [round(value, 3) for value in values] for name, values in medians.items()},
        "ratios_of_the_last_turn": [round(ratio, 2) for ratio in ratios],
        "machine": machine(),
    }  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(f"written to {options.output}")


def save_model(options: BenchmarkOptions, folder: Path) -> None:
    """A Llama of random weights with the tokenizer of the sample model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_BASE)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden_size, intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def conversation(engine: Any, options: BenchmarkOptions) -> list[float]:
    """CPU seconds to the first token of each turn."""
    from onecard.data.messages import Turn
    from onecard.inference.engine import GenerationRequest

    length = options.new_tokens
    first = SamplingOptions(max_new_tokens=1, min_new_tokens=1)
    rest = SamplingOptions(max_new_tokens=length, min_new_tokens=length, no_repeat_ngram_size=3)
    turns: tuple[Turn, ...] = ()
    found = []
    for _ in range(options.turns):
        turns = (*turns, Turn("user", QUESTION))
        begun = time.process_time()
        list(engine.stream(GenerationRequest(turns, sampling=first)))
        found.append(time.process_time() - begun)
        text = list(engine.stream(GenerationRequest(turns, sampling=rest)))[-1][0].text
        turns = (*turns, Turn("assistant", text))
    return found


if __name__ == "__main__":
    sys.exit(run_main(main))
