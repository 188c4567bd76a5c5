"""Both answers of a pair in one row behind one prompt: the same losses, gradients and runs as a row for each."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onecard.config.lora import LoraOptions
from onecard.errors import ModelError
from onecard.model.lora.adapter import add_lora
from onecard.model.memory.architecture import Linear, architecture_of
from onecard.objectives.preference import AnswerPair, PairView
from onecard.objectives.registry import objective_named
from onecard.objectives.shared_prompt import collate_pairs, shared_tokens
from onecard.recipes import finetune
from onecard.train.shared_prompt import WORTH_SHARING, relative_work
from onecard.train.trackers import read_log
from tests import tiny
from tests.model.model_families import save_family
from tests.objectives.test_preference import adapted, encoded, every_problem, load, pair

OPTIONS = {"cutoff_len": 200, "prompt_type": "chatml", "learning_rate": 1e-2, "max_steps": 3, "test_size": 4,
           "eval_steps": 3, "num_epoch": 9}  # fmt: skip
OF_PAIRS = ("dpo", "ipo", "simpo", "orpo", "reward")
# Of a start; and what changes at once where a margin passes 0, which that of the first step is but for rounding.
OWN = ("tokens_per_s", "rewards/accuracies")


def in_one_row(pairs: Sequence[AnswerPair]) -> list[AnswerPair]:
    starts = [next(place for place, label in enumerate(each.chosen.labels) if label >= 0) for each in pairs]
    return [replace(each, n_shared=start - 1) for each, start in zip(pairs, starts, strict=True)]


def gradients(model: Any, name: str, pairs: Sequence[AnswerPair], chunk_tokens: int) -> tuple[Tensor, list[Tensor]]:
    loss, _ = objective_named(name).loss_of(model, pairs, "cpu", chunk_tokens=chunk_tokens)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), [each for each in found if each is not None]


def compare(model: Any, name: str, chunk_tokens: int = 0) -> None:
    apart = [pair(9, 3, 6), pair(1, 2, 5), pair(12, 8, 1)]
    torch.manual_seed(1)
    loss, wanted = gradients(model, name, apart, chunk_tokens)
    shared, got = gradients(model, name, in_one_row(apart), chunk_tokens)
    torch.testing.assert_close(shared, loss, atol=1e-5, rtol=1e-6)
    largest = max(float(each.abs().max()) for each in wanted)
    assert largest > 1e-3 and len(got) == len(wanted) > 8
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5 * max(1.0, largest), rtol=0)


@pytest.mark.parametrize(
    ("name", "chunk_tokens"), [*((name, n) for name in OF_PAIRS[:4] for n in (0, 5)), ("reward", 0)]
)
def test_losses_and_gradients_are_those_of_a_row_for_each_answer(name: str, chunk_tokens: int, tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    if name != "reward":
        compare(load(tiny_base), name, chunk_tokens)
        return
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    compare(add_lora(base, LoraOptions(lora_r=4), gives_reward=True), name)


@pytest.mark.parametrize(
    ("family", "attention"), [("qwen2", "sdpa"), ("qwen2", "eager"), ("gemma2", "eager"), ("gpt2", "sdpa")]
)
def test_other_families_and_eager_attention(family: str, attention: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    saved = save_family(family, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, attn_implementation=attention)
    compare(adapted(base).eval(), "dpo", 5)  # GPT-2 has dropout of its own


def test_where_each_token_of_a_row_stands() -> None:
    made = pair(3, 2, 1)
    made.chosen.input_ids[:], made.chosen.labels[:] = [5, 6, 7, 8, 9], [-100, -100, -100, 8, 9]
    made.rejected.input_ids[:], made.rejected.labels[:] = [5, 6, 7, 4], [-100, -100, -100, 4]
    batch = collate_pairs([(made.chosen, made.rejected, 2), (made.rejected, made.rejected, 0)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 7, 4, 0], [5, 6, 7, 4, 5, 6, 7, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["segments"].tolist() == [[0, 0, 1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 2, 2, 2, 2]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 9, -100, 4, -100], [-100] * 3 + [4] + [-100] * 3 + [4]]


def pair_file(path: Path, n: int, words: int) -> Path:
    """Pairs with prompts of so many words and answers of one to four."""
    draw = random.Random(words)
    rows = [{"prompt": " ".join([f"Question {i}", *("and why" for _ in range(draw.randint(words // 2, words)))]),
             "chosen": "thanks " * draw.randint(1, 4), "rejected": "never " * draw.randint(1, 4)}
            for i in range(n)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def numbers(run: Path) -> list[dict[str, float]]:
    rows = [row for row in read_log(run) if "loss" in row or "eval_loss" in row]
    return [{key: value for key, value in row.items() if key not in OWN} for row in rows]


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed on both streams, without the breaks of lines."""
    return " ".join("".join(capsys.readouterr()).split())


def test_a_data_set_says_what_its_pairs_share(tmp_path: Path, sp_tokenizer: Any) -> None:
    dataset = encoded(pair_file(tmp_path / "pairs.jsonl", 5, 12), sp_tokenizer, tmp_path, 200)
    rows = np.arange(10)
    n_shared = shared_tokens(dataset, rows.reshape(-1, 2))
    view, apart = PairView(dataset, rows), PairView(dataset, rows)
    view.share(n_shared)
    for position in range(5):
        one, two = view[position].chosen, view[position].rejected
        n = int(n_shared[position])
        assert one.input_ids[:n] == two.input_ids[:n] and one.labels[n] == -100 and one.labels[n + 1] >= 0
        assert view[position].n_shared == n and apart[position].n_shared is None
        assert view.lengths[position] == len(one.input_ids) + len(two.input_ids) - n
        assert view.lengths[position] == objective_named("dpo").length(view[position])
        assert apart.lengths[position] == 2 * max(len(one.input_ids), len(two.input_ids))
    assert view.shares_prompt and not apart.shares_prompt


@pytest.mark.parametrize(
    "options",
    [{"objective": "dpo", "cache_reference": True}, pytest.param({"objective": "reward"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_run_is_the_one_with_a_row_for_each_answer(
    options: dict[str, Any], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the cut of a step."""
    data, found = pair_file(tmp_path / "pairs.jsonl", 16, 24), []
    for name, more in (("off", {"share_prompt": False}), ("auto", {"micro_batch": 2, "loss_chunk": 2})):
        run = finetune(tiny.config_for(tiny_base, data, tmp_path / name / "run", **OPTIONS, **options, **more))
        assert ("in one row behind one prompt" in told(capsys)) == (name == "auto")
        found.append(numbers(run))
    assert len(found[0]) == 4
    assert found[1] == [{key: pytest.approx(value, rel=1e-5, abs=1e-5) for key, value in row.items()}
                        for row in found[0]]  # fmt: skip


def test_it_pays_by_the_prompts_the_answers_and_the_attention() -> None:
    """By hand, with as much work for 4,000 tokens seen as for all linear layers."""
    layer = Linear("x", 1, 8000, bias=False, count=1)
    model = replace(architecture_of("Llama-3.1-8B"), n_heads=1, head_dim=1, n_layers=1, linears=(layer,))
    long_prompt, no_prompt = (np.array([[1000, 1000]]), np.array([900])), (np.array([[1000, 800]]), np.array([0]))
    assert relative_work(*long_prompt, model) == pytest.approx(1100 * (1 + 1100 / 4000) / (2 * 1000 * (1 + 500 / 4000)))
    assert relative_work(*no_prompt, model) == pytest.approx(1800 * (1 + 1800 / 4000) / (2 * 1000 * (1 + 500 / 4000)))
    assert relative_work(*long_prompt, model) < WORTH_SHARING < 1 < relative_work(*no_prompt, model)


def test_a_base_that_cannot_keep_answers_apart_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pair_file(tmp_path / "pairs.jsonl", 16, 24)
    for family, changes, why in (("bloom", {}, "the second answer sees the first one"),
                                 ("mistral", {"sliding_window": 32}, "has a window of 32 tokens")):  # fmt: skip
        base = save_family(family, tmp_path / family, vocab_size=448, **changes)
        tiny.save_sentencepiece_tokenizer(base)
        options = {**OPTIONS, "objective": "dpo", "max_steps": 1}
        of_two = finetune(tiny.config_for(base, data, tmp_path / family / "auto", **options))
        assert (why in told(capsys)) == (family == "bloom")  # a window is known before anything is planned
        rows = finetune(tiny.config_for(base, data, tmp_path / family / "off", **options, share_prompt=False))
        assert numbers(of_two) == numbers(rows)
        with pytest.raises(ModelError, match=f"cannot read the prompt of a pair once.*{why}.*leave --share_prompt out"):
            finetune(tiny.config_for(base, data, tmp_path / family / "on", **options, share_prompt=True))


def test_what_it_does_not_go_with_is_refused_by_flag() -> None:
    for options, words in (
        ({"objective": "sft"}, "of --objective dpo, ipo, simpo, orpo, reward, and this one is sft"),
        ({"objective": "kto"}, "and this one is kto"),
        ({"objective": "dpo", "peft_method": "prompt_tuning"}, "does not go with virtual tokens"),
        ({"objective": "dpo", "attn_implementation": "flash_attention_2"}, "flash_attention_2, which take no mask"),
    ):
        found = every_problem({**options, "share_prompt": True})
        assert [flag for flag, _ in found] == ["--share_prompt"] and words in found[0][1], found
