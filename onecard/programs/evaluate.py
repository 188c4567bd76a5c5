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
from typing import TYPE_CHECKING, Any

from onecard.config.base_model import ModelOptions
from onecard.config.evaluation import EvaluateOptions
from onecard.config.inference import AnsweringModelOptions
from onecard.config.parsing import parse
from onecard.console import say
from onecard.errors import ConfigError
from onecard.inference.run_files import stored_by_first
from onecard.programs import _blind, _lm_eval, _ship

if TYPE_CHECKING:
    from onecard.curation.make.journal import Journal
    from onecard.evaluate.run import EvaluationTask
    from onecard.inference.call import ModelBundle


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
    config = parse(EvaluateConfig, words, description=__doc__, stored=stored_by_first)
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
    """What is measured, read before the model is loaded, the model, and what its answers depend on."""
    from onecard.curation.make.journal import check_folder
    from onecard.evaluate.tasks import tasks_of
    from onecard.inference.load import load_bundle

    options = config.evaluate
    check_folder(Path(options.output_path))
    is_chat = options.prompt == "chat" or (options.prompt == "auto" and options.lora_path is not None)
    tasks = tasks_of(options, is_chat)
    bundle, depends_on = load_bundle(
        config.model, options.lora_path, options.prompt_type, options.thinking, options.adapter_scale
    )
    if options.prompt == "auto" and not is_chat and bundle.template.name == "auto":
        tasks = tasks_of(options, is_chat=True)  # the tokenizer's own template
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
