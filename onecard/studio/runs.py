"""Runs as the files of a folder tell them: the table, one run, renaming, trash. Nothing is remembered beside them."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from onecard.config.given_paths import newest_checkpoints
from onecard.config.problems import Problem
from onecard.errors import CheckpointError, ConfigError
from onecard.serve.http_error import ApiError
from onecard.storage import json_object, move, read_json_object, write_whole
from onecard.studio.context import leads_within
from onecard.studio.folders import bytes_in, is_portable
from onecard.studio.jobs import ALIVE, Jobs
from onecard.studio.run_log import last_rows
from onecard.train import control
from onecard.train.advice import ADVICE_NAME
from onecard.train.findings import COMPARISON_NAME
from onecard.train.run_lock import OWNER, RunLock
from onecard.train.trackers import LOG_NAME

STUDIO_FILE, STUDIO_LOG, QUESTIONS = "studio.json", "studio.log", "questions.jsonl"
OPTIONS_FILE, STATE_FILE, MANIFEST_FILE = "onecard.yaml", "trainer_state.json", "manifest.json"
READ = (OPTIONS_FILE, STATE_FILE, MANIFEST_FILE, LOG_NAME, STUDIO_FILE, STUDIO_LOG, QUESTIONS, COMPARISON_NAME,
        ADVICE_NAME, "control")  # fmt: skip
MARKS = (OPTIONS_FILE, LOG_NAME, STUDIO_FILE)  # any of them makes a folder a run
TRASH, TRASH_NOTE = ".trash", "trash.json"
BETWEEN = ":"  # in an id, between a chain of stages and its stage; no system has it in names of folders by default
NAME = re.compile(r"\w[\w .-]{0,98}[\w-]|\w")
MOST_NOTES, MOST_FILES, MOST_QUESTIONS = 20_000, 300, 500
RUNNING = ("starting", "training", "evaluating", "paused", "given_back")
PROCESS = re.compile(r"process (\d+) on (.+)")


@dataclass
class Runs:
    """The runs in a folder and in the folders of it (the stages of a chain)."""

    root: Path
    jobs: Jobs
    _sizes: dict[Path, tuple[tuple[int, ...], int]] = field(default_factory=dict)

    def paths(self) -> Iterator[Path]:
        """The directory of each run."""
        for folder in _folders(self.root):
            if self._shows(folder):
                yield folder
            yield from (inner for inner in _folders(folder) if re.match(r"\d+-", inner.name) and self._shows(inner))

    def id_of(self, run: Path) -> str:
        """`my-run`, or `chain:1-first` for a stage."""
        return BETWEEN.join(run.relative_to(self.root).parts)

    def path(self, run_id: str) -> Path:
        """The directory of this run. Raises ApiError (404) where there is none."""
        parts = run_id.split(BETWEEN)
        is_plain = all(part and not part.startswith(".") and not re.search(r"[/\\\0]", part) for part in parts)
        is_short = len(parts) <= 2 and all(len(part.encode()) < 256 for part in parts)  # as names of files are
        run = self.root.joinpath(*parts) if is_plain and is_short else self.root
        if run == self.root or not self._shows(run):
            raise ApiError(404, "there is no such run", code="no_such_run")
        return run

    def _shows(self, run: Path) -> bool:
        """Whether this is a run, and neither it nor what is read of it is a link that leads elsewhere."""
        read = [run, *(run / name for name in READ)]
        return is_run(run) and all(leads_within(path, (self.root,)) for path in read if path.is_symlink())

    def table(self) -> list[dict[str, Any]]:
        """A row of each run, the newest first."""
        return sorted((self.row(run) for run in self.paths()), key=lambda row: -(row["date"] or 0))

    def row(self, run: Path) -> dict[str, Any]:
        """What the table tells of a run; None for what its files do not say."""
        options, position = settings(run), newest_position(run)
        rows = last_rows(run)
        step = max([row["step"] for row in rows] + [position.get("step") or 0])
        state, status = self.state(run)
        comparison = read_json_object(run / COMPARISON_NAME)
        return {
            "id": self.id_of(run), "state": state, "step": status.get("step") or step,
            "total": status.get("total_steps") or position.get("total_steps") or None,
            "base": _name(options.get("model_path")), "data": _data_name(options),
            "objective": options.get("objective"), "method": options.get("peft_method"), "bits": options.get("bits"),
            "loss": _newest(rows, "loss"), "eval_loss": _newest(rows, "eval_loss") or position.get("best_loss"),
            "speed": _newest(rows, "tokens_per_s"), **verdict(comparison), "size": self._size(run),
            "date": _date(run), "notes": str(read_json_object(run / STUDIO_FILE).get("notes", "")),
        }  # fmt: skip

    def state(self, run: Path) -> tuple[str, dict[str, Any]]:
        """starting, training, evaluating, paused, given_back, ended, stopped, failed or lost; and its status.

        A run that wrote no status (of an earlier version) is known by its lock and by what it left.
        """
        job_id = read_json_object(run / STUDIO_FILE).get("job")
        job, created = "", 0.0
        if isinstance(job_id, str):
            with suppress(ApiError):
                found = self.jobs.get(job_id)
                job, created = found["state"], found["created"]
        status = status_of(run)
        is_held = owner_lives(run)
        # What an earlier start of the run wrote does not hold once it is started again.
        if status and (status["state"] in RUNNING or status.get("process_began", 0) >= created - 1):
            return str(status["state"]), status
        if is_held or job in ALIVE:
            return ("training" if is_held else "starting"), {}
        if status:
            return str(status["state"]), status
        if (run / MANIFEST_FILE).is_file():
            return "ended", {}
        return ("failed" if job in ("failed", "lost") else "stopped"), {}

    def is_running(self, run: Path) -> bool:
        return self.state(run)[0] in RUNNING

    def running(self) -> list[Path]:
        """The runs that go on now, whoever started them."""
        return [run for run in self.paths() if self.is_running(run)]

    def details(self, run: Path) -> dict[str, Any]:
        """The row with settings, files, the comparison with the base, advice, and the command that started it."""
        files: list[dict[str, Any]] = []
        for file in sorted(run.rglob("*")):
            with suppress(OSError):
                if file.is_file() and len(files) < MOST_FILES and not file.name.startswith("."):
                    files.append({"name": file.relative_to(run).as_posix(), "size": file.stat().st_size})
        comparison = read_json_object(run / COMPARISON_NAME)
        kept = ("mean_base", "mean_tuned", "difference", "n_better")
        return {
            **self.row(run), "path": str(run), "settings": settings(run), "files": files,
            "advice": _list(run / ADVICE_NAME),
            "comparison": {name: comparison[name] for name in kept if name in comparison},
            "n_compared": len(comparison.get("tuned") or ()), "words": read_json_object(run / STUDIO_FILE).get("words"),
            "job": read_json_object(run / STUDIO_FILE).get("job"),
        }  # fmt: skip

    def differences(self, runs: Sequence[Path]) -> dict[str, list[Any]]:
        """The settings in which these runs differ: name -> the value of each; None of a run without settings."""
        found = [settings(run) for run in runs]
        names = dict.fromkeys(name for options in found for name in options if name != "output_path")
        values = {name: [options.get(name) for options in found] for name in names}
        known = [place for place, options in enumerate(found) if options]
        return {name: several for name, several in values.items()
                if any(several[place] != several[known[0]] for place in known)}  # fmt: skip

    def note(self, run: Path, **changes: Any) -> None:
        """Change what studio.json of a run holds. Raises CheckpointError."""
        content = json.dumps({**read_json_object(run / STUDIO_FILE), **changes}, ensure_ascii=False)
        try:
            write_whole(run / STUDIO_FILE, content)
        except OSError as reason:
            raise CheckpointError(f"{run / STUDIO_FILE} cannot be written: {reason.strerror or reason}") from None

    def rename(self, run: Path, name: str) -> Path:
        """Give the folder another name. Raises ConfigError for a bad or taken one, CheckpointError while it runs."""
        check_name(name)
        target = run.with_name(name)
        if target.exists():
            raise ConfigError("--name", f"there is already a run called {name}; choose another name")
        self._at_rest(run)
        move(run, target)
        return target

    def delete(self, run: Path) -> str:
        """Move a run into the trash; returns its number there. Raises CheckpointError while it runs."""
        self._at_rest(run)
        number = f"{time.time_ns():020d}"
        place = self.root / TRASH / number
        place.mkdir(parents=True)
        note = {"id": self.id_of(run), "deleted": time.time()}
        write_whole(place / TRASH_NOTE, json.dumps(note, ensure_ascii=False))
        move(run, place / "run")
        return number

    def trash(self) -> list[dict[str, Any]]:
        """What lies in the trash, the newest first: {number, id, deleted}."""
        places = sorted((self.root / TRASH).glob("*/run"), reverse=True)
        return [{"number": place.parent.name, **read_json_object(place.parent / TRASH_NOTE)} for place in places]

    def restore(self, number: str) -> Path:
        """Put a run of the trash back where it was. Raises ApiError (404), ConfigError where its name is taken."""
        place = self._trashed(number)
        parts = str(read_json_object(place / TRASH_NOTE).get("id", "")).split(BETWEEN)
        for part in parts:
            check_name(part)
        target = self.root.joinpath(*parts)
        if target.exists():
            raise ConfigError("--name", f"there is already a run called {parts[-1]}; rename that one first")
        target.parent.mkdir(parents=True, exist_ok=True)
        move(place / "run", target)
        shutil.rmtree(place, ignore_errors=True)
        return target

    def purge(self, number: str) -> None:
        """Remove a run of the trash for good. Raises ApiError (404)."""
        shutil.rmtree(self._trashed(number), ignore_errors=True)

    def _trashed(self, number: str) -> Path:
        place = self.root / TRASH / number
        if not re.fullmatch(r"\d{20}", number) or not (place / "run").is_dir():
            raise ApiError(404, "that is not in the trash", code="not_in_trash")
        return place

    def _at_rest(self, run: Path) -> None:
        """Raise CheckpointError where the run, or a stage in it, goes on."""
        for one in (run, *_folders(run)):
            if is_run(one):
                if self.is_running(one):
                    raise CheckpointError(f"{one.name} goes on; stop it first, then rename or delete it")
                with RunLock(one):  # asks the system, which knows best
                    pass

    def _size(self, run: Path) -> int:
        """Bytes of all files; counted anew when the folder itself has changed."""
        key = tuple(_changed(place) for place in (run, *_folders(run)))
        if run not in self._sizes or self._sizes[run][0] != key:
            self._sizes[run] = (key, bytes_in(run))
        return self._sizes[run][1]


def status_of(run: Path) -> dict[str, Any]:
    """What a run says of itself (`control.RunStatus`); empty for one that wrote no status."""
    with suppress(control.NotRunning):
        return asdict(control.status(run))
    return {}


def is_run(folder: Path) -> bool:
    """Whether this is the directory of a run, begun or ended."""
    return any((folder / name).is_file() for name in MARKS)


def check_name(name: str) -> None:
    """Raise ConfigError for what cannot be the name of a run's folder, here or on another system."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or not is_portable(name):
        problem: Problem = ("--name", f"{str(name)[:100]!r} is no name for a run; use letters, digits, spaces, - and _")
        raise ConfigError(*problem)


def settings(run: Path) -> dict[str, Any]:
    """The options in a run's onecard.yaml, by name."""
    with suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
        found = yaml.load((run / OPTIONS_FILE).read_text(encoding="utf-8"), FAST_LOADER)  # noqa: S506 (a safe one)
        return found if isinstance(found, dict) else {}
    return {}


# libyaml's loader is ten times as fast, where pyyaml was built with it.
FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def newest_position(run: Path) -> dict[str, Any]:
    """trainer_state.json of the result, else of the newest checkpoint."""
    places = [run, *newest_checkpoints(run)[:1]]
    return next(filter(None, (read_json_object(place / STATE_FILE) for place in places)), {})


def verdict(comparison: dict[str, Any]) -> dict[str, Any]:
    """better, worse or same by the interval of the difference from the base; None where none was measured."""
    difference = comparison.get("difference")
    if not isinstance(difference, dict) or not all(isinstance(v, (int, float)) for v in difference.values()):
        return {"verdict": None, "difference": None}
    low, high = difference.get("low", 0), difference.get("high", 0)
    return {"verdict": "better" if high < 0 else "worse" if low > 0 else "same", "difference": difference.get("value")}


def owner_lives(run: Path) -> bool:
    """Whether the process that holds the run's lock, by its own words, lives: no later one with its number."""
    try:
        path = run / OWNER
        found = PROCESS.fullmatch(path.read_text(encoding="utf-8").strip())
        if found is None or found[2] != socket.gethostname():
            return False
        process = psutil.Process(int(found[1]))
        # It has begun before it wrote the file; a later process has begun afterwards.
        return process.create_time() <= path.stat().st_mtime + 1 and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, OverflowError, psutil.Error):
        return False


def questions(run: Path) -> list[dict[str, Any]]:
    """The last answers that the run gave while it went on: step, question, answer."""
    with suppress(OSError):
        lines = (run / QUESTIONS).read_text(encoding="utf-8", errors="replace").splitlines()[-MOST_QUESTIONS:]
        rows = [json_object(line) for line in lines]
        return [row for row in rows if "question" in row or "messages" in row]
    return []


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _list(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return content if isinstance(content, list) else []


def _newest(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if isinstance(row.get(name), (int, float))), None)


def _name(value: Any) -> str | None:
    """A model by the last part of its path; an id of the Hub whole."""
    text = str(value) if value else ""
    return (Path(text).name if Path(text).is_absolute() else text) or None


def _data_name(options: dict[str, Any]) -> str | None:
    given = options.get("data") or options.get("data_path")
    names = [_name(one) or "" for one in (given if isinstance(given, list) else [given])]
    return ", ".join(filter(None, names)) or None


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _date(run: Path) -> float | None:
    """When it last wrote: of the log, else of what else makes it a run; seconds since 1970."""
    times = [_changed(run / name) / 1e9 for name in (LOG_NAME, OPTIONS_FILE, STUDIO_FILE)]
    return times[0] or max(times) or None
