"""Pairs of answers for a blind comparison: read from files, or written by a base and a run to the same questions.

What a model writes goes into answers_a.jsonl and answers_b.jsonl of the folder, as `onecard generate` writes them, and
is gone on with after a kill. pairs.json remembers what they were made from, so that no model is loaded a second time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onecard.config.base_model import ModelOptions
from onecard.config.given_paths import is_data_file
from onecard.config.inference import SamplingOptions
from onecard.console import warn
from onecard.data.formats import to_sample
from onecard.data.messages import Conversation, Turn
from onecard.data.questions import to_question
from onecard.data.sources import Source, data_fingerprint
from onecard.data.values import UnusableRecord
from onecard.errors import ConfigError, DataError
from onecard.evaluate.open_answers import records_of
from onecard.inference.batch.results import OWN_FIELDS, AnswerFile
from onecard.inference.batch.run import BatchJob, answer_questions, survey
from onecard.inference.call import ModelBundle
from onecard.inference.load import load_bundle
from onecard.installation import command
from onecard.model.trained import has_adapter, without_adapter
from onecard.serve.web.votes import VotedPair
from onecard.storage import write_whole

BASE, PAIRS_FILE = "base", "pairs.json"
Answer = tuple[tuple[Turn, ...], str]  # the question's turns, and the answer


@dataclass(frozen=True)
class BlindJob:
    """Who answers what, where, and how. `sides`: A and B, each "base", a run, or a file of answers."""

    sides: tuple[str, str]
    questions: str
    folder: Path
    model: ModelOptions
    prompt_type: str
    sampling: SamplingOptions
    batch_size: int


def pairs_of(job: BlindJob) -> list[VotedPair]:
    """The pairs, in the order of the questions. Raises DataError where the two sides share no question."""
    files = [Path(side).expanduser() if is_data_file(side) else None for side in job.sides]
    for flag, file in zip(("--a", "--b"), files, strict=True):
        if file is not None and not file.is_file():
            raise ConfigError(flag, f"there is no file {file}")
    written = [job.folder / f"answers_{letter}.jsonl" for letter in "ab"]
    if None in files and not _is_whole(job):
        _write_answers(job, [path if file is None else None for file, path in zip(files, written, strict=True)])
    a, b = (read_answers(file or path) for file, path in zip(files, written, strict=True))
    pairs = pair_up(a, b)
    if not pairs:
        raise DataError(f"{job.sides[0]} and {job.sides[1]} answer no question in common")
    n_apart = len(a) + len(b) - 2 * len(pairs)
    if n_apart:
        warn(f"{n_apart} answers are left out: only one of the two answers that question")
    return pairs


def _about(job: BlindJob) -> dict[str, Any]:
    return {"sides": list(job.sides), "questions": data_fingerprint(job.questions), "prompt_type": job.prompt_type,
            "model": asdict(job.model), "sampling": asdict(job.sampling)}  # fmt: skip


def _is_whole(job: BlindJob) -> bool:
    """Whether all answers of this job are in the folder."""
    try:
        stored = json.loads((job.folder / PAIRS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stored == json.loads(json.dumps(_about(job))))


def _write_answers(job: BlindJob, paths: Sequence[Path | None]) -> None:
    """Have the models answer. A base is asked through the run beside it, its adapter off: one model is in memory."""
    source = Source((job.questions,))
    n_questions, questions = survey(source), data_fingerprint(source)
    bundles: dict[str | None, tuple[ModelBundle, dict[str, Any]]] = {}
    runs = [side for side in job.sides if side != BASE and not is_data_file(side)]
    for side, path in zip(job.sides, paths, strict=True):
        if path is None:
            continue
        source_run = side if side != BASE else runs[0] if runs else None
        if source_run not in bundles:
            bundles.clear()
            bundles[source_run] = load_bundle(job.model, source_run, job.prompt_type)
        bundle, depends_on = bundles[source_run]
        base_alone: AbstractContextManager[Any] = nullcontext()
        if side == BASE and source_run is not None:
            if not has_adapter(bundle.model):
                raise ConfigError(
                    "--a" if job.sides[0] == BASE else "--b",
                    f"base: {source_run} is no adapter but a model of its own; have its base answer with "
                    f"{command('generate')} and give the file of its answers here",
                )
            base_alone, depends_on = without_adapter(bundle.model), {**depends_on, "adapter": None}
        depends_on = {**depends_on, "questions": questions, **asdict(job.sampling)}
        with AnswerFile(path, depends_on) as answers, base_alone:
            answer_questions(BatchJob(bundle, source, n_questions, job.sampling, job.batch_size), answers)
    write_whole(job.folder / PAIRS_FILE, json.dumps(_about(job), indent=1) + "\n")


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file in any shape that training reads, or as `onecard generate` wrote it; questions that could
    not be answered are left out. Raises DataError with the line of a record that cannot be read."""
    found: list[Answer] = []
    for line, record in records_of(path):
        try:
            found += _answer_in(record, f"{path}:{line}")
        except UnusableRecord as reason:
            raise DataError(str(reason), str(path), line) from None
    if not found:
        raise DataError("holds no answer", str(path))
    return found


def _answer_in(record: dict[str, Any], where: str) -> Iterator[Answer]:
    if "finish_reason" in record and "output" in record:  # of `onecard generate`, beside the record's own reference
        asked = to_question({name: value for name, value in record.items() if name not in OWN_FIELDS}, where).sample
        if isinstance(asked, Conversation) and record["output"] is not None:
            yield asked.turns, str(record["output"])
        return
    sample = to_sample(record, where).sample
    if not isinstance(sample, Conversation) or sample.turns[-1].role != "assistant":
        raise UnusableRecord("the record holds no question with an answer")
    yield sample.turns[:-1], sample.turns[-1].content


def pair_up(a: Sequence[Answer], b: Sequence[Answer]) -> list[VotedPair]:
    """The answers to the same questions; of a question that is asked several times, in their order."""
    waiting: dict[tuple[Turn, ...], list[str]] = {}
    for turns, answer in b:
        waiting.setdefault(turns, []).append(answer)
    pairs = []
    for number, (turns, answer) in enumerate(a, start=1):
        if waiting.get(turns):
            pairs.append(VotedPair(str(number), turns, answer, waiting[turns].pop(0)))
    return pairs
