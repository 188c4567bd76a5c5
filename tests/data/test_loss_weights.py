"""Weights of answers: from the record to the loss, exact over micro-batches, and of no cost to data without any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onecard.config.base_model import DEFAULT_BASE
from onecard.data.batches import collate, micro_batches
from onecard.data.chat_template import load_template
from onecard.data.dataset import EncodedDataset, encode_dataset
from onecard.data.encode import IGNORE_INDEX, EncodeSettings
from onecard.data.learn_marks import WEIGHTED
from onecard.model.load import load_tokenizer
from onecard.objectives.base import SampleView
from onecard.objectives.next_token import SupervisedFineTuning


def exchange(question: str, answer: str, **marks: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **marks}]


RECORDS = [
    [*exchange("a", "first answer", weight=0.5), *exchange("b", "second", loss_weight=2)],
    exchange("c", "plain one"),
    [*exchange("d", "never", train=False), *exchange("e", "third answer", weight="0.1", loss=3)],
    exchange("f", "and another plain one"),
]
PLAIN = [[{key: m[key] for key in ("role", "content")} for m in record] for record in RECORDS]


FINGERPRINT_OF_PLAIN = "b5b2540a8492e7f8685ead405bccade387f7d219bcf3b9eebb66896524bcdd6d"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEFAULT_BASE)


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEFAULT_BASE, dtype=torch.float32).eval()


@pytest.fixture
def encoded(tokenizer: Any, tmp_path: Path) -> Any:
    def encode(records: list[Any], **settings: Any) -> EncodedDataset:
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps({"messages": record}) + "\n" for record in records), encoding="utf-8")
        template = load_template("chatml", tokenizer)
        return encode_dataset(str(file), template, tokenizer, EncodeSettings(400, **settings), tmp_path / "cache")

    return encode


def weights_by_answer(dataset: EncodedDataset, tokenizer: Any) -> dict[str, float]:
    """The learned texts of all samples, each with the one weight of its tokens."""
    found: dict[str, float] = {}
    for sample in (dataset[k] for k in range(len(dataset))):
        weights = sample.weights or [1.0] * len(sample.labels)
        runs: list[list[tuple[int, float]]] = [[]]
        for label, weight in zip(sample.labels, weights, strict=True):
            if label == IGNORE_INDEX:
                runs.append([])
            else:
                runs[-1].append((label, weight))
        for run in filter(None, runs):
            (weight,) = {weight for _, weight in run}
            found[tokenizer.decode([label for label, _ in run]).replace("<|im_end|>", "")] = weight
    return found


@pytest.mark.parametrize("again", [False, True])
def test_each_answer_keeps_its_weight(encoded, tokenizer, again):
    dataset = encoded(RECORDS)
    dataset = encoded(RECORDS) if again else dataset  # now from the cache
    assert weights_by_answer(dataset, tokenizer) == {
        "first answer": 0.5, "second": 2.0, "plain one": 1.0, "third answer": pytest.approx(0.3),
        "and another plain one": 1.0,
    }  # fmt: skip
    assert dataset.report.read.notes[WEIGHTED] == [2, "data.jsonl:1"]
    n_learned = [sum(label != IGNORE_INDEX for label in dataset[k].labels) for k in range(4)]
    assert dataset.supervised.tolist() == n_learned
    assert dataset.units[[1, 3]].tolist() == [n_learned[1], n_learned[3]]
    weighted = dataset[0]
    expected = sum(w for w, label in zip(weighted.weights, weighted.labels, strict=True) if label != IGNORE_INDEX)
    assert dataset.units[0] == pytest.approx(expected, rel=1e-12)


def test_data_without_weights_are_as_they_were(encoded):
    weighted, plain = encoded(RECORDS), encoded(PLAIN)
    assert plain.units is plain.supervised
    assert all(plain[k].weights == [] for k in range(len(plain)))
    assert "loss_weights" not in collate([plain[0], plain[1]], 0)
    assert weighted.fingerprint != plain.fingerprint
    # Frozen when there were no weights: a run of an earlier version goes on.
    assert plain.fingerprint == FINGERPRINT_OF_PLAIN
    ones = [[{**m, "weight": 1} if m["role"] == "assistant" else m for m in record] for record in PLAIN]
    assert encoded(ones).fingerprint == plain.fingerprint


def test_another_weight_is_another_fingerprint(encoded):
    first, second = (encoded([exchange("a", "b", weight=weight)]) for weight in (0.5, 0.25))
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("mode", ["last", "everything"])
def test_weights_with_other_ways_to_train(encoded, mode):
    dataset = encoded(RECORDS, train_on=mode)
    sample = dataset[0]
    learned = {w for w, label in zip(sample.weights, sample.labels, strict=True) if label != IGNORE_INDEX}
    assert learned == ({2.0} if mode == "last" else {0.5, 1.0, 2.0})


def test_the_loss_per_weighted_token_is_the_same_however_a_step_is_cut(encoded, tiny_model):
    dataset, objective = encoded(RECORDS), SupervisedFineTuning()
    view = SampleView(dataset, np.arange(len(dataset)))
    n_units = view.units.sum()
    losses = []
    for rows, chunk_tokens in ((4, 0), (1, 0), (2, 0), (3, 7)):
        total, counted = 0.0, 0.0
        with torch.no_grad():
            for micro in micro_batches(np.arange(4), view.lengths, micro_batch=rows):
                loss, n = objective.loss_of(tiny_model, [view[i] for i in micro], "cpu", chunk_tokens=chunk_tokens)
                total, counted = total + float(loss), counted + n
        assert counted == pytest.approx(n_units, rel=1e-9)
        losses.append(total / n_units)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    plain = SampleView(encoded(PLAIN), np.arange(4))
    assert plain.units.dtype == np.int32
