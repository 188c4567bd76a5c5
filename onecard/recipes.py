"""The stories, each on one screen: fine-tune a model; ask a model.

A recipe strings the parts together and decides nothing else; what a part does is told in its own module. Heavy
libraries are imported inside the recipes, after the options are known to be good.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from onecard import cli
from onecard.config import FinetuneConfig
from onecard.config_talk import GenerateConfig
from onecard.console import say


def finetune(config: FinetuneConfig) -> Path:
    """Train an adapter as `config` says, going on from where an earlier start of the same run was cut off.

    Returns the run's directory, complete enough to resume, chat and export from.

    Raises OneCardError (see `console.py`) with what to do next; a run that was asked to stop raises `Stopped`.
    """
    from onecard.model.quantization import quiet_bitsandbytes

    with quiet_bitsandbytes():
        return _finetune(config)


def _finetune(config: FinetuneConfig) -> Path:
    from onecard.model.adapters import describe_trainable
    from onecard.model.hardware import detect
    from onecard.train.loop import train
    from onecard.train.reporting import check_sinks
    from onecard.train.rundir import RunDirectory, Settings
    from onecard.train.setup import build_accelerator, build_run, open_reporter, prepare_data, start_position

    check_sinks(wandb=config.train.wandb, tensorboard=config.train.tensorboard)
    config.model.model_path = _findable(config.model.model_path)
    directory = RunDirectory(Path(config.train.output_path))
    with directory.locked():
        hardware = detect(config.model.device)
        accelerator = build_accelerator(config, hardware)
        found = start_position(config, directory, accelerator)
        data = prepare_data(config, accelerator)
        run = build_run(config, hardware, accelerator, data, found, directory)
        say(describe_trainable(run.plain_model))
        settings = Settings(cli.to_yaml(config), data.tokenizer, data.template.jinja)
        directory.write_settings(settings)
        reporter = open_reporter(config, run, directory)
        try:
            state = train(run, reporter)
        finally:
            reporter.close()
        directory.publish(settings, state, final_weights=config.train.final_weights)
    return directory.path


def _findable(model_path: str) -> str:
    """A local base as an absolute path: the run's directory is used from other folders later."""
    path = Path(model_path).expanduser()
    return str(path.resolve()) if path.is_dir() else model_path


def generate(config: GenerateConfig) -> None:
    """Let a model answer as `config` says: one instruction, a file of questions, or a person at the keyboard.

    Raises OneCardError with what to do next; stopped in the middle of a file it raises `Stopped`, and goes on there
    when it is started again.
    """
    from onecard.model.quantization import quiet_bitsandbytes

    with quiet_bitsandbytes():
        _generate(config)


def _generate(config: GenerateConfig) -> None:
    from onecard.talk.answer_file import AnswerFile
    from onecard.talk.answers import Job, answer_questions, survey, with_system
    from onecard.talk.generation import Generation, answer_rows, prepare
    from onecard.talk.loading import load_talker
    from onecard.talk.terminal import answer_once, interact
    from onecard.text.conversation import Turn
    from onecard.text.sources import data_fingerprint

    ask, sampling = config.ask, config.sampling
    n_questions = survey(ask.data_path) if ask.data_path else 0
    talker, depends_on = load_talker(config.model, config.talker.lora_path, config.talker.prompt_type)

    def answer(instruction: str, number: int) -> Generation:
        turns = with_system([Turn("user", instruction, ask.input)], config.talker.system)
        return answer_rows(talker, [prepare(talker, turns, sampling, number=number)], sampling)[0]

    if ask.data_path and ask.output_path:
        depends_on |= {"questions": data_fingerprint(ask.data_path), **asdict(sampling), "system": config.talker.system}
        job = Job(talker, ask.data_path, n_questions, sampling, ask.batch_size, config.talker.system)
        with AnswerFile(Path(ask.output_path), depends_on) as answers:
            tally = answer_questions(job, answers)
        say(f"{tally.line()}; all {n_questions} are in {ask.output_path}")
    elif ask.instruction is not None:
        answer_once(answer, ask.instruction)
    else:
        interact(answer)
