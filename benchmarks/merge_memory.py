#!/usr/bin/env python3
"""Measure the RAM and time that merging takes, on a sharded base much larger than the bar, beside peft's usual way.

    python benchmarks/merge_memory.py [--total_gb 3] [--shard_mb 400] [--way both] [--rounds 3]

Each way runs in a process of its own on the same base of random weights (made here, shard by shard) and LoRA adapter,
the two in turns; medians of time are compared, in seconds of processor because those depend little on other work:
  tools/merge_lora.py   with its verification, shards of the base's size
  peft, whole model     from_pretrained, PeftModel, merge_and_unload, save_pretrained
Peak RSS is the system's own high-water mark: pages of mapped files count, whether or not they could be given back.
The bars for the tool are 3 shards + 1 GiB, and 1.5 times peft's seconds of processor (told, not enforced). Writes
benchmarks/results/merge_memory.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.errors import OneCardError  # noqa: E402

HIDDEN, MLP, HEADS, ROWS = 2048, 5632, 16, 32_000
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP + 2 * HIDDEN)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
TOOL, WHOLE = "tools/merge_lora.py", "peft, whole model"


@dataclass
class BenchmarkOptions:
    """What is measured."""

    total_gb: float = 3.0
    """Size of the base in fp16, in GB of 10^9 bytes."""
    shard_mb: int = 400
    """Size of one weight file of the base, and of the result."""
    way: Literal["both", "tool", "peft"] = "both"
    """What is measured; the tool alone, the usual way alone, or both."""
    rounds: int = 3
    """How often each way runs."""
    folder: str = ""
    """Where base and results are written while it runs; empty: the system's temporary directory."""
    output: str = str(ROOT / "benchmarks" / "results" / "merge_memory.json")
    """Where the result is written."""
    whole: str = ""
    """Merge BASE,ADAPTER,RESULT the usual way in this process; the benchmark starts itself so."""


def make_base(directory: Path, layers: int, shard_bytes: int) -> int:
    """Write a Llama of random fp16 weights, one shard in memory; returns its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from onecard.export.io.weights import ShardWriter

    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=2048, dtype="float16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    writer = ShardWriter(directory, shard_bytes)
    for name, shape in shapes.items():
        # Embeddings that outweigh what each layer adds. With small ones a random model this deep magnifies the rounding
        # to fp16 to 2e-3 of the largest logit (two were measured), over the bound that the proof begins with.
        std = 1.0 if "embed_tokens" in name else 0.02 / (2 * layers) ** 0.5
        writer.add(name, torch.ones(shape).half() if "norm" in name else (torch.randn(shape) * std).half())
    return sum(file.stat().st_size for file in writer.finish())


def make_adapter(directory: Path, base: Path, layers: int) -> None:
    """Write a LoRA on all linear layers, in plain PEFT files."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
              "target_modules": sorted(LINEAR), "base_model_name_or_path": str(base)}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name in LINEAR:
            part = "self_attn" if name[0] in "qkvo" else "mlp"
            where = f"base_model.model.model.layers.{layer}.{part}.{name}"
            n_in, n_out = (
                (MLP if name == "down_proj" else HIDDEN),
                (MLP if name in ("gate_proj", "up_proj") else HIDDEN),
            )
            tensors[f"{where}.lora_A.weight"] = torch.randn(RANK, n_in) * 0.01
            tensors[f"{where}.lora_B.weight"] = torch.randn(n_out, RANK) * 0.001
    save_file(tensors, directory / "adapter_model.safetensors")


def merge_whole(base: str, adapter: str, result: str) -> None:
    """The usual way: the whole model in memory, in fp16."""
    import torch
    from transformers import AutoModelForCausalLM

    from onecard.model.lora.adapter import load_adapter

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16, local_files_only=True)
    load_adapter(model, adapter, trainable=False).model.merge_and_unload().save_pretrained(result)


def measure(name: str, command: list[str]) -> dict[str, Any]:
    """Run one way and watch it: seconds, and the highest resident memory in bytes."""
    import psutil

    started, peak, cpu = time.perf_counter(), [0], [0.0]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", env=environment
    )
    watched = psutil.Process(process.pid)

    def watch() -> None:
        while process.poll() is None:
            try:
                cpu[0] = sum(watched.cpu_times()[:2])
                peak[0] = max(peak[0], watched.memory_info().rss, high_water_bytes(process.pid))
            except psutil.Error:
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    output, _ = process.communicate()
    thread.join()
    if process.returncode:
        raise OneCardError(f"{name} failed:\n{output[-3000:]}")
    proven = [line for line in output.splitlines() if line.startswith("proven")]
    wall_s = round(time.perf_counter() - started, 1)
    return {"way": name, "peak_bytes": peak[0], "wall_s": wall_s, "cpu_s": round(cpu[0], 1), "said": proven}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one way: the highest memory, the median times and each run's."""
    times = {key: median(run[key] for run in runs) for key in ("wall_s", "cpu_s")}
    each = {f"each_{key}": [run[key] for run in runs] for key in times}
    return {**runs[0], "peak_bytes": max(run["peak_bytes"] for run in runs), **times, **each}


def high_water_bytes(pid: int) -> int:
    """The kernel's own peak of a process, which no sampling misses; 0 where there is no such thing."""
    status = Path(f"/proc/{pid}/status")
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def run(options: BenchmarkOptions, folder: Path) -> dict[str, Any]:
    """Make base and adapter, merge them in each way, and compare."""
    from benchmarks.machine import machine

    base, adapter, shard_bytes = folder / "base", folder / "adapter", options.shard_mb * 10**6
    layers = max(1, round((options.total_gb * 1e9 - 4 * ROWS * HIDDEN) / LAYER_BYTES))
    base.mkdir()
    total = make_base(base, layers, shard_bytes)
    make_adapter(adapter, base, layers)
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    say(f"base: {layers} layers, {total / 2**30:.2f} GiB in {len(list(base.glob('*.safetensors')))} shards")
    ways = {
        TOOL: [str(ROOT / TOOL), "--model_path", str(base), "--lora_path", str(adapter), "--output_path",
               str(folder / "tool"), "--max_shard_size", f"{options.shard_mb}MB"],
        WHOLE: [__file__, "--whole", f"{base},{adapter},{folder / 'whole'}"],
    }  # fmt: skip
    chosen = {"both": (TOOL, WHOLE), "tool": (TOOL,), "peft": (WHOLE,)}[options.way]
    results, runs = {TOOL: folder / "tool", WHOLE: folder / "whole"}, {name: list[dict[str, Any]]() for name in chosen}
    for _ in range(options.rounds):
        for name in chosen:
            shutil.rmtree(results[name], ignore_errors=True)
            runs[name].append(measure(name, [sys.executable, *ways[name]]))
            say(f"{name}: {runs[name][-1]['cpu_s']} s of processor, {runs[name][-1]['wall_s']} s")
    rows = [summary(runs[name]) for name in chosen]
    bar = 3 * largest + 2**30
    result = {"layers": layers, "total_bytes": total, "largest_shard_bytes": largest, "bar_bytes": bar, "rows": rows}
    if options.way == "both":
        result["largest_difference"] = largest_difference(folder / "tool", folder / "whole")
    return {**result, "machine": machine("cpu")}


def largest_difference(one: Path, other: Path) -> float:
    """Between two results, tensor by tensor, in units of the tensor's largest value."""
    from onecard.export.io.weights import open_weights

    theirs, largest = open_weights(other), 0.0
    for name, tensor in open_weights(one):
        apart = (tensor.float() - theirs.read(name).float()).abs().max()
        largest = max(largest, float(apart / tensor.float().abs().max()))
    return largest


def main(argv: list[str] | None = None) -> None:
    options = parse(BenchmarkOptions, argv, description=__doc__ or "")
    if options.whole:
        merge_whole(*options.whole.split(","))
        return
    from benchmarks.machine import say_table, write_result

    with tempfile.TemporaryDirectory(prefix="merge-memory-", dir=options.folder or None) as folder:
        result = run(options, Path(folder))
    gib = 2**30
    say_table(
        ["way", "peak RSS, GiB", "seconds of processor", "seconds"],
        [[row["way"], round(row["peak_bytes"] / gib, 2), row["cpu_s"], row["wall_s"]] for row in result["rows"]],
    )
    say(f"base {result['total_bytes'] / gib:.2f} GiB, bar (3 shards + 1 GiB) {result['bar_bytes'] / gib:.2f} GiB")
    if options.way == "both":
        ratio = result["rows"][0]["cpu_s"] / result["rows"][1]["cpu_s"]
        say(f"{TOOL} takes {ratio:.2f} times the seconds of processor of {WHOLE}, medians of {options.rounds}")
    write_result(options.output, result)
    over = [row for row in result["rows"] if row["way"] == TOOL and row["peak_bytes"] >= result["bar_bytes"]]
    if over:
        raise OneCardError("merge_lora.py takes more RAM than the bar")


if __name__ == "__main__":
    sys.exit(run_main(main))
