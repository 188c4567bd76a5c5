"""`onecard evaluate lm-eval`: lm-evaluation-harness on a base, a run directory or a server, as a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass, field, replace

from onecard.config.base_model import ModelOptions, rope_scaling_of
from onecard.config.inference import AnsweringModelOptions
from onecard.config.parsing import missing, parse
from onecard.config.problems import Problem
from onecard.console import say
from onecard.errors import ConfigError, ModelError
from onecard.inference.run_files import stored_by_first
from onecard.installation import command


@dataclass
class LmEvalOptions:
    """Which tasks, and on what."""

    tasks: str = ""
    """Tasks of lm-evaluation-harness, with commas between them; it loads their data from the Hub."""
    lora_path: str | None = None
    """Adapter: a run directory, or one of its checkpoints. Without it the base model is measured."""
    base_url: str = ""
    """Measure a server instead, such as onecard serve: its address, which ends with /v1."""
    served_model: str = ""
    """Name of the model at --base_url. onecard serve: its --model_name, else the folder of the adapter or the base."""
    include_path: str = ""
    """Folder of tasks of your own, as YAML."""
    num_fewshot: int = -1
    """Examples in front of each question; -1: as the task has it."""
    limit: int = 0
    """Only so many questions of each task; 0: all."""
    batch_size: str = "8"
    """Questions at once, or auto."""
    output_path: str = ""
    """Folder for the harness's own results, each answer included; empty: they are only printed."""
    apply_chat_template: bool = False
    """Ask in the tokenizer's chat template."""

    def problems(self) -> list[Problem]:
        found = missing(self, "tasks")
        if self.base_url and self.lora_path:
            found.append(("--lora_path", "and --base_url contradict each other; the server has its adapter"))
        if bool(self.base_url) != bool(self.served_model):
            found.append(("--served_model", "and --base_url go together: which model, and where it is served"))
        return found


@dataclass
class LmEvalConfig:
    """Everything this verb needs; see the classes of its fields."""

    lm_eval: LmEvalOptions = field(default_factory=LmEvalOptions)
    model: ModelOptions = field(default_factory=AnsweringModelOptions)


def main(words: list[str]) -> None:
    """Run the verb with these words."""
    about = "Start lm-evaluation-harness (requirements-eval.txt) with what it has to know of a base, a run or a server."
    config = parse(LmEvalConfig, words, description=about, verb="lm-eval", stored=stored_by_first)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("", "lm-evaluation-harness is not installed: pip install -r requirements-eval.txt")
    started = command_of(config)
    say("starting: " + " ".join(started[1:]))
    done = subprocess.run(started, check=False)
    if done.returncode:
        raise ModelError(f"lm-evaluation-harness ended with status {done.returncode}; what it said stands above")


def command_of(config: LmEvalConfig) -> list[str]:
    """The harness's command line. Its model reads the same bits, and begins a text as the tokenizer does."""
    from onecard.data.special_tokens import beginning_ids
    from onecard.inference.load import base_path, load_tokenizer_and_template
    from onecard.inference.run_files import has_tokenizer, run_directory

    options = config.lm_eval
    base = base_path(config.model.model_path, options.lora_path)
    tokenizer, _ = load_tokenizer_and_template(replace(config.model, model_path=base), options.lora_path, "auto")
    # The harness leaves it out by default, of a server, too, which is sent ids; many models are far worse without.
    begins_with_bos = {"add_bos_token": str(bool(beginning_ids(tokenizer)))}
    if options.base_url:
        model = "local-completions"
        arguments = {"base_url": f"{options.base_url.rstrip('/')}/completions", "tokenizer": base}
        arguments["model"] = options.served_model
        arguments |= {"tokenizer_backend": "huggingface", **begins_with_bos}
    else:
        if rope_scaling_of(config.model.rope_scaling) is not None:
            raise ConfigError("--rope_scaling", f"{config.model.rope_scaling} does not reach the harness, which loads "
                              f"the base by itself: merge the run ({command('merge')}) and give --model_path, or serve "
                              "it and give --base_url")  # fmt: skip
        model = "hf"
        arguments = {"pretrained": base}
        run = run_directory(options.lora_path)
        if options.lora_path:
            arguments["peft"] = options.lora_path
        if run is not None and has_tokenizer(run):
            arguments["tokenizer"] = str(run)
        arguments |= begins_with_bos
        if config.model.bits in (4, 8):
            arguments[f"load_in_{config.model.bits}bit"] = "True"
        else:
            arguments["dtype"] = "float32" if config.model.bits == 32 else "auto"
    words = [sys.executable, "-m", "lm_eval", "--model", model, "--tasks", options.tasks]
    words += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    words += ["--batch_size", options.batch_size]
    if config.model.device != "auto" and not options.base_url:
        words += ["--device", config.model.device]
    for flag, value in (("--num_fewshot", options.num_fewshot), ("--limit", options.limit or -1)):
        words += [flag, str(value)] if value >= 0 else []
    for flag, text in (("--include_path", options.include_path), ("--output_path", options.output_path)):
        words += [flag, text] if text else []
    words += ["--log_samples"] if options.output_path else []
    return words + (["--apply_chat_template"] if options.apply_chat_template else [])
