"""Options: names that users know, defaults that agree, every contradiction named by its flag."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from onecard.config import inference, run, training
from onecard.config import parsing as cli
from onecard.config.base_model import ModelOptions
from onecard.config.data import DataOptions
from onecard.config.given_paths import paths_in
from onecard.config.inference import (
    AnsweringModelOptions,
    AskOptions,
    ChatConfig,
    ChatOptions,
    GenerateConfig,
    InferenceOptions,
    LimitOptions,
    PageOptions,
    ParallelOptions,
    SamplingOptions,
    ServeConfig,
    ServedDocumentsOptions,
    ServeOptions,
)
from onecard.config.lora import LoraOptions
from onecard.config.problems import problems_of, refuse
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig, MemoryOptions
from onecard.errors import ConfigError

TRAINING = [ModelOptions, DataOptions, LoraOptions, TrainOptions, MemoryOptions]
TALKING = [
    AnsweringModelOptions,
    SamplingOptions,
    InferenceOptions,
    AskOptions,
    ChatOptions,
    PageOptions,
    ServeOptions,
    ServedDocumentsOptions,
    LimitOptions,
    ParallelOptions,
]

# The flags that users of this kind of kit already type; renaming one breaks their scripts.
KEPT_NAMES = {
    *("model_path", "data_path", "output_path", "test_size", "eval_steps", "save_steps", "num_epoch", "micro_batch"),
    *("total_batch", "log_steps", "warmup_ratio", "cutoff_len", "learning_rate", "lora_r", "lora_alpha", "bits"),
    *("lora_dropout", "lora_target_modules", "prompt_type", "resume_from_checkpoint", "lora_remote_checkpoint"),
    *("from_data_beginning", "wandb", "deepspeed"),
}


def test_kept_names() -> None:
    assert len(KEPT_NAMES) == 24
    assert set(cli.options_of(FinetuneConfig)) >= KEPT_NAMES


@pytest.mark.parametrize("config_class", [FinetuneConfig, GenerateConfig, ChatConfig, ServeConfig])
def test_defaults_have_no_problem_and_no_name_stands_twice(config_class: type) -> None:
    example = config_class()
    names = [f.name for group in fields(example) for f in fields(getattr(example, group.name))]
    assert problems_of(example) == []
    repeated = {name for name in names if names.count(name) > 1}
    assert not repeated, "flags are flat: a name can stand in one group only"


@pytest.mark.parametrize(
    ("module", "groups", "least"), [(run, TRAINING, 40), (training, TRAINING, 10), (inference, TALKING, 40)]
)
def test_every_option_has_a_help_text(module, groups, least) -> None:
    tree = ast.parse(inspect.getsource(module))
    visited = 0
    for cls in [node for node in tree.body if isinstance(node, ast.ClassDef) and node.decorator_list]:  # dataclasses
        for option, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(option, ast.AnnAssign) and not cls.name.endswith("Config"):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert is_text, f"{cls.name}.{ast.unparse(option.target)} has no docstring"
                assert str(after.value.value).rstrip().endswith((".", "auto"))
                visited += 1
    kinds = {kind for group in groups for kind in group.__mro__ if kind.__module__ == module.__name__}
    assert visited == sum(len(kind.__annotations__) for kind in kinds) >= least


# (group, changed fields, flags that must be named)
REFUSED = [
    (ModelOptions, {"model_path": ""}, ["--model_path"]),
    (AnsweringModelOptions, {"model_path": ""}, ["--model_path"]),
    (ModelOptions, {"bits": 32, "dtype": "fp16"}, ["--bits"]),
    (ModelOptions, {"bits": 16, "dtype": "fp32"}, ["--bits"]),
    (DataOptions, {"data_path": ""}, ["--data_path"]),
    (DataOptions, {"cutoff_len": 7}, ["--cutoff_len"]),
    (DataOptions, {"test_size": -0.1}, ["--test_size"]),
    (DataOptions, {"test_size": 1.5}, ["--test_size"]),
    (LoraOptions, {"lora_r": 0}, ["--lora_r"]),
    (LoraOptions, {"train_new_tokens": True, "train_embeddings": True}, ["--train_new_tokens"]),
    (LoraOptions, {"lora_alpha": 0}, ["--lora_alpha"]),
    (LoraOptions, {"lora_dropout": 1.0}, ["--lora_dropout"]),
    (LoraOptions, {"lora_target_modules": " , "}, ["--lora_target_modules"]),
    (
        LoraOptions,
        {"lora_target_parameters": "experts", "lora_dropout": 0.1, "use_dora": True, "lora_init": "pissa"},
        ["--lora_dropout", "--use_dora", "--lora_init"],
    ),
    (
        TrainOptions,
        {"total_batch": -1, "log_steps": 0, "eval_steps": -1, "eval_minutes": -1},
        ["--log_steps", "--total_batch", "--eval_steps", "--eval_minutes"],
    ),
    (TrainOptions, {"save_steps": -1, "save_minutes": -0.5}, ["--save_steps", "--save_minutes"]),
    (TrainOptions, {"max_steps": -1, "micro_batch": -1}, ["--max_steps", "--micro_batch"]),
    (TrainOptions, {"micro_tokens": -1, "warmup_steps": -1}, ["--micro_tokens", "--warmup_steps"]),
    (
        TrainOptions,
        {"weight_decay": -1.0, "max_grad_norm": -1.0, "seed": -1},
        ["--weight_decay", "--max_grad_norm", "--seed"],
    ),
    (TrainOptions, {"num_epoch": 0}, ["--num_epoch"]),
    (TrainOptions, {"learning_rate": -1.0}, ["--learning_rate"]),
    (TrainOptions, {"learning_rate": float("nan")}, ["--learning_rate"]),
    (TrainOptions, {"warmup_ratio": 1.0}, ["--warmup_ratio"]),
    (TrainOptions, {"loraplus_ratio": 0.5}, ["--loraplus_ratio"]),
    (TrainOptions, {"keep_checkpoints": 1}, ["--keep_checkpoints"]),
    (TrainOptions, {"output_path": ""}, ["--output_path"]),
    (TrainOptions, {"init_adapter": "a", "lora_remote_checkpoint": "b"}, ["--lora_remote_checkpoint"]),
    (TrainOptions, {"deepspeed": "a.json", "optimizer": "adamw_8bit"}, ["--optimizer"]),
    (TrainOptions, {"accept_changes": "data,colour"}, ["--accept_changes"]),
    (MemoryOptions, {"vram": -1.0}, ["--vram"]),
    (MemoryOptions, {"loss_chunk": -2, "mlp_tile": -2}, ["--loss_chunk", "--mlp_tile"]),
    (MemoryOptions, {"kernels": "liger", "pretend_turing": True}, ["--kernels"]),
    (SamplingOptions, {"max_new_tokens": 0}, ["--max_new_tokens"]),
    (SamplingOptions, {"temperature": -0.1}, ["--temperature"]),
    (SamplingOptions, {"top_p": 0.0}, ["--top_p"]),
    (SamplingOptions, {"top_p": 1.1}, ["--top_p"]),
    (
        SamplingOptions,
        {"top_k": -1, "no_repeat_ngram_size": -1, "seed": -1},
        ["--top_k", "--no_repeat_ngram_size", "--seed"],
    ),
    (SamplingOptions, {"num_beams": 0}, ["--num_beams"]),
    (SamplingOptions, {"repetition_penalty": 0.0}, ["--repetition_penalty"]),
    (
        SamplingOptions,
        {"temperature": float("nan"), "repetition_penalty": float("nan")},
        ["--temperature", "--repetition_penalty"],
    ),
    (SamplingOptions, {"min_new_tokens": 300}, ["--min_new_tokens"]),
    (SamplingOptions, {"stop": ["ok", ""]}, ["--stop"]),
    (ModelOptions, {"max_memory": "10GiB"}, ["--max_memory"]),
    (InferenceOptions, {"compile": True}, ["--compile"]),
    (ChatOptions, {"load_chat": "a.json"}, ["--load_chat"]),
    (AskOptions, {"web": True, "instruction": "a"}, ["--web"]),
    (PageOptions, {"host": "0.0.0.0"}, ["--host"]),
    (PageOptions, {"host": "", "port": 70000}, ["--host", "--port"]),
    (PageOptions, {"share": True}, ["--share"]),
    (PageOptions, {"auth": "me"}, ["--auth"]),
    (PageOptions, {"auth": "me:"}, ["--auth"]),
    (ServeOptions, {"host": "192.168.1.5"}, ["--host"]),
    (ServeOptions, {"api_key": " "}, ["--api_key"]),
    (ServeOptions, {"allowed_origins": "page.example, https://a.example"}, ["--allowed_origins"]),
    (ServeOptions, {"allowed_hosts": "*.lan", "allowed_origins": "*"}, ["--allowed_hosts", "--allowed_origins"]),
    (PageOptions, {"allowed_hosts": "box.lan/chat"}, ["--allowed_hosts"]),
    (ServeOptions, {"api_key": "schlüssel"}, ["--api_key"]),
    (LimitOptions, {"max_queue": -1, "max_request_seconds": float("nan")}, ["--max_queue", "--max_request_seconds"]),
    (
        LimitOptions,
        {"max_beams": 0, "max_choices": 0, "max_embedding_inputs": 0},
        ["--max_beams", "--max_choices", "--max_embedding_inputs"],
    ),
    (LimitOptions, {"max_body_bytes": 10}, ["--max_body_bytes"]),
    (ParallelOptions, {"max_parallel": 0}, ["--max_parallel"]),
    (AskOptions, {"batch_size": 0}, ["--batch_size"]),
    (AskOptions, {"data_path": "a.json"}, ["--output_path"]),
    (AskOptions, {"output_path": "a.jsonl"}, ["--data_path"]),
    (AskOptions, {"data_path": "a", "output_path": "b", "instruction": "c"}, ["--instruction"]),
    (AskOptions, {"input": "a"}, ["--input"]),
]

ACCEPTED = [
    (ModelOptions, {"max_memory": "0:10GiB, 1:10.5GiB,cpu:30GB"}),
    (PageOptions, {"host": "0.0.0.0", "auth": "me:a:b"}),
    (PageOptions, {"host": "::1", "port": 0}),
    (ServeOptions, {"host": "0.0.0.0", "api_key": "secret"}),
    (InferenceOptions, {"compile": True, "static_cache": True}),
    (ModelOptions, {"bits": 32, "dtype": "fp32"}),
    (DataOptions, {"test_size": 0}),
    (DataOptions, {"test_size": 200.0}),
    (TrainOptions, {"num_epoch": 0, "max_steps": 5}),
    (TrainOptions, {"num_epoch": 0.5}),
    (TrainOptions, {"accept_changes": "data, bits"}),
    (TrainOptions, {"deepspeed": "a.json", "optimizer": "adamw"}),
    (TrainOptions, {"init_adapter": "a"}),
    (AskOptions, {"data_path": "a", "output_path": "b"}),
    (AskOptions, {"instruction": "a", "input": "b"}),
]


@pytest.mark.parametrize(("group", "changes", "flags"), REFUSED)
def test_refused(group: type, changes: dict, flags: list[str]) -> None:
    found = replace(group(), **changes).problems()
    assert [flag for flag, _ in found] == flags
    for _, message in found:
        assert len(message) > 8


@pytest.mark.parametrize(("group", "changes"), ACCEPTED)
def test_accepted(group: type, changes: dict) -> None:
    assert replace(group(), **changes).problems() == []


def test_every_group_is_refused_something() -> None:
    # The folder of documents is looked for with all given paths.
    assert {group for group, *_ in REFUSED} == {*TRAINING, *TALKING} - {ServedDocumentsOptions}


def test_problems_of_all_groups_come_together() -> None:
    bad = FinetuneConfig(
        ModelOptions(model_path=""), DataOptions(cutoff_len=1), LoraOptions(lora_r=0), TrainOptions(log_steps=0)
    )
    found = problems_of(bad)
    assert [flag for flag, _ in found] == ["--model_path", "--cutoff_len", "--lora_r", "--log_steps"]
    with pytest.raises(ConfigError) as caught:
        refuse(found)
    assert len(str(caught.value).splitlines()) == 5
    with pytest.raises(ConfigError) as single:
        refuse(found[:1])
    assert single.value.flag == "--model_path"
    refuse([])


@pytest.mark.parametrize("name", ["train_new_tokens", "train_embeddings"])
@pytest.mark.parametrize(
    ("group", "changes", "flag"),
    [
        ("memory", {"offload_embeddings": "on"}, "--offload_embeddings"),
        ("memory", {"head_bits": "4"}, "--head_bits"),
        ("memory", {"head_bits": "8"}, "--head_bits"),
    ],
)
def test_what_a_trained_vocabulary_contradicts(name: str, group: str, changes: dict, flag: str) -> None:
    example = FinetuneConfig()
    setattr(example, group, replace(getattr(example, group), **changes))
    assert example.problems() == []
    setattr(example.lora, name, True)
    (problem,) = example.problems()
    assert problem[0] == flag and f"--{name}" in " ".join(problem)


def test_start_adapter_is_either_name() -> None:
    assert TrainOptions().start_adapter is None
    assert TrainOptions(init_adapter="a").start_adapter == "a"
    assert TrainOptions(lora_remote_checkpoint="b").start_adapter == "b"


def test_the_default_paths_exist() -> None:
    assert Path(ModelOptions().model_path, "config.json").is_file()
    assert Path(DataOptions().data_path).is_file()
    assert all(is_dataclass(group) for group in [*TRAINING, *TALKING])


def test_a_path_that_exists_is_one_whatever_commas_are_in_it(tmp_path: Path) -> None:
    there = tmp_path / "a, b"
    there.mkdir()
    assert paths_in(str(there)) == [str(there)]
    assert paths_in(f"{there}, c ,") == [str(tmp_path / "a"), "b", "c"]
    assert paths_in("   ") == paths_in("") == paths_in(None) == paths_in(" , ") == []
