"""Measure a model: multiple choice, open answers, extraction and perplexity, from local files, with a report.

onecard evaluate --suite ceval:ceval-exam --suite mmlu:data --lora_path outputs/mine --output_path measured
onecard evaluate --suite loss:held_out.json --lora_path outputs/mine --sweep_scale 0.25,0.5,1,1.5 --output_path swept
onecard evaluate --compare measured_base measured --output_path compared
onecard evaluate lm-eval --tasks arc_easy --lora_path outputs/mine
onecard evaluate ship --run outputs/mine
onecard evaluate blind --a base --b outputs/mine --questions questions.jsonl --output_path blind
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onecard.config.base_model import ModelOptions
from onecard.config.inference import AnsweringModelOptions, scale_problems
from onecard.config.parsing import comma_list, missing, parse
from onecard.config.problems import Problem, too_small
from onecard.console import say
from onecard.errors import ConfigError
from onecard.inference.run_files import stored_options
from onecard.programs import _blind, _lm_eval, _ship

if TYPE_CHECKING:
    from onecard.curation.make.journal import Journal
    from onecard.evaluate.run import EvaluationTask
    from onecard.inference.call import ModelBundle


@dataclass
class EvaluateOptions:
    """What is measured, and how it is asked."""

    suite: str | list[str] = ""
    """What to measure on, KIND:PATH, may be repeated. KIND: ceval, cmmlu, mmlu, mmcu, gaokao (folders as their authors
    publish them), open, extraction or perplexity (files); without a kind it is told by the layout."""
    output_path: str = ""
    """Folder for the report, answers.jsonl, and journal.jsonl, by which the same command goes on where it was cut."""
    lora_path: str | None = None
    """Adapter: a run directory, one of its checkpoints, or a Hub id. Without it the base model is measured."""
    adapter_scale: float = 1.0
    """How strongly the adapter is put on: 0 is the base, 1 what was trained. For LoRA, LoHa and LoKr."""
    sweep_scale: str = ""
    """Measure at each of these scales of the adapter, with commas between them, and at 0: gain over the base against
    forgetting, and the scale that is best. More scales may be added later to the same --output_path; empty: none."""
    prompt_type: str = "auto"
    """Prompt template. auto takes the one stored with the adapter."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether the model thinks before it answers, where its prompt template has a switch for that."""
    prompt: Literal["auto", "base", "chat"] = "auto"
    """Multiple choice as plain text (base) or in the prompt template (chat). auto: chat with an adapter, or where the
    tokenizer has a template of its own."""
    method: Literal["likelihood", "choice", "free"] = "likelihood"
    """Multiple choice by the likelihood of the options' letters, by decoding that may only write one of them (choice),
    or by an answer that is written freely, whose letter is then looked for."""
    shots: int = 0
    """Examples in front of each question: of the split dev, or drawn by --seed where there is none."""
    cot: bool = False
    """With --method free: the model reasons before it answers."""
    split: Literal["auto", "dev", "val", "test"] = "auto"
    """Which questions of a benchmark. auto: val for C-Eval, whose test has no answers; test for the others."""
    subjects: str = ""
    """Only these subjects of the benchmarks, with commas between them."""
    limit: int = 0
    """Only so many records of each suite from the top; 0: all."""
    batch_size: int = 8
    """Questions that are answered at once."""
    max_new_tokens: int = 0
    """Longest answer in tokens. 0: 16 for a letter, 512 otherwise."""
    window: int = 0
    """Perplexity: tokens that are read at once. 0: what the model can read, at most 2,048."""
    stride: int = 0
    """Perplexity: tokens between the beginnings of two windows. 0: half a window."""
    seed: int = 42
    """Seed of the intervals by resampling, and of drawn examples."""
    base_url: str = ""
    """Address of an OpenAI-compatible endpoint that grades open answers, such as that of onecard serve; empty: none."""
    judge_model: str = ""
    """Name of the model there."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; without one in it none is sent."""
    timeout_s: float = 300.0
    """Seconds until a grading must be whole."""
    max_attempts: int = 6
    """Times that the endpoint is asked before the evaluation ends; what was graded is kept."""
    compare: str | list[str] = ""
    """Measure nothing; compare two folders that this program wrote, A B, over the records that both answered, with the
    interval of the difference. A run of finetune --eval_suites stands for what it measured at its end, "base" for what
    the other run measured before its first step. --output_path is then the folder for comparison.json and
    comparison.md; empty: none."""

    def problems(self) -> list[Problem]:
        if self.compare:
            found = [("--suite", "and --compare contradict each other: one measures, the other reads")] * bool(
                self.suite
            )
            is_pair = isinstance(self.compare, list) and len(self.compare) == 2
            return found if is_pair else [*found, ("--compare", "takes two folders: A B")]
        found = missing(self, "suite", "output_path") + scale_problems(self.adapter_scale) + self._sweep_problems()
        if self.cot and self.method != "free":
            found.append(("--cot", f"needs --method free: {self.method} leaves no room to reason"))
        if bool(self.base_url) != bool(self.judge_model):
            found.append(("--judge_model", "and --base_url go together: which model grades, and where it is"))
        found += too_small(self, batch_size=1, shots=0, limit=0, max_new_tokens=0, window=0, stride=0, seed=0,
                           max_attempts=1)  # fmt: skip
        if self.window == 1:
            found.append(("--window", "1 token tells nothing of the next; use 2 or more"))
        elif 0 < self.window <= self.stride:
            found.append(("--stride", f"{self.stride} is not below the window of {self.window} tokens"))
        return found

    def _sweep_problems(self) -> list[Problem]:
        if not self.sweep_scale:
            return []
        try:
            wrong = [scale for scale in self.scales if not 0 <= scale <= 10]
        except ValueError:
            return [("--sweep_scale", f"{self.sweep_scale!r} is no list of numbers, such as 0.25,0.5,1")]
        found = [("--sweep_scale", f"{scale:g} is not between 0 (the base) and 10") for scale in wrong]
        if not self.lora_path:
            found.append(("--sweep_scale", "needs an adapter to scale: give --lora_path"))
        if self.adapter_scale != 1:
            found.append(("--adapter_scale", "and --sweep_scale contradict each other: one scale, or several"))
        if self.base_url:
            found.append(("--base_url", "does not go with --sweep_scale, which compares scores without a judge"))
        return found

    @property
    def scales(self) -> list[float]:
        """The scales of --sweep_scale and 0, in order. Raises ValueError for what is no number."""
        return sorted({0.0, *map(float, comma_list(self.sweep_scale))})

    @property
    def suites(self) -> list[str]:
        """The suites, one or several."""
        return [self.suite] if isinstance(self.suite, str) else list(self.suite)


@dataclass
class EvaluateConfig:
    """Everything this program needs; see the classes of its fields."""

    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    model: ModelOptions = field(default_factory=AnsweringModelOptions)


LEVEL = 0.95  # of the intervals of a comparison, as of those of a report
# Options that change how an evaluation is carried out, and none of its figures.
_MAY_CHANGE = (
    "suite", "output_path", "lora_path", "sweep_scale", "batch_size", "base_url", "judge_model", "api_key_env",
    "timeout_s", "max_attempts",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbs = {"blind": _blind.main, "lm-eval": _lm_eval.main, "ship": _ship.main}
    if words and words[0] in verbs:
        verbs[words[0]](words[1:])
        return
    config = parse(
        EvaluateConfig, words, description=__doc__, stored=lambda typed: stored_options(typed.get("lora_path"))
    )
    if config.evaluate.compare:
        compare(config.evaluate)
    elif config.evaluate.sweep_scale:
        sweep(config)
    else:
        evaluate(config)


def compare(options: EvaluateOptions) -> dict[str, Any]:
    """Put two evaluations side by side; the comparison, which is written where a folder is named."""
    from onecard.evaluate.compare import compare_reports, comparison_lines, folders_of
    from onecard.evaluate.report import comparison_markdown
    from onecard.storage import write_whole

    a, b = folders_of(*options.compare)
    suites = compare_reports(a, b, level=LEVEL, seed=options.seed)
    found = {"a": str(a), "b": str(b), "level": LEVEL, "suites": [suite.plain() for suite in suites]}
    for line in comparison_lines(suites, LEVEL):
        say(line)
    if options.output_path:
        folder = Path(options.output_path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "comparison.json", json.dumps(found, ensure_ascii=False, indent=1) + "\n")
            write_whole(folder / "comparison.md", comparison_markdown(found))
        except OSError as reason:
            raise ConfigError("--output_path", f"cannot be written: {reason}") from None
        say(f"the comparison: {folder / 'comparison.md'}")
    return found


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure as the options say; the report, which is written, too."""
    return _measured(config, *_opened(config))


def sweep(config: EvaluateConfig) -> dict[str, Any]:
    """Measure at each scale into a folder of its own; the report of them all, which is written, too."""
    from onecard.curation.make.journal import Journal
    from onecard.evaluate.compare import read_evaluation
    from onecard.evaluate.page import write_report
    from onecard.evaluate.report import build_report
    from onecard.evaluate.sweep import at_scale, best_scale, forgetting_at, sweep_lines, swept_suite

    options, folder, source = config.evaluate, Path(config.evaluate.output_path), str(config.evaluate.lora_path)
    try:
        # With another scale than 1, so that a method without a strength is refused before anything is measured.
        tasks, bundle, depends_on = _opened(replace(config, evaluate=replace(options, adapter_scale=0)))
    except ConfigError as reason:
        if reason.flag != "--adapter_scale":
            raise
        raise ConfigError("--sweep_scale", str(reason).removeprefix(f"{reason.flag}: ")) from None
    forgetting: dict[float, float] = {}
    rows: dict[float, dict[str, Any]] = {}
    noises = []
    with Journal(folder, _begins_with(options, tasks, depends_on)) as journal:
        for scale in options.scales:
            say(f"--- scale {scale:g}")
            bundle = at_scale(bundle, source, scale)
            where = replace(options, adapter_scale=scale, output_path=str(folder / f"scale_{scale:g}"))
            known = {**depends_on, "adapter_scale": scale}
            if scale == 1:
                del known["adapter_scale"]
            _measured(replace(config, evaluate=where), tasks, bundle, known)
            rows[scale] = read_evaluation(Path(where.output_path))
            forgetting[scale], noise = forgetting_at(bundle, scale, journal)
            noises.append(noise)
    found = [
        swept_suite(task.name, task.kind, {at: one[task.name]["rows"].values() for at, one in rows.items()},
                    options.seed)
        for task in tasks
    ]  # fmt: skip
    suites = [suite for suite in found if suite is not None]
    if not suites:
        raise ConfigError("--suite", "no record of the suites has a score, so there is no gain to be told")
    best = best_scale(suites, forgetting)
    settings = _settings(config, bundle, depends_on) | {
        "best_scale": "-" if best is None else f"{best:g}", "rule": "sweep_rule", "forgetting_noise": max(noises)
    }  # fmt: skip
    report = build_report(settings, [suite.part(forgetting) for suite in suites])
    write_report(folder, report)
    for line in sweep_lines(suites, forgetting, best):
        say(line)
    say(f"the report: {folder / 'report.html'}")
    return report


def _opened(config: EvaluateConfig) -> tuple[list[EvaluationTask], ModelBundle, dict[str, Any]]:
    """What is measured, the model, and what its answers depend on. Raises OneCardError."""
    from onecard.curation.make.journal import check_folder
    from onecard.inference.load import load_bundle

    options = config.evaluate
    check_folder(Path(options.output_path))
    is_chat = options.prompt == "chat" or (options.prompt == "auto" and options.lora_path is not None)
    tasks = _tasks(options, is_chat)
    bundle, depends_on = load_bundle(
        config.model, options.lora_path, options.prompt_type, options.thinking, options.adapter_scale
    )
    if options.prompt == "auto" and not is_chat and bundle.template.name == "auto":
        tasks = _tasks(options, is_chat=True)  # the tokenizer's own template
    return tasks, bundle, depends_on


def _begins_with(options: EvaluateOptions, tasks: list[EvaluationTask], depends_on: dict[str, Any]) -> dict[str, Any]:
    """What the answers depend on, for the journal."""
    # Only what differs from its default: options that later versions add leave a journal as it is.
    defaults = vars(EvaluateOptions())
    chosen = {
        name: value for name, value in vars(options).items() if value != defaults[name] and name not in _MAY_CHANGE
    }
    return {"options": chosen, "model": depends_on, "suites": {task.name: task.depends_on() for task in tasks}}


def _measured(
    config: EvaluateConfig, tasks: list[EvaluationTask], bundle: ModelBundle, depends_on: dict[str, Any]
) -> dict[str, Any]:
    """Answer what is not answered yet, and write the report."""
    from onecard.curation.make.journal import Journal
    from onecard.evaluate.page import write_report
    from onecard.evaluate.report import build_report
    from onecard.evaluate.run import summary_lines
    from onecard.evaluate.tasks import answered
    from onecard.inference.adapters import name_of

    options, folder = config.evaluate, Path(config.evaluate.output_path)
    with Journal(folder, _begins_with(options, tasks, depends_on)) as journal:
        settings = _settings(config, bundle, depends_on)
        name = name_of(options.lora_path or settings["model"])
        parts = answered(folder, tasks, bundle, journal, options.batch_size, name)
        report = build_report(settings, parts)
        write_report(folder, report)
        if options.base_url:
            _judge(options, tasks, journal, parts)
            report = build_report(settings, parts)
            write_report(folder, report)
    for line in summary_lines(report):
        say(line)
    say(f"the report: {folder / 'report.html'}")
    return report


def _tasks(options: EvaluateOptions, is_chat: bool) -> list[EvaluationTask]:
    """Everything is read before the model is loaded. Raises ConfigError and DataError."""
    from onecard.evaluate.tasks import TaskOptions, tasks_of

    asked = TaskOptions(options.method, options.shots, options.cot, options.split, options.subjects, options.limit,
                        options.max_new_tokens, options.window, options.stride, options.seed)  # fmt: skip
    return tasks_of(options.suites, is_chat, asked)


def _settings(config: EvaluateConfig, bundle: ModelBundle, depends_on: dict[str, Any]) -> dict[str, Any]:
    """How the answers came about, for the report."""
    from onecard.inference.load import base_path

    options = config.evaluate
    settings = {
        "model": base_path(config.model.model_path, options.lora_path), "adapter": options.lora_path or "-",
        "bits": depends_on["bits"], "dtype": depends_on["dtype"], "template": bundle.template.known_name,
        "base": str(depends_on["base"])[:16],
    }  # fmt: skip
    settings |= {"adapter_scale": options.adapter_scale} if options.adapter_scale != 1 else {}
    return settings | {"thinking": options.thinking, "seed": options.seed, "interval": "95 %"}


def _judge(
    options: EvaluateOptions, tasks: list[EvaluationTask], journal: Journal, parts: list[dict[str, Any]]
) -> None:
    """Have open answers graded, and put the grades into the parts of the report."""
    from onecard.curation.make.endpoint import Endpoint, EndpointSettings
    from onecard.curation.make.journal import Journal as GradeJournal
    from onecard.curation.make.run import TokenPrices, make
    from onecard.evaluate.judge import JUDGE_FOLDER, judge_tasks, judged_measures
    from onecard.evaluate.open_answers import OpenTask
    from onecard.evaluate.run import rows_of

    judged = [task for task in tasks if isinstance(task, OpenTask)]
    rows = {task.name: {row["key"]: row["answer"] for row in rows_of(task, journal)} for task in judged}
    settings = EndpointSettings(
        options.base_url, options.judge_model, options.api_key_env, temperature=0.0, timeout_s=options.timeout_s,
        max_attempts=options.max_attempts,
    )  # fmt: skip
    folder = Path(options.output_path) / JUDGE_FOLDER
    with Endpoint(settings) as endpoint, GradeJournal(folder, {"judge": options.judge_model}) as grades:
        make(endpoint, options.judge_model, grades, judge_tasks(judged, rows, grades), TokenPrices())
        for task, part in zip(tasks, parts, strict=True):
            if not isinstance(task, OpenTask):
                continue
            part["settings"]["judge"] = options.judge_model
            found = {measure.name: measure for measure in judged_measures(task, grades, options.seed)}
            for measure in part["measures"]:
                measure["values"] |= found[measure["name"]].plain()["values"]
