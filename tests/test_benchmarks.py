"""The benchmarks of memory and speed at their smallest size: they run, write their JSON, and compare like with like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from benchmarks import answering_on_cpu, context_per_vram, kl_anchor, long_context, memory_ladder, packing, step_speed
from benchmarks.plain import upcast_like_peft
from benchmarks.random_models import config_of, random_base
from benchmarks.synthetic_run import build_run, random_samples
from onecard.config.base_model import ModelOptions
from onecard.config.data import DataOptions
from onecard.config.lora import LoraOptions
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig, MemoryOptions
from onecard.errors import ModelError
from onecard.model.hardware import detect
from onecard.model.load import load_base
from onecard.model.quantization import stored_bytes
from onecard.train.step import take_step
from tests.model.model_families import save_family

CPU = detect("cpu")


def parts_of(model: torch.nn.Module) -> dict[str, Any]:
    """Every module, parameter and buffer by name, with all that decides memory and arithmetic."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        leaf = not list(module.children())
        found[f"module {name}"] = (type(module).__name__, stored_bytes(module) if leaf else 0, module.training)
    for name, weight in model.named_parameters():
        found[f"weight {name}"] = (type(weight).__name__, weight.shape, weight.dtype, weight.requires_grad)
    for name, table in model.named_buffers():
        found[f"table {name}"] = (table.shape, table.dtype, table.tolist())  # computed, so the same values
    return found


def config_for(base: Path | str, bits: Any, dtype: Any = "auto", **memory: Any) -> FinetuneConfig:
    return FinetuneConfig(
        ModelOptions(str(base), bits=bits, dtype=dtype), DataOptions(cutoff_len=32), LoraOptions(),
        TrainOptions(total_batch=2, micro_batch=1, max_steps=5, optimizer="adamw"),
        MemoryOptions(loss_chunk=16, **memory),
    )  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_random_base_is_built_as_a_loaded_one_and_trains(family: str, bits: Any, tmp_path: Path) -> None:
    base = save_family(family, tmp_path)
    options = ModelOptions(str(base), bits=bits)
    loaded, made = load_base(options, CPU), random_base(config_of(str(base)), options, CPU)
    expected, got = parts_of(loaded.model), parts_of(made.model)
    assert len(got) > 30 and got == expected
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_gradient_checkpointing"):
        assert getattr(made.model, name, False) == getattr(loaded.model, name, False), name
    assert made.model.config._attn_implementation == loaded.model.config._attn_implementation
    assert made.dtype == loaded.dtype
    run = build_run(config_for(base, bits), CPU, made, random_samples([12, 20], 128))
    loaded_run = build_run(config_for(base, bits), CPU, loaded, random_samples([12, 20], 128))
    kinds = [[type(module).__name__ for module in each.plain_model.modules()] for each in (run, loaded_run)]
    assert kinds[0] == kinds[1]  # peft wraps both alike
    first, second = take_step(run), take_step(run)
    assert first.grad_norm > 0 and second.loss < first.loss and not run.events


def test_a_seed_names_one_model() -> None:
    options = ModelOptions(bits=4)
    one, same, other = (random_base(memory_ladder.TOY, options, CPU, seed=seed).model for seed in (1, 1, 2))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(one(ids).logits, same(ids).logits)
    assert not torch.equal(one(ids).logits, other(ids).logits)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_plain_hugging_face_is_prepared_as_peft_does(bits: Any, tmp_path: Path) -> None:
    base = save_family("qwen2", tmp_path, dtype=torch.bfloat16)  # its biases are 16-bit weights of quantised layers
    options = ModelOptions(str(base), bits=bits, dtype="bf16", gradient_checkpointing=False)
    ours, theirs = load_base(options, CPU).model, load_base(options, CPU).model
    upcast_like_peft(ours)
    peft.prepare_model_for_kbit_training(theirs)
    got, expected = (
        {name: (weight.dtype, weight.shape, weight.requires_grad) for name, weight in model.named_parameters()}
        for model in (ours, theirs)
    )
    assert got == expected and torch.float32 in {dtype for dtype, _, _ in got.values()}
    assert torch.equal(ours(torch.tensor([[5, 6]])).logits, theirs(torch.tensor([[5, 6]])).logits)
    assert sum(w.nbytes for w in ours.parameters()) == sum(w.nbytes for w in theirs.parameters())  # tied stay tied


@pytest.mark.parametrize(
    ("left_out", "fewer"),
    [
        ((), 0.5),
        (("no upcast", "layer inputs in RAM", "8-bit optimizer", "head in", "tiled"), 0.7),
    ],
    ids=["all", "some"],
)
@pytest.mark.slow
def test_memory_ladder(
    left_out: tuple[str, ...], fewer: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    techniques = memory_ladder.techniques
    monkeypatch.setattr(
        memory_ladder, "techniques", lambda given: [row for row in techniques(given) if not row[0].startswith(left_out)]
    )
    monkeypatch.setitem(memory_ladder.TOY, "num_hidden_layers", 2)
    output = tmp_path / "ladder.json"
    memory_ladder.main(
        ["--length", "192", "--rows", "2", "--mlp_tile", "64", "--loss_chunk", "32", "--device", "cpu",
         "--output", str(output)]
    )  # fmt: skip
    result = json.loads(output.read_text(encoding="utf-8"))
    rows = {row["technique"]: row for row in result["rows"]}
    assert len(rows) == 9 - len(left_out) and result["machine"]["device"] == "cpu" and result["machine"]["gpu"] is None
    assert all(row["reserved"] is None and not row["out_of_memory"] for row in rows.values())
    planned = [row for row in rows.values() if row["planned"] is not None]
    assert len(planned) == len(rows) - (1 if "no upcast" in left_out else 2)
    for row in planned:
        assert row["planned"] * 0.97 < row["measured"] < row["planned"] * 1.03, row
    for word in {"chunked", "8-bit optimizer", "embeddings in RAM", "head in", "tiled"} - set(left_out):
        (row,) = [row for name, row in rows.items() if word in name and row["planned"]]
        assert row["difference"] < -300_000, row
    assert planned[-1]["measured"] < fewer * result["rows"][0]["measured"]
    assert str(tmp_path) not in output.read_text(encoding="utf-8")  # no machine's paths
    assert capsys.readouterr().out.count("\n| + ") == len(rows) - 1


@pytest.mark.parametrize("is_traced", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_context_per_vram_prints_no_number_of_a_card_that_was_not_measured(
    is_traced: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if not is_traced:
        request.getfixturevalue("peaks_by_formula")
        request.getfixturevalue("monkeypatch").setattr(context_per_vram, "toy_row", lambda *_: {"planned tokens": 1})
    output = tmp_path / "context.json"
    context_per_vram.main(["--vram", "8,11,20", "--toy_mib", "34", "--device", "cpu", "--output", str(output)])
    result = json.loads(output.read_text(encoding="utf-8"))
    assert [row["gib"] for row in result["rows"]] == [8, 11, 20]
    assert [row["unsloth"] for row in result["rows"]] == [2_972, 17_100, None]
    for row in result["rows"]:
        assert row["planned"] > 0 and row["tried"] == []
        assert {row[name] for name in ("measured", "ratio", "reserved_gib", "tokens_per_s")} == {None}
    assert result["toy"]["planned tokens"] > 0
    assert "Planned only" in capsys.readouterr().out


def test_a_toy_takes_what_is_planned_for_its_longest_context() -> None:
    toy = context_per_vram.toy_row(context_per_vram.ContextOptions(toy_mib=34, device="cpu"), CPU)
    assert 0.97 < toy["measured / planned"] < 1.01
    assert toy["measured MiB"] < 34 * 1.01


def test_the_search_for_the_longest_context_closes_in() -> None:
    def after(*tried: tuple[int, bool]) -> int:
        return context_per_vram.next_length([{"tokens": tokens, "passed": passed} for tokens, passed in tried])

    assert after((1000, True)) == 1050
    assert after((1000, False)) == 950
    assert after((1000, True), (1050, False)) == 1025
    assert after((1000, False), (950, True), (975, True)) == 987


@pytest.mark.slow
def test_step_speed(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    step_speed.main(
        ["--rounds", "3", "--steps", "1", "--total_batch", "8", "--plain_rows", "2", "--lora_r", "4", "--micro_tokens",
         "256", "--device", "cpu", "--output", str(output)]
    )  # fmt: skip
    result = json.loads(output.read_text(encoding="utf-8"))
    plain, ours = result["rows"]
    assert plain["ratio"] == 1.0 and ours["ratio"] == sorted(ours["ratios"])[1] and len(ours["ratios"]) == 3
    assert min(plain["padding"], ours["padding"]) >= 1
    assert result["facts"]["loss_difference"] <= 1e-4
    for row in (plain, ours):
        n_linear, ceiling = result["facts"]["n_linear"], result["matrix_product_flops_per_s"]
        assert row["share"] == pytest.approx(6 * n_linear * row["tokens_per_s"] / ceiling, abs=2e-4)
        assert 0 < row["share"] < 1


@pytest.mark.slow
def test_packing(tmp_path: Path) -> None:
    output = tmp_path / "packing.json"
    packing.main(["--rows", "60", "--rounds", "2", "--steps", "1", "--total_batch", "8", "--cutoff_len", "256",
                  "--output", str(output)])  # fmt: skip
    result = json.loads(output.read_text(encoding="utf-8"))
    packed, padded, fixed = result["rows"][:3]  # TRL, where it is installed, follows
    assert packed["packed_to_this"] == 1.0 and result["facts"]["samples"] == 60
    assert min(row["computed_to_real_tokens"] for row in (packed, padded, fixed)) >= 1
    assert result["facts"]["loss_difference"] <= packing.TOLERANCE


@pytest.mark.slow
def test_kl_anchor_halves_what_is_forgotten_at_equal_exact_match(tmp_path: Path) -> None:
    output = tmp_path / "kl_anchor.json"
    kl_anchor.main(["--weights", "0,0.1", "--seeds", "1", "--num_epoch", "1", "--output", str(output)])
    without, anchored = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert anchored["forgetting"][0] < 0.5 * without["forgetting"][0] and without["exact_match"][0] > 0.5
    assert anchored["exact_match"][0] > without["exact_match"][0] - 0.05


def test_yarn_reads_on_where_the_base_without_it_does_not(tmp_path: Path) -> None:
    output = tmp_path / "long_context.json"
    long_context.main(["--texts", "6", "--scalings", "none,yarn:4", "--seed", "3", "--output", str(output)])
    found, kept = (json.loads(path.read_text(encoding="utf-8"))["losses"]
                   for path in (output, long_context.RESULTS / "long_context.json"))  # fmt: skip
    for losses in (found, kept):
        assert losses["yarn:4"]["192-384"] < losses["none"]["192-384"]


SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2
}  # fmt: skip


@pytest.mark.slow
def test_answering_on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(answering_on_cpu, "SHAPE", {**answering_on_cpu.SHAPE, **SMALL})
    output = tmp_path / "speeds.json"
    answering_on_cpu.main(["--layers", "1", "--rounds", "1", "--new_tokens", "3", "--output", str(output)])
    result = json.loads(output.read_text())
    assert list(result["bits"]) == ["32", "16", "8", "4"]
    sizes = [one["weight_mib"] for one in result["bits"].values()]
    assert sizes == sorted(sizes, reverse=True) and all(len(one["rounds"]) == 1 for one in result["bits"].values())
    assert capsys.readouterr().out.count("\n| ") == 5


def test_the_kept_measurement_is_why_16_bits_answer_on_a_cpu() -> None:
    kept = json.loads((answering_on_cpu.RESULTS / "answering_on_cpu.json").read_text())["bits"]
    assert min(kept, key=lambda bits: kept[bits]["seconds_per_token"]) == "16"
    assert kept["32"]["seconds_per_token"] < kept["8"]["seconds_per_token"] < kept["4"]["seconds_per_token"]


def test_speeds_of_different_losses_are_not_compared() -> None:
    both = {step_speed.PLAIN: lambda step: 2.0 + step, step_speed.OURS: lambda step: 2.0 + step * 1.001}
    assert step_speed.check_same_loss(both, 1, 1e-4) == 0
    with pytest.raises(ModelError, match="speeds mean nothing"):
        step_speed.check_same_loss(both, 2, 1e-4)
    nan = {step_speed.PLAIN: lambda step: 2.0, step_speed.OURS: lambda step: float("nan")}
    with pytest.raises(ModelError):
        step_speed.check_same_loss(nan, 1, 1e-4)
