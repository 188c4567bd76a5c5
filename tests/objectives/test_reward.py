"""Reward models: the formula, plain PEFT's rewards, cuts, resume, margins, and what such a run refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from onecard.config.lora import LoraOptions
from onecard.data.chat_template import load_template
from onecard.data.dataset import EncodedDataset, encode_dataset
from onecard.data.encode import EncodeSettings
from onecard.errors import ConfigError, ModelError
from onecard.inference.load import load_bundle
from onecard.model.load import load_tokenizer
from onecard.model.lora.adapter import add_lora, load_adapter
from onecard.model.lora.formats import read_adapter
from onecard.model.reward_head import rewards
from onecard.objectives.preference import AnswerPair
from onecard.objectives.registry import objective_named
from onecard.objectives.reward import RewardModelling, collate_rows
from onecard.recipes import finetune
from onecard.train.trackers import draw_loss, read_log
from tests import tiny
from tests.objectives.test_preference import every_problem, pair_file

OPTIONS = {"objective": "reward", "cutoff_len": 96, "prompt_type": "chatml", "learning_rate": 1e-2, "num_epoch": 9}


def encoded(path: Path, base: Path, folder: Path) -> EncodedDataset:
    tokenizer = load_tokenizer(str(base))
    template, encoder = load_template("chatml", tokenizer), objective_named("reward").encoder
    return encode_dataset(str(path), template, tokenizer, EncodeSettings(96), folder / "cache", encoder=encoder)


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    data = pair_file(folder / "pairs.jsonl", 48)
    return finetune(tiny.config_for(tiny_base, data, folder / "run", **OPTIONS, max_steps=12, test_size=12,
                                    eval_steps=12, micro_batch=8, save_steps=12))  # fmt: skip


def test_held_out_pairs_are_told_apart_and_plain_peft_gives_the_same_rewards(
    run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    evaluated = [row for row in read_log(run) if "eval_loss" in row][-1]
    assert evaluated["eval_rewards/accuracies"] >= 0.9 and evaluated["eval_rewards/margins"] > 0
    assert draw_loss(run).stat().st_size > 10_000
    dataset = encoded(pair_file(tmp_path / "others.jsonl", 5, seed=1), tiny_base, tmp_path)
    rows = [dataset[number] for number in range(len(dataset))]
    assert len(rows) == 10
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_base), run, trainable=False, gives_reward=True)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, pad_token_id=0)
    plain = PeftModel.from_pretrained(plain, run).eval()
    with torch.no_grad():
        found = rewards(ours.model.eval(), collate_rows(rows))
        wanted = torch.cat([plain(torch.tensor([row.input_ids])).logits[0] for row in rows])
    assert found.shape == (10,) and torch.allclose(found, wanted, atol=1e-5), (found, wanted)
    assert found[::2].min() > found[1::2].max()


@pytest.mark.parametrize("center", [0.0, 0.3])
def test_loss_and_gradients_are_those_of_the_formula(center: float, tiny_base: Path, tmp_path: Path) -> None:
    path = pair_file(tmp_path / "pairs.jsonl", 3)
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[0]["margin"], rows[2]["margin"] = 0.5, "1.25"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    dataset = encoded(path, tiny_base, tmp_path)
    assert not dataset.report.read.ignored_fields
    pairs = [AnswerPair(dataset[number], dataset[number + 1]) for number in (0, 2, 4)]
    model: Any = add_lora(AutoModelForCausalLM.from_pretrained(tiny_base), LoraOptions(), gives_reward=True)
    objective = RewardModelling(center=center)
    loss, n_pairs, metrics = objective.sums(model, objective.collate(pairs))
    loss.backward()
    trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    found = []
    for row in (row for pair in pairs for row in (pair.chosen, pair.rejected)):
        states = model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[-1]
        found.append(states[0, -1] @ model.get_base_model().score.modules_to_save["default"].weight[0])
    better, worse = torch.stack(found).view(-1, 2).unbind(1)
    by_hand = (-logsigmoid(better - worse - torch.tensor([0.5, 0, 1.25])) + center * (better + worse) ** 2).sum()
    by_hand.backward()
    assert n_pairs == 3 and loss.item() == pytest.approx(by_hand.item(), abs=1e-5)
    assert metrics[3].tolist() == pytest.approx([(better - worse).sum().item(), 3], abs=1e-5)
    assert any("score" in name for name in trained)
    for name, parameter in model.named_parameters():
        if name in trained:
            assert torch.allclose(parameter.grad, trained[name], atol=1e-5), name


@pytest.mark.slow
def test_a_step_does_not_depend_on_how_it_is_cut_and_a_run_goes_on_bit_by_bit(tiny_base: Path, tmp_path: Path) -> None:
    data, found = pair_file(tmp_path / "pairs.jsonl", 20), []
    for micro_batch in (8, 4):
        output = tmp_path / str(micro_batch) / "run"
        options = {**OPTIONS, "max_steps": 3, "micro_batch": micro_batch, "keep_checkpoints": 9}
        rows = read_log(finetune(tiny.config_for(tiny_base, data, output, **options)))
        found.append([row[key] for row in rows for key in ("loss", "grad_norm", "rewards/margins") if "loss" in row])
    assert len(found[0]) == 9 and found[1] == pytest.approx(found[0], rel=1e-5, abs=2e-6)
    again = {**options, "resume_from_checkpoint": str(output / "checkpoint-2")}
    resumed = finetune(tiny.config_for(tiny_base, data, tmp_path / "resumed", **again))
    one, other = (tiny.tensors_of(where / "adapter_model.safetensors") for where in (output, resumed))
    assert tiny.same_tensors(one, other) and "base_model.model.score.weight" in one


def test_a_margin_that_is_no_number_is_named(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "Hi", "chosen": "Yes.", "rejected": "No.", "margin": margin} for margin in (1, "much")]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    report = encoded(path, tiny_base, tmp_path).report
    assert report.n_samples == 2 and '"margin" is no number' in str(report.read.bad)


def test_what_writes_answers_refuses_a_reward_model_by_name(run: Path, tiny_base: Path) -> None:
    words = "is a reward model.*gives answers a number and writes none.*--best_of 8 --reward RUN"
    with pytest.raises(ModelError, match=words):
        load_bundle(tiny.config_for(tiny_base, run, run).model, str(run), "chatml")
    with pytest.raises(ModelError, match=words):
        read_adapter(run / "checkpoint-12")
    from onecard.programs import merge

    with pytest.raises((ConfigError, ModelError), match=words):
        merge.main(["--lora_path", str(run), "--output_path", str(run / "merged"), "--model_path", str(tiny_base)])


@pytest.mark.parametrize(
    ("options", "flag", "words"),
    [
        ({"train_embeddings": True}, "--train_embeddings", "no output head"),
        ({"peft_method": "full", "bits": 16}, "--peft_method", "use lora"),
        ({"init_adapter": "outputs/mine"}, "--init_adapter", "merge that adapter"),
        ({"train_on": "everything"}, "--train_on", "answers are compared"),
        ({"shard": True}, "--shard", "leave it out"),
        ({"deepspeed": "ds.json"}, "--deepspeed", "leave it out"),
        ({"center_rewards": -1.0}, "--center_rewards", "-1 is no weight"),
        ({"center_rewards": 0.1, "objective": "dpo"}, "--center_rewards", "of --objective reward, and this one is dpo"),
        ({"pref_beta": 0.1}, "--pref_beta", "this one is reward"),
    ],
)
def test_options_that_do_not_apply_are_refused_by_flag(options: dict[str, Any], flag: str, words: str) -> None:
    found = every_problem({"objective": "reward", **options})
    assert len(found) == 1 and found[0][0] == flag and words in found[0][1], found
