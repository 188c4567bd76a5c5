#!/usr/bin/env python
"""What typing an answer live costs: tokens per second of `stream` over plain `model.generate`, in every mode.

    python benchmarks/streaming.py [--rounds 15]

One process, one model, one prompt; in each round plain and streamed answers take turns, and what counts is the ratio of
the two of one round, so a machine that slows down slows both. The text of every chunk is made, as a page needs it.
Writes benchmarks/results/streaming.json: every round, medians, the machine and the versions.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from onecard.config.base_model import DEFAULT_BASE, ModelOptions  # noqa: E402
from onecard.config.inference import SamplingOptions  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"temperature": 0.8, "top_p": 0.95},
    "beam (4)": {"num_beams": 4},
    "beam-sample (4)": {"num_beams": 4, "temperature": 0.8},
}


@dataclass
class BenchmarkOptions:
    """What is measured."""

    model_path: str = DEFAULT_BASE
    """Base model."""
    bits: int = 32
    """Bits per base weight."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    new_tokens: int = 256
    """Length of each answer, which no end token cuts short."""
    threads: int = 1
    """Threads of torch on a CPU. With two on a busy two-core machine the ratios scattered; see docs/benchmarks.md."""
    rounds: int = 15
    """Times that plain and streamed answers are compared; medians are reported."""
    output: str = str(ROOT / "benchmarks" / "results" / "streaming.json")
    """Where the result is written."""


def main() -> None:
    options = parse(BenchmarkOptions, description=__doc__)

    import torch

    from onecard.data.messages import Turn
    from onecard.inference.generate import answer_rows, prepare, stream
    from onecard.inference.load import load_bundle

    torch.set_num_threads(options.threads)
    model = ModelOptions(model_path=options.model_path, bits=options.bits, device=options.device)  # type: ignore[arg-type]
    bundle, _ = load_bundle(model, None, "auto")
    turns = [Turn("user", "Tell me all you know about the capital of France, 请用中文。")]
    modes: dict[str, Any] = {}
    for name, settings in MODES.items():
        sampling = SamplingOptions(
            max_new_tokens=options.new_tokens, min_new_tokens=options.new_tokens, no_repeat_ngram_size=4, **settings
        )
        row = prepare(bundle, turns, sampling)
        n_chunks = 0

        def plain(row: Any = row, sampling: SamplingOptions = sampling) -> int:
            return answer_rows(bundle, [row], sampling)[0].n_new_tokens

        def streamed(sampling: SamplingOptions = sampling) -> int:
            nonlocal n_chunks
            chunks = list(stream(bundle, turns, sampling))
            n_chunks = len(chunks)
            return chunks[-1].usage.n_new_tokens

        modes[name] = compare(plain, streamed, options.rounds) | {"chunks": n_chunks}
        say(f"{name}: streamed / plain {modes[name]['ratio']:.3f} in {n_chunks} chunks")
    result = {"model": Path(options.model_path).name, "new_tokens": options.new_tokens, "rounds": options.rounds,
              "modes": modes, "machine": machine()}  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(f"written to {options.output}")


def compare(plain: Callable[[], int], streamed: Callable[[], int], rounds: int) -> dict[str, Any]:
    """Tokens per second of both, round by round, and the median of the rounds' ratios."""
    speeds: list[tuple[float, float]] = []
    for k in range(rounds + 1):
        # Who goes first changes from round to round, so that neither always finds the warmer machine.
        pair = {way: speed(way) for way in ((plain, streamed) if k % 2 else (streamed, plain))}
        if k:
            speeds.append((pair[plain], pair[streamed]))
    return {
        "ratio": round(statistics.median(live / alone for alone, live in speeds), 4),
        "plain_tokens_per_s": round(statistics.median(alone for alone, _ in speeds), 1),
        "streamed_tokens_per_s": round(statistics.median(live for _, live in speeds), 1),
        "ratios": [round(live / alone, 4) for alone, live in speeds],
    }


def speed(answer: Callable[[], int]) -> float:
    """Tokens per second of one answer."""
    begun = time.perf_counter()
    n_tokens = answer()
    return n_tokens / (time.perf_counter() - begun)


def machine() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "transformers")},
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
