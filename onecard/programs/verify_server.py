"""Compare a server with the run that it serves: same model, same template, same stop, and if not, by which usual cause.

onecard verify-server http://localhost:8000/v1 --run outputs/my-first-adapter

For onecard serve, vLLM, SGLang, llama.cpp, Ollama, LM Studio and what else speaks OpenAI's API. A few short prompts
with their answers, stored when the run ended (server_check.json), are asked there. Ends with 0: the same, 2: not the
same, 3: undecided, 1: the server cannot be asked.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from onecard.config.base_model import ModelOptions
from onecard.config.inference import AnsweringModelOptions
from onecard.config.parsing import missing, parse, words_by_name
from onecard.config.problems import Problem
from onecard.console import say, warn
from onecard.errors import OneCardError
from onecard.inference.run_files import stored_options

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass
class VerifyServerOptions:
    """Which server, which run, and how much may be lost on the way."""

    url: str = ""
    """Address of the server, with or without /v1; the first word of the command."""
    run: str = ""
    """Directory of the run that the server should serve."""
    model: str = ""
    """Name of the model there; without it the run's own name, else the first adapter or model of /v1/models."""
    api_key: str = ""
    """Key of the server; without it what the environment variable OPENAI_API_KEY holds."""
    max_kl: float = 0.1
    """Up to this divergence (nats per token) the model counts as the same, quantised: 8 bits have about 0.002, 4 bits
    0.03, 3 bits 0.1 and 2 bits 0.5."""
    max_seconds: float = 120.0
    """Time for all requests together."""
    json: bool = False
    """Print one JSON object."""

    def problems(self) -> list[Problem]:
        found = missing(self, "url", "run")
        if self.run and not Path(self.run).expanduser().is_dir():
            found.append(("--run", f"{self.run} is not a directory"))
        if self.max_kl <= 0:
            found.append(("--max_kl", f"{self.max_kl} is not above 0; other kernels alone make some thousandths"))
        if self.max_seconds <= 0:
            found.append(("--max_seconds", f"{self.max_seconds} leaves no time; use a minute or two"))
        return found


@dataclass
class VerifyServerConfig:
    """Everything this program needs; the base is loaded only for a run without stored answers."""

    verify: VerifyServerOptions = field(default_factory=VerifyServerOptions)
    model: ModelOptions = field(default_factory=AnsweringModelOptions)


class NotTheSame(OneCardError):
    """The server is another model, or has another template or stop."""

    exit_code = 2


class Undecided(OneCardError):
    """What the server answers does not tell."""

    exit_code = 3


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    words = words_by_name(argv, "--url")
    verify(
        parse(
            VerifyServerConfig, words, description=__doc__ or "", stored=lambda typed: stored_options(typed.get("run"))
        )
    )


def verify(config: VerifyServerConfig) -> None:
    """Compare, say what was found. Raises NotTheSame, Undecided and what else keeps it from being found."""
    from onecard.inference.load import load_tokenizer_and_template
    from onecard.serve.verify.client import ServerClient
    from onecard.serve.verify.compare import ServerComparison
    from onecard.serve.verify.make import check_of

    options, run = config.verify, Path(config.verify.run).expanduser()
    key = options.api_key or os.environ.get(KEY_VARIABLE, "")
    with ServerClient(options.url, key, model=options.model, seconds=options.max_seconds) as client:
        known = client.models()  # a dead server is told before a model is loaded
        client.model = options.model or chosen_model(known, run.name)
        check = check_of(run, config.model)
        base = replace(config.model, model_path=str(check.about.get("base", "")))
        tokenizer, template = load_tokenizer_and_template(base, str(run), "auto")
        client.start_clock()
        report = ServerComparison(client, check, template, tokenizer, options.max_kl).report()
    if options.json:
        content = {"url": options.url, "model_name": client.model, "run": options.run, **report.to_json()}
        say(json.dumps(content, ensure_ascii=False, indent=1), is_styled=False)
    else:
        say(f"{client.model} at {client.root}, compared in {len(check.prompts)} prompts")
        for question, found in (("model", report.model), ("template", report.template), ("stop", report.stop)):
            cause = f"{found.cause}: " if found.cause else ""
            say(f"  same {question}: {found.same} - {cause}{found.words}")
        for note in report.notes:
            warn(note)
    causes = [found.cause for found in (report.model, report.template, report.stop) if found.cause]
    if report.same == "no":
        raise NotTheSame(f"this server is not what was trained: {', '.join(causes)}")
    if report.same == "unknown":
        raise Undecided("it shows not whether this server is what was trained; see the lines above")


def chosen_model(known: list[str], run: str) -> str:
    """The name to ask for: the run's, else the first one. Raises ConfigError where there is none."""
    if not known:
        raise Undecided("the server names no model (/v1/models is empty); load one there, or give --model")
    named = next((name for name in known if name.split("/")[-1].split(":")[0] == run), known[0])
    if len(known) > 1 and named != run:
        warn(f"the server has {len(known)} models; {named} is compared (--model names another one)")
    return named
