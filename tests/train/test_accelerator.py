"""What DeepSpeed is told, how divided optimizer state becomes whole again, and the two engines' small parts."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.config.zero_stage import zero_stage
from onecard.errors import CheckpointError, ConfigError
from onecard.installation import SHIPPED as REPOSITORY
from onecard.train import deepspeed_config as settings
from onecard.train.accelerator import TrainingEngine
from onecard.train.deepspeed_engine import Autocast, LossScale, ShardedOptimizer, Zero3Model, left_out, whole_modules
from onecard.train.optimizer_shards import ShardLayout, join_states, pieces_of_each, split_state
from tests import tiny

Written = Callable[[Any], TrainOptions]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Options that name a file with the given content, in surroundings where DeepSpeed could start."""
    monkeypatch.setattr(settings, "find_spec", lambda name: object())
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)

    def write(content: Any) -> TrainOptions:
        path = tmp_path / "zero.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return TrainOptions(deepspeed=str(path), max_grad_norm=0.5)

    return write


def check(options: TrainOptions, **others: Any) -> None:
    settings.check_deepspeed(tiny.with_options(FinetuneConfig(train=options), others))


def test_auto_is_filled(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    options = written({
        "fp16": {"enabled": "auto", "initial_scale_power": 16}, "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "gradient_clipping": "auto",
        "communication_data_type": "auto", "wall_clock_breakdown": True,
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "allgather_bucket_size": 1000,
                              "offload_optimizer": {"device": "cpu", "pin_memory": "auto"}},
    })  # fmt: skip
    check(options)
    assert capsys.readouterr().err == ""
    filled = settings.deepspeed_config(options)
    assert filled == {
        "zero_optimization": {"stage": 2, "allgather_bucket_size": 1000, "offload_optimizer": {"device": "cpu"},
                              "elastic_checkpoint": False, "round_robin_gradients": False},
        "gradient_clipping": 0.5, "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1,
        "wall_clock_breakdown": True, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    assert '"auto"' not in json.dumps(filled)


def test_what_flags_decide_is_told(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    check(written({
        "zero_optimization": {"stage": 1}, "train_batch_size": 64, "gradient_clipping": 1.0, "bf16": {"enabled": True},
        "fp16": {"enabled": False}, "optimizer": {"type": "AdamW", "params": {"lr": 3e-5}},
    }))  # fmt: skip
    told = capsys.readouterr().err
    for part in ("train_batch_size (--total_batch)", "gradient_clipping (--max_grad_norm)", "bf16 (--dtype)",
                 "optimizer (--optimizer)"):  # fmt: skip
        assert part in told
    assert "fp16" not in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "line 1: is not JSON"),
        ("[1]", "holds list"),
        ({}, 'no section "zero_optimization"'),
        ({"zero_optimization": {"stage": 0}}, "stage is 0"),
        ({"zero_optimization": {"stage": True}}, "stage is True"),
        ({"zero_optimization": {"stage": "2"}}, "stage is '2'"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4; 1, 2 and 3 work"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights would change"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "device is 'nvme'; cpu works"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow would change"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation (did you mean zero_optimization?)"),
        ({"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
    ],
)
def test_refused(written: Written, content: Any, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(written(content))
    assert str(refused.value).startswith("--deepspeed")
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"bits": 4}, r"--bits: 4 does not go with ZeRO stage 3 of --deepspeed.*--shard in its place"),
        ({"bits": 8}, r"--bits: 8 does not go"),
        ({"bits": 16, "train_embeddings": "all"}, r"--train_embeddings: does not go with ZeRO stage 3.*use stage 2"),
        ({"bits": 16, "use_dora": True}, r"--deepspeed: with ZeRO stage 3 does not go with --use_dora.*plain LoRA"),
        ({"bits": 16, "lora_init": "pissa"}, r"--deepspeed: with ZeRO stage 3 does not go with --lora_init pissa"),
        ({"bits": 16, "peft_method": "oft"}, r"--deepspeed: with ZeRO stage 3 does not go with --peft_method oft"),
        ({"bits": 16, "peft_method": "full"}, r"--deepspeed: with ZeRO stage 3 does not go with --peft_method full"),
        ({"bits": 16, "offload_activations": "on"}, r"--offload_activations: does not go with ZeRO stage 3"),
        ({"bits": 16, "mlp_tile": 64}, r"--mlp_tile: does not go with ZeRO stage 3"),
    ],
)
def test_what_does_not_go_with_stage_3(written: Written, others: dict[str, Any], told: str) -> None:
    """The same goes with stage 2."""
    with pytest.raises(ConfigError, match=told):
        check(written({"zero_optimization": {"stage": 3}}), **others)
    check(written({"zero_optimization": {"stage": 2}}), **others)


@pytest.mark.parametrize(
    ("content", "stage"),
    [
        ({"zero_optimization": {"stage": 3}}, 3), ({"zero_optimization": {"stage": "auto"}}, 2),
        ({"zero_optimization": {}}, 0), ({"zero_optimization": 3}, 0), ([1], 0), ("{", 0), ({}, 0),
    ],
)  # fmt: skip
def test_stage_that_a_file_asks_for(written: Written, content: Any, stage: int) -> None:
    options = written(content)
    assert zero_stage(options.deepspeed) == stage
    assert options.divides_base is (stage == 3)
    assert zero_stage("no-such-file.json") == zero_stage(None) == 0


def test_one_flat_parameter_for_each_group_in_stage_3(written: Written) -> None:
    """Their state is stored by group, whatever the file says."""
    asked = {"stage": 3, "sub_group_size": 10, "offload_param": {"device": "cpu", "pin_memory": "auto"}}
    zero = settings.deepspeed_config(written({"zero_optimization": asked}))["zero_optimization"]
    assert zero.pop("sub_group_size") > 1e12
    assert zero == {"stage": 3, "offload_param": {"device": "cpu"}, "elastic_checkpoint": False,
                    "round_robin_gradients": False}  # fmt: skip


def test_missing_file(written: Written, tmp_path: Path) -> None:
    options = written({})
    options.deepspeed = str(tmp_path / "no.json")
    with pytest.raises(ConfigError, match=r"no\.json cannot be read .*config-sample/deepspeed_zero2\.json"):
        check(options)
    assert (REPOSITORY / "config-sample" / "deepspeed_zero2.json").is_file()


@pytest.mark.parametrize("stage", [2, 3])
def test_sample_config(stage: int, written: Written) -> None:
    options = written((REPOSITORY / "config-sample" / f"deepspeed_zero{stage}.json").read_text(encoding="utf-8"))
    check(options, bits=16)
    assert settings.deepspeed_config(options)["zero_optimization"]["stage"] == stage


def test_surroundings(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    options = written({"zero_optimization": {"stage": 2}})
    check(options)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"pip install .*requirements-deepspeed\.txt"):
        patch.setattr(settings, "find_spec", lambda name: None)
        check(options)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="torchrun"):
        patch.delenv("LOCAL_RANK")
        check(options)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="accelerate launch"):
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        check(options)
    assert (REPOSITORY / "requirements-deepspeed.txt").is_file()


LAYOUT = (
    ShardLayout(  # c, in a group of its own, fits into the first process; its partition in the second is all padding
        names=[["a", "b"], ["c"]],
        shapes={"a": torch.Size([2, 2]), "b": torch.Size([3]), "c": torch.Size([2])},
        pieces=[
            [{"a": (0, 4)}, {"c": (0, 2)}],
            [{"b": (0, 3)}, {}],
        ],
    )
)
SPLIT = ShardLayout(  # the same with the border in the middle of a
    names=LAYOUT.names, shapes=LAYOUT.shapes,
    pieces=[[{"a": (0, 3)}, {"c": (0, 1)}], [{"a": (0, 1), "b": (1, 2)}, {"c": (0, 1)}], [{"b": (0, 1)}, {}]],
)  # fmt: skip


THIRDS = ShardLayout(  # each parameter in as many parts as there are processes, the last one padded
    names=LAYOUT.names, shapes=LAYOUT.shapes, pieces=pieces_of_each(LAYOUT.names, LAYOUT.shapes, 3),
)  # fmt: skip


def test_each_parameter_is_cut_for_each_process() -> None:
    assert THIRDS.pieces == [
        [{"a": (0, 2), "b": (2, 1)}, {"c": (0, 1)}],
        [{"a": (0, 2), "b": (2, 1)}, {"c": (0, 1)}],
        [{"b": (2, 1)}, {}],
    ]


def whole_state() -> dict[str, Any]:
    values = {0: torch.arange(4.0).reshape(2, 2), 1: torch.arange(10.0, 13.0), 2: torch.tensor([20.0, 21.0])}
    state = {number: {"step": torch.tensor(7.0), "exp_avg": value, "exp_avg_sq": value * 2, "note": 3}
             for number, value in values.items()}  # fmt: skip
    return {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "params": [2]}]}


@pytest.mark.parametrize(("layout", "sizes"), [(LAYOUT, [4, 2]), (SPLIT, [3, 1]), (THIRDS, [3, 1])])
def test_state_is_divided_and_joined(layout: ShardLayout, sizes: list[int]) -> None:
    shards = [split_state(whole_state(), layout, rank, sizes) for rank in range(len(layout.pieces))]
    for shard in shards:
        assert [group["params"] for group in shard["param_groups"]] == [[0], [1]]
        assert [shard["state"][number]["exp_avg"].shape for number in (0, 1)] == [(size,) for size in sizes]
    first = {id(LAYOUT): 10.0, id(SPLIT): 3.0, id(THIRDS): 2.0}[id(layout)]
    assert torch.equal(shards[1]["state"][0]["exp_avg"][:1], torch.tensor([first]))
    joined, expected = join_states(shards, layout), whole_state()
    assert joined["param_groups"] == expected["param_groups"]
    assert joined["state"].keys() == expected["state"].keys()
    for number, entry in expected["state"].items():
        assert joined["state"][number].keys() == entry.keys()
        for key, value in entry.items():
            got = joined["state"][number][key]
            assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value
    steps = {entry["step"].data_ptr() for entry in joined["state"].values()}
    assert len(steps) == 3, "parameters that share one step counter count several times per step"


def test_state_before_the_first_step() -> None:
    empty = {"state": {}, "param_groups": whole_state()["param_groups"]}
    shards = [split_state(empty, LAYOUT, rank, [4, 2]) for rank in range(2)]
    assert [shard["state"] for shard in shards] == [{}, {}]
    assert join_states(shards, LAYOUT) == empty


def test_state_of_another_adapter_is_refused() -> None:
    optimizer = ShardedOptimizer(engine=None, base=None, layout=LAYOUT, scaler=None)  # type: ignore[arg-type]
    other = whole_state()
    other["param_groups"][0]["params"].append(5)
    with pytest.raises(CheckpointError, match=r"\[3, 1\] parameters per group; \[2, 1\] are trained"):
        optimizer.load_state_dict(other)


def test_loss_scale_is_that_of_torch() -> None:
    """Held against torch.amp.GradScaler, whose update is asked for the same overflows."""
    overflows = [True, True, False, False, True] + [False] * 4001
    ours, found = LossScale(), torch.zeros(1)
    theirs, tracker = torch.full((1,), 2.0**16), torch.zeros(1, dtype=torch.int32)
    for overflow in overflows:
        ours.update(overflow)
        found.fill_(float(overflow))
        torch._amp_update_scale_(theirs, tracker, found, 2.0, 0.5, 2000)
    assert ours.scale == float(theirs) == 2.0**15
    assert ours.good_steps == int(tracker) == 1
    again = LossScale()
    again.load_state_dict(ours.state_dict())
    assert (again.scale, again.good_steps) == (ours.scale, ours.good_steps)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    assert ours.state_dict().keys() == scaler.state_dict().keys()


def test_autocast_is_inside() -> None:
    model = Autocast(torch.nn.Linear(4, 4), "cpu", torch.bfloat16)
    with torch.autocast("cpu", enabled=False):
        assert model(torch.ones(1, 4)).dtype == torch.bfloat16
    assert model.module.weight.dtype == torch.float32


class Tied(torch.nn.Module):
    """As a language model whose head has the weights of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def test_what_stays_whole_is_not_seen() -> None:
    """Neither its modules while the others are divided, nor its weights at any time."""
    model = Tied()
    for parameter in model.embedding.parameters():
        parameter.requires_grad_(False)
    ends = whole_modules(model)
    assert ends == [model.embedding, model.head]
    seen = Zero3Model(model, ends)
    assert [name for name, _ in seen.named_parameters()] == ["module.layer.weight", "module.layer.bias"]
    before = [name for name, _ in model.named_modules()]
    with left_out(seen, ends):
        assert [name for name, _ in model.named_modules()] == ["", "layer"]
    assert [name for name, _ in model.named_modules()] == before
    assert model.head.weight is model.embedding.weight


def test_a_trained_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="ZeRO stage 3 keeps embeddings and output head whole"):
        whole_modules(Tied())


def test_only_one_file_imports_deepspeed() -> None:
    files = [path for path in (REPOSITORY / "onecard").rglob("*.py") if "import deepspeed" in path.read_text("utf-8")]
    assert [path.name for path in files] == ["deepspeed_engine.py"]
    assert importlib.util.find_spec("onecard.train.deepspeed_engine") is not None


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_left_out_after_an_overflow_is_counted(fused: bool) -> None:
    """A fused optimizer is called after an overflow, too, and changes nothing: it must count as left out."""
    model = torch.nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)

    class Scaled:
        """What accelerate's optimizer does under fp16."""

        def step(self) -> None:
            scaler.step(optimizer)
            scaler.update()

        def zero_grad(self) -> None:
            optimizer.zero_grad()

    engine = TrainingEngine(SimpleNamespace(scaler=scaler, num_processes=1), model, Scaled(), max_grad_norm=1.0)
    before = model.weight.detach().clone()
    for factor, is_left_out in ((torch.inf, True), (1.0, False)):
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.unscale_(optimizer)
        assert engine.step() is is_left_out
        assert torch.equal(before, model.weight) is is_left_out
    assert scaler.get_scale() == 4.0
