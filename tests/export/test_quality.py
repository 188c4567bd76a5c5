"""Perplexity, plain rounding, and text kept apart: against closed forms and definitions."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onecard.config.base_model import ModelOptions
from onecard.data.chat_template import load_template
from onecard.errors import ConfigError, ModelError
from onecard.export.quantize import gptq
from onecard.export.quantize.calibration import calibration_of, data_rows, text_rows, texts_of
from onecard.export.quantize.evaluate import quality_of, round_layers, round_to_nearest
from onecard.export.quantize.options import CalibrationTextOptions, GptqOptions
from onecard.model.files import base_fingerprint
from onecard.model.hardware import detect
from onecard.model.load import load_base
from onecard.objectives.registry import objective_named
from tests.model.model_families import save_family

DOCUMENTS = objective_named("documents")


@pytest.fixture(scope="module")
def model(tiny_base):
    return load_base(
        ModelOptions(model_path=str(tiny_base), bits=32, gradient_checkpointing=False), detect("cpu")
    ).model


def test_perplexity_is_exp_of_the_mean_loss_of_all_tokens(model) -> None:
    rows = [[1, 5, 9, 17], [1, 200], [1, 30, 31, 32, 33, 34, 35]]
    total, n = 0.0, 0
    for row in rows:
        logs = torch.log_softmax(model(torch.tensor([row])).logits[0].double(), dim=-1)
        for position in range(len(row) - 1):
            total, n = total - float(logs[position, row[position + 1]]), n + 1
    assert n == 10
    for batch_size in (1, 3):  # padding changes nothing
        assert math.isclose(
            quality_of(model, rows, batch_size=batch_size, objective=DOCUMENTS).perplexity,
            math.exp(total / n),
            rel_tol=1e-5,
        )


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])  # the last two change what their heads give
def test_divergence_is_that_of_the_whole_distributions(family, tmp_path) -> None:
    directory = save_family(family, tmp_path)
    options = ModelOptions(model_path=str(directory), bits=32, gradient_checkpointing=False)
    model, other = (load_base(options, detect("cpu")).model for _ in range(2))
    layers = [name for name, part in other.named_modules() if isinstance(part, torch.nn.Linear) and "mlp" in name]
    round_layers(other, layers, 2, -1)
    rows = [[1, 5, 9, 17], [1, 40], [1, 30, 31, 32, 33, 34, 35]]
    total, n = 0.0, 0
    for row in rows:
        old, new = (torch.log_softmax(it(torch.tensor([row])).logits[0, :-1].double(), -1) for it in (model, other))
        total, n = total + float((old.exp() * (old - new)).sum()), n + len(old)
    assert n == 10 and total / n > 1e-4
    for batch_size in (1, 3):
        before = quality_of(model, rows, batch_size=batch_size, objective=DOCUMENTS)
        after = quality_of(other, rows, before, batch_size=batch_size, objective=DOCUMENTS)
        assert before.divergence == 0 and math.isclose(after.divergence, total / n, rel_tol=1e-3)
        assert abs(quality_of(model, rows, before, batch_size=batch_size, objective=DOCUMENTS).divergence) < 1e-6
        assert quality_of(other, rows, batch_size=batch_size, objective=DOCUMENTS).perplexity == after.perplexity


def test_a_model_that_answers_nan_is_reported(tiny_base) -> None:
    broken = load_base(ModelOptions(model_path=str(tiny_base), bits=32), detect("cpu")).model
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="loss of nan"):
        quality_of(broken, [[1, 2, 3]], objective=DOCUMENTS)


def test_rounding_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.1, 0.9, 1.0]])
    step = torch.tensor(2 / 3).half().float()
    assert torch.equal(round_to_nearest(weight, 2, -1), torch.tensor([[-2.0, 0, 1, 1]]) * step)
    # asymmetric: from -1 to 1 as well here, but with the zero at round(1 / step) = 2 (1.5 rounds to even)
    assert torch.equal(round_to_nearest(weight, 2, -1, symmetric=False), torch.tensor([[-2.0, 0, 1, 1]]) * step)
    assert torch.equal(round_to_nearest(torch.zeros(2, 4), 4, 2), torch.zeros(2, 4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_stays_within_half_a_step_and_each_group_has_its_own(bits) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 40) * torch.tensor([1.0] * 16 + [100.0] * 16 + [0.01] * 8)
    rounded = round_to_nearest(weight, bits, 16)
    n_groups = 0
    for start in range(0, 40, 16):  # the last group is shorter
        group, result = weight[:, start : start + 16], rounded[:, start : start + 16]
        step = 2 * group.abs().amax(dim=1, keepdim=True) / (2**bits - 1)
        # the largest positive value has no level of its own: it is one step lower, so at most a step off
        assert ((group - result).abs() <= step * (0.5 + 2**-9 * 2**bits) + (group > 0) * step / 2).all()
        assert all(len(row.unique()) <= 2**bits for row in result)
        n_groups += 1
    assert n_groups == 3


def test_only_named_layers_are_rounded(tiny_base) -> None:
    model = load_base(ModelOptions(model_path=str(tiny_base), bits=32), detect("cpu")).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    round_layers(model, ["model.layers.0.mlp.up_proj"], 4, 32)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match="no linear layer"):
        round_layers(model, ["model.norm"], 4, 32)


def test_text_in_rows(sp_tokenizer) -> None:
    texts = ["The quick brown fox.", "中国的首都是北京。", "What is the capital of France? Paris."]
    ids = [sp_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    alone = list(text_rows(texts, sp_tokenizer, 512, packed=False))
    assert alone == [[1, *row] for row in ids]
    packed = list(text_rows(texts * 20, sp_tokenizer, 16))
    assert len(packed) > 20 and all(len(row) == 16 and row[0] == 1 for row in packed)
    joined = [token for row in packed for token in row[1:]]
    assert "首都是北京。\n\nWhat is" in sp_tokenizer.decode(joined)
    assert list(text_rows(["Paris."], sp_tokenizer, 64)) == [
        [1, *sp_tokenizer("Paris.", add_special_tokens=False)["input_ids"]]
    ]
    assert list(text_rows([], sp_tokenizer, 64)) == []


def test_two_sides_never_meet() -> None:
    rows = [[1, k % 500, k, *range(7)] for k in range(2000)] * 2  # every row twice
    options = CalibrationTextOptions(calibration_samples=60, calibration_len=50, eval_samples=20, seed=1)
    made = calibration_of(rows, options)
    assert made.n_tokens >= 3000 and len(made.held_out) >= 100
    assert not {tuple(row) for row in made.rows} & {tuple(row) for row in made.held_out}
    assert made == calibration_of(rows, options)
    assert made.rows != calibration_of(rows, replace(options, seed=2)).rows
    given = calibration_of(rows, options, held_out=[[1, 2, 3]])
    assert given.held_out == [[1, 2, 3]]
    with pytest.raises(ConfigError, match=r"--calibration_path: gives .* tokens"):
        calibration_of(rows[:100], options)
    endless = calibration_of(([1, k, *range(8)] for k in itertools.count()), options)
    assert endless.n_tokens >= 3000


def test_data_go_through_the_template(sp_tokenizer, instructions) -> None:
    template = load_template("alpaca", sp_tokenizer)
    rows = list(data_rows(str(instructions), DOCUMENTS, template, sp_tokenizer, 256))
    assert len(rows) == 24 and all(row[0] == 1 for row in rows)
    text = sp_tokenizer.decode(rows[3])
    assert "### Instruction:" in text and "数到 3" in text  # record 3 is one of the Chinese ones
    assert "数到 3" in list(texts_of(str(instructions)))[3]


def test_layers_that_an_earlier_version_left_are_gone_on_with(tiny_base: Path, tmp_path: Path) -> None:
    """Its work.json, to the letter; with other settings the layers are of another model and go."""
    kept, rows = tmp_path / "kept", [[1, 2, 3]]
    (kept / "layers").mkdir(parents=True)
    (kept / "layers" / "CURRENT").write_text("1", encoding="utf-8")
    written = (
        '{"bits": 4, "group_size": 32, "desc_act": false, "symmetric": true, "damp_percent": 0.05, "batch_size": 2, '
        f'"device": "cpu", "source": {json.dumps(base_fingerprint(str(tiny_base)))}, '
        f'"rows": "{hashlib.sha256(json.dumps(rows).encode()).hexdigest()}"}}'
    )
    (kept / "work.json").write_text(written, encoding="utf-8")
    assert gptq._same_work(kept, tiny_base, rows, GptqOptions(group_size=32), 2, "cpu")
    assert not gptq._same_work(kept, tiny_base, rows, GptqOptions(group_size=32, sym=False), 2, "cpu")
    assert not (kept / "layers").exists()
