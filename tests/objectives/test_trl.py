"""Losses and gradients are those of TRL's own trainers, from collator to loss: the same rows, weights and reference.

What differs by choice is laid out so that it does not count: a chosen answer's own loss is a mean over its tokens here,
pair by pair, and over all tokens of the batch in TRL (so those of one length); its ORPO learns prompts (so those of
one token).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onecard.config.lora import LoraOptions
from onecard.config.run import TrainOptions
from onecard.data.encode import LabelledSample
from onecard.model.lora.adapter import add_lora
from onecard.model.reward_head import SCORE
from onecard.objectives.grpo import GroupRelative, Rollout, rollout_of
from onecard.objectives.preference import AnswerPair
from onecard.objectives.registry import objective_named
from onecard.objectives.reward import RewardModelling
from tests.objectives.test_preference import load

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore")]
EXACT, EOS = 1e-5, 2
PLAIN = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}
TEXTS = {"prompt": ["Hi"] * 8, "chosen": ["a"] * 8, "rejected": ["b"] * 8}
"""What a trainer is made with, and never sees again."""
Trainer = Callable[..., Any]


@pytest.fixture
def trainer(tiny_base: Path, sp_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Makes one of TRL around a fresh adapter, which is its reference, and gives it the weights of `load` then."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def make(kind: type, config: type, texts: dict[str, Any] = TEXTS, *, settings: dict[str, Any], **more: Any) -> Any:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM

        tokenizer = copy.deepcopy(sp_tokenizer)
        tokenizer.pad_token = "<unk>"
        begun = add_lora(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), LoraOptions(lora_r=4))
        arguments = config(output_dir=str(tmp_path), **PLAIN | settings)
        made = kind(model=begun, args=arguments, train_dataset=Dataset.from_dict(texts), processing_class=tokenizer,
                    **more)  # fmt: skip
        missing = begun.load_state_dict(trained(load(tiny_base)), strict=False)
        assert not missing.unexpected_keys
        return made

    return make


def trained(model: Any, values: str = "data") -> dict[str, Tensor]:
    """The trained weights of a model by name, or their gradients (`grad`)."""
    return {name: getattr(p, values).detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def compare(ours: Any, loss: Tensor, theirs: Any, wanted: Tensor) -> None:
    """Losses and the gradients of all trained weights, to 1e-5."""
    loss.backward()
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), abs=EXACT)
    found, expected = trained(ours, "grad"), trained(theirs, "grad")
    assert found.keys() == expected.keys() and len(found) == 28
    assert max(float(each.abs().max()) for each in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=EXACT, rtol=0, msg=name)


def answer(prompt: Sequence[int], n: int, *, ends: bool = True, **more: Any) -> LabelledSample:
    ids = [*prompt, *torch.randint(3, 400, (n - ends,)).tolist(), *[EOS] * ends]
    return LabelledSample(ids, [-100] * len(prompt) + ids[len(prompt) :], "a row", 0, **more)


def pairs(*sizes: tuple[int, int, int]) -> list[AnswerPair]:
    """By the tokens of prompt, chosen and rejected answer."""
    torch.manual_seed(1)
    made = []
    for prompt, chosen, rejected in sizes:
        ids = [1, *torch.randint(3, 400, (prompt - 1,)).tolist()]
        made.append(AnswerPair(answer(ids, chosen), answer(ids, rejected)))
    return made


RAGGED, EVEN = [(4, 3, 6), (2, 8, 1), (7, 2, 2)], [(4, 5, 6), (2, 5, 1), (7, 5, 2)]


def our_loss(name: str, model: Any, samples: Sequence[Any], chunk_tokens: int, options: dict[str, Any]) -> Tensor:
    objective = objective_named(name).with_options(TrainOptions(objective=name, **options))  # type: ignore[arg-type]
    found = objective.estimator(samples) if objective.looks_ahead else None
    if found:
        with torch.no_grad():
            total, n = found[0].loss_of(model, found[1], "cpu", chunk_tokens=chunk_tokens)
        objective = objective.with_estimate(float(total / n))
    loss, n_units = objective.loss_of(model, samples, "cpu", chunk_tokens=chunk_tokens)
    return loss / n_units


@pytest.mark.parametrize("chunk_tokens", [0, 5])
@pytest.mark.parametrize(
    ("name", "options", "sizes", "settings"),
    [
        ("dpo", {}, RAGGED, {"loss_type": ["sigmoid"], "beta": 0.1}),
        # Its sigmoid loss has no smoothing; that of one pair by optimal transport is the same formula with it.
        ("dpo", {"pref_beta": 0.5, "label_smoothing": 0.2}, RAGGED[:1],
         {"loss_type": ["aot"], "beta": 0.5, "label_smoothing": 0.2}),
        ("dpo", {"sft_weight": 0.3}, EVEN, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
        ("ipo", {"pref_beta": 0.2}, RAGGED, {"loss_type": ["ipo"], "beta": 0.2}),
    ],
)  # fmt: skip
def test_dpo_and_ipo(
    name: str, options: dict[str, Any], sizes: Any, settings: dict[str, Any], chunk_tokens: int, trainer: Trainer,
    tiny_base: Path,
) -> None:  # fmt: skip
    from trl import DPOConfig, DPOTrainer

    samples, theirs = pairs(*sizes), trainer(DPOTrainer, DPOConfig, settings=settings)
    rows = []
    for each in samples:
        n_prompt = each.chosen.labels.count(-100)
        sides = {"prompt": each.chosen.input_ids[:n_prompt], "chosen": each.chosen.input_ids[n_prompt:],
                 "rejected": each.rejected.input_ids[n_prompt:]}  # fmt: skip
        rows.append({f"{side}_ids": ids for side, ids in sides.items()})
    wanted = theirs.compute_loss(theirs.model, theirs.data_collator(rows))
    ours = load(tiny_base)
    compare(ours, our_loss(name, ours, samples, chunk_tokens, options), theirs.model, wanted)


@pytest.mark.parametrize("chunk_tokens", [0, 5])
@pytest.mark.parametrize(
    ("name", "options", "sizes", "settings"),
    [
        ("simpo", {}, RAGGED, {"beta": 2.0, "simpo_gamma": 1.0}),
        ("simpo", {"pref_beta": 2.5, "simpo_gamma": 0.5, "label_smoothing": 0.1, "sft_weight": 0.2}, EVEN,
         {"beta": 2.5, "simpo_gamma": 0.5, "label_smoothing": 0.1, "cpo_alpha": 0.2}),
        ("orpo", {}, [(1, 5, 6), (1, 5, 1), (1, 5, 3)], {"beta": 0.1}),
        ("orpo", {"pref_beta": 0.4}, [(1, 7, 2)], {"beta": 0.4}),
    ],
)  # fmt: skip
def test_simpo_and_orpo(
    name: str, options: dict[str, Any], sizes: Any, settings: dict[str, Any], chunk_tokens: int, trainer: Trainer,
    tiny_base: Path,
) -> None:  # fmt: skip
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    samples = pairs(*sizes)
    common = {"max_length": 64, "remove_unused_columns": False}
    if name == "simpo":
        settings = {"loss_type": "simpo", "cpo_alpha": 0.0, **settings}
        theirs = trainer(CPOTrainer, CPOConfig, settings=common | settings)
    else:
        theirs = trainer(ORPOTrainer, ORPOConfig, settings=common | settings)
    rows = []
    for each in samples:
        row = {"prompt_input_ids": [1], "prompt_attention_mask": [1]}
        for side, sample in (("chosen", each.chosen), ("rejected", each.rejected)):
            row |= {f"{side}_input_ids": sample.input_ids, f"{side}_labels": sample.labels,
                    f"{side}_attention_mask": [1] * len(sample.input_ids)}  # fmt: skip
        rows.append(row)
    wanted, _ = theirs.get_batch_loss_metrics(theirs.model, theirs.data_collator(rows))
    ours = load(tiny_base)
    compare(ours, our_loss(name, ours, samples, chunk_tokens, options), theirs.model, wanted)


def test_the_odds_ratio_of_orpo_behind_longer_prompts(trainer: Trainer, tiny_base: Path) -> None:
    """By TRL's odds_ratio_loss, which is what is not the chosen answer's own loss."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    samples, theirs = pairs(*RAGGED), trainer(ORPOTrainer, ORPOConfig, settings={"max_length": 64, "beta": 0.1})
    ours = load(tiny_base)
    for model in (ours, theirs.model):
        model.get_output_embeddings().weight.data *= 10
    for each in samples:  # an odds is a probability where that is small, so rejected answers are the likeliest ones
        for place in range(each.rejected.labels.count(-100), len(each.rejected.labels)):
            token = int(ours(torch.tensor([each.rejected.input_ids[:place]])).logits[0, -1].argmax())
            each.rejected.input_ids[place] = each.rejected.labels[place] = token
    rows = [row for each in samples for row in (each.chosen, each.rejected)]
    logs = [
        theirs.get_batch_logps(theirs.model(ids).logits, torch.tensor([row.labels]), average_log_prob=True)
        for row in rows for ids in [torch.tensor([row.input_ids])]
    ]  # fmt: skip
    chosen, rejected = torch.cat(logs).view(-1, 2).unbind(1)
    assert float(rejected.exp().min()) > 0.04
    wanted = (-chosen - theirs.odds_ratio_loss(chosen, rejected)[0]).mean()
    compare(ours, our_loss("orpo", ours, samples, 0, {}), theirs.model, wanted)


@pytest.mark.parametrize("chunk_tokens", [0, 5])
@pytest.mark.parametrize("good", [(True, False, False, True), (False, True, True, False), (True, True, True, True)])
def test_kto(good: tuple[bool, ...], chunk_tokens: int, trainer: Trainer, tiny_base: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    torch.manual_seed(2 + sum(good))
    sizes = [(4, 3), (2, 8), (7, 2), (5, 6)]
    texts = {"prompt": ["Hi"] * 4, "completion": ["a", "b", "c", "d"], "label": [True, False] * 2}
    settings = {"beta": 0.3, "desirable_weight": 2.0, "undesirable_weight": 0.5, "per_device_train_batch_size": 4}
    theirs = trainer(KTOTrainer, KTOConfig, texts, settings=settings)
    prompts = [[1, *torch.randint(3, 400, (n - 1,)).tolist()] for n, _ in sizes]
    samples = []
    for prompt, (_, n), is_good in zip(prompts, sizes, good, strict=True):
        weights = [] if is_good else [-1.0] * (len(prompt) + n)
        samples.append(answer(prompt, n, weights=weights))
    answers = [sample.input_ids[len(prompt) :] for sample, prompt in zip(samples, prompts, strict=True)]
    others = [answers[-1], *answers[:-1]]  # as TRL's add_kl_completion_ids turns a batch
    rows = [dict(zip(("prompt_ids", "completion_ids", "KL_completion_ids", "label"), each, strict=True))
            for each in zip(prompts, answers, others, good, strict=True)]  # fmt: skip
    wanted = theirs.compute_loss(theirs.model, theirs.data_collator(rows))
    ours = load(tiny_base)
    options = {"pref_beta": 0.3, "desirable_weight": 2.0, "undesirable_weight": 0.5}
    compare(ours, our_loss("kto", ours, samples, chunk_tokens, options), theirs.model, wanted)


REWARDS = [1.0, 0.25, 0.0, 2.0, 1.5, 1.5]


@pytest.mark.parametrize("chunk_tokens", [0, 5])
@pytest.mark.parametrize(
    ("options", "settings", "is_later_update"),
    [
        ({"grpo_loss": "dapo"}, {"loss_type": "dapo"}, False),
        ({"grpo_loss": "dapo", "mask_overlong": True, "kl_beta": 0.1},
         {"loss_type": "dapo", "mask_truncated_completions": True, "beta": 0.1}, False),
        ({"grpo_loss": "dr_grpo", "rollout_temperature": 0.7, "kl_beta": 0.05},
         {"loss_type": "dr_grpo", "scale_rewards": "none", "temperature": 0.7, "beta": 0.05}, False),
        ({"grpo_loss": "grpo", "grpo_updates": 2, "grpo_clip_high": 0.28, "rollout_temperature": 1.3},
         {"loss_type": "grpo", "epsilon_high": 0.28, "temperature": 1.3}, True),
        ({"grpo_loss": "dapo", "grpo_updates": 2, "kl_beta": 0.2}, {"loss_type": "dapo", "beta": 0.2}, True),
    ],
)  # fmt: skip
def test_grpo(
    options: dict[str, Any], settings: dict[str, Any], is_later_update: bool, chunk_tokens: int, trainer: Trainer,
    tiny_base: Path,
) -> None:  # fmt: skip
    """TRL makes advantages, masks and divisors of the rewards, too; only the answers are given to it.

    Its divergence is that of the paper where its own later correction by the ratio is off.
    """
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(3)
    given = [[1, *torch.randint(3, 400, (n,)).tolist()] for n in (4, 6)]
    sizes = [(0, 9, False), (0, 3, True), (0, 6, True), (1, 2, True), (1, 4, True), (1, 9, False)]
    rows = [answer(given[prompt], n, ends=ends) for prompt, n, ends in sizes]
    prompts = [given[prompt] for prompt, _, _ in sizes]
    answers = [row.input_ids[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    theirs = trainer(
        GRPOTrainer, GRPOConfig, {"prompt": ["Hi"] * 8}, reward_funcs=lambda completions, **_: REWARDS,
        rollout_func=lambda *_: {"prompt_ids": prompts, "completion_ids": answers, "logprobs": None},
        settings={"num_generations": 3, "per_device_train_batch_size": 6, "max_completion_length": 9, "epsilon": 0.2,
                  "beta": 0.0, "use_bias_correction_kl": False, **settings},
    )  # fmt: skip
    theirs.current_gradient_accumulation_steps = 1
    theirs.model.train()
    inputs = theirs._generate_and_score_completions([{"prompt": "Hi"} for _ in rows])
    old = -torch.rand(inputs["completion_ids"].shape) * 3 - 4  # near log 1/448, so that some ratios are clipped
    if is_later_update:
        inputs["old_per_token_logps"] = old
    wanted = theirs.compute_loss(theirs.model, inputs)

    ours = load(tiny_base)
    objective = GroupRelative().with_options(TrainOptions(objective="grpo", rollout_max_tokens=9, **options))
    assert isinstance(objective, GroupRelative)
    rollouts: list[Rollout] = []
    for number, (prompt, ids) in enumerate(zip(prompts, answers, strict=True)):
        row = LabelledSample(prompt, [], "a row", 0)
        rollouts.append(rollout_of(row, ids, ended=sizes[number][2], reward=REWARDS[number]))
        if is_later_update:
            rollouts[-1].old = old[number, : len(ids)].tolist()
    view = objective.rollout_view([rollouts[:3], rollouts[3:]], None)
    advantages = torch.tensor([each.advantage for each in view])
    torch.testing.assert_close(advantages, inputs["advantages"], atol=EXACT, rtol=0)
    loss, n_units = objective.loss_of(ours, list(view), "cpu", chunk_tokens=chunk_tokens)
    assert n_units == view.units.sum()
    compare(ours, loss / n_units, theirs.model, wanted)


@pytest.mark.parametrize("center", [None, 0.3])
def test_reward(center: float | None, tiny_base: Path, tmp_path: Path, sp_tokenizer: Any) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    samples, margins = pairs(*RAGGED), [0.5, 0.0, 1.25]
    for each, margin in zip(samples, margins, strict=True):
        each.chosen.fields = str(margin)
    torch.manual_seed(0)
    ours: Any = add_lora(AutoModelForCausalLM.from_pretrained(tiny_base), LoraOptions(lora_r=4), gives_reward=True)
    head = next(p for name, p in ours.named_parameters() if SCORE in name and p.requires_grad)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, pad_token_id=0)
    plain.score.weight.data.copy_(head.data)
    tokenizer = copy.deepcopy(sp_tokenizer)
    tokenizer.pad_token = "<unk>"
    settings: dict[str, Any] = {**PLAIN, "center_rewards_coefficient": center}
    theirs = RewardTrainer(plain, RewardConfig(output_dir=str(tmp_path), **settings),
                           train_dataset=Dataset.from_dict({"chosen": ["a"], "rejected": ["b"]}),
                           processing_class=tokenizer)  # fmt: skip
    rows = [{"chosen_ids": each.chosen.input_ids, "rejected_ids": each.rejected.input_ids, "margin": margin}
            for each, margin in zip(samples, margins, strict=True)]  # fmt: skip
    wanted = theirs.compute_loss(plain, theirs.data_collator(rows))
    loss, n_pairs = RewardModelling(center=center or 0.0).loss_of(ours, samples, "cpu")
    loss = loss / n_pairs
    loss.backward()
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), abs=EXACT)
    assert float(plain.score.weight.grad.abs().max()) > 1e-3
    torch.testing.assert_close(head.grad, plain.score.weight.grad, atol=EXACT, rtol=0)
