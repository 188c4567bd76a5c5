#!/usr/bin/env python
"""Encode a million short instruction records: records per second and peak memory, beside `datasets.map`.

    python benchmarks/prepare_data.py [--records 1000000] [--runs 3]

Three ways, each in a process of its own, from the same jsonl file, with the same tokenizer, no cache to find:
  onecard       read, check, render the template, mask the prompts, write the encoded Arrow file
  map           load_dataset("json") + map(batched) that tokenises the whole text once; no mask, no checks
  map, masked   the same, and the prompt tokenised once more to mask it, as fine-tuning scripts do
Writes benchmarks/results/prepare_data.json: every run, medians, the machine and the versions.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.errors import OneCardError  # noqa: E402

WAYS = ("onecard", "map", "map, masked")
LIMIT_BYTES = int(1.5 * 2**30)
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@dataclass
class BenchmarkOptions:
    """What is measured."""

    records: int = 1_000_000
    """Records in the data file."""
    runs: int = 3
    """Times that each way is measured; the medians are reported."""
    tokenizer: str = str(ROOT / "sample" / "tiny-llama")
    """Directory of the tokenizer."""
    output: str = str(ROOT / "benchmarks" / "results" / "prepare_data.json")
    """Where the result is written."""
    way: str = ""
    """Measure one way in this process and print one line of JSON; the benchmark starts itself so."""
    data_path: str = ""
    """The data file, with --way."""


class Watch:
    """Seconds on the wall and of all threads' CPU, which a busy machine stretches less, since it was made."""

    def __init__(self) -> None:
        self.wall_s, self.cpu_s = -time.perf_counter(), -time.process_time()

    def stop(self) -> None:
        self.wall_s += time.perf_counter()
        self.cpu_s += time.process_time()


def write_records(path: Path, n: int) -> None:
    """`n` short instruction records, the same for the same `n`; about a third Chinese, a third with an input."""
    words = ("add", "count", "fox", "river", "seven", "colour", "translate", "the", "list", "name", "capital", "moon")
    signs = "把下面的句子翻译成英文请数一数山水月亮面包红色七加二"
    draw = random.Random(7)
    with path.open("w", encoding="utf-8") as stream:
        for i in range(n):
            if i % 3:
                question = " ".join(draw.choices(words, k=draw.randint(4, 12)))
                answer = " ".join(draw.choices(words, k=draw.randint(1, 20)))
            else:
                question = "".join(draw.choices(signs, k=draw.randint(4, 16)))
                answer = "".join(draw.choices(signs, k=draw.randint(1, 24)))
            context = str(draw.randint(0, 10**6)) if i % 3 == 1 else ""
            row = {"instruction": f"{question} {i}", "input": context, "output": answer}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(options: BenchmarkOptions) -> dict[str, Any]:
    """One way, once, in this process: seconds without imports, peak memory with them."""
    with tempfile.TemporaryDirectory(prefix="prepare-data-") as folder:
        work = {"onecard": encode_with_onecard, "map": encode_with_map, "map, masked": encode_with_map_masked}
        watch, n_tokens = work[options.way](options, Path(folder))
    return {
        "way": options.way,
        "wall_s": round(watch.wall_s, 2),
        "cpu_s": round(watch.cpu_s, 2),
        "tokens": n_tokens,
        "peak_bytes": peak_bytes(),
    }


def encode_with_onecard(options: BenchmarkOptions, folder: Path) -> tuple[Watch, int]:
    from transformers import AutoTokenizer

    from onecard.data.chat_template import load_template
    from onecard.data.dataset import encode_dataset
    from onecard.data.encode import EncodeSettings

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    watch = Watch()
    template = load_template("alpaca", tokenizer)
    dataset = encode_dataset(options.data_path, template, tokenizer, EncodeSettings(1024), folder)
    watch.stop()
    return watch, int(dataset.report.n_tokens)


def encode_with_map(options: BenchmarkOptions, folder: Path, *, masked: bool = False) -> tuple[Watch, int]:
    import pyarrow.compute
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = [prompt_of(*fields) for fields in zip(rows["instruction"], rows["input"], strict=True)]
        texts = [prompt + answer + tokenizer.eos_token for prompt, answer in zip(prompts, rows["output"], strict=True)]
        ids = tokenizer(texts)["input_ids"]
        if not masked:
            return {"input_ids": ids}
        starts = [len(prompt) for prompt in tokenizer(prompts)["input_ids"]]
        return {"input_ids": ids, "labels": [[-100] * n + row[n:] for row, n in zip(ids, starts, strict=True)]}

    watch = Watch()
    data = load_dataset("json", data_files=options.data_path, split="train", cache_dir=str(folder))
    data = data.map(encode, batched=True, remove_columns=data.column_names, load_from_cache_file=False)
    watch.stop()
    return watch, int(pyarrow.compute.sum(pyarrow.compute.list_value_length(data.data.column("input_ids"))).as_py())


def encode_with_map_masked(options: BenchmarkOptions, folder: Path) -> tuple[Watch, int]:
    return encode_with_map(options, folder, masked=True)


def prompt_of(instruction: str, context: str) -> str:
    with_input = f"\n\n### Input:\n{context}" if context else ""
    return f"{PREAMBLE}\n\n### Instruction:\n{instruction}{with_input}\n\n### Response:\n"


def peak_bytes() -> int:
    """The most memory this process ever held, pages of mapped files included; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    libraries = ("transformers", "tokenizers", "datasets", "pyarrow", "numpy", "jinja2")
    return {
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def run_all(options: BenchmarkOptions) -> Iterator[dict[str, Any]]:
    """The result after each round; ways take turns, so that a busy moment of the machine does not fall on one alone."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="prepare-data-") as folder:
        data = Path(folder) / "records.jsonl"
        write_records(data, options.records)
        for number in range(options.runs):
            for way in WAYS[number % 3 :] + WAYS[: number % 3]:
                runs.append(run_in_own_process(options, way, data))
                say(f"{runs[-1]}")
            median = {way: summary([run for run in runs if run["way"] == way], options.records) for way in WAYS}
            head = {"records": options.records, "data_bytes": data.stat().st_size, "rounds": number + 1}
            yield {**head, "median": median, "runs": runs, "machine": machine()}


def summary(runs: list[dict[str, Any]], n_records: int) -> dict[str, Any]:
    """Medians over the runs of one way, and the highest peak."""
    return {
        "records_per_s": round(n_records / statistics.median(run["wall_s"] for run in runs)),
        "cpu_us_per_record": round(1e6 * statistics.median(run["cpu_s"] for run in runs) / n_records, 1),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
    }


def run_in_own_process(options: BenchmarkOptions, way: str, data: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--data_path", str(data), "--tokenizer", options.tokenizer]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise OneCardError(f"{way} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = parse(BenchmarkOptions, description=__doc__ or "")
    if options.way:
        say(json.dumps(measure(options)))
        return
    result: dict[str, Any] = {}
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for result in run_all(options):
        output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for way, numbers in result["median"].items():
        speed, cpu, peak = numbers["records_per_s"], numbers["cpu_us_per_record"], numbers["peak_bytes"] / 2**30
        say(f"{way:12} {speed:>8,} records/s   {cpu:>6.1f} CPU us/record   peak {peak:.2f} GiB")
    if result["median"]["onecard"]["peak_bytes"] > LIMIT_BYTES:
        raise OneCardError(f"the peak is over {LIMIT_BYTES / 2**30} GiB")


if __name__ == "__main__":
    sys.exit(run_main(main))
