"""The steps of `prove_gpu.py`: which program each one is, with which options on this card in this time.

Every step is a program that can be started by hand as well. Sizes are chosen by what is free on the card and by the
time: a 2080 Ti gets smaller models than a card of a computing centre. Knows programs and their options; it does not
know how they are run, nor what becomes of their results.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onecard.config.training import MemoryOptions

# Weights of all linear layers, and GiB of the whole model in 4 bits (head and embeddings in 16), rounded up.
MODELS = (("Llama-3.1-8B", 7.0e9, 5.4), ("Llama-3.2-3B", 2.9e9, 2.1), ("Llama-3.2-1B", 1.0e9, 1.0),
          ("Qwen2.5-0.5B", 0.4e9, 0.5))  # fmt: skip
# Assumed until a card has said more: the share of the rate of matrix products that a training step reaches, and the
# seconds in which a billion weights are made and quantised.
SHARE_OF_RATE, SECONDS_OF_A_BILLION = 0.3, 1.0
# Of two steps of two rows of 34,432 tokens through Llama-3.1-8B, as context_per_vram.py counts them.
FLOPS_AT_11_GIB = 1.2e16
# The config of a model that a simulated card computes in a second.
TOY = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8016, "max_position_embeddings": 131072,
       "tie_word_embeddings": False}  # fmt: skip
GPU_TESTS = ("pytest", "pytest_timeout", "hypothesis")
# It starts programs that are steps of their own here.
LEFT_OUT = "tests/gpu/test_fit.py::test_each_benchmark_runs_on_the_card"


class NotHere(Exception):
    """Why a step cannot be run on this machine, or in this version."""


@dataclass(frozen=True)
class Setting:
    """What a step may go by. `seconds`: it should take no more; `result`: where its program is to write."""

    pretend_turing: bool
    rehearse: bool
    simcard: str
    device: str
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    result: Path = Path()

    def command(self, words: Sequence[str]) -> list[str]:
        """The whole command of a step, on the simulated card where there is one."""
        if self.simcard and words[0] == "-m":  # pytest, which has an option for it
            return [sys.executable, *words, "--simcard", self.simcard]
        return [sys.executable, *(("-m", "tests.simcard", self.simcard) if self.simcard else ()), *words]

    def benchmark(self, name: str, *words: object, turing: bool = True) -> list[str]:
        """A program of this folder with the options that all of them have."""
        turing_words = ["--pretend_turing"] if turing and self.pretend_turing else []
        common = ["--device", self.device, "--output", str(self.result), "--debug", *turing_words]
        return [f"benchmarks/{name}.py", *map(str, words), *common]

    def limit(self) -> tuple[str, str]:
        """The option that all long benchmarks have."""
        return "--seconds", f"{self.seconds:.0f}"

    def toy(self) -> str:
        """The file with the toy's config."""
        file = self.folder / "toy.json"
        file.write_text(json.dumps(TOY), encoding="utf-8")
        return str(file)

    def largest(self, *, copies: int, room_gib: float, starts: int, tokens: int) -> str:
        """The largest model that fits `copies` times with `room_gib` beside it, and that is made `starts` times and
        trains `tokens` in time; the smallest one where none does."""
        rate = SHARE_OF_RATE * self.facts["matrix_product_flops_per_s"]
        for name, n_weights, gib in MODELS:
            seconds = starts * SECONDS_OF_A_BILLION * n_weights / 1e9 + 6 * n_weights * tokens / rate
            if copies * gib + room_gib <= self.facts["free_gib"] and seconds <= self.seconds:
                return name
        return MODELS[-1][0]


@dataclass(frozen=True)
class Step:
    """One step. `weight`: its share of the time that is left; below `least_seconds` it is not begun.

    words: what stands after `python`, or raises NotHere. numbers: what came of it, by the setting and what was printed.
    """

    name: str
    title: str
    weight: float
    least_seconds: float
    words: Callable[[Setting], list[str]]
    numbers: Callable[[Setting, str], Any]


def result_file(setting: Setting, printed: str) -> Any:
    """What the program wrote, without what it says of the machine again."""
    found = json.loads(setting.result.read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if name != "machine"}


def described(setting: Setting, printed: str) -> Any:
    return json.loads(setting.result.read_text(encoding="utf-8"))


def describe(setting: Setting) -> list[str]:
    return setting.benchmark("machine")


def doctor(setting: Setting) -> list[str]:
    return ["tools/doctor.py", "--json"]


def findings(setting: Setting, printed: str) -> Any:
    """What the doctor printed, but for what these programs are given so that nothing is downloaded."""
    found = json.loads(printed[printed.index("{") :])
    found["findings"] = [one for one in found["findings"] if one["name"] != "HF_HUB_OFFLINE"]
    return found


def gpu_tests(setting: Setting) -> list[str]:
    missing = [name for name in GPU_TESTS if importlib.util.find_spec(name) is None]
    if missing:
        raise NotHere(f"{', '.join(missing)} is not installed: pip install -r requirements-dev.txt")
    chosen = ["-k", "turing"] if setting.rehearse else ["--deselect", LEFT_OUT]
    return ["-m", "pytest", "-v", "-p", "no:cacheprovider", "--color", "no", "tests/gpu", *chosen]


def test_outcomes(setting: Setting, printed: str) -> Any:
    """How many tests passed, failed and were skipped, and what pytest says of those that did not pass; also where it
    was killed on its way."""
    outcomes = re.findall(r"^tests/gpu/.+? (PASSED|FAILED|SKIPPED|ERROR)\b", printed, re.MULTILINE)
    notes = re.findall(r"^(?:FAILED|ERROR|SKIPPED) .+$", printed, re.MULTILINE)
    if not outcomes:
        raise ValueError("no test was run")
    return {name.lower(): outcomes.count(name) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")} | {"notes": notes}


def plan(setting: Setting) -> list[str]:
    models = "toy" if setting.rehearse else "real"
    return setting.benchmark("plan_accuracy", "--models", models, *setting.limit())


def context(setting: Setting) -> list[str]:
    if setting.rehearse:
        # A toy on a card of 12 MiB, beside 512 for a CUDA context and 40 for gaps; a second is not enough for it.
        sized: tuple[Any, ...] = ("--model_path", setting.toy(), "--vram", 564 / 1024, "--tries", 1)
    else:
        # The size that this project is for comes first, then what takes less time before what takes more.
        sized = ("--model_path", "Llama-3.1-8B", "--vram", "11,8,12,16,24", "--tries", 3, *setting.limit())
        if FLOPS_AT_11_GIB / (SHARE_OF_RATE * setting.facts["matrix_product_flops_per_s"]) > setting.seconds:
            sized = (*sized, "--quick")
    return setting.benchmark("context_per_vram", *sized, turing=False)  # it always is Turing's


def ladder(setting: Setting) -> list[str]:
    length, rows = 4096, 2
    if setting.rehearse:
        return setting.benchmark("memory_ladder", "--model_path", setting.toy(), "--length", 64, *setting.limit())
    # Nine rows of two steps, each of two micro-batches.
    model = setting.largest(copies=1, room_gib=3.0, starts=9, tokens=9 * 2 * 2 * rows * length)
    options = {"model_path": model, "length": length, "rows": rows, "loss_chunk": 1024, "mlp_tile": 2048}
    return setting.benchmark("memory_ladder", *flags(options), *setting.limit())


def speed(setting: Setting) -> list[str]:
    options: dict[str, object] = {"rounds": 5, "lora_r": 32}
    if setting.rehearse:
        options = {"rounds": 1, "steps": 1, "total_batch": 4, "plain_rows": 2, "micro_tokens": 256}
    else:
        # Both contestants hold a base of their own; a step has about 32 rows of 100 tokens and their padding.
        options["model_path"] = setting.largest(copies=2, room_gib=4.0, starts=2, tokens=2 * 2 * 3 * 32 * 130)
    if importlib.util.find_spec("liger_kernel") is not None and not setting.pretend_turing and not setting.rehearse:
        options["kernels"] = "liger"
    return setting.benchmark("step_speed", *flags(options), *setting.limit())


def trl(setting: Setting) -> list[str]:
    if importlib.util.find_spec("trl") is None:
        more = "; unsloth is, but has no program here" if importlib.util.find_spec("unsloth") is not None else ""
        raise NotHere(f"trl is not installed{more}")
    options: dict[str, object] = {"lora_r": 32}
    if setting.rehearse:
        options = {"total_batch": 4, "rows": 2, "steps": 2}
    else:
        # The same model as `speed` takes, unless the time differs; a step has 32 rows of 100 tokens and their padding.
        options["model_path"] = setting.largest(copies=2, room_gib=4.0, starts=1, tokens=6 * 32 * 130)
    return setting.benchmark("trl_speed", *flags(options))


def streamed(setting: Setting) -> list[str]:
    if not hasattr(MemoryOptions, "stream_layers"):
        raise NotHere("not in this version: layers do not pass through the card")
    raise NotHere("layers pass through the card, but no program measures it in this version")


def serving(setting: Setting) -> list[str]:
    if setting.rehearse:
        options: dict[str, object] = {"model_path": setting.toy(), "clients": "1,2", "new_tokens": 4}
    else:
        options = {"model_path": setting.largest(copies=1, room_gib=2.0, starts=1, tokens=0)}
    return setting.benchmark("serving", *flags(options), *setting.limit())


def gptq(setting: Setting) -> list[str]:
    if importlib.util.find_spec("gptqmodel") is None:
        raise NotHere("gptqmodel is not installed: pip install -r requirements-gptq.txt")
    return setting.benchmark("gptq_kernels")


def kill_and_resume(setting: Setting) -> list[str]:
    options: dict[str, object] = {"seconds": f"{setting.seconds / 3:.0f}"}
    if setting.rehearse:
        options = {"steps": 3, "kill_at": 1, "simcard": setting.simcard}
    return setting.benchmark("kill_and_resume", *flags(options))


def flags(options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


MACHINE = Step("machine", "the machine and its card", 0, 20, describe, described)
# In order of value. Least seconds are estimates.
STEPS = (
    Step("doctor", "what works on this machine", 3, 15, doctor, findings),
    Step("gpu_tests", "tests/gpu on the card", 12, 40, gpu_tests, test_outcomes),
    Step("plan", "the memory plan beside what the allocator counts", 22, 40, plan, result_file),
    Step("context", "the longest context of cards of 8 to 24 GiB", 25, 60, context, result_file),
    Step("ladder", "what each technique saves", 14, 40, ladder, result_file),
    Step("speed", "the speed of a step beside plain Hugging Face + PEFT", 8, 35, speed, result_file),
    Step("trl", "the same with TRL's SFTTrainer", 3, 30, trl, result_file),
    Step("streamed", "layers that pass through the card beside resident ones", 1, 30, streamed, result_file),
    Step("serving", "the API with 1, 4, 8 and 16 clients", 8, 30, serving, result_file),
    Step("gptq", "GPTQ kernels beside the CPU", 3, 25, gptq, result_file),
    Step("kill_and_resume", "a run that is killed and resumed", 7, 40, kill_and_resume, result_file),
)
