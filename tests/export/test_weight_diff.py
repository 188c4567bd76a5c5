"""A tuned model as a difference: bit for bit over every kind of number, classic float differences, and bad inputs."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from onecard.console import run_main
from onecard.export.io.weights import open_weights
from onecard.export.weight_diff.arithmetic import add_bits, add_floats, fit_rows, subtract_bits, subtract_floats
from onecard.programs import weight_diff
from tests import tiny

INTEGER = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
# Zero, -0.0, smallest and largest denormal, one, largest, infinities, quiet and signalling NaN with payloads.
SPECIAL = {
    torch.float16: [0, 0x8000, 1, 0x03FF, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x7E01, 0xFD55],
    torch.bfloat16: [0, 0x8000, 1, 0x007F, 0x3F80, 0x7F7F, 0x7F80, 0xFF80, 0x7FC1, 0xFFA5],
    torch.float32: [0, 1 << 31, 1, 0x7FFFFF, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFA55AA5],
}


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits_of(one), bits_of(other))


def from_patterns(patterns: list[int], dtype: torch.dtype) -> Tensor:
    width = 8 * dtype.itemsize
    signed = [p - (1 << width) if p >= 1 << (width - 1) else p for p in patterns]
    return torch.tensor(signed, dtype=INTEGER[dtype]).view(dtype)


def run(*words: str | Path) -> int:
    return run_main(lambda: weight_diff.main([str(word) for word in words]), debug=False)


def make(base: Path, tuned: Path, diff: Path, *more: str) -> None:
    assert run("make", "--base_path", base, "--tuned_path", tuned, "--output_path", diff, *more) == 0


def recover(base: Path, diff: Path, out: Path, *more: str) -> None:
    assert run("recover", "--base_path", base, "--diff_path", diff, "--output_path", out, *more) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path, target: Path | None = None) -> str:
    """The one line that refuses; nothing is left behind."""
    capsys.readouterr()
    assert run(*words, *(["--output_path", target] if target else [])) != 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert "not foreseen" not in lines[0]
    if target:
        assert not target.exists()
        assert not [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}")]
    return lines[0]


def model_of(directory: Path, tensors: dict[str, Tensor], n_files: int = 1) -> Path:
    """A directory of plain tensors, cut into files round-robin, with a config beside."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    if n_files == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {name: f"model-{i % n_files + 1:05d}-of-{n_files:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(held, directory / file, metadata={"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return directory


def assert_same_model(one: Path, other: Path, n_tensors: int) -> None:
    left, right = open_weights(one), open_weights(other)
    assert left.entries.keys() == right.entries.keys()
    assert sum(same_bits(left.read(name), right.read(name)) for name in left.entries) == n_tensors


# the arithmetic


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_bit_patterns_come_back(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(list(INTEGER)))
    pattern = st.one_of(st.sampled_from(SPECIAL[dtype]), st.integers(0, (1 << 8 * dtype.itemsize) - 1))
    rows = data.draw(st.lists(st.tuples(pattern, pattern), min_size=1, max_size=40))
    base, tuned = (from_patterns([row[i] for row in rows], dtype) for i in (0, 1))
    difference = subtract_bits(tuned, base)
    assert difference.dtype == INTEGER[dtype]
    modulus = 1 << 8 * dtype.itemsize
    assert [int(d) % modulus for d in difference] == [(t - b) % modulus for b, t in rows]
    assert same_bits(add_bits(base, difference, dtype), tuned)


def test_every_pair_of_special_values_comes_back() -> None:
    n = 0
    for dtype, patterns in SPECIAL.items():
        special = from_patterns(patterns, dtype)
        tuned, base = special.repeat_interleave(len(patterns)), special.repeat(len(patterns))
        assert same_bits(add_bits(base, subtract_bits(tuned, base), dtype), tuned)
        n += len(tuned)
    assert n == 300


def test_other_kinds_of_numbers_come_back() -> None:
    kinds = [torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]
    for dtype in kinds:
        random = torch.Generator().manual_seed(3)
        base, tuned = (torch.randint(0, 2 if dtype == torch.bool else 100, (5, 8), generator=random) for _ in range(2))
        base, tuned = (t.to(torch.float32).to(dtype) for t in (base, tuned))
        assert same_bits(add_bits(base, subtract_bits(tuned, base), dtype), tuned)
    scalar = torch.tensor(1.5)
    assert same_bits(add_bits(scalar, subtract_bits(-scalar, scalar), torch.float32), -scalar)


def test_float_difference_is_rounded_once() -> None:
    base, tuned = torch.tensor([1.0, 2.0]), torch.tensor([1.0009765625, -3.0], dtype=torch.float16)
    assert subtract_floats(tuned, base).tolist() == [0.0009765625, -5.0]
    assert add_floats(torch.tensor([1.0]), torch.tensor([0.0004], dtype=torch.float16)).dtype == torch.float16
    assert fit_rows(torch.tensor([[1.0], [3.0]]), 3, "mean").tolist() == [[1.0], [3.0], [2.0]]
    assert fit_rows(torch.tensor([[1.0], [3.0]]), 3).tolist() == [[1.0], [3.0], [0.0]]
    assert fit_rows(torch.tensor([[1.0], [3.0]]), 1).tolist() == [[1.0]]


# whole models


def saved_model(directory: Path, architecture: str, dtype: torch.dtype, seed: int, shard: str) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=16))
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        ))  # fmt: skip
    else:
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        ))  # fmt: skip
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    (directory / "chat_template.jinja").write_text(f"template of {seed}", encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", torch.float16), ("gpt2", torch.float32), ("qwen2", torch.bfloat16)]
)
def test_a_model_comes_back_bit_for_bit(
    tmp_path: Path, architecture: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved_model(tmp_path / "base", architecture, dtype, 0, "20KB")
    tuned = saved_model(tmp_path / "tuned", architecture, dtype, 1, "1GB")
    n = len(open_weights(tuned).entries)
    assert len(list(base.glob("*.safetensors"))) != len(list(tuned.glob("*.safetensors")))
    make(base, tuned, tmp_path / "diff", "--max_shard_size", "50KB")
    assert {e.dtype for e in open_weights(tmp_path / "diff").entries.values()} <= {*INTEGER.values()}
    recover(base, tmp_path / "diff", tmp_path / "back", "--max_shard_size", "15KB")
    assert_same_model(tuned, tmp_path / "back", n)
    names = {path.name for path in tuned.iterdir() if not path.name.startswith("model")}
    assert names == {path.name for path in (tmp_path / "back").iterdir() if not path.name.startswith("model")}
    assert (
        sum((tmp_path / "back" / name).read_bytes() == (tuned / name).read_bytes() for name in names) == len(names) > 2
    )
    capsys.readouterr()
    words = ("verify", "--base_path", base, "--diff_path", tmp_path / "diff")
    assert run(*words) == run(*words, "--tuned_path", tuned) == 0
    assert f"in {n} tensors bit for bit" in capsys.readouterr().out


def test_a_base_cut_into_other_files_is_the_same_base(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base", "gpt2", torch.float32, 0, "10KB")
    tuned = saved_model(tmp_path / "tuned", "gpt2", torch.float32, 1, "1GB")
    make(base, tuned, tmp_path / "diff")
    weights = dict(open_weights(base))
    torch.save({"module": 1}, tmp_path / "unused.bin")
    resharded = model_of(tmp_path / "other", dict(reversed(weights.items())), n_files=5)
    recover(resharded, tmp_path / "diff", tmp_path / "back")
    assert_same_model(tuned, tmp_path / "back", len(weights))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(weights, pickled / "pytorch_model.bin")
    assert run("verify", "--base_path", pickled, "--diff_path", tmp_path / "diff") == 0


def special_models(root: Path) -> tuple[Path, Path]:
    """Hidden payloads, buffers, new tokens, unchanged and changed kinds: everything that can differ."""
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    same = numbers(4, 4)
    specials = {str(d): from_patterns(p, d) for d, p in SPECIAL.items()}
    base = {f"special.{name}": t.flip(0) for name, t in specials.items()}
    tuned = {f"special.{name}": t for name, t in specials.items()}
    base |= {
        "embed": numbers(6, 8).half(), "same": same, "steps": torch.tensor(7), "mask": torch.tensor([True, False]),
        "cast": numbers(3, 3), "gone": numbers(2), "cut": numbers(6, 2), "reshaped": numbers(2, 3),
    }  # fmt: skip
    tuned |= {
        "embed": numbers(8, 8).half(), "same": same.clone(), "steps": torch.tensor(9), "mask": torch.tensor([True] * 2),
        "cast": numbers(3, 3).bfloat16(), "new": numbers(5), "cut": numbers(4, 2), "reshaped": numbers(3, 2),
        "big": numbers(8, 8),
    }  # fmt: skip
    base["big"] = numbers(8, 8)
    return model_of(root / "base", base, 3), model_of(root / "tuned", tuned, 2)


def test_exact_keeps_whatever_a_tensor_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = special_models(tmp_path)
    make(base, tuned, tmp_path / "diff")
    told = capsys.readouterr().out
    assert "12 tensors: 9 as a difference, 1 unchanged, not stored, 2 whole" in told
    assert "stored whole: new, reshaped" in told or "stored whole: reshaped, new" in told
    assert "rows added or removed: " in told
    assert "only in the base, not in the tuned model: gone" in told
    assert "same" not in open_weights(tmp_path / "diff").entries
    recover(base, tmp_path / "diff", tmp_path / "back")
    assert_same_model(tuned, tmp_path / "back", 12)


def test_a_model_equal_to_its_base_is_nothing_to_publish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = special_models(tmp_path)
    words = ("make", "--base_path", base, "--tuned_path", base)
    assert "nothing to publish" in refused(capsys, *words, target=tmp_path / "diff")


# classic float differences


def classic(root: Path, base_dtype: torch.dtype, dtype: torch.dtype, *, n_new: int = 0, fill: str = "zeros") -> Path:
    """A base, a tuned model and their difference as others published it: plain subtraction, no record."""
    random = torch.Generator().manual_seed(5)
    shapes = {"model.embed": (10, 8), "model.layer.weight": (8, 8), "lm_head.weight": (10, 8)}
    base = {name: torch.randn(*shape, generator=random).to(base_dtype) for name, shape in shapes.items()}
    resized = {}
    for name, tensor in base.items():
        added = tensor.float().mean(0, keepdim=True) if fill == "mean" else torch.zeros(1, 8)
        is_resized = name != "model.layer.weight" and n_new
        resized[name] = torch.cat([tensor.float(), added.repeat(n_new, 1)]) if is_resized else tensor.float()
    tuned = {n: (t + 0.01 * torch.randn(*t.shape, generator=random)).to(dtype) for n, t in resized.items()}
    difference = {name: (tuned[name].float() - resized[name]).to(dtype) for name in tuned}
    difference["model.layer.rotary_emb.inv_freq"] = torch.zeros(4)
    model_of(root / "base", {**base, "extra": torch.ones(2)})
    model_of(root / "tuned", tuned)
    (model_of(root / "diff", difference) / "tokenizer.model").write_bytes(b"pieces")
    return root / "diff"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16])
def test_classic_differences_are_read(
    tmp_path: Path, base_dtype: torch.dtype, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    diff = classic(tmp_path, base_dtype, dtype)
    recover(tmp_path / "base", diff, tmp_path / "back")
    told = capsys.readouterr().out
    assert "could not be told from another" in told
    assert "only in the base, not in the result: extra" in told
    assert ("rounded to the latter" in told) == (base_dtype != dtype)
    one, other = (load_file(tmp_path / place / "model.safetensors") for place in ("tuned", "back"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert other[name].dtype == dtype
        assert float((tensor.float() - other[name].float()).abs().max()) <= torch.finfo(dtype).eps * 4
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"pieces"
    words = ("verify", "--base_path", tmp_path / "base", "--diff_path", diff)
    assert run(*words, "--tuned_path", tmp_path / "tuned") == 0
    assert "tuned_path" in refused(capsys, *words)


@pytest.mark.parametrize("fill", ["zeros", "mean"])
def test_classic_differences_with_new_tokens(tmp_path: Path, fill: str, capsys: pytest.CaptureFixture[str]) -> None:
    diff = classic(tmp_path, torch.float16, torch.float32, n_new=2, fill=fill)
    recover(tmp_path / "base", diff, tmp_path / "back", "--new_rows", fill)
    told = capsys.readouterr().out
    assert f"model.embed has +2 rows; base rows that are lacking count as {fill}" in told
    one, other = (load_file(tmp_path / place / "model.safetensors") for place in ("tuned", "back"))
    assert sum(torch.allclose(one[name], other[name], atol=1e-3, rtol=0) for name in one) == 3
    wrong = {"zeros": "mean", "mean": "zeros"}[fill]
    words = ("verify", "--base_path", tmp_path / "base", "--diff_path", diff, "--tuned_path", tmp_path / "tuned")
    assert "apart" in refused(capsys, *words, "--new_rows", wrong)


def test_our_float_difference_is_a_classic_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved_model(tmp_path / "base", "llama", torch.float16, 0, "1GB")
    tuned = saved_model(tmp_path / "tuned", "llama", torch.float16, 1, "1GB")
    make(base, tuned, tmp_path / "diff", "--mode", "float")
    one, other, difference = (load_file(p / "model.safetensors") for p in (base, tuned, tmp_path / "diff"))
    assert sum(same_bits(difference[name], other[name] - one[name]) for name in one) == len(one) == 21
    recover(base, tmp_path / "diff", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert sum(same_bits(back[name], one[name] + difference[name]) for name in one) == 21
    assert run("verify", "--base_path", base, "--diff_path", tmp_path / "diff", "--tuned_path", tuned) == 0
    assert "within rounding" in capsys.readouterr().out


# bad inputs


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    base = saved_model(root / "base", "llama", torch.float16, 0, "30KB")
    make(base, saved_model(root / "tuned", "llama", torch.float16, 1, "30KB"), root / "diff")
    return root


def test_another_base_is_refused_before_anything_is_written(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from onecard.export.weight_diff import diff as library

    weights = dict(open_weights(published / "base"))
    weights["model.norm.weight"][3] += 1
    other = model_of(tmp_path / "other", weights)
    written: list[str] = []
    monkeypatch.setattr(library.ShardWriter, "add", lambda self, name, tensor: written.append(name))
    words = ("recover", "--base_path", other, "--diff_path", published / "diff")
    line = refused(capsys, *words, target=tmp_path / "out")
    assert "1 of 21 tensors differ (model.norm.weight); take the one that it was made from: base" in line
    assert not written
    del weights["model.norm.weight"]
    fewer = model_of(tmp_path / "fewer", weights)
    assert "lacks model.norm.weight" in refused(capsys, *words[:2], fewer, *words[3:], target=tmp_path / "out")


def alter_record(diff: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((diff / "weight_diff.json").read_text())
    change(content)
    (diff / "weight_diff.json").write_text(json.dumps(content), encoding="utf-8")


def alter_tensor(diff: Path) -> None:
    held = load_file(diff / "model.safetensors")
    held["lm_head.weight"][0] += 1
    save_file(held, diff / "model.safetensors")


BAD_DIFFERENCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "record lost": (lambda d: (d / "weight_diff.json").unlink(), "weight_diff.json is missing"),
    "record no JSON": (lambda d: (d / "weight_diff.json").write_text("{"), "cannot be read as JSON"),
    "record newer": (lambda d: alter_record(d, lambda c: c.update(format=2)), "format 2"),
    "record without hashes": (lambda d: alter_record(d, lambda c: c.pop("tuned")), "weight_diff.json is damaged"),
    "record of another mode": (lambda d: alter_record(d, lambda c: c.update(mode="xor")), "do not agree"),
    "record lacks a tensor": (
        lambda d: alter_record(d, lambda c: [c[k].pop("lm_head.weight") for k in ("tuned", "base", "kinds")]),
        "disagree: lm_head.weight",
    ),
    "one number changed": (alter_tensor, "not the recorded lm_head.weight"),
    "truncated": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-5]), "is damaged",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DIFFERENCES)
def test_damaged_differences_are_refused(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, says = BAD_DIFFERENCES[case]
    shutil.copytree(published / "diff", tmp_path / "diff")
    damage(tmp_path / "diff")
    words = ("--base_path", published / "base", "--diff_path", tmp_path / "diff")
    assert says in refused(capsys, "recover", *words, target=tmp_path / "out")
    line = refused(capsys, "verify", *words, "--tuned_path", published / "tuned")
    assert says in line


class Code:
    """What a hostile pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_bad_models_are_refused(tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned, target = published / "tuned", tmp_path / "out"
    gpt2 = saved_model(tmp_path / "gpt2", "gpt2", torch.float16, 0, "1GB")
    words = ("make", "--tuned_path", tuned, "--base_path")
    assert "is not made from" in refused(capsys, *words, gpt2, target=target)
    wide = model_of(tmp_path / "wide", {n: torch.cat([t, t], -1) for n, t in open_weights(published / "base")})
    assert "model.layers.0.input_layernorm.weight is (32,)" in refused(capsys, *words, wide, target=target)
    proof = tmp_path / "it ran"
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Code(proof)}))
    assert "holds code" in refused(capsys, *words, hostile, target=target)
    assert not proof.exists()
    assert "no directory" in refused(capsys, *words, tmp_path / "nowhere", target=target)
    assert re.search("is or holds what is read", refused(capsys, *words, published / "base", "--output_path", tuned))


def test_a_float_difference_must_be_finite(tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = dict(open_weights(published / "tuned"))
    weights["model.norm.weight"][0] = float("nan")
    broken = model_of(tmp_path / "broken", weights)
    words = ("make", "--base_path", published / "base", "--tuned_path", broken, "--mode")
    assert "model.norm.weight: tuned - base is not finite" in refused(capsys, *words, "float", target=tmp_path / "out")
    assert run(*words, "exact", "--output_path", tmp_path / "out") == 0
    (broken / "config.json").write_text('{"quantization_config": {"bits": 4}}', encoding="utf-8")
    assert "is quantised" in refused(capsys, *words, "float", target=tmp_path / "out2")


def test_a_classic_difference_to_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diff = classic(tmp_path, torch.float16, torch.float16)
    other = model_of(tmp_path / "other", {"model.embed": torch.ones(10, 8)})
    words = ("recover", "--diff_path", diff, "--base_path")
    assert "has no tensor" in refused(capsys, *words, other, target=tmp_path / "out")
    held = load_file(tmp_path / "base" / "model.safetensors")
    held["lm_head.weight"] = torch.ones(10, 4)
    narrow = model_of(tmp_path / "narrow", held)
    assert "lm_head.weight is (10, 4)" in refused(capsys, *words, narrow, target=tmp_path / "out")
    held["lm_head.weight"] = torch.full((10, 8), float("inf"))
    endless = model_of(tmp_path / "endless", held)
    assert "infinite in lm_head.weight" in refused(capsys, *words, endless, target=tmp_path / "out")


def test_verify_sees_another_tuned_model(tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = dict(open_weights(published / "tuned"))
    weights["model.norm.weight"][0] += 1
    words = ("verify", "--base_path", published / "base", "--diff_path", published / "diff", "--tuned_path")
    assert "not the tuned model's model.norm.weight" in refused(capsys, *words, model_of(tmp_path / "a", weights))
    del weights["model.norm.weight"]
    assert "same tensors: model.norm.weight" in refused(capsys, *words, model_of(tmp_path / "b", weights))


def test_settings_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_base: Path) -> None:
    assert run("make") == 2
    said = capsys.readouterr().err
    assert sum(flag in said for flag in ("--base_path", "--tuned_path", "--output_path")) == 3
    words = ("make", "--base_path", tiny_base, "--tuned_path", tiny_base, "--output_path", tmp_path / "o")
    assert run(*words, "--max_shard_size", "huge") == 2
    assert run(*words, "--mode", "xor") == 2
    assert tiny.CORPUS and run("unmake") == 2
