#!/usr/bin/env python
"""A run that is killed in its middle and goes on, beside one that nothing broke: are they the same, bit for bit?

    python benchmarks/kill_and_resume.py --bits 4 --pretend_turing

Both are `finetune.py` in processes of their own on the sample data. One is killed without a warning (kill -9, on
Windows TerminateProcess) once some checkpoints are there, and started again with the same command. Compared are the
adapter, the optimizer and the logged losses. Kernels that add in no fixed order may make a card differ in the last
bits; the largest difference is then what counts. Writes benchmarks/results/kill_and_resume.json.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, write_result  # noqa: E402
from onecard.config.base_model import DEFAULT_BASE  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.errors import ModelError  # noqa: E402

LOOK_SECONDS, END_SECONDS = 0.02, 10


@dataclass
class KillOptions:
    """What is run."""

    model_path: str = DEFAULT_BASE
    """Directory of a small model."""
    bits: int = 4
    """Bits per base weight."""
    steps: int = 20
    """Optimizer steps of a run."""
    kill_at: int = 4
    """The kill comes as soon as the checkpoint of this step, or of a later one, is there."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    pretend_turing: bool = False
    """fp16 and no FlashAttention, whatever the card."""
    simcard: str = ""
    """A simulated card for the runs, as tests/simcard/README.md says; '': the machine's own."""
    seconds: float = 300.0
    """Each start of finetune.py is given up after so many."""
    output: str = str(RESULTS / "kill_and_resume.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(KillOptions, argv, description=__doc__ or "")
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-", ignore_cleanup_errors=True) as folder:
        straight, broken = Path(folder) / "straight", Path(folder) / "broken"
        finish(start(options, straight), options)
        killed_after = kill_in_the_middle(start(options, broken), broken, options)
        finish(start(options, broken), options)
        found = compare(straight, broken)
    outcome = f"the adapter differs by at most {found['largest_difference']:.1e}; the same: {found['same']}"
    outcome = "the same, bit for bit" if found["is_bitwise"] else outcome
    say(f"killed after step {killed_after} of {options.steps} and resumed: {outcome}")
    given = asdict(options) | {name: Path(getattr(options, name)).name for name in ("output", "model_path")}
    here = machine("cpu" if options.device == "cpu" or not has_card() else "cuda")
    write_result(options.output, {"options": given, "killed_after": killed_after, **found, "machine": here})


def has_card() -> bool:
    import torch

    return torch.cuda.is_available()


def start(options: KillOptions, run: Path) -> subprocess.Popen[bytes]:
    """Begin `finetune.py` in the directory `run`, or go on in it; what it prints goes to a file beside it."""
    program = ["-m", "tests.simcard", options.simcard] if options.simcard else []
    words = {
        "model_path": options.model_path, "bits": options.bits, "device": options.device, "output_path": run,
        "data_path": ROOT / "sample" / "merge_sample.json", "cache_path": run.parent / "cache", "cutoff_len": 256,
        "test_size": 0, "total_batch": 4, "max_steps": options.steps, "log_steps": 1, "save_steps": 1,
        "pretend_turing": str(options.pretend_turing).lower(),
    }  # fmt: skip
    command = [sys.executable, *program, str(ROOT / "finetune.py")]
    command += [part for name, value in words.items() for part in (f"--{name}", str(value))]
    with run.with_suffix(".txt").open("ab") as printed:
        return subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], options: KillOptions) -> None:
    """Wait for a run that must succeed. Raises ModelError with the end of what it printed."""
    try:
        code = process.wait(options.seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(END_SECONDS)
        raise ModelError(f"finetune.py did not end within {options.seconds:.0f} s: {printed_by(process)}") from None
    if code:
        raise ModelError(f"finetune.py ended with {code}: {printed_by(process)}")


def printed_by(process: Any) -> str:
    """The last lines of the run that this process was."""
    run = Path(process.args[process.args.index("--output_path") + 1])
    lines = run.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-12:])


def kill_in_the_middle(process: subprocess.Popen[bytes], run: Path, options: KillOptions) -> int:
    """Kill the run once its checkpoint is there; the step of the last one. Raises ModelError where none came."""
    end = time.monotonic() + options.seconds
    while newest(run) < options.kill_at and process.poll() is None and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
    was_running = process.poll() is None
    process.kill()
    process.wait(END_SECONDS)
    step = newest(run)
    if not was_running or step < options.kill_at:
        raise ModelError(f"the run could not be killed in its middle (step {step}): {printed_by(process)}")
    return step


def newest(run: Path) -> int:
    """The step of the newest checkpoint of a run directory; 0 without one."""
    return max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*[0-9]")), default=0)


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Whether adapter, optimizer and losses of two runs are the same bit for bit, and how far the adapters differ."""
    import torch

    from onecard.train.trackers import read_log
    from tests.tiny import largest_difference, same_values, tensors_of

    adapters = [tensors_of(run / "adapter_model.safetensors") for run in (one, other)]
    states = [
        torch.load(run / f"checkpoint-{newest(run)}" / "optimizer.pt", weights_only=True, map_location="cpu")
        for run in (one, other)
    ]
    losses = [[(row["step"], row["loss"]) for row in read_log(run) if "loss" in row] for run in (one, other)]
    same = {"adapter": same_values(*adapters), "optimizer": same_values(*states), "losses": losses[0] == losses[1]}
    return {"is_bitwise": all(same.values()), "same": same, "largest_difference": largest_difference(*adapters),
            "steps": len(losses[0])}  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_main(main))
