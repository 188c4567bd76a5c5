"""Packed rows: samples that share a row learn what they learn alone, however a step is cut, stopped or spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from onecard.config.lora import LoraOptions
from onecard.data.batches import collate, micro_batches
from onecard.data.encode import IGNORE_INDEX, LabelledSample
from onecard.data.packing import in_rows, packed, padded_tokens, row_lengths
from onecard.errors import ModelError
from onecard.model.lora.adapter import add_lora
from onecard.model.packed_rows import keep_texts_apart
from onecard.objectives.registry import objective_named
from onecard.recipes import finetune
from onecard.train.memory_probe import _largest
from onecard.train.oom import MicroBatchLimits
from onecard.train.trackers import read_log
from tests import tiny
from tests.launching import finish, launch, torchrun
from tests.model.model_families import save_family

OPTIONS = {"cutoff_len": 128, "micro_batch": 0, "micro_tokens": 256, "test_size": 6, "eval_steps": 2, "save_steps": 2,
           "max_steps": 4, "num_epoch": 9, "learning_rate": 1e-3, "total_batch": 9}  # fmt: skip


def random_samples(rng: np.random.RandomState, n: int) -> list[LabelledSample]:
    """Ragged ones with a prompt that is not learned; every second one has weights."""
    found = []
    for number in range(n):
        ids = rng.randint(3, 60, rng.randint(2, 30)).tolist()
        n_prompt = int(rng.randint(1, len(ids)))
        weights = [0.5 + number % 4] * len(ids) if number % 2 else []
        labels = [IGNORE_INDEX] * n_prompt + ids[n_prompt:]
        found.append(LabelledSample(ids, labels, f"record {number}", number, weights=weights))
    return found


def test_rows_hold_whole_samples_and_end_where_the_order_says() -> None:
    rng, n_rows = np.random.RandomState(3), 0
    for _ in range(200):
        lengths = rng.randint(1, 60, rng.randint(1, 40))
        indices, row_tokens = rng.permutation(len(lengths)), int(rng.randint(20, 90))
        rows = packed(indices, lengths, row_tokens)
        assert sorted(np.concatenate(rows).tolist()) == sorted(indices.tolist())
        sums = [int(lengths[row].sum()) for row in rows]
        assert all(total <= row_tokens or len(row) == 1 for total, row in zip(sums, rows, strict=True))
        assert row_lengths(lengths[np.concatenate(rows)], row_tokens) == sums
        n_rows += len(rows)
        limits = {"micro_tokens": int(rng.randint(20, 300)), "row_tokens": row_tokens}
        micros = micro_batches(indices, lengths, **limits)
        assert sorted(np.concatenate(micros).tolist()) == sorted(indices.tolist())
        for micro in micros:
            assert padded_tokens(micro, lengths, row_tokens) <= limits["micro_tokens"] or len(micro) == 1
    assert n_rows > 1000
    assert packed(np.arange(4), np.array([5, 4, 3, 2]), 8)[0].tolist() == [0, 2]


def test_a_row_is_its_samples_one_after_another() -> None:
    samples = random_samples(np.random.RandomState(0), 5)
    lengths = [len(sample.input_ids) for sample in samples]
    (row,) = in_rows(samples, sum(lengths))
    assert row.input_ids == [token for sample in samples for token in sample.input_ids]
    assert row.starts == np.cumsum(lengths)[:-1].tolist()
    assert row.labels == [token for sample in samples for token in [IGNORE_INDEX, *sample.labels[1:]]]
    assert row.weights == [w for s in samples for w in s.weights or [1.0] * len(s.input_ids)]
    batch = collate([row, samples[0]], pad_id=0)
    wanted = [place for length in lengths for place in range(length)]
    assert batch["position_ids"][0].tolist() == wanted
    n_pads = len(wanted) - lengths[0]
    assert batch["position_ids"][1].tolist() == [*range(lengths[0]), *range(n_pads)]
    assert "position_ids" not in collate(samples, pad_id=0)


def adapted(family: str, folder: Path) -> Any:
    """An adapter that does something already; without dropout, whose numbers are drawn by place."""
    base = AutoModelForCausalLM.from_pretrained(save_family(family, folder))
    torch.manual_seed(0)
    model = add_lora(base, LoraOptions())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "cohere"])
@pytest.mark.parametrize("chunk_tokens", [0, 8])
def test_loss_and_gradients_are_those_of_the_samples_alone(family: str, chunk_tokens: int, tmp_path: Path) -> None:
    model, objective = adapted(family, tmp_path), objective_named("sft")
    keep_texts_apart(model, "cpu")
    samples = random_samples(np.random.RandomState(1), 9)
    lengths = np.array([len(sample.input_ids) for sample in samples])
    order = np.concatenate(packed(np.arange(len(samples)), lengths, 60))
    results = []
    for row_tokens in (0, 60):
        model.zero_grad()
        ordered = [samples[number] for number in order]
        loss, units = objective.loss_of(model, ordered, "cpu", chunk_tokens=chunk_tokens, row_tokens=row_tokens)
        (loss / units).backward()
        gradients = [weight.grad.flatten() for weight in model.parameters() if weight.requires_grad]
        results.append((loss.item() / units, torch.cat(gradients)))
    (one, alone), (other, together) = results
    assert other == pytest.approx(one, abs=1e-5)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert alone.abs().max() > 1e-2


def test_a_model_that_looks_across_texts_is_refused_by_name(tmp_path: Path) -> None:
    import transformers as tf

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    mamba = tf.MambaForCausalLM(tf.MambaConfig(**sizes, intermediate_size=64, state_size=8))
    small = {**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "moe_intermediate_size": 16}
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    in_blocks = tf.DeepseekV4ForCausalLM(tf.DeepseekV4Config(**small, compress_rates=rates))
    for base in (AutoModelForCausalLM.from_pretrained(save_family("bloom", tmp_path)), mamba, in_blocks):
        targets = "in_proj" if base is mamba else "all-linear"
        model = add_lora(base, LoraOptions(lora_target_modules=targets)).train()
        with pytest.raises(ModelError, match=rf"{type(base).__name__} cannot keep the texts of a packed row apart"):
            keep_texts_apart(model, "cpu")
        assert model.training


def run_of(base: Path, folder: Path, **changes: Any) -> Path:
    data = tiny.write_instructions(folder.parent / "data.json", n=40)
    return finetune(tiny.config_for(base, data, folder, **OPTIONS | changes))


def numbers(run: Path) -> dict[str, list[float]]:
    rows = read_log(run)
    return {name: [row[name] for row in rows if name in row] for name in ("loss", "grad_norm", "eval_loss")}


@pytest.mark.slow
def test_a_packed_run_is_the_unpacked_one_however_it_is_cut(tiny_base: Path, tmp_path: Path) -> None:
    """Packing is no part of a run: one that began without it goes on with it."""
    plain = run_of(tiny_base, tmp_path / "plain")
    wanted = numbers(plain)
    assert len(wanted["loss"]) == 4 and len(wanted["eval_loss"]) == 2
    cuts = {"packed": {}, "small": {"micro_tokens": 100}, "rows": {"micro_tokens": 0, "micro_batch": 2},
            "tried": {"rehearsal": True}}  # fmt: skip
    for name, changes in cuts.items():
        run = run_of(tiny_base, tmp_path / name, packing=True, **changes)
        for key, values in numbers(run).items():
            assert values == pytest.approx(wanted[key], rel=1e-4), (name, key)
    half = str(plain / "checkpoint-2")
    again = run_of(tiny_base, tmp_path / "again", packing=True, resume_from_checkpoint=half)
    assert numbers(again)["loss"] == pytest.approx(wanted["loss"][2:], rel=1e-4)


def test_a_packed_run_resumes_bitwise(tiny_base: Path, tmp_path: Path) -> None:
    whole = run_of(tiny_base, tmp_path / "whole", packing=True)
    half = str(whole / "checkpoint-2")
    again = run_of(tiny_base, tmp_path / "again", packing=True, resume_from_checkpoint=half)
    weights = [tiny.tensors_of(run / "adapter_model.safetensors") for run in (whole, again)]
    assert tiny.largest_difference(*weights) == 0


def test_the_rehearsal_finds_rows_that_a_step_can_have() -> None:
    lengths = np.array([60, 50, 50, 40, 10, 10, 5])
    limits = MicroBatchLimits(micro_tokens=200, row_tokens=100)
    worst, samples = _largest(lengths, limits, total_batch=4)
    assert (worst.rows, worst.length) == (2, 100)
    assert len(samples) == 4 and sorted(row_lengths(lengths[samples], 100)) == [100, 100]
    worst, samples = _largest(lengths, MicroBatchLimits(row_tokens=100), total_batch=1)
    assert (worst.rows, worst.length) == (1, 60) and samples.tolist() == [0]


def test_a_document_of_a_block_sees_itself_only(tmp_path: Path) -> None:
    """Blocks cut documents, so each piece of one is a text of its own."""
    model, objective = adapted("llama", tmp_path), objective_named("pretrain")
    rng = np.random.RandomState(5)
    pieces = [rng.randint(3, 60, n).tolist() for n in (7, 12, 9)]
    alone = [LabelledSample(ids, [IGNORE_INDEX, *ids[1:]], "a", 0) for ids in pieces]
    ids = [token for piece in pieces for token in piece]
    labels = [label for sample in alone for label in sample.labels]
    block = LabelledSample(ids, labels, "a", 0, starts=[7, 19])
    losses = []
    for samples in ([block], alone):
        loss, units = objective.loss_of(model, samples, "cpu")
        losses.append((loss.item(), units))
    assert losses[0][1] == losses[1][1] == 25
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-4)
    seen, _ = objective.loss_of(model, [LabelledSample(ids, labels, "a", 0)], "cpu")
    assert abs(seen.item() - losses[1][0]) > 1e-2, "without the mask it would be another loss"


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tiny_base: Path, tmp_path: Path) -> None:
    one = run_of(tiny_base, tmp_path / "one", packing=True)
    data, output = tmp_path / "data.json", tmp_path / "two"
    config = tiny.config_for(tiny_base, data, output, **OPTIONS, packing=True)
    finish(launch(torchrun(2), config, tmp_path / "start"))
    wanted = numbers(one)
    assert len(wanted["loss"]) == 4
    for key, values in numbers(output).items():
        assert values == pytest.approx(wanted[key], rel=1e-4), key
