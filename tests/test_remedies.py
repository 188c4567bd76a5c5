"""What a message tells somebody to do can be done: each option that it names is one of the program that says it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from onecard.config import parsing as cli
from onecard.config.given_paths import names_paths
from onecard.errors import ConfigError
from tests.call_graph import FLAG, REPOSITORY, CallGraph, named_flags, reached

FOLDER = REPOSITORY / "onecard" / "programs"
PROGRAMS = sorted(FOLDER.glob("[!_]*.py"))
# Programs that hand words on: to which others.
HANDS_ON = {
    "documents": ("serve", "chat"), "quantize": ("quantize_bnb", "quantize_gptq"), "test": (),
    "quickstart": ("finetune", "generate", "chat", "evaluate"),
    "recipe": ("data", "inspect", "finetune", "evaluate", "score"),
}  # fmt: skip
OWN_WORDS = {"quantize": {"method"}, "test": {"all", "gptq", "trl", "real"}, "quickstart": {"examples"}}
# Options of other programs that are started from here, or that a person starts.
FOREIGN = {"gpus", "query", "format", "nproc_per_node", "standalone", "use_deepspeed", "python", "clear",
           "quiet", "dist", "durations", "check", "simcard", "run"}  # fmt: skip
# Code that serves every program through tables of options, and says only what is in the program's own.
BY_TABLE = ("onecard.config.old_names", "onecard.config.given_paths")
# Their `problems` are asked of the classes that make a program's own options: a test below.
OF_OPTIONS = tuple(
    f"onecard.config.{name}"
    for name in ("base_model", "curation", "data", "evaluation", "lora", "run", "training", "rollouts", "inference")
) + tuple(f"onecard.export.{room}.options" for room in ("gguf", "merge", "quantize"))
# (module, option): why the programs that do not have the option never come to its message.
NEVER = {
    ("onecard.data.columns", "columns"): "evaluation reads whole texts of a record, and names no columns",
    ("onecard.data.formats", "columns"): "evaluation tells no problem of a single record",
    ("onecard.data.plain_text", "txt_split"): "evaluation does not tell how a file was read",
    ("onecard.export.io.output", "overwrite"): "the folder between two stages is made where there is none",
    ("onecard.export.merge.merge", "accept_other_base"): "a stage is merged into the base that it was trained on",
    ("onecard.export.merge.merge", "lora_path"): "there is one adapter, that of the stage before",
    ("onecard.export.merge.merge", "dtype"): "only for a name that was typed",
    ("onecard.export.io.output", "max_shard_size"): "a stage is cut into files of the usual size",
    ("onecard.export.io.output", "output_path"): "checksums reads, and makes no directory",
    ("onecard.model.lora.targets", "bits"): "exports build the model without weights, so without bits",
    ("onecard.model.lora.peft_model", "bits"): "exports build the model without weights, so without bits",
    ("onecard.model.hardware", "dtype"): "it is auto where it is no option",
    ("onecard.model.load", "attn_implementation"): "it is auto where it is no option",
    ("onecard.model.load", "max_memory"): "it is None where it is no option",
    ("onecard.inference.engine", "logit_bias"): "an option of a request, told to its client",
    ("onecard.inference.batched.batch", "max_parallel"): "it is 1 where it is no option",
    ("onecard.inference.batched.size", "kv_cache_gib"): "it is 0 where it is no option",
    ("onecard.inference.load", "adapter_scale"): "it is 1 where it is no option",
    ("onecard.model.lora.methods", "adapter_scale"): "it is 1 where it is no option",
    ("onecard.model.trained", "adapter_scale"): "it is 1 where it is no option",
    ("onecard.inference.engine", "top_logprobs"): "an option of a request, told to its client",
    ("onecard.inference.adapters", "adapters_path"): "generate has no folder of adapters",
    ("onecard.inference.adapters", "adapter"): "an option of a request, told to its client",
    ("onecard.inference.model_limits", "num_beams"): "score asks without beams",
    ("onecard.inference.model_limits", "static_cache"): "score asks without a static cache",
    ("onecard.inference.run_files", "adapters_path"): "generate has no folder of adapters",
    ("onecard.data.jinja_chat", "prompt_type"): "merging takes the template that the run was trained with",
    ("onecard.data.lost_turns", "prompt_type"): "merging takes the template that the run was trained with",
    ("onecard.data.lost_turns", "thinking"): "what exports write of a conversation has no thoughts and no calls",
    ("onecard.data.encode", "thinking"): "exports keep no thoughts only",
    ("onecard.data.built_in_templates", "prompt_type"): "merging takes the template that the run was trained with",
    ("onecard.data.chat_template", "thinking"): "exports ask for no thoughts",
    ("onecard.data.sources", "strict"): "only where it was typed",
    ("onecard.export.hub.download", "repo_id"): "data get never fetches into the Hub's cache",
    ("onecard.export.hub.files", "repo_id"): "data get says the same of the collection, without the option",
    ("onecard.inference.generate", "num_beams"): "only with log-probabilities, for which a request asks",
    ("onecard.evaluate.questions", "suite"): "training says it of --eval_suites (in_run.py)",
    ("onecard.evaluate.text_metrics", "suite"): "training says it of --eval_suites (in_run.py)",
    ("onecard.evaluate.choice", "suite"): "training says it of --eval_suites (in_run.py)",
    ("onecard.evaluate.compare", "eval_suites"): "of finetune, which the message names",
    ("onecard.evaluate.tables", "split"): "training says it of --eval_suites (in_run.py)",
    ("onecard.evaluate.suites", "subjects"): "training asks suites as they are by default (in_run.py)",
    ("onecard.evaluate.choice", "shots"): "training asks suites as they are by default (in_run.py)",
    ("onecard.evaluate.choice", "cot"): "training asks suites as they are by default (in_run.py)",
    ("onecard.evaluate.perplexity", "window"): "training asks suites as they are by default (in_run.py)",
    ("onecard.evaluate.perplexity", "stride"): "training asks suites as they are by default (in_run.py)",
    ("onecard.serve.security", "rate_limit"): "the page of votes counts no requests",
    ("onecard.serve.body_limit", "max_body_bytes"): "the page of votes is sent no texts",
    ("onecard.inference.queue", "max_queue"): "the page of votes asks no model",
    ("onecard.programs._lm_eval", "model"): "of the harness that is started",
    ("onecard.programs._lm_eval", "model_args"): "of the harness that is started",
    ("onecard.programs._lm_eval", "log_samples"): "of the harness that is started",
    ("onecard.export.merge.merge", "rope_scaling"): "tells how the adapter was trained",
    ("onecard.export.gguf.adapter", "rope_scaling"): "tells how the adapter was trained",
    ("onecard.model.lora.formats", "rope_scaling"): "tells how the adapters were trained",
    ("onecard.model.lora.formats", "lora_path"): "one adapter has no other one that differs",
    ("onecard.model.rope_scaling", "rope_scaling"): "exports give what training has checked",
    ("onecard.model.model_config", "trust_remote_code"): "what is written as GGUF, transformers knows",
    ("onecard.serve.handover", "port"): "of the engine that is started",
    ("onecard.serve.handover", "host"): "of the engine that is started",
    ("onecard.serve.handover", "model"): "of the engine that is started",
    ("onecard.serve.handover", "alias"): "of the engine that is started",
    ("onecard.serve.handover", "jinja"): "of the engine that is started",
    ("onecard.export.gguf.adapter", "lora"): "of llama.cpp's server",
    ("onecard.export.gguf.export", "prompt_type"): "the run's own template is handed over",
    ("onecard.export.gguf.ollama", "prompt_type"): "the run's own template is handed over",
    ("onecard.export.gguf.ollama", "system"): "no system text is handed over",
    ("onecard.inference.load", "lora_path"): "the adapter is that of the run",
    ("onecard.data.mixture", "data"): "what a run learned from is left out where it is gone",
    ("onecard.data.mixture", "data_path"): "what a run learned from is left out where it is gone",
    ("onecard.programs._data_make", "model_path"): "of the command that it shows, which is that of serving",
}


def loaded(program: Path) -> ModuleType:
    return importlib.import_module(f"onecard.programs.{program.stem}")


@cache
def classes_of(program: Path) -> list[type]:
    """The dataclasses that make a program's options, with those of their groups."""
    module, wholes = loaded(program), []
    inner = [value for name, value in vars(module).items() if re.match(r"_[a-z]", name)]
    inner += [inspect.getmodule(value) for value in vars(module).values()
              if inspect.isfunction(value) and value.__module__.startswith("onecard.programs.")]  # fmt: skip
    for part in (module, *inner):
        if isinstance(part, ModuleType):  # the program, or the module of a verb that has verbs of its own
            named = {node.id for node in ast.walk(ast.parse(inspect.getsource(part))) if isinstance(node, ast.Name)}
            wholes += [kind for name in sorted(named) if is_dataclass(kind := getattr(part, name, None))]
    return wholes + [type(group) for kind in wholes for group in vars(kind()).values() if is_dataclass(group)]


@cache
def options_of(program: Path) -> frozenset[str]:
    """All options of a program, of each of its verbs."""
    found = {option for kind in classes_of(program) for option in cli.options_of(kind)}
    found |= OWN_WORDS.get(program.stem, set()) | {"config", "print_config", "help", "debug"}
    for other in HANDS_ON.get(program.stem, ()):
        found |= options_of(program.with_stem(other))
    assert len(found) > 3, program
    return frozenset(found)


@cache
def graph_of(program: Path) -> CallGraph:
    return reached(program)


def is_named(program: Path, text: str) -> bool:
    verb = program.stem.replace("_", "-")
    return f"command('{verb}')" in text or f"({verb} --" in text


@cache
def unknown_to(program: Path) -> list[tuple[str, int, str, str]]:
    """(module, line, option, text) of what a program's messages name and it does not have."""
    found, own = [], options_of(program) | FOREIGN
    for module, line, flag, text in named_flags(graph_of(program)):
        if flag in own or module in (*BY_TABLE, *OF_OPTIONS):
            continue
        if not any(flag in options_of(other) for other in PROGRAMS if is_named(other, text)):
            found.append((module, line, flag, text))
    return found


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_messages_name_options_of_the_program_that_says_them(program: Path) -> None:
    offences = [one for one in unknown_to(program) if (one[0], one[2]) not in NEVER]
    assert not offences


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_contradictions_name_options_of_the_program(program: Path) -> None:
    for kind in classes_of(program):
        source = inspect.getsource(kind.problems) if hasattr(kind, "problems") else ""
        assert set(FLAG.findall(source)) <= options_of(program), kind


def test_every_exception_is_still_one() -> None:
    met = {(module, flag) for program in PROGRAMS for module, _, flag, _ in unknown_to(program)}
    assert met == set(NEVER)


def test_the_search_finds_what_a_program_says() -> None:
    """A remedy of training in what only generate.py reaches would be found."""
    said = {(module, flag) for module, _, flag, _ in named_flags(graph_of(FOLDER / "generate.py"))}
    assert {("onecard.model.load", "bits"), ("onecard.inference.load", "model_path")} <= said
    assert not any(module.startswith("onecard.train") for module, _ in said)
    assert ("onecard.train.auto_config", "total_batch") in {
        (module, flag) for module, _, flag, _ in named_flags(graph_of(FOLDER / "finetune.py"))
    }


@pytest.mark.parametrize("kind", ["q4_k_m", "Q4_K_M", "q6_k", "iq4_xs", "q2_k"])
def test_kinds_that_only_llama_cpp_writes_are_answered_with_its_program(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"--gguf_type: .* is not one of .*; llama.cpp makes it of .*llama-quantize"):
        loaded(FOLDER / "gguf.py").main(["--gguf_type", kind])
    with pytest.raises(ConfigError) as refused:
        loaded(FOLDER / "gguf.py").main(["--gguf_type", "q9"])
    assert "llama-quantize" not in str(refused.value)


# Options whose texts speak of files, and that name none: names, patterns, sizes, and KIND:PATH or NAME:PATH.
NO_PATHS = {"accept_changes", "data", "exclude", "final_weights", "include", "max_shard_size", "model", "model_name",
            "reward", "served_model", "suite"}  # fmt: skip


def test_every_option_that_names_a_file_has_its_home_directory_put_in_and_is_looked_for() -> None:
    """`given_paths.MORE_PATHS` is a list; ~ behind = in an option that it lacks would be a folder of that name."""
    found = set()
    for kind in {kind for program in PROGRAMS for kind in classes_of(program)}:
        texts = cli.help_texts(kind)
        for name, option in cli.options_of(kind).items():
            is_text = option.is_text or option.takes_paths
            if is_text and re.search(r"\b(files?|folders?|director(y|ies)|paths?)\b", texts.get(name, "")):
                found.add(name)
    assert {"questions", "embed_model", "models", "data_path"} <= found
    assert {name for name in found if not names_paths(name)} <= NO_PATHS
