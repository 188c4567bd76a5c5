"""Steps of every objective take what is planned for them, to 3 %; answers that are sampled take no more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.plan_accuracy import toy_config
from benchmarks.synthetic_run import Samples, real_run
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.data.encode import LabelledSample
from onecard.model.hardware import detect
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.estimate import account
from onecard.model.memory.plan import CardSpec, make_plan
from onecard.model.memory.rollouts import row_bytes
from onecard.model.memory.tensor_sizes import n_trained
from onecard.model.packed_rows import keep_texts_apart
from onecard.objectives.grpo import Rollout
from onecard.objectives.preference import AnswerPair
from onecard.train.step import take_step
from tests import tiny
from tests.live_memory import held_bytes, peak_bytes

PROMPT, ANSWER, PAIRS = 96, 64, 2  # tokens, and pairs in a micro-batch
# A vocabulary of some size: logits that are there, or are not, should tell.
CONFIG = toy_config("llama", num_hidden_layers=2, vocab_size=4096)
CASES: dict[str, dict[str, Any]] = {
    "dpo": {}, "dpo, cached": {}, "dpo, shared": {}, "ipo": {}, "simpo": {}, "orpo": {}, "kto": {}, "reward": {},
    "reward, shared": {}, "grpo": {"kl_beta": 0.1}, "sft, packed": {"packing": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_number_format() -> Iterator[None]:
    """accelerate keeps one for the process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def row(prompt: list[int], seed: int, weight: float = 1.0) -> LabelledSample:
    answer = np.random.default_rng(seed).integers(3, 4000, ANSWER).tolist()
    return LabelledSample(
        [*prompt, *answer], [-100] * PROMPT + answer, str(seed), seed, weights=[weight] * (PROMPT + ANSWER)
    )


def samples_of(objective: Any, case: str) -> Samples:
    """Two micro-batches of them: the gradients are there from the second on."""
    prompt = np.random.default_rng(0).integers(3, 4000, PROMPT).tolist()
    rows = [row(prompt, number, (-1.0) ** number) for number in range(4 * PAIRS)]
    if objective.name == "grpo":
        rollouts = [Rollout(each.input_ids, each.labels, each.record, each.group, n_prompt=PROMPT) for each in rows]
        view = objective.rollout_view([rollouts[:4], rollouts[4:]], None)
        return Samples(list(view), list(view.lengths), list(view.units))
    if objective.name == "sft":  # of unlike length, which fill rows of the same
        texts = [LabelledSample(each.input_ids[:n], each.input_ids[:n], each.record, each.group)
                 for each, n in zip(rows, (90, PROMPT + ANSWER - 90) * 2 * PAIRS, strict=True)]  # fmt: skip
        return Samples(texts, [len(each.input_ids) for each in texts], [len(each.input_ids) for each in texts])
    if objective.name == "kto":
        return Samples(rows, [len(each.input_ids) for each in rows], [1] * len(rows))
    shared = PROMPT - 1 if "shared" in case else None
    known = np.array([-300.0, -300.0], np.float32) if "cached" in case or "shared" in case else None
    pairs = [AnswerPair(one, other, 0, known, shared) for one, other in zip(rows[::2], rows[1::2], strict=True)]
    return Samples(pairs, [objective.length(each) for each in pairs], [1] * len(pairs))


@pytest.mark.parametrize(
    ("case", "bits"),
    [*((case, 32) for case in CASES), *(pytest.param(case, bits, marks=pytest.mark.slow)
                                        for case in ("dpo", "reward", "grpo") for bits in (4, 8, 16))],
)  # fmt: skip
def test_a_step_takes_what_is_planned(case: str, bits: int) -> None:
    name = case.split(",")[0]
    options = TrainOptions(objective=name, optimizer="adamw", **CASES[case])  # type: ignore[arg-type]
    config = FinetuneConfig(train=replace(options, share_prompt="shared" in case))
    chunk = 1024 if name == "reward" else 64  # logits that it never makes would be more than its layers
    config = tiny.with_options(config, {"bits": bits, "lora_r": 4, "loss_chunk": chunk, "gradient_checkpointing": True})
    shape = make_plan(architecture_of(CONFIG), config, CardSpec("CPU", 2**34, 2**34, is_gpu=False)).setup
    assert shape.gives_reward == (name == "reward") and shape.masks_parts == ("shared" in case)
    assert shape.packs_texts == ("packed" in case)
    setup = replace(shape, element_bytes=2 if bits == 16 else 4, rows=1, length=1)
    run = real_run(CONFIG, setup, detect("cpu"))
    run.options = replace(options, total_batch=run.options.total_batch, learning_rate=2e-4)
    run.train_samples = samples_of(run.objective, case)
    n_rows = PAIRS if name not in ("grpo", "kto") else 2 * PAIRS
    run.options.total_batch, run.limits = len(run.train_samples), replace(run.limits, micro_batch=n_rows)
    setup = replace(setup, rows=n_rows, length=int(run.train_samples.lengths[0]))
    if "packed" in case:
        keep_texts_apart(run.plain_model, "cpu")
        setup = replace(setup, length=PROMPT + ANSWER)
        run.limits = replace(run.limits, row_tokens=setup.length)
    trained = [each for each in run.plain_model.parameters() if each.requires_grad]
    assert n_trained(architecture_of(CONFIG), setup) == sum(each.numel() for each in trained)
    take_step(run)
    measured = held_bytes(run.plain_model, run.optimizer) + peak_bytes(lambda: take_step(run))
    planned = account(architecture_of(CONFIG), setup).tensor_bytes
    print(case, bits, planned / measured)
    most = 0.01 if "packed" in case else 0.03  # as rows of one text, packed ones would be planned 1.4 % too small
    assert abs(planned / measured - 1) <= most, (planned, measured)


def test_answers_take_no_more_than_is_counted_for_each(tiny_base: Any) -> None:
    """Prompt, answer and scores of rows that are sampled together."""
    from transformers import AutoModelForCausalLM

    from onecard.data.chat_template import load_template
    from onecard.inference.call import ModelBundle
    from onecard.inference.rollouts import RolloutSampler
    from onecard.model.load import load_tokenizer

    tokenizer: Any = load_tokenizer(str(tiny_base))
    base: Any = AutoModelForCausalLM.from_config(architecture_of(CONFIG).source.read()[0]).eval()
    sampler = RolloutSampler(ModelBundle(base, tokenizer, load_template("chatml", tokenizer)), ANSWER, 0)
    prompts = [list(range(5, 5 + PROMPT))] * 8

    def sample() -> None:
        with torch.no_grad():
            sampler(prompts, range(8), 1.0)

    sample()
    counted = 8 * row_bytes(architecture_of(CONFIG), PROMPT + ANSWER, 4)
    taken = peak_bytes(sample)
    print("sampled", taken / counted)
    assert 0.3 <= taken / counted <= 1
