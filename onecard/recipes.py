"""The steps of each program: fine-tune a model, ask it, chat with it, serve it.

A recipe strings the parts together and decides nothing else; what a part does is told in its own module. Heavy
libraries are imported inside the recipes, after the options are known to be good.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.config import parsing as cli
from onecard.config.best_of import SAMPLES
from onecard.config.data import toy_base_problem
from onecard.config.inference import AskOptions, ChatConfig, GenerateConfig, PageOptions, ServeConfig
from onecard.config.problems import problems_of, refuse
from onecard.config.training import FinetuneConfig
from onecard.console import say, warn

if TYPE_CHECKING:
    from onecard.data.chat_template import Template
    from onecard.data.messages import Turn
    from onecard.data.sources import Source
    from onecard.evaluate.in_run import RunSuites
    from onecard.inference.call import ModelBundle
    from onecard.inference.engine import InferenceEngine
    from onecard.objectives.rewards import Rewards
    from onecard.train.base_comparison import BaseComparison
    from onecard.train.build import TrainingData
    from onecard.train.control_folder import ControlFolder
    from onecard.train.rollouts import Rollouts
    from onecard.train.run import Run
    from onecard.train.run_control import RunControl
    from onecard.train.rundir import RunDirectory, RunSettings
    from onecard.train.state import TrainerState


def finetune(config: FinetuneConfig) -> Path:
    """Train an adapter as `config` says, going on from where an earlier start of the same run was cut off.

    Returns the run's directory, complete enough to resume, chat and export from.

    Raises OneCardError (see `console.py`) with what to do next; a run that was asked to stop raises `Stopped`.
    """
    from onecard.curation.alike import clusters_of_groups, likeness
    from onecard.inference.call import ModelBundle
    from onecard.model.hardware import detect
    from onecard.model.trained import describe_trained
    from onecard.train import auto_config
    from onecard.train.asking import standing_questions
    from onecard.train.build import build_accelerator, build_run, prepare_data, training_state
    from onecard.train.end_by_clock import end_by_clock
    from onecard.train.held_out import Likeness
    from onecard.train.resume import resolve_start_adapter, resolve_txt_split, start_position, take_over
    from onecard.train.rundir import RunDirectory, RunSettings, portable
    from onecard.train.shared_prompt import resolve_shared_prompt
    from onecard.train.trackers import check_trackers

    refuse(problems_of(config))
    suites = _suites(config)
    standing = standing_questions(config.train)
    clock = end_by_clock(config.train)
    if problem := toy_base_problem(config.model.model_path, config.data.data or config.data.data_path):
        warn(problem)
    check_trackers(wandb=config.train.wandb, tensorboard=config.train.tensorboard)
    config = replace(config, model=portable(config).model)  # adapters remember the name of their base
    directory = RunDirectory(Path(config.train.output_path))
    with directory.locked(), directory.control() as folder:
        hardware = detect(config.model.device, pretend_turing=config.memory.pretend_turing)
        auto_config.cap_memory(hardware, config.memory.vram, config.model.max_memory)
        first = auto_config.first_plan(config, hardware)
        accelerator = build_accelerator(config, hardware, first.model.model_type)
        point = start_position(config, directory, accelerator)
        config = resolve_txt_split(resolve_start_adapter(config, point), point)
        data = prepare_data(config, accelerator, point, Likeness(likeness(), clusters_of_groups))
        config = replace(config, data=replace(config.data, test_size=data.test_size))
        config = auto_config.resolve_total_batch(config, point, data.train.n_per_epoch)
        config = auto_config.resolve_learning_rate(config, first.model, point)
        pinned = resolve_shared_prompt(auto_config.pin_choices(config, point), data.train, data.test, first.model)
        fitted, plan = auto_config.resolve(pinned, hardware, first, data.longest, accelerator)
        state = training_state(config, data, point)
        fitted = auto_config.resolve_lengths(fitted, data.train.n_per_epoch, len(data.test))
        run = build_run(fitted, hardware, accelerator, data, state, point, directory)
        run.plan, run.clock = plan, clock
        run.rollouts = open_rollouts(run, data.tokenizer, data.template, directory.path)
        bundle = ModelBundle(run.plain_model, data.tokenizer, data.template)
        run.control = open_questions(run, bundle, folder, standing)
        if clock is not None:
            clock.resume(run.state.seconds)
        say(describe_trained(run.plain_model))
        settings = RunSettings(cli.to_yaml(portable(config)), data.tokenizer, data.template.jinja)
        directory.write_settings(settings)
        if point is not None:
            take_over(point, run.state, directory)
        _train_and_publish(config, run, data, directory, settings, suites(run, data))
    return directory.path


def _train_and_publish(
    config: FinetuneConfig, run: Run, data: TrainingData, directory: RunDirectory, settings: RunSettings,
    suites: Sequence[RunSuites],
) -> None:  # fmt: skip
    """Train a run that is built, put its result in place, and say how it compares with the base."""
    from onecard.model.trained import write_result
    from onecard.serve.verify.make import check_after_training
    from onecard.train.advice import LearnedData, advise
    from onecard.train.base_comparison import BaseComparison

    comparisons: list[BaseComparison | RunSuites] = [BaseComparison(run, directory.path, config.lora), *suites]
    state = _trained(config, run, directory, comparisons)
    directory.publish(settings, state, config.train, partial(write_result, run.plain_model))
    for comparison in comparisons:
        comparison.after()
    check_after_training(config, run, data, directory.path)
    if run.accelerator.is_main_process and run.rollouts is None:
        report = data.train.dataset.report
        advise(directory.path, LearnedData(data.train.n_per_epoch, report.n_samples, report.n_cut))


def _trained(
    config: FinetuneConfig, run: Run, directory: RunDirectory, comparisons: Sequence[BaseComparison | RunSuites]
) -> TrainerState:
    """Train a run that is built, from its memory probe to its last step; its log is closed whatever happens."""
    from onecard.train.build import open_reporter
    from onecard.train.loop import train
    from onecard.train.memory_probe import probe_if_wanted
    from onecard.train.run import report_events

    reporter = open_reporter(config, run, directory)
    try:
        probe_if_wanted(run, config.memory.rehearsal)
        for comparison in comparisons:
            comparison.before()
        return train(run, reporter)
    finally:
        report_events(run, reporter)
        reporter.close()
        if run.rollouts is not None:
            run.rollouts.close()


def _suites(config: FinetuneConfig) -> Callable[[Run, TrainingData], list[RunSuites]]:
    """What measures the suites of --eval_suites, whose files are read now, once the run is built; nothing without."""
    named = cli.comma_list(config.train.eval_suites)
    if not named:
        return lambda run, data: []
    from onecard.evaluate.in_run import RunSuites, read_suites
    from onecard.inference.call import ModelBundle

    tasks = read_suites(named, config.train.seed)

    def of_run(run: Run, data: TrainingData) -> list[RunSuites]:
        bundle = ModelBundle(run.plain_model, data.tokenizer, data.template, objective=config.train.objective)
        return [RunSuites(tasks, run, bundle, Path(config.train.output_path), config.lora)]

    return of_run


def open_rollouts(run: Run, tokenizer: Any, template: Template, run_dir: Path) -> Rollouts | None:
    """What samples answers for the steps of a run; None where its objective learns recorded ones."""
    if run.options.objective != "grpo":
        return None
    from onecard.inference.call import ModelBundle
    from onecard.inference.rollouts import RolloutSampler
    from onecard.model.memory.rollouts import answers_at_once
    from onecard.objectives.rewards import Answer, Rewards
    from onecard.train.rollouts import Rollouts
    from onecard.train.step_log import ROLLOUTS_NAME, StepLog

    options = run.options
    sampler = RolloutSampler(
        ModelBundle(run.plain_model, tokenizer, template), options.rollout_max_tokens, options.seed
    )
    at_once = options.rollout_batch or (answers_at_once(run.plan) if run.plan is not None else 1)
    say(f"{options.rollouts} answers to each prompt, at most {at_once} sampled at once (--rollout_batch)")
    log = StepLog(run_dir, ROLLOUTS_NAME)
    if run.accelerator.is_main_process:
        log.keep_up_to(run.state.step)
    rewards = Rewards(options)
    for view in (run.train_samples, run.test_samples):
        rewards.check_records(
            Answer("", json.loads(row.fields), row.record) for row in map(view.__getitem__, range(len(view)))
        )
    return Rollouts(sampler, rewards, log, at_once)


def open_questions(
    run: Run, bundle: ModelBundle, folder: ControlFolder, standing: Sequence[Sequence[Turn]]
) -> RunControl:
    """What carries out requests to a run, and asks its model; the `standing` questions at each evaluation."""
    from onecard.inference.live_answers import live_answer
    from onecard.train.asking import Questions, answering_context, refusal_of
    from onecard.train.run_control import RunControl
    from onecard.train.step_log import QUESTIONS_NAME, StepLog

    answers = partial(live_answer, replace(bundle, context=partial(answering_context, run.accelerator)))
    log = StepLog(folder.run_dir or Path(run.options.output_path), QUESTIONS_NAME)
    if run.accelerator.is_main_process:
        log.keep_up_to(run.state.step)
    return RunControl(folder, Questions(answers, log, standing, refusal=refusal_of(run.options)))


def generate(config: GenerateConfig) -> None:
    """Let a model answer as `config` says: one instruction, a file of questions, or a person at the keyboard.

    Raises OneCardError with what to do next; stopped in the middle of a file it raises `Stopped`, and goes on there
    when it is started again.
    """
    if config.ask.web:
        return _ask_page(config)
    if config.ask.data_path and config.ask.output_path:
        return _answer_file(config)
    return _ask(config)


def _ask(config: GenerateConfig) -> None:
    """Answer one instruction, or whoever sits at the keyboard."""
    from onecard.data.messages import Turn
    from onecard.inference.batch.run import with_system
    from onecard.inference.call import Chunk, StreamingOptions
    from onecard.inference.generate import stream
    from onecard.inference.grammar import asked_grammar
    from onecard.inference.load import load_bundle
    from onecard.inference.sampling import CacheOptions
    from onecard.serve.terminal.ask import answer_once, interact

    ask, asked, sampling = config.ask, config.inference, config.sampling
    grammar = asked_grammar(ask.json_schema, ask.regex)
    bundle, _ = load_bundle(config.model, asked.lora_path, asked.prompt_type, asked.thinking, asked.adapter_scale)
    bundle = replace(bundle, cache=CacheOptions(config.inference.static_cache, config.inference.compile))

    def answer(instruction: str, number: int) -> Iterator[Chunk]:
        turns = with_system([Turn("user", instruction, ask.input)], config.inference.system)
        streaming = StreamingOptions(show_beams=ask.show_beams)
        return stream(bundle, turns, sampling, streaming, number=number, grammar=grammar)

    rewrites = sampling.num_beams > 1
    if ask.instruction is not None:
        answer_once(answer, ask.instruction, rewrites=rewrites)
    else:
        interact(answer, rewrites=rewrites)


def _answer_file(config: GenerateConfig) -> None:
    """Answer a file of questions, going on where an earlier start was cut off."""
    from onecard.data.sources import data_fingerprint, source_of
    from onecard.inference.batch.results import AnswerFile
    from onecard.inference.batch.run import BatchJob, answer_questions, survey
    from onecard.inference.grammar import asked_grammar
    from onecard.inference.load import load_bundle

    ask, asked, sampling, system = config.ask, config.inference, config.sampling, config.inference.system
    source, output_path = source_of(ask), str(ask.output_path)
    grammar = asked_grammar(ask.json_schema, ask.regex)
    n_questions = survey(source)
    checkers = _checkers(ask, source) if ask.best_of > 1 and not ask.reward_run else None
    bundle, depends_on = load_bundle(
        config.model, asked.lora_path, asked.prompt_type, asked.thinking, asked.adapter_scale
    )
    depends_on |= {"questions": data_fingerprint(source), **asdict(sampling), "system": system}
    job = BatchJob(bundle, source, n_questions, sampling, ask.batch_size, system, ask.best_of, grammar)
    if ask.best_of > 1:
        depends_on["best_of"] = ask.best_of
        output_path += SAMPLES
    if grammar is not None:  # answers that were held to nothing are gone on with as before
        depends_on["grammar"] = grammar.parts["answer"]
    with AnswerFile(Path(output_path), depends_on) as answers:
        tally = answer_questions(job, answers)
    say(f"{tally.line()}; all {job.n_answers} are in {output_path}")
    if ask.best_of > 1:
        del bundle, job  # a reward model takes its place
        _keep_best(config, source, depends_on, checkers)


def _checkers(ask: AskOptions, source: Source) -> Rewards:
    """What judges answers by rules. Raises DataError for records without what they compare with."""
    from onecard.config.rollouts import RolloutOptions
    from onecard.data.prompts import to_prompt
    from onecard.data.questions import Question
    from onecard.data.sources import ReadReport, read
    from onecard.objectives.rewards import Answer, Rewards

    found = Rewards(RolloutOptions(ask.reward, ask.reward_file, ask.reward_seconds))
    questions = read(source, report=ReadReport(), shape=to_prompt)
    found.check_records(Answer("", each.fields, each.record) for each in questions if isinstance(each, Question))
    return found


def _keep_best(config: GenerateConfig, source: Source, depends_on: dict[str, Any], checkers: Rewards | None) -> None:
    """Judge the sampled answers, and write the best ones and the pairs."""
    from onecard.inference.batch.best_of import BestOfJob, judge_by_checkers, judge_by_model, write_best, write_pairs
    from onecard.inference.batch.results import AnswerFile
    from onecard.inference.batch.reward_model import RewardModel
    from onecard.model.hardware import empty_cache

    ask, system, output = config.ask, config.inference.system, Path(str(config.ask.output_path))
    job = BestOfJob(source, Path(f"{output}{SAMPLES}"), ask.best_of, system)
    empty_cache()
    judged_by: dict[str, Any] = {"reward": ask.reward, "reward_file": ask.reward_file}
    if checkers is not None:
        judge = judge_by_checkers(checkers)
    else:
        model = RewardModel(ask.reward_run, config.model)
        judged_by, judge = {"reward": model.fingerprint}, judge_by_model(model.rewards, system)
    try:
        with AnswerFile(output, depends_on | judged_by) as answers:
            write_best(job, judge, answers)
            say(f"the best of {ask.best_of} answers to each of {answers.n_done} questions are in {output}")
    finally:
        if checkers is not None:
            checkers.close()
    if ask.save_pairs:
        write_pairs(job, output, Path(ask.save_pairs), ask.pair_margin)


def _ask_page(config: GenerateConfig) -> None:
    """Open the page for single questions."""
    from onecard.inference.engine import open_engine
    from onecard.serve.web.app import ask_page, launch
    from onecard.serve.web.examples import questions

    engine = open_engine(config.model, config.inference, config.limits)
    blocks = ask_page(
        engine,
        config.sampling,
        config.page,
        system=config.inference.system,
        show_beams=config.ask.show_beams,
        examples=questions(),
    )
    launch(blocks, config.page, max_body_bytes=config.limits.max_body_bytes)


def chat(config: ChatConfig) -> None:
    """Chat with a model: on a page in the browser, or in the terminal.

    Raises OneCardError with what to do next; faults of single answers are told there and end nothing.
    """
    from onecard.inference.engine import open_engine

    chat, bundle = config.chat, config.inference
    kind = engine_kind(config.documents.documents)
    engine = open_engine(config.model, bundle, config.limits, chat.adapters_path, kind=kind)
    if chat.cli:
        from onecard.inference.history import ChatHistory
        from onecard.serve.terminal.chat import chat_in_terminal

        session = ChatHistory(system=bundle.system)
        chat_in_terminal(engine, session, config.sampling, show_beams=chat.show_beams, load=chat.load_chat)
    else:
        from onecard.serve.web.app import chat_page, launch
        from onecard.serve.web.examples import first_messages

        blocks = chat_page(
            engine, config.sampling, config.page, system=bundle.system, show_beams=chat.show_beams,
            examples=first_messages(),
        )  # fmt: skip
        launch(blocks, config.page, max_body_bytes=config.limits.max_body_bytes)


def engine_kind(index: str | None) -> Callable[..., InferenceEngine]:
    """What makes an engine: one that also answers out of the documents of this index, where there is one."""
    from onecard.inference.engine import InferenceEngine

    if index is None:
        return InferenceEngine
    from onecard.documents.engine import DocumentsEngine, open_search

    return partial(DocumentsEngine, open_search(Path(index)))


def serve(config: ServeConfig) -> None:
    """Serve a model over the OpenAI API, and the chat page beside it if it is wanted, until Ctrl-C or SIGTERM.

    Raises OneCardError with what to do next; faults of single requests go to their clients.
    """
    from onecard.inference.engine import open_engine
    from onecard.serve.api.app import build_app, run_server

    options, bundle = config.serve, config.inference
    engine = open_engine(
        config.model, bundle, config.limits, options.adapters_path, options.model_name, config.parallel,
        engine_kind(config.documents.documents),
    )  # fmt: skip
    app = build_app(engine, options, config.limits, config.sampling, bundle.system)
    if options.web:
        from onecard.serve.web.app import chat_page, mount
        from onecard.serve.web.examples import first_messages

        page = PageOptions(host=options.host, language=options.language)
        blocks = chat_page(engine, config.sampling, page, system=bundle.system, examples=first_messages())
        mount(app, blocks)
    try:
        run_server(app, options.host, options.port)
    finally:
        engine.close()
