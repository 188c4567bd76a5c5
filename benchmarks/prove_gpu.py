#!/usr/bin/env python
"""Everything that only a card can say, in one command and a given time: what works, what fits, how fast it is.

    bash scripts/prove_gpu.sh [--minutes 10] [--pretend_turing]

Needs no network and no files of models: weights are random, of the sizes that the card's memory and the time allow. The
steps run in order of value, each as a program of its own that is ended where it goes beyond its share of the time; one
that fails, hangs or runs out of memory leaves the others standing. Each leaves `NN-step.json` at once in
benchmarks/results/gpu/<card>-<date>/; `python scripts/write_benchmarks.py` makes the tables of the documents of them.
Ends with 1 where a step failed. The steps themselves are in `proof_steps.py`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.proof_steps import MACHINE, STEPS, NotHere, Setting, Step  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.config.problems import Problem  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.errors import ModelError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
# How a step ended.
DONE, FAILED, NO_MEMORY, KILLED, NOT_RUN = "done", "failed", "out of memory", "killed", "not run"
BAD = (FAILED, NO_MEMORY, KILLED)
START_SECONDS = 10.0  # of a program, until it has imported everything and found the card
END_SECONDS = 10.0  # for a process to be gone after it was killed
REHEARSAL_SECONDS = 240.0  # each step of a rehearsal has at most so many; the programs are told to take one
LAST_LINES = 15
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1"}  # of every step


@dataclass
class ProofOptions:
    """What is run, and for how long."""

    minutes: float = 10.0
    """Time for everything."""
    pretend_turing: bool = False
    """fp16 and no FlashAttention, whatever the card."""
    steps: str = "all"
    """Names of steps with commas between them, such as doctor,serving; all: every one."""
    device: str = "auto"
    """auto or cuda:N."""
    output_path: str = ""
    """Folder of the results; '': benchmarks/results/gpu/<card>-<date>."""
    rehearse: bool = False
    """Toy models and a second for each step: shows that all steps run, and measures nothing."""
    simcard: str = ""
    """With --rehearse: a simulated card, such as sm75:11GiB (tests/simcard/README.md); '': the machine's own."""
    debug: bool = False
    """Show tracebacks."""

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        names = [step.name for step in STEPS]
        wrong = [] if self.steps == "all" else [name for name in self.steps.split(",") if name not in names]
        if wrong:
            found.append(("--steps", f"{', '.join(wrong)} is no step; use {', '.join(names)}"))
        if self.minutes <= 0:
            found.append(("--minutes", f"{self.minutes:g} is no time; use 10, or more"))
        if self.simcard and not self.rehearse:
            found.append(("--simcard", "is no card, so nothing can be measured on it; use it with --rehearse"))
        return found


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit code (None: it was killed at its limit) and what it printed."""

    code: int | None
    out: str
    err: str
    seconds: float


Launch = Callable[[Sequence[str], float, Path], Ended]


def main(argv: list[str] | None = None) -> None:
    options = parse(ProofOptions, argv, description=__doc__ or "")
    folder = prove(options)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    say(f"{len(found)} files in {folder}; `python scripts/write_benchmarks.py` puts them into the documents")
    bad = [f"{one['step']} ({one['status']})" for one in found if one["status"] in BAD]
    if bad:
        raise ModelError(f"{len(bad)} of {len(found)} steps did not end well: {', '.join(bad)}; their files say why")


def prove(options: ProofOptions, launch: Launch | None = None, steps: Sequence[Step] = STEPS) -> Path:
    """Run all steps, or as many as there is time for; returns the folder of their JSON files.

    Raises ModelError where there is no card to run them on.
    """
    end = time.monotonic() + 60 * options.minutes
    launch = launch or run_program
    chosen = [step for step in steps if options.steps == "all" or step.name in options.steps.split(",")]
    with tempfile.TemporaryDirectory(prefix="prove-gpu-", ignore_cleanup_errors=True) as temporary:
        setting = Setting(options.pretend_turing, options.rehearse, options.simcard, options.device, Path(temporary))
        report = Report(options, revision())
        setting, first = find_card(setting, launch, report, limit=REHEARSAL_SECONDS if options.rehearse else 120.0)
        folder = Path(options.output_path) if options.output_path else fresh_folder(first["machine"])
        report.write(folder, 0, first)
        for number, step in enumerate(steps, 1):
            if step not in chosen:
                continue
            left = end - time.monotonic()
            later = [each.weight for each in chosen[chosen.index(step) :]]
            limit = REHEARSAL_SECONDS if options.rehearse else share(step, sum(later), left)
            report.write(folder, number, run_step(step, setting, launch, report, limit, left))
    return folder


def share(step: Step, weights: float, left: float) -> float:
    """Seconds for this step, of those that it and all later ones, of together `weights`, have left."""
    return max(step.least_seconds, left * step.weight / weights)


def find_card(setting: Setting, launch: Launch, report: Report, limit: float) -> tuple[Setting, dict[str, Any]]:
    """The machine with its card as the first file says it. Raises ModelError without a card."""
    found = run_step(MACHINE, setting, launch, report, limit, limit)
    facts = found["numbers"]
    if facts is None:
        raise ModelError(f"this machine could not be described: {found['reason']}\n" + "\n".join(found["last_lines"]))
    if facts["device"] != "cuda":
        raise ModelError("there is no card that PyTorch can use here; `python tools/doctor.py` says why")
    report.machine = found["machine"] = facts
    return replace(setting, facts=facts), found


def run_step(step: Step, setting: Setting, launch: Launch, report: Report, limit: float, left: float) -> dict[str, Any]:
    """What there is to say of one step: its numbers, or why there are none. Never raises but for Ctrl-C."""
    # The program is to stop by itself before it is killed, so that what it has found is whole.
    setting = replace(setting, seconds=1.0 if setting.rehearse else max(1.0, 0.9 * limit - START_SECONDS))
    setting = replace(setting, result=setting.folder / f"{step.name}.json")
    try:
        words = step.words(setting)
    except NotHere as reason:
        return report.entry(step, NOT_RUN, str(reason))
    if limit > left:
        return report.entry(step, NOT_RUN, f"{max(0.0, left):.0f} s left, {step.least_seconds:.0f} s needed", words)
    say(f"{step.name}: {step.title}, at most {limit:.0f} s")
    ended = launch(setting.command(words), limit, setting.folder / step.name)
    numbers, unreadable = None, ""
    try:
        numbers = step.numbers(setting, ended.out)
    except (OSError, ValueError, KeyError) as problem:
        unreadable = f"no result: {type(problem).__name__}"
    status, why = judge(ended, unreadable, limit)
    return report.entry(step, status, why, words, ended, numbers, limit)


def judge(ended: Ended, unreadable: str, limit: float) -> tuple[str, str]:
    """How a step ended, and the reason in one line."""
    printed = (ended.err.strip() or ended.out.strip()).splitlines()
    if ended.code is None:
        return KILLED, f"it did not end within {limit:.0f} s" + (f"; {unreadable}" if unreadable else "")
    if ended.code == 0 and not unreadable:
        return DONE, ""
    if re.search(r"out ?of ?memory", ended.err, re.IGNORECASE):
        return NO_MEMORY, next(line for line in printed[::-1] if re.search(r"out ?of ?memory", line, re.IGNORECASE))
    if ended.code == 0:
        return FAILED, unreadable
    return FAILED, printed[-1] if printed else f"it ended with {ended.code} and said nothing"


class Report:
    """The JSON files: what each of them holds, and where they lie."""

    def __init__(self, options: ProofOptions, git_revision: str) -> None:
        self.machine: dict[str, Any] | None = None
        self._every = {"git_revision": git_revision, "minutes": options.minutes, "rehearsal": options.rehearse,
                       "pretend_turing": options.pretend_turing}  # fmt: skip

    def entry(
        self,
        step: Step,
        status: str,
        reason: str,
        words: Sequence[str] = (),
        ended: Ended | None = None,
        numbers: Any = None,
        limit: float | None = None,
    ) -> dict[str, Any]:
        """One file's content. `last_lines`: the end of what a step printed that did not end well."""
        lines = (ended.out + "\n" + ended.err).strip().splitlines()[-LAST_LINES:] if ended and status in BAD else []
        return {
            "step": step.name, "title": step.title, "status": status, "reason": shown(reason),
            "command": [shown(word) for word in words], "limit_seconds": None if limit is None else round(limit, 1),
            "seconds": round(ended.seconds, 1) if ended else None, "numbers": numbers,
            "last_lines": [shown(line) for line in lines], "machine": self.machine, **self._every,
        }  # fmt: skip

    def write(self, folder: Path, number: int, entry: dict[str, Any]) -> None:
        """Write one file at once, and say how the step ended."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(entry, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{number:02d}-{entry['step']}.json").write_text(text, encoding="utf-8")
        say(f"{entry['step']}: {entry['status']}" + (f": {entry['reason']}" if entry["reason"] else ""))


def shown(text: str) -> str:
    """The text without the names of this machine's folders, of its user and of its host."""
    from onecard.doctor.facts import without_names

    places = {tempfile.gettempdir(): "<tmp>", str(ROOT): "."}
    for place, instead in places.items():
        text = text.replace(place, instead)
    return without_names(text)


def fresh_folder(facts: dict[str, Any]) -> Path:
    """benchmarks/results/gpu/<card>-<date>, with a number behind it where there is one already."""
    name = re.sub(r"[^a-z0-9]+", "-", str(facts["gpu"]).lower()).strip("-") + f"-{facts['date']}"
    names = [name, *(f"{name}-{number}" for number in range(2, 100))]
    return next(RESULTS / each for each in names if not (RESULTS / each).exists())


def revision() -> str:
    """The commit that is checked out, with + behind it where files differ from it; '' where git does not say."""
    try:
        heads, changes = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return heads.strip() + ("+" if changes.strip() else "")


def run_program(command: Sequence[str], limit: float, prefix: Path) -> Ended:
    """Run a program to its end, or end it with all its children after `limit` seconds. Output goes through files:
    a pipe that nobody reads would stop it."""
    begun = time.monotonic()
    files = [prefix.with_suffix(suffix) for suffix in (".out", ".err")]
    with files[0].open("wb") as out, files[1].open("wb") as err:
        environment = {**os.environ, **ENVIRONMENT}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                end_tree(process)
    printed, errors = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return Ended(code, printed, errors, time.monotonic() - begun)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that runs, and all that it started."""
    import psutil

    parent = psutil.Process(process.pid)
    family = [*parent.children(recursive=True), parent]
    for each in family:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=END_SECONDS)
    process.poll()


if __name__ == "__main__":
    sys.exit(run_main(main))
