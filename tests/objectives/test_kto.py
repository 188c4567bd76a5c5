"""KTO: loss and gradients by a formula of its own, whatever the cut; which records teach what; resume."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard.config.run import TrainOptions
from onecard.data.chat_template import load_template
from onecard.data.dataset import EncodedDataset, encode_dataset
from onecard.data.encode import EncodeSettings, LabelledSample
from onecard.data.learn_marks import NOT_A_GOOD_ANSWER
from onecard.data.pairs import NO_LABEL, TOO_LONG_ANSWER
from onecard.data.preference import CHOSEN_LEARNED
from onecard.objectives.kto import mismatched
from onecard.objectives.registry import objective_named
from onecard.recipes import finetune
from onecard.train.trackers import read_log
from tests import tiny
from tests.objectives.test_preference import BAD, GOOD, OPTIONS, every_problem, load

KTO = {**OPTIONS, "objective": "kto"}


def labelled_file(path: Path, n: int) -> Path:
    """Friendly answers are marked good, others bad; two of three are good."""
    draw = random.Random(0)
    rows = [
        {"prompt": f"Question {i}", "label": i % 3 > 0,
         "completion": " ".join(draw.choice(GOOD if i % 3 else BAD) for _ in range(draw.randint(1, 4)))}
        for i in range(n)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def row(prompt: int, answer: int, good: bool) -> LabelledSample:
    ids = torch.randint(3, 60, (prompt + answer,)).tolist()
    return LabelledSample(ids, [-100] * prompt + ids[prompt:], "a row", 0, weights=[] if good else [-1.0] * len(ids))


def log_ratio(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """log pi(answer | prompt) - log ref(answer | prompt), from whole logits of this row alone."""

    def of() -> Tensor:
        logs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return sum(logs[len(prompt) - 1 + place, token] for place, token in enumerate(answer))  # type: ignore[return-value]

    with torch.no_grad(), model.disable_adapter():
        reference = of()
    return of() - reference


@pytest.mark.parametrize("chunk_tokens", [0, 5])
def test_loss_and_gradients_are_those_of_the_formula(chunk_tokens: int, tiny_base: Path) -> None:
    """Eq. 7 of the paper as TRL has it: good and bad are measured from the mean over mismatched answers, 0 or more."""
    model = load(tiny_base)
    sizes, good = [(4, 3), (2, 8), (7, 2), (5, 6)], [True, False, False, True]
    samples = [row(*size, label) for size, label in zip(sizes, good, strict=True)]
    prompts = [sample.input_ids[:n] for sample, (n, _) in zip(samples, sizes, strict=True)]
    answers = [sample.input_ids[n:] for sample, (n, _) in zip(samples, sizes, strict=True)]
    ratios = [log_ratio(model, *each) for each in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        shifted = [answers[-1], *answers[:-1]]
        kl = torch.stack([log_ratio(model, *each) for each in zip(prompts, shifted, strict=True)]).mean()
    for sign in (1, -1):  # of one of them nothing is left
        at = (sign * kl).clamp(min=0)
        expected = sum(
            2.0 * (1 - torch.sigmoid(0.3 * (ratio - at))) if label else 0.5 * (1 - torch.sigmoid(0.3 * (at - ratio)))
            for ratio, label in zip(ratios, good, strict=True)
        )
        options = TrainOptions(objective="kto", pref_beta=0.3, desirable_weight=2.0, undesirable_weight=0.5)
        objective = objective_named("kto").with_options(options)
        found = objective.estimator(samples)
        assert found is not None
        with torch.no_grad():
            total, n = found[0].loss_of(model, found[1], "cpu", chunk_tokens=chunk_tokens)
        assert float(total / n) == pytest.approx(float(kl), abs=1e-5)
        loss, n = objective.with_estimate(sign * float(total / n)).loss_of(
            model, samples, "cpu", chunk_tokens=chunk_tokens
        )
        assert n == 4
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        theirs = torch.autograd.grad(expected, parameters, retain_graph=True)
        assert any(gradient.abs().max() > 1e-3 for gradient in theirs)
        for own, other in zip(torch.autograd.grad(loss, parameters), theirs, strict=True):
            torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


def test_a_prompt_meets_the_answer_before_it() -> None:
    one, two = row(2, 3, True), row(4, 1, False)
    first, second = mismatched([one, two])
    assert first.input_ids == one.input_ids[:2] + two.input_ids[4:] and first.labels == [-100] * 2 + two.labels[4:]
    assert second.input_ids == two.input_ids[:4] + one.input_ids[2:]
    assert objective_named("kto").estimator([one]) is None


def test_a_step_does_not_depend_on_how_it_is_cut_and_a_run_goes_on_bit_by_bit(tiny_base: Path, tmp_path: Path) -> None:
    data = labelled_file(tmp_path / "labelled.jsonl", 30)
    options = {**KTO, "test_size": 6, "max_steps": 4, "eval_steps": 2, "keep_checkpoints": 9, "save_steps": 2}
    names = [*objective_named("kto").metrics, "rewards/margins"]
    found, runs = [], []
    for cut in ({"micro_batch": 8}, {"micro_batch": 3, "loss_chunk": 3}, {"micro_batch": 1}):
        output = tmp_path / str(cut["micro_batch"]) / "run"
        runs.append(finetune(tiny.config_for(tiny_base, data, output, **options, **cut)))
        keys = ["loss", "grad_norm", "eval_loss", *names, *(f"eval_{name}" for name in names)]
        found.append({key: [row[key] for row in read_log(runs[-1]) if key in row] for key in keys})
    assert {len(values) for values in found[0].values()} <= {2, 3, 4}  # a step may have no bad answer
    assert len(found[0]["loss"]) == 4 and found[0]["loss"][0] == pytest.approx(0.5, abs=1e-6)
    assert max(found[0]["kl"]) > 1e-3 and max(found[0]["eval_kl"]) > 1e-3  # it is not 0 throughout
    for other in found[1:]:
        for key, values in found[0].items():
            assert other[key] == pytest.approx(values, rel=2e-5, abs=5e-6), key
    again = {**options, "micro_batch": 8, "resume_from_checkpoint": str(runs[0] / "checkpoint-2")}
    resumed = finetune(tiny.config_for(tiny_base, data, tmp_path / "resumed", **again))
    assert [step for step, _ in tiny.losses_of(resumed)] == [3, 4]
    assert tiny.same_tensors(*(tiny.tensors_of(run / "adapter_model.safetensors") for run in (runs[0], resumed)))


@pytest.mark.slow
def test_good_answers_become_likelier_than_bad_ones(tiny_base: Path, tmp_path: Path) -> None:
    data = labelled_file(tmp_path / "labelled.jsonl", 90)
    options = {**KTO, "test_size": 30, "max_steps": 40, "eval_steps": 40, "undesirable_weight": 2.0}
    evaluated = [row for row in read_log(finetune(tiny.config_for(tiny_base, data, tmp_path / "run", **options)))
                 if "eval_loss" in row][-1]  # fmt: skip
    assert evaluated["eval_rewards/margins"] > 0.5 > 0 > evaluated["eval_rewards/rejected"]


def encoded(rows: list[dict[str, Any]], tokenizer: Any, folder: Path) -> EncodedDataset:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    template, encoder = load_template("chatml", tokenizer), objective_named("kto").encoder
    return encode_dataset(str(path), template, tokenizer, EncodeSettings(96), folder / "cache", encoder=encoder)


def test_labels_of_all_forms_are_read_and_other_records_are_counted(tmp_path: Path, sp_tokenizer: Any) -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    rows: list[dict[str, Any]] = [
        {"prompt": "Hi", "completion": "Hello.", "label": True},
        {"prompt": said[:1], "completion": said[1:], "label": False},
        {"messages": said, "label": "false"},
        {"messages": [{**turn, "content": f"{turn['content']} You"} for turn in said], "kto_tag": True},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."},
        {"instruction": "Hi", "output": "Hello."},
        {"prompt": "Hi", "completion": "No. " * 100, "label": False},
    ]
    dataset = encoded(rows, sp_tokenizer, tmp_path)
    view = objective_named("kto").samples(dataset, torch.arange(len(dataset)).numpy())
    assert view.units.tolist() == [1] * 6
    batch = objective_named("kto").collate([view[number] for number in range(6)])
    assert batch["good"].tolist() == [True, False, False, True, True, False] and "loss_weights" not in batch
    learned = [sp_tokenizer.decode([label for label in view[number].labels if label >= 0]) for number in range(6)]
    assert learned == ["Hello.<|im_end|>"] * 3 + ["Hello. You<|im_end|>", "Hello.<|im_end|>", "Go.<|im_end|>"]
    assert dataset.groups[4] == dataset.groups[5]  # both sides of a pair go to the same side of a split
    dropped = {place.rpartition(":")[2]: reason for place, reason in dataset.report.dropped_records}
    assert dropped == {"6": NO_LABEL, "7": TOO_LONG_ANSWER.format(96)}
    assert not dataset.report.read.notes.keys() & {CHOSEN_LEARNED, NOT_A_GOOD_ANSWER}


@pytest.mark.parametrize(
    ("options", "flag", "words"),
    [
        ({"desirable_weight": 2.0}, "--desirable_weight", "is of --objective kto, and this one is sft"),
        ({"undesirable_weight": -1.0, "objective": "kto"}, "--undesirable_weight", "-1 is no weight"),
        ({"cache_reference": True, "objective": "kto"}, "--cache_reference", "is of --objective dpo, ipo"),
        ({"total_batch": 1, "objective": "kto"}, "--total_batch", "1 is too few"),
        ({"lora_init": "olora", "objective": "kto"}, "--lora_init", "olora does not go with --objective kto"),
    ],
)
def test_options_that_do_not_apply_are_refused_by_flag(options: dict[str, Any], flag: str, words: str) -> None:
    found = every_problem(options)
    assert len(found) == 1 and found[0][0] == flag and words in found[0][1]
