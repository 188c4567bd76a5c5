"""Rewards and rollouts: losses by formulas of their own, cuts, resume, what is drawn, what a step learns from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onecard.config.lora import LoraOptions
from onecard.config.problems import problems_of
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.data.chat_template import load_template
from onecard.data.dataset import EncodedDataset, encode_dataset
from onecard.data.encode import EncodeSettings, LabelledSample
from onecard.errors import ConfigError, DataError
from onecard.inference.rollouts import RolloutSampler
from onecard.model.lora.adapter import add_lora
from onecard.model.memory.architecture import architecture_of
from onecard.objectives.grpo import GroupRelative, Rollout, group_advantages, rollout_of
from onecard.objectives.reward_file import RewardError
from onecard.programs import inspect_run
from onecard.recipes import finetune
from onecard.train.optim import build_optimizer
from onecard.train.step_log import ROLLOUTS_NAME, StepLog
from onecard.train.trackers import draw_loss, read_log
from tests import tiny
from tests.runs import assert_same_end, final_checkpoint, run_and_stop

OPTIONS = {
    "objective": "grpo", "reward": "regex:[aeiou0-9],length:-30:0.5", "cutoff_len": 96, "prompt_type": "chatml",
    "rollouts": 4, "rollout_max_tokens": 12, "total_batch": 4, "micro_batch": 0, "micro_tokens": 400,
    "learning_rate": 3e-3, "log_rollouts": True, "num_epoch": 9,
}  # fmt: skip


def adapted(directory: Path) -> Any:
    """A model whose adapter is not what it began as."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = add_lora(
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), LoraOptions(lora_r=4)
    ).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.empty_like(parameter).normal_(0, 0.05)
    return model


def rollout(prompt: int, answer: int, *, ended: bool = True, reward: float = 0.0) -> Rollout:
    ids = torch.randint(3, 60, (prompt + answer,)).tolist()
    return rollout_of(LabelledSample(ids[:prompt], [], "a row", 0), ids[prompt:], ended=ended, reward=reward)


def by_full_logits(model: Any, each: Rollout, temperature: float) -> Tensor:
    """The log-probabilities of the answer's tokens (n_answer,), alone."""
    logs = (model(input_ids=torch.tensor([each.input_ids])).logits[0] / temperature).log_softmax(-1)
    return torch.stack([logs[place - 1, each.input_ids[place]] for place in range(each.n_prompt, len(each.input_ids))])


def formula(model: Any, groups: list[list[Rollout]], options: TrainOptions, old: dict[int, Tensor]) -> Tensor:
    """The loss of a step as the papers and TRL's GRPOTrainer have it: one answer after the other."""
    found, n_tokens, n_answers = [], 0, 0
    for group in groups:
        rewards = torch.tensor([each.reward for each in group])
        advantages = rewards - rewards.mean()
        if options.grpo_loss != "dr_grpo":
            advantages = advantages / (rewards.std() + 1e-4)
        for each, advantage in zip(group, advantages, strict=True):
            policy = by_full_logits(model, each, options.rollout_temperature)
            with torch.no_grad(), model.disable_adapter():
                reference = by_full_logits(model.eval(), each, options.rollout_temperature)
            model.train()
            ratio = torch.exp(policy - old.get(id(each), policy.detach()))
            high = options.grpo_clip_high or options.grpo_clip
            clipped = torch.clip(ratio, 1 - options.grpo_clip, 1 + high)
            losses = -torch.minimum(ratio * advantage, clipped * advantage)
            losses = losses + options.kl_beta * (torch.exp(reference - policy) - (reference - policy) - 1)
            counts = each.ended or not options.mask_overlong
            n_answers += 1
            n_tokens += len(losses) * counts
            found.append((losses.mean() if options.grpo_loss == "grpo" else losses.sum()) * counts)
    whole = torch.stack(found).sum()
    if options.grpo_loss == "dapo":
        return whole / n_tokens
    return whole / n_answers if options.grpo_loss == "grpo" else whole / (n_answers * options.rollout_max_tokens)


@pytest.mark.parametrize("chunk_tokens", [0, 5])
@pytest.mark.parametrize(
    "options",
    [{}, {"grpo_loss": "grpo", "mask_overlong": True}, {"mask_overlong": True, "kl_beta": 0.1},
     {"grpo_loss": "dr_grpo", "rollout_temperature": 0.7, "kl_beta": 0.05},
     {"grpo_loss": "grpo", "grpo_updates": 2, "grpo_clip_high": 0.28, "rollout_temperature": 1.3}],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_formulas(
    options: dict[str, Any], chunk_tokens: int, tiny_base: Path
) -> None:
    model, given = adapted(tiny_base), TrainOptions(objective="grpo", rollout_max_tokens=9, **options)
    objective = GroupRelative().with_options(given)
    assert isinstance(objective, GroupRelative)
    groups = [[rollout(5, 9, ended=False, reward=1.0), rollout(5, 3, reward=0.25), rollout(5, 6)],
              [rollout(7, 2, reward=2.0), rollout(7, 4, reward=1.5), rollout(7, 1, reward=1.5)]]  # fmt: skip
    old: dict[int, Tensor] = {}
    if given.grpo_updates > 1:
        for each in (each for group in groups for each in group):
            each.old = (
                by_full_logits(model, each, given.rollout_temperature).detach() + torch.randn(()) * 0.3
            ).tolist()
            old[id(each)] = torch.tensor(each.old)
    view = objective.rollout_view(groups, None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = formula(model, groups, given, old)
    wanted = torch.autograd.grad(expected, trained)
    assert any(float(gradient.abs().max()) > 1e-4 for gradient in wanted)
    total, gradients, n_units = 0.0, [torch.zeros_like(parameter) for parameter in trained], view.units.sum()
    for some in ([0, 3], [1, 2, 4], [5]):
        loss, units = objective.loss(model, objective.collate([view[i] for i in some]), chunk_tokens=chunk_tokens)
        assert units == view.units[some].sum()
        total += float(loss / n_units)
        for whole, part in zip(gradients, torch.autograd.grad(loss / n_units, trained), strict=True):
            whole += part
    assert total == pytest.approx(float(expected), abs=1e-6)
    for found, expected_gradient in zip(gradients, wanted, strict=True):
        assert torch.allclose(found, expected_gradient, atol=1e-6, rtol=1e-4)


def test_advantages_are_deviations_within_a_group() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    half = 0.5 / (rewards[0].std() + 1e-4)
    assert torch.allclose(group_advantages(rewards), torch.tensor([[half, -half, -half, half], [0.0] * 4]))
    assert group_advantages(rewards, divide=False)[0].tolist() == [0.5, -0.5, -0.5, 0.5]


def encoded(path: Path, tokenizer: Any, folder: Path, cutoff_len: int = 96) -> EncodedDataset:
    template, settings = load_template("chatml", tokenizer), EncodeSettings(cutoff_len)
    return encode_dataset(str(path), template, tokenizer, settings, folder / "cache", encoder=GroupRelative.encoder)


def test_prompts_are_read_with_and_without_answers(tmp_path: Path, sp_tokenizer: Any) -> None:
    records = [
        {"instruction": "Add", "input": "2 3", "output": "5", "level": 1},
        {"prompt": "Say something"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"prompt": "x" * 400},
        {"output": "an answer to nothing"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    dataset = encoded(path, sp_tokenizer, tmp_path)
    assert len(dataset) == 3 and dataset.report.read.n_bad == 1 and dataset.report.dropped.total() == 1
    fields = [json.loads(dataset[i].fields) for i in range(3)]
    assert [each["reference"] for each in fields] == ["5", None, "Hello"]
    assert fields[0] == {"prompt": "Add\n2 3", "reference": "5", "row": records[0]}
    # What generation is fed, and nothing of the answer.
    assert sp_tokenizer.decode(dataset[2].input_ids).count("Hello") == 0
    assert sp_tokenizer.decode(dataset[2].input_ids).rstrip().endswith("assistant")
    path.write_text("\n".join(map(json.dumps, [{**records[0], "level": 2}, *records[1:]])), encoding="utf-8")
    assert encoded(path, sp_tokenizer, tmp_path).fingerprint != dataset.fingerprint  # a reward may read it


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_that_was_stopped_ends_bit_by_bit_as_one_that_was_not(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "max_steps": 4, "lora_dropout": 0.1, "kl_beta": 0.02, "grpo_updates": 2}
    whole = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "whole", **options))
    config = tiny.config_for(tiny_base, instructions, tmp_path / "cut", **options)
    run_and_stop(config, monkeypatch, after_steps=2)
    with (tmp_path / "cut" / "rollouts.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "answer": "of a step that was lost"}\n{"step": 3, "ans')
    cut = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "cut", **options))
    assert_same_end(whole, cut)
    assert rows_of(whole) == rows_of(cut) and len(rows_of(whole)) == 4 * 4 * 4
    losses = [loss for _, loss in tiny.losses_of(whole)]
    assert len(losses) == 4 and any(losses)
    # Each answer to a prompt has numbers of its own.
    first = [row["answer"] for row in rows_of(whole)[:4]]
    assert len(set(first)) > 1 and len({row["record"] for row in rows_of(whole)[:4]}) == 1


def test_a_step_does_not_depend_on_how_it_is_cut_or_sampled(
    tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    found = []
    for number, (micro, batch) in enumerate([(1, 3), (5, 64)]):
        options = {**OPTIONS, "max_steps": 2, "micro_batch": micro, "micro_tokens": 0, "rollout_batch": batch,
                   "learning_rate": 5e-4}  # fmt: skip
        run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / f"run{number}", **options))
        found.append((run, [row["grad_norm"] for row in read_log(run) if "loss" in row]))
    (one, norms), (other, other_norms) = found
    assert rows_of(one) == rows_of(other)
    assert norms == pytest.approx(other_norms, rel=1e-4) and norms[0] > 0
    assert_same_updates(one, other, tiny_base)


def assert_same_updates(one: Path, other: Path, base: Path) -> None:
    """Adam's moments agree to rounding, and the weights to 1e-5 where that does not divide rounding by rounding.

    A gradient below 1e-4 of the largest one is divided by its own size, too.
    """
    states = [torch.load(final_checkpoint(run) / "optimizer.pt", weights_only=True)["state"] for run in (one, other)]
    tensors = [tiny.tensors_of(run / "adapter_model.safetensors") for run in (one, other)]
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one, is_trainable=True)
    known = {id(weight): name.replace(".default", "") for name, weight in model.named_parameters()}
    groups = build_optimizer(model, TrainOptions(optimizer="adamw")).param_groups
    names = [known[id(weight)] for group in groups for weight in group["params"]]
    assert len(names) == len(states[0]) == len(tensors[0])
    for moment in ("exp_avg", "exp_avg_sq"):
        pairs = [(states[0][number][moment], states[1][number][moment]) for number in states[0]]
        largest = max(float(mine.abs().max()) for mine, _ in pairs)
        assert max(float((mine - theirs).abs().max()) for mine, theirs in pairs) < 1e-6 * largest, moment
    sizes = {name: states[0][number]["exp_avg_sq"].sqrt() for number, name in enumerate(names)}
    least, n_compared = 1e-4 * max(float(size.max()) for size in sizes.values()), 0
    for name, size in sizes.items():
        apart = (tensors[0][name] - tensors[1][name]).abs()[size > least]
        n_compared += len(apart)
        assert not len(apart) or float(apart.max()) < 1e-5, name
    assert n_compared > sum(size.numel() for size in sizes.values()) / 2


def test_what_is_drawn_for_an_answer_does_not_depend_on_those_beside_it(tiny_base: Path, sp_tokenizer: Any) -> None:
    from onecard.inference.call import ModelBundle

    model = adapted(tiny_base).eval()
    bundle = ModelBundle(model, sp_tokenizer, load_template("chatml", sp_tokenizer))
    sample = RolloutSampler(bundle, 8, 42)
    prompts = [[1, 20, 30], [1, 40], [1, 20, 30]]
    together = sample(prompts, [10, 11, 12], 1.0)
    assert together == [sample([ids], [number], 1.0)[0] for ids, number in zip(prompts, (10, 11, 12), strict=True)]
    assert together[0].ids != together[2].ids
    assert sample(prompts, [10, 11, 12], 0.0)[0] == sample(prompts, [7, 8, 9], 0.0)[0]
    cut = [answer for answer in together if not answer.ended]
    assert all(len(answer.ids) == 8 for answer in cut)
    # Nothing that sampling leaves behind keeps the model from being trained.
    model.train()(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()


def test_memory_that_runs_out_while_sampling_makes_batches_smaller(
    tiny_base: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = RolloutSampler.__call__, []

    def of_little_room(self: Any, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, prompts, *rest)

    options = {**OPTIONS, "max_steps": 2}
    whole = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "whole", **options))
    monkeypatch.setattr(RolloutSampler, "__call__", of_little_room)
    cut = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "cut", **options))
    assert sizes[:4] == [16, 8, 4, 4] and max(sizes[4:]) == 4
    assert rows_of(whole) == rows_of(cut)
    changes = [row["change"] for row in read_log(cut) if row.get("event") == "out_of_memory"]
    assert changes == [f"{n // 2} answers are sampled at once instead of {n}" for n in (16, 8)]


@pytest.mark.parametrize(
    ("options", "flag", "words"),
    [
        ({"objective": "grpo"}, "--reward", "is missing"),
        ({"objective": "sft", "reward": "exact"}, "--reward", "is of --objective grpo"),
        ({"objective": "grpo", "reward": "exct"}, "--reward", "'exct' is no checker"),
        ({"objective": "grpo", "reward": "exact", "rollouts": 1}, "--rollouts", "1 is too few; use 2 or more"),
        ({"objective": "grpo", "reward": "exact", "cutoff_len": 256}, "--rollout_max_tokens", "leaves no room"),
        ({"objective": "grpo", "reward": "exact", "rollout_temperature": 0.0}, "--rollout_temperature", "not between"),
        ({"objective": "grpo", "reward": "exact", "kl_beta": -1.0}, "--kl_beta", "-1 is not 0 or more"),
        ({"objective": "grpo", "reward": "exact", "deepspeed": "ds.json"}, "--deepspeed", "does not go with"),
        ({"objective": "grpo", "reward": "exact", "stream_layers": "on"}, "--stream_layers", "does not go with"),
    ],
)
def test_options_that_do_not_apply_are_refused_by_flag(options: dict[str, Any], flag: str, words: str) -> None:
    config = tiny.with_options(FinetuneConfig(), {"cutoff_len": 1024, **options})
    found = problems_of(config)
    assert any(name == flag and words in text for name, text in found), found


def test_a_memory_plan_is_for_the_longest_answers(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    from onecard.train.memory_probe import worst_micro_batch
    from onecard.train.oom import MicroBatchLimits

    options = {**OPTIONS, "max_steps": 1, "rehearsal": True, "test_size": 2, "grpo_loss": "grpo"}
    run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", **options))
    evaluated = [row for row in read_log(run) if "eval_reward" in row]
    assert evaluated[-1]["eval_reward"] > 0 and evaluated[-1]["eval_completions/mean_length"] > 1
    assert "eval_loss" not in evaluated[-1] and "eval_kl" not in evaluated[-1]
    lengths = np.repeat([20, 30], 4)
    assert worst_micro_batch(lengths, MicroBatchLimits(3, 0), 8).rows == 3
    assert replace(TrainOptions(), objective="grpo", rollouts=4).answers_per_prompt == 4


def test_a_step_tells_what_was_sampled(tiny_base: Path, instructions: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "max_steps": 2, "kl_beta": 0.1, "grpo_updates": 2, "micro_batch": 3, "micro_tokens": 0}
    run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", **options))
    for row in (row for row in read_log(run) if "loss" in row):
        sampled = [each for each in rows_of(run) if each["step"] == row["step"]]
        rewards = torch.tensor([each["reward"] for each in sampled]).view(4, 4)
        assert row["reward"] == pytest.approx(float(rewards.mean()), abs=1e-5)
        assert row["reward_std"] == pytest.approx(float(rewards.std(dim=1).mean()), abs=1e-5) and row["reward_std"] > 0
        assert row["completions/mean_length"] == sum(each["n_tokens"] for each in sampled) / 16
        assert row["completions/clipped_ratio"] == sum(not each["ended"] for each in sampled) / 16
        assert row["kl"] > 0 and 0 <= row["clip_ratio"] < 1
    assert draw_loss(run).stat().st_size > 10_000


def test_divergence_and_clipped_share_are_counted_by_token(tiny_base: Path) -> None:
    model, objective = adapted(tiny_base), GroupRelative(kl_beta=0.1, clip=0.2, clip_high=0.3)
    groups = [[rollout(5, 4, reward=1.0), rollout(5, 2)]]
    with torch.no_grad():
        policies = [by_full_logits(model, each, 1.0) for each in groups[0]]
        with model.disable_adapter():
            differences = torch.cat([by_full_logits(model, each, 1.0) for each in groups[0]]) - torch.cat(policies)
    # Of 1.4, 1.4, 1 and 1.1 under a positive advantage two are held, of 0.7 and 1.4 under a negative one the first.
    ratios = torch.tensor([1.4, 1.4, 1.0, 1.1]), torch.tensor([0.7, 1.4])
    for each, policy, ratio in zip(groups[0], policies, ratios, strict=True):
        each.old = (policy - ratio.log()).tolist()
    view = objective.rollout_view(groups, None)
    found = objective.means(objective.sums(model, objective.collate(list(view))).metrics.flatten().tolist())
    assert found["kl"] == pytest.approx(float((differences.exp() - differences - 1).mean()), rel=1e-4)
    assert found["clip_ratio"] == pytest.approx(3 / 6)
    for each in groups[0]:
        each.old = []
    assert "clip_ratio" not in objective.means(
        objective.sums(model, objective.collate(list(view))).metrics.flatten().tolist()
    )


def test_a_reward_that_fails_ends_the_run_with_all_steps_before_it_saved(
    tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rewards.py"
    options = {**OPTIONS, "reward": "", "reward_file": str(file), "max_steps": 3, "save_steps": 100}
    whole_text = "def reward(answer, row):\n    return len(set(answer)) + len(row['instruction'])\n"
    file.write_text(whole_text, encoding="utf-8")
    whole = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "whole", **options))
    fails = "calls = []\ndef reward(answer, row):\n    calls.append(1)\n    if len(calls) > 40: raise KeyError('x')\n"
    file.write_text(fails + "    return len(set(answer)) + len(row['instruction'])\n", encoding="utf-8")
    config = tiny.config_for(tiny_base, instructions, tmp_path / "cut", **options)
    with pytest.raises(RewardError, match=r"raised KeyError in line 4: 'x'"):
        finetune(config)
    assert (tmp_path / "cut" / "checkpoint-2").is_dir()
    file.write_text(whole_text, encoding="utf-8")
    assert_same_end(whole, finetune(tiny.config_for(tiny_base, instructions, tmp_path / "cut", **options)))


@pytest.mark.usefixtures("peaks_by_formula")
def test_as_many_answers_are_sampled_at_once_as_training_leaves_room_for() -> None:
    from onecard.model.memory.plan import CardSpec, make_plan
    from onecard.model.memory.rollouts import MOST_AT_ONCE, answers_at_once, row_bytes

    model = architecture_of("Qwen2.5-7B")
    # Keys and values of Qwen2.5-7B, 28 layers of 4 heads of 128: 56 KiB a token in 16 bits.
    assert row_bytes(model, 2, 2) - row_bytes(model, 1, 2) == 2 * 28 * 4 * 128 * 2 + 2 * (4 * 3584 + 3 * 18944)
    config = tiny.with_options(FinetuneConfig(), {"model_path": "Qwen2.5-7B", "objective": "grpo", "cutoff_len": 2048})
    found = [
        answers_at_once(make_plan(model, config, CardSpec("card", gib * 2**30, 64 * 2**30))) for gib in (8, 11, 24)
    ]
    assert 1 <= found[0] < found[1] < found[2] <= MOST_AT_ONCE
    tiny_model = architecture_of("sample/tiny-llama")
    assert answers_at_once(make_plan(tiny_model, config, CardSpec("card", 2**32, 2**33))) == MOST_AT_ONCE


def test_what_was_sampled_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = StepLog(tmp_path, ROLLOUTS_NAME)
    row = {"record": "a:1", "prompt": "Two\nlines", "reference": "5", "rewards": {"exact": 1.0}, "n_tokens": 4}
    worse = {**row, "answer": "6\x1b[2J", "reward": 0.25, "ended": False, "rewards": {"exact": 0.0}}
    for step in (1, 2, 3):
        log.write(step, [worse, {**row, "answer": "5", "reward": 1.0, "ended": True}])
    log.keep_up_to(2)
    inspect_run.main(["--run_path", str(tmp_path), "--step", "1"])
    shown = capsys.readouterr().out
    assert "     1        2       0.6250     4.0    50.0%" in shown and "     3 " not in shown
    assert 'step 1, a:1: "Two\\nlines"; recorded answer: "5"' in shown
    assert shown.index('1.0000  "5"  (exact 1)') < shown.index('0.2500  "6\\u001b[2J" [cut off]  (exact 0)')
    inspect_run.main(["--run_path", str(tmp_path), "--json"])
    last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["step"] for each in last] == [2, 2] and last[0] == {"step": 2, **worse}
    with pytest.raises(ConfigError, match=r"--step: there are no answers of step 3, but those of 1 to 2"):
        inspect_run.main(["--run_path", str(tmp_path), "--step", "3"])
    with pytest.raises(ConfigError, match=r"--run_path: there is no rollouts.jsonl"):
        inspect_run.main(["--run_path", str(tmp_path / "none")])


def test_a_prompt_without_an_answer_to_compare_with_is_named_before_the_first_step(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"Count to {i}", **({"output": "7"} if i else {})} for i in range(8)]
    data = tmp_path / "prompts.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    options = {**OPTIONS, "reward": "number", "max_steps": 2}
    with pytest.raises(DataError, match=r"prompts.json:\d+ has no recorded answer, which --reward number"):
        finetune(tiny.config_for(tiny_base, data, tmp_path / "run", **options))
    assert "step 1/" not in capsys.readouterr().out
