"""Questions to the model while it is being trained: it answers with its present weights, and trains on undisturbed.

The model itself answers, no copy of it. What answering might change is put back, so the run is bitwise what it would
have been. Knows a `Run` and turns; what writes answers is handed in (inference/live_answers.py), since packages of one
layer do not know each other.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch

from onecard.config.inference import SamplingOptions
from onecard.config.problems import refuse
from onecard.config.run import TrainOptions
from onecard.console import few, say, warn
from onecard.data.messages import Turn
from onecard.data.questions import Question, read_questions, to_question
from onecard.data.sources import ReadReport
from onecard.data.values import UnusableRecord
from onecard.errors import ConfigError, DataError, OneCardError
from onecard.installation import command
from onecard.model.hardware import count_gpus
from onecard.train.run import Run
from onecard.train.step_log import StepLog

Answerer = Callable[[Sequence[Turn], SamplingOptions, threading.Event], Iterator[Any]]
MOST_NEW_TOKENS, MOST_BEAMS = 4096, 16
STANDING_TOKENS = 256  # of an answer at each evaluation
WORDS = ("question", "messages", "system")
_SHOWN = 200  # characters of an answer on the terminal


class Questions:
    """Asks one run's model; `standing` questions are asked again at each evaluation."""

    def __init__(
        self, answer: Answerer, log: StepLog, standing: Sequence[Sequence[Turn]] = (), refusal: str = ""
    ) -> None:
        """refusal: why this run cannot be asked; empty where it can."""
        self._answer, self._log, self._standing, self.refusal = answer, log, standing, refusal

    def ask(
        self, run: Run, turns: Sequence[Turn], sampling: SamplingOptions,
        on_text: Callable[[str], None] = lambda text: None, must_end: Callable[[], bool] = lambda: False,
    ) -> str:  # fmt: skip
        """The answer of the present weights, which is logged; `on_text` gets it while it grows.

        must_end: asked again and again; an answer that is ended so is cut. Raises OneCardError where there is none.
        """
        if self.refusal:
            raise ConfigError("", self.refusal)
        cancel = threading.Event()
        chunk = None
        with _undisturbed(run):
            for chunk in self._answer(turns, sampling, cancel):
                on_text(chunk.text)
                if must_end():
                    cancel.set()
        assert chunk is not None
        self._log.write(run.state.step, [_row(turns, sampling, chunk)])
        return str(chunk.text)

    def ask_standing(self, run: Run) -> None:
        """Ask those of --ask and --ask_file, by the likeliest tokens, and say the answers; on the first process."""
        if not run.accelerator.is_main_process:
            return
        for turns in self._standing:
            try:
                answer = self.ask(run, turns, SamplingOptions(max_new_tokens=STANDING_TOKENS))
            except OneCardError as reason:
                warn(f"{_shown(turns[-1].content)} was not answered: {reason}")
                continue
            say(f"step {run.state.step}: {_shown(turns[-1].content)} -> {_shown(answer)}")


def standing_questions(options: TrainOptions) -> list[tuple[Turn, ...]]:
    """Those of --ask and --ask_file. Raises DataError for a file without any."""
    from_file = read_questions(options.ask_file, report=ReadReport()) if options.ask_file else ()
    return [(Turn("user", text),) for text in options.ask] + [question.turns for question in from_file]


def refusal_of(options: TrainOptions) -> str:
    """Why a run cannot be asked while it trains; empty where it can."""
    if options.objective == "reward":
        return "a reward model judges answers and writes none"
    if options.deepspeed or options.shard:
        flag = "--deepspeed" if options.deepspeed else "--shard"
        return f"{flag}: an answer would need all processes at once; ask its newest checkpoint ({command('generate')})"
    return ""


def answering_context(accelerator: Any) -> AbstractContextManager[Any]:
    """What a model that is being trained computes answers in: without gradients, in the arithmetic of training.

    Not `torch.inference_mode`: what a module keeps of that could not be trained with.
    """
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(accelerator.autocast())
    return stack


def question_of(given: Mapping[str, Any]) -> tuple[tuple[Turn, ...], SamplingOptions]:
    """The conversation and the settings of a request. Raises ConfigError and DataError that say what is wrong."""
    unknown = sorted(given.keys() - {*WORDS, *(each.name for each in fields(SamplingOptions))})
    if unknown:
        raise ConfigError("", f"a question has no {few(unknown)}")
    if ("question" in given) == ("messages" in given):
        raise ConfigError("", "a question has one of question and messages")
    messages = given["messages"] if "messages" in given else [{"role": "user", "content": given["question"]}]
    if given.get("system"):
        messages = [{"role": "system", "content": given["system"]}, *messages]
    try:
        question = to_question({"messages": messages}, "the question").sample
    except (UnusableRecord, TypeError) as reason:
        raise DataError(f"the question cannot be asked: {reason}") from reason
    assert isinstance(question, Question)  # `to_question` makes nothing else
    return tuple(question.turns), _sampling_of({name: given[name] for name in given.keys() - {*WORDS}})


def _sampling_of(given: Mapping[str, Any]) -> SamplingOptions:
    defaults = SamplingOptions()
    for name, value in given.items():
        default = getattr(defaults, name)
        kinds = (int, float) if isinstance(default, float) else type(default)
        texts = isinstance(value, list) and not all(isinstance(each, str) for each in value)
        if isinstance(value, bool) or not isinstance(value, kinds) or texts:
            raise ConfigError(name, f"{value!r} is no {type(default).__name__}")
    # JSON writes 1.0 as 1, and transformers takes no whole number for a temperature.
    floats = {name for name in given if isinstance(getattr(defaults, name), float)}
    settings: dict[str, Any] = {name: float(value) if name in floats else value for name, value in given.items()}
    sampling = SamplingOptions(**settings)
    refuse(sampling.problems())
    if sampling.max_new_tokens > MOST_NEW_TOKENS or sampling.num_beams > MOST_BEAMS:
        raise ConfigError("", f"a run answers with at most {MOST_NEW_TOKENS} tokens and {MOST_BEAMS} beams")
    return sampling


def _row(turns: Sequence[Turn], sampling: SamplingOptions, chunk: Any) -> dict[str, Any]:
    """What the log keeps of an answer; all turns where there are several."""
    row: dict[str, Any] = {"question": turns[-1].content}
    if len(turns) > 1 or turns[-1].input:
        row["messages"] = [{"role": turn.role, "content": turn.one_text()} for turn in turns]
    more = {"answer": chunk.text, "finish_reason": chunk.finish_reason, "n_tokens": chunk.usage.n_new_tokens}
    return row | more | {"settings": asdict(sampling)}


def _shown(text: str) -> str:
    """On one line, not too long."""
    line = " ".join(text.split())
    return f"{line[:_SHOWN]}..." if len(line) > _SHOWN else line


@contextmanager
def _undisturbed(run: Run) -> Iterator[None]:
    """Let the model answer: without dropout, noise and recomputed layers. Its modes and all random states come back."""
    model: torch.nn.Module = run.plain_model
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    is_on_card = run.accelerator.device.type == "cuda"
    with torch.random.fork_rng(devices=range(count_gpus()) if is_on_card else []):
        model.eval()
        try:
            yield
        finally:
            for module, was_training in modes:
                module.training = was_training
            random.setstate(python)
            np.random.set_state(numpy)
