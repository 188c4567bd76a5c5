"""Preference pairs: losses and gradients by formulas of their own, cuts, resume, what is learned, what is dropped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from onecard.config.lora import LoraOptions
from onecard.config.problems import problems_of
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.data.chat_template import load_template
from onecard.data.dataset import EncodedDataset, encode_dataset
from onecard.data.encode import EncodeSettings, LabelledSample
from onecard.data.pairs import EQUAL_ANSWERS, NO_PAIR, OTHER_PROMPT, TOO_LONG
from onecard.data.preference import CHOSEN_LEARNED
from onecard.errors import CheckpointError, DataError
from onecard.inference.batch.evaluate import mean_loss, read_cases
from onecard.inference.load import load_bundle
from onecard.model.chunked_loss import CHUNK_BYTES_PER_LOGIT
from onecard.model.lora.adapter import add_lora
from onecard.objectives.preference import AnswerPair, adapter_off
from onecard.objectives.registry import objective_named
from onecard.recipes import finetune
from onecard.train.trackers import draw_loss, read_log
from tests import tiny
from tests.live_memory import peak_bytes
from tests.model.model_families import save_family

GOOD, BAD = ["thanks", "please", "welcome", "sun", "yes"], ["never", "stop", "away", "rain", "no"]
OPTIONS = {"objective": "dpo", "cutoff_len": 96, "prompt_type": "chatml", "learning_rate": 1e-2, "num_epoch": 9}
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


def pair_file(path: Path, n: int, seed: int = 0) -> Path:
    """Pairs of which the chosen answer is of friendly words and the rejected one is not, of ragged length."""
    draw = random.Random(seed)
    rows = [
        {"prompt": f"Question {i}", **{
            side: " ".join(draw.choice(words) for _ in range(draw.randint(1, 4)))
            for side, words in (("chosen", GOOD), ("rejected", BAD))}}
        for i in range(n)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def pair(prompt: int, chosen: int, rejected: int) -> AnswerPair:
    def row(n: int) -> LabelledSample:
        ids = torch.randint(3, 60, (prompt + n,)).tolist()
        ids[:prompt] = range(5, 5 + prompt)
        return LabelledSample(ids, [-100] * prompt + ids[prompt:], "a pair", 0)

    return AnswerPair(row(chosen), row(rejected))


def adapted(model: Any, **options: Any) -> Any:
    """With an adapter that is not what it began as."""
    peft_model = add_lora(model, LoraOptions(lora_r=4, **options)).train()
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter += torch.empty_like(parameter).normal_(0, 0.05)
    return peft_model


def by_full_logits(model: Any, samples: list[AnswerPair]) -> Tensor:
    """Log-probabilities of the answers (n, 2), each row alone."""
    sums = []
    for row in (row for each in samples for row in (each.chosen, each.rejected)):
        logs = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].log_softmax(-1)
        wanted = [(place - 1, label) for place, label in enumerate(row.labels) if label >= 0]
        sums.append(sum(logs[place, label] for place, label in wanted))
    return torch.stack(sums).view(-1, 2)


# By policy and reference log-probabilities and the tokens of the answers, each (n, 2), as TRL has them:
# DPOTrainer (sigmoid, ipo), CPOTrainer (simpo; sigmoid with label_smoothing), ORPOTrainer.odds_ratio_loss. The chosen
# answer's own loss is the mean over its tokens, pair by pair, as in LLaMA-Factory.
def dpo(policy: Tensor, reference: Tensor, sizes: Tensor, beta: float = 0.1, wrong: float = 0.0) -> Tensor:
    chosen, rejected = (policy - reference).unbind(1)
    delta = beta * (chosen - rejected)
    return -logsigmoid(delta) * (1 - wrong) - logsigmoid(-delta) * wrong


def ipo(policy: Tensor, reference: Tensor, sizes: Tensor) -> Tensor:
    chosen, rejected = ((policy - reference) / sizes).unbind(1)
    return (chosen - rejected - 1 / (2 * 0.1)) ** 2


def simpo(policy: Tensor, reference: Tensor, sizes: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    chosen, rejected = (policy / sizes).unbind(1)
    return -logsigmoid(beta * (chosen - rejected - gamma / beta))


def orpo(policy: Tensor, reference: Tensor, sizes: Tensor) -> Tensor:
    p = (policy.double() / sizes).exp()
    odds = p / (1 - p)
    return (-p[:, 0].log() - 0.1 * logsigmoid((odds[:, 0] / odds[:, 1]).log())).float()


CASES: list[tuple[str, dict[str, Any], Formula]] = [
    ("dpo", {}, dpo),
    ("dpo", {"pref_beta": 0.5, "label_smoothing": 0.2}, lambda *given: dpo(*given, beta=0.5, wrong=0.2)),
    ("dpo", {"sft_weight": 0.3}, lambda p, r, n: dpo(p, r, n) - 0.3 * p[:, 0] / n[:, 0]),
    ("ipo", {}, ipo),
    ("simpo", {}, simpo),
    ("simpo", {"pref_beta": 2.5, "simpo_gamma": 0.0}, lambda *given: simpo(*given, beta=2.5, gamma=0.0)),
    ("orpo", {}, orpo),
]


@pytest.mark.parametrize("chunk_tokens", [0, 5])
@pytest.mark.parametrize(("name", "options", "formula"), CASES)
def test_losses_and_gradients_are_those_of_the_formulas(
    name: str, options: dict[str, Any], formula: Formula, chunk_tokens: int, tiny_base: Path
) -> None:
    compare(load(tiny_base), name, options, formula, chunk_tokens)


def test_metrics_are_those_of_trl_whatever_the_cut(tiny_base: Path) -> None:
    """By formulas of its own: a reward is beta times the log-ratio, per token where the loss is."""
    model, samples = load(tiny_base), [pair(4, 3, 6), pair(2, 8, 1), pair(7, 2, 2)]
    with torch.no_grad():
        policy = by_full_logits(model, samples)
        with model.disable_adapter():
            reference = by_full_logits(model, samples)
    sizes = torch.tensor([[3, 6], [8, 1], [2, 2]])
    wanted = {"dpo": 0.1 * (policy - reference), "simpo": 2.0 * policy / sizes}
    for name, rewards in wanted.items():
        objective = objective_named(name)
        sums = sum(objective.sums_of(model, [each], "cpu").metrics.detach() for each in samples)
        chosen, rejected = rewards.unbind(1)
        expected = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
                    "rewards/accuracies": (chosen > rejected).float(), "logps/chosen": policy[:, 0],
                    "logps/rejected": policy[:, 1]}  # fmt: skip
        got = objective.means(sums.flatten().tolist())
        assert got == pytest.approx({key: float(each.mean()) for key, each in expected.items()}, abs=1e-5)
        torch.testing.assert_close(objective.sums_of(model, samples, "cpu").metrics, sums, atol=1e-4, rtol=1e-5)
        assert 0 < got["rewards/accuracies"] < 1 or name == "simpo"


def test_a_trained_head_and_a_soft_cap_have_the_same_gradients(tiny_base: Path, tmp_path: Path) -> None:
    compare(load(tiny_base, train_embeddings=True), "dpo", {}, dpo, 5)
    compare(load(save_family("gemma2", tmp_path)), "dpo", {}, dpo, 5)


def load(directory: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return adapted(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), **options)


def compare(model: Any, name: str, options: dict[str, Any], formula: Formula, chunk_tokens: int) -> None:
    samples = [pair(4, 3, 6), pair(2, 8, 1), pair(7, 2, 2)]
    sizes = torch.tensor([[3, 6], [8, 1], [2, 2]])
    with torch.no_grad(), model.disable_adapter():
        reference = by_full_logits(model, samples)
    expected = formula(by_full_logits(model, samples), reference, sizes).sum()
    objective = objective_named(name).with_options(TrainOptions(objective=name, **options))  # type: ignore[arg-type]
    loss, n_units = objective.loss_of(model, samples, "cpu", chunk_tokens=chunk_tokens)
    assert n_units == 3
    torch.testing.assert_close(loss, expected, atol=2e-5, rtol=1e-6)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    factor = 1024.0  # as a loss scaler's
    ours = torch.autograd.grad(loss * factor, parameters)
    theirs = torch.autograd.grad(expected, parameters)
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own / factor, other, atol=1e-5, rtol=1e-4)


def test_the_reference_is_the_base_without_dropout_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = load(save_family("gpt2", tmp_path), lora_dropout=0.5)
    samples = [pair(4, 3, 6)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    state = torch.get_rng_state()
    with adapter_off(model):
        reference = by_full_logits(model, samples)
    assert torch.equal(torch.get_rng_state(), state)
    assert not reference.requires_grad and all(module.training for module in model.modules())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    with torch.no_grad():
        assert torch.equal(by_full_logits(model.unload().eval(), samples), reference)


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_a_step_does_not_depend_on_how_it_is_cut(name: str, tiny_base: Path, tmp_path: Path) -> None:
    data = pair_file(tmp_path / "pairs.jsonl", 20)
    found = []
    for cut in ({"micro_batch": 8}, {"micro_batch": 4, "loss_chunk": 3}, {"micro_batch": 1}):
        output = tmp_path / str(cut["micro_batch"]) / "run"
        options = {**OPTIONS, "objective": name, "test_size": 4, "max_steps": 3, "eval_steps": 3, **cut}
        rows = read_log(finetune(tiny.config_for(tiny_base, data, output, **options)))
        metrics = [f"{of}{key}" for of in ("", "eval_") for key in objective_named(name).metrics]
        keys = ["loss", "grad_norm", "eval_loss", *metrics]
        found.append({key: [row[key] for row in rows if key in row] for key in keys})
    assert draw_loss(output).stat().st_size > 10_000
    assert len(found[0]) == 15 and {len(values) for values in found[0].values()} == {3, 1}
    for other in found[1:]:
        for key, values in found[0].items():
            assert other[key] == pytest.approx(values, rel=2e-6 if key == "loss" else 1e-5, abs=2e-6), key
    if name == "dpo":
        assert found[0]["loss"][0] == pytest.approx(0.693147, abs=1e-6)  # log 2: the adapter begins as nothing


def test_a_run_that_goes_on_ends_bit_by_bit_as_one_that_did_not_stop(tiny_base: Path, tmp_path: Path) -> None:
    data = pair_file(tmp_path / "pairs.jsonl", 20)
    options = {**OPTIONS, "max_steps": 4, "lora_dropout": 0.1, "keep_checkpoints": 9}
    whole = finetune(tiny.config_for(tiny_base, data, tmp_path / "whole", **options))
    again = {**options, "resume_from_checkpoint": str(whole / "checkpoint-2")}
    resumed = finetune(tiny.config_for(tiny_base, data, tmp_path / "resumed", **again))
    assert [step for step, _ in tiny.losses_of(resumed)] == [3, 4]
    one, other = (tiny.tensors_of(run / "adapter_model.safetensors") for run in (whole, resumed))
    assert one and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("name", "beta"), [("dpo", 0.0), ("ipo", 0.0), ("simpo", 0.0), ("orpo", 3.0)])
def test_held_out_pairs_are_told_apart_after_training(name: str, beta: float, tiny_base: Path, tmp_path: Path) -> None:
    data, held_out = pair_file(tmp_path / "pairs.jsonl", 48), pair_file(tmp_path / "others.jsonl", 20, seed=1)
    options = {**OPTIONS, "objective": name, "pref_beta": beta, "max_steps": 16, "micro_batch": 8, "save_steps": 16}
    run = finetune(tiny.config_for(tiny_base, data, tmp_path / "run", **options))
    config = tiny.config_for(tiny_base, data, run).model
    before, after = (load_bundle(config, path, "chatml")[0] for path in (None, str(run)))
    dataset = encoded(held_out, before.tokenizer, tmp_path)
    samples = [AnswerPair(dataset[i], dataset[i + 1]) for i in range(0, len(dataset), 2)]
    accuracies = []
    for bundle in (before, after):
        with torch.no_grad():
            logs = by_full_logits(bundle.model.eval(), samples)
        logs = logs / torch.tensor([[sum(label >= 0 for label in row.labels) for row in (each.chosen, each.rejected)]
                                    for each in samples])  # fmt: skip
        accuracies.append(float((logs[:, 0] > logs[:, 1]).float().mean()))
    assert accuracies[0] < 0.8 and accuracies[1] >= 0.9, accuracies


def encoded(path: Path, tokenizer: Any, folder: Path, cutoff_len: int = 96) -> EncodedDataset:
    template = load_template("chatml", tokenizer)
    encoder = objective_named("dpo").encoder
    return encode_dataset(str(path), template, tokenizer, EncodeSettings(cutoff_len), folder / "cache", encoder=encoder)


def test_a_pair_is_two_rows_with_one_prompt_of_which_the_last_answers_are_learned(
    tmp_path: Path, sp_tokenizer: Any
) -> None:
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
               {"role": "user", "content": "And?"}]  # fmt: skip
    row = {"prompt": history, "chosen": [{"role": "assistant", "content": "Yes."}],
           "rejected": [{"role": "assistant", "content": "No, never."}]}  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    dataset = encoded(path, sp_tokenizer, tmp_path, 200)
    chosen, rejected = dataset[0], dataset[1]
    assert len(dataset) == 2 and chosen.group == rejected.group
    learned = [sp_tokenizer.decode([label for label in each.labels if label >= 0]) for each in (chosen, rejected)]
    assert learned == ["Yes.<|im_end|>", "No, never.<|im_end|>"]
    start = chosen.labels.index(next(label for label in chosen.labels if label >= 0))
    assert chosen.input_ids[:start] == rejected.input_ids[:start]
    view = objective_named("dpo").samples(dataset, np.arange(2))
    assert (len(view), view.units.tolist(), view.lengths.tolist()) == (1, [1], [2 * len(rejected.input_ids)])
    assert not dataset.report.read.notes.keys() & {CHOSEN_LEARNED}


def test_pairs_that_teach_no_preference_are_named_and_counted(tmp_path: Path, sp_tokenizer: Any) -> None:
    def said(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    rows: list[dict[str, Any]] = [
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."},
        {"prompt": "Hi", "chosen": "Same.", "rejected": "Same."},
        {"chosen": said("Hi", "Hello."), "rejected": said("Bye", "Go.")},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "No. " * 100},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": ""},
        {"instruction": "Hi", "output": "Hello."},
        {"prompt": "Hi", "chosen": "Hello."},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "rejected": {"from": "gpt", "value": "Go."},
            "chosen": None,
        },
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    report = encoded(path, sp_tokenizer, tmp_path).report
    dropped = {place.rpartition(":")[2]: reason for place, reason in report.dropped_records}
    assert dropped == {"2": EQUAL_ANSWERS, "3": OTHER_PROMPT, "4": TOO_LONG.format(96), "5": NO_PAIR, "6": NO_PAIR}
    assert (report.n_samples, report.read.n_bad) == (2, 2)
    reasons = [bad.reason for bad in report.read.bad]
    assert reasons[0] == '"chosen" of a preference pair is there, but "rejected" is missing'
    assert reasons[1] == '"rejected" of a preference pair is there, but "chosen" is missing'
    path.write_text("\n".join(map(json.dumps, rows[1:])), encoding="utf-8")
    with pytest.raises(DataError, match=f"nothing can be learned.*{EQUAL_ANSWERS}"):
        encoded(path, sp_tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("options", "flag", "words"),
    [
        ({"pref_beta": 0.1}, "--pref_beta", "this one is sft"),
        ({"simpo_gamma": 0.0, "objective": "dpo"}, "--simpo_gamma", "of --objective simpo, and this one is dpo"),
        ({"sft_weight": 1.0, "objective": "orpo"}, "--sft_weight", "dpo, ipo, simpo, and this one is orpo"),
        ({"label_smoothing": 0.1, "objective": "ipo"}, "--label_smoothing", "dpo, simpo, and this one is ipo"),
        ({"label_smoothing": 0.5, "objective": "dpo"}, "--label_smoothing", "0.5 is no share of pairs"),
        ({"pref_beta": -1.0, "objective": "dpo"}, "--pref_beta", "-1 is no weight"),
        ({"objective": "dpo", "lora_init": "pissa"}, "--lora_init", "pissa does not go with --objective dpo"),
        ({"objective": "simpo", "train_on": "everything"}, "--train_on", "answers are compared"),
        ({"objective": "orpo", "deepspeed": "ds.json"}, "--deepspeed", "leave it out"),
    ],
)
def test_options_that_do_not_apply_are_refused_by_flag(options: dict[str, Any], flag: str, words: str) -> None:
    found = every_problem(options)
    assert len(found) == 1 and found[0][0] == flag and words in found[0][1]


def every_problem(options: dict[str, Any]) -> list[tuple[str, str]]:
    config = tiny.with_options(FinetuneConfig(), options)
    return problems_of(config)


def test_options_that_apply_are_taken() -> None:
    for options in (
        {"objective": "simpo", "lora_init": "pissa", "simpo_gamma": 0.0, "label_smoothing": 0.1, "sft_weight": 1.0},
        {"objective": "ipo", "pref_beta": 0.2, "sft_weight": 0.5},
    ):
        assert every_problem(options) == []


def test_a_run_of_pairs_is_scored_by_its_answers(tiny_base: Path, tmp_path: Path) -> None:
    data = pair_file(tmp_path / "pairs.jsonl", 6)
    bundle, _ = load_bundle(tiny.config_for(tiny_base, data, tmp_path / "run").model, None, "chatml")
    of_pairs = replace(bundle, objective="dpo")
    samples = [case.sample for case in read_cases(str(data), of_pairs)]
    assert len(samples) == 6 and mean_loss(of_pairs, samples) == mean_loss(bundle, samples)


def test_sources_with_shares_rehearsal_and_recomputed_layers(tiny_base: Path, tmp_path: Path) -> None:
    """A share counts pairs; a rehearsal, layers computed again and all logits at once change no loss."""
    few, many = pair_file(tmp_path / "few.jsonl", 6), pair_file(tmp_path / "many.jsonl", 20, seed=1)
    options = {
        **OPTIONS,
        "data": f"{few}:2,{many}:0.5",
        "data_path": FinetuneConfig().data.data_path,
        "test_size": 0.2,
        "max_steps": 3,
        "log_samples": True,
    }
    plain = finetune(tiny.config_for(tiny_base, few, tmp_path / "plain", **options))
    changed = {**options, "rehearsal": True, "gradient_checkpointing": True, "loss_chunk": -1, "micro_batch": 2}
    other = finetune(tiny.config_for(tiny_base, few, tmp_path / "other", **changed))
    one, two = ([row for row in read_log(run) if "loss" in row] for run in (plain, other))
    assert [row["samples"] for row in one] == [row["samples"] for row in two]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=2e-6)
    assert [len(row["samples"]) for row in one[:2]] == [8, 8]


def test_a_start_from_an_adapter_says_what_the_reference_is(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pair_file(tmp_path / "pairs.jsonl", 8)
    first = finetune(tiny.config_for(tiny_base, data, tmp_path / "first", **OPTIONS, max_steps=2))
    again = {**OPTIONS, "max_steps": 1, "init_adapter": str(first)}
    of_base = finetune(tiny.config_for(tiny_base, data, tmp_path / "base", **again, cache_reference=False))
    assert "compares with the base without any adapter" in "".join(capsys.readouterr())
    assert tiny.losses_of(of_base)[0][1] < 0.6  # not log 2: the start differs from the reference
    of_start = finetune(tiny.config_for(tiny_base, data, tmp_path / "start", **again))
    assert f"the reference is the adapter {first}: log-probabilities of 8 pairs" in capsys.readouterr().out
    assert tiny.losses_of(of_start)[0][1] == pytest.approx(0.693147, abs=1e-6)
    longer = {**again, "max_steps": 2}
    with pytest.raises(CheckpointError, match="reference: --cache_reference auto -> false"):
        finetune(tiny.config_for(tiny_base, data, of_start, **longer, cache_reference=False))
    # A run of a version that knew no other reference than the base goes on with it.
    written = of_base / "checkpoint-1" / "trainer_state.json"
    state = json.loads(written.read_text(encoding="utf-8"))
    assert state["identity"].pop("reference") == "base"
    written.write_text(json.dumps(state), encoding="utf-8")
    written.with_name("manifest.json").unlink()
    longer["resume_from_checkpoint"] = str(written.parent)
    finetune(tiny.config_for(tiny_base, data, tmp_path / "older", **longer))
    assert "compares with the base without any adapter" in "".join(capsys.readouterr())


def test_logits_of_a_chunk_are_all_that_a_chunk_adds(tmp_path: Path) -> None:
    """Forward, reference and backward; the same rows in fine-tuning take as much."""
    vocab = 20_000
    model = load(save_family("llama", tmp_path, vocab_size=vocab))
    samples = [pair(4, 50, 60), pair(4, 60, 40)]
    rows = [row for each in samples for row in (each.chosen, each.rejected)]

    def peak(name: str, taken: list[Any], chunk_tokens: int) -> int:
        objective = objective_named(name)

        def step() -> None:
            objective.loss_of(model, taken, "cpu", chunk_tokens=chunk_tokens)[0].backward()

        step()
        return peak_bytes(step)

    ours, larger = (peak("dpo", samples, chunk_tokens) for chunk_tokens in (32, 64))
    assert (larger - ours) / (32 * vocab) == pytest.approx(CHUNK_BYTES_PER_LOGIT[32], rel=0.01)
    assert ours < peak("dpo", samples, 0) / 3
    assert ours == pytest.approx(peak("sft", rows, 32), rel=0.05)
