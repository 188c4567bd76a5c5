"""How an optimizer step is cut into micro-batches changes memory, never the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from onecard.recipes import finetune
from tests import tiny


@pytest.fixture(scope="module")
def eight_by_one(tiny_base: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: each of a step's 8 samples passes alone, so there is no padding at all."""
    output = tmp_path_factory.mktemp("reference") / "run"
    return finetune(tiny.config_for(tiny_base, instructions, output, micro_batch=1, num_epoch=2))


@pytest.mark.parametrize("limits", [{"micro_batch": 8}, {"micro_batch": 4}, {"micro_batch": 0, "micro_tokens": 300}])
def test_any_cut_gives_the_same_losses_and_weights(
    limits: dict[str, int], eight_by_one: Path, tiny_base: Path, instructions: Path, tmp_path: Path
) -> None:
    run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", num_epoch=2, **limits))
    expected, got = tiny.losses_of(eight_by_one), tiny.losses_of(run)
    assert len(got) == 6
    assert [step for step, _ in got] == [step for step, _ in expected]
    assert max(abs(a - b) for (_, a), (_, b) in zip(got, expected, strict=True)) < 1e-6
    weights = [tiny.tensors_of(path / "adapter_model.safetensors") for path in (eight_by_one, run)]
    # Adam divides by the gradient's own size, so a rounding of 1e-8 near a zero gradient grows a little.
    assert tiny.largest_difference(*weights) < 1e-4


def test_the_loss_is_per_supervised_token_of_the_whole_step(
    eight_by_one: Path, tiny_base: Path, instructions: Path
) -> None:
    """The first logged loss equals plain cross-entropy over all answer tokens of the step, computed by hand."""
    import torch
    from transformers import AutoModelForCausalLM

    from onecard.data.batches import step_samples
    from onecard.data.chat_template import load_template
    from onecard.data.dataset import encode_dataset
    from onecard.data.encode import IGNORE_INDEX, EncodeSettings
    from onecard.model.load import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_base))
    data = encode_dataset(
        str(instructions), load_template("alpaca", tokenizer), tokenizer, EncodeSettings(256), eight_by_one.parent
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    loss_sum, n_tokens = 0.0, 0
    for index in step_samples(0, len(data), 8, seed=42).indices:
        sample = data[int(index)]
        logits = model(torch.tensor([sample.input_ids])).logits[0, :-1]
        labels = torch.tensor(sample.labels[1:])
        loss_sum += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"))
        n_tokens += int((labels != IGNORE_INDEX).sum())
    assert n_tokens > 16
    assert tiny.losses_of(eight_by_one)[0][1] == pytest.approx(loss_sum / n_tokens, abs=1e-5)
