"""Objectives: what a step computes is what it computed before there was a choice, and the loop takes any of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy, logsigmoid

from onecard.data.batches import collate
from onecard.data.chat_template import load_template
from onecard.data.dataset import cache_key
from onecard.data.encode import EncodeSettings
from onecard.errors import CheckpointError, ModelError
from onecard.inference.load import load_bundle
from onecard.objectives import registry
from onecard.objectives.base import Objective, SampleView
from onecard.objectives.registry import objective_named
from onecard.recipes import finetune
from onecard.train.rundir import OPTIONS_NAME
from onecard.train.trackers import read_log
from tests import tiny

# Of the mixed file below, by an earlier version (torch 2.13, CPU, fp32), whose numbers and this one's were the same bit
# for bit; other processors add in another order.
LOSSES = [6.122832298278809, 6.115568161010742, 6.073695659637451]
GRAD_NORMS = [1.0970823764801025, 0.8941728472709656, 1.0064284801483154]
EVAL_LOSS = 6.0498238029060785
OPTIONS = {"cutoff_len": 64, "micro_batch": 0, "micro_tokens": 200, "max_steps": 3, "test_size": 4, "eval_steps": 3,
           "prompt_type": "chatml", "learning_rate": 1e-3, "save_steps": 3}  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of one and of two answers, and documents, some of them longer than a sample may be."""
    rng = random.Random(7)

    def said(n: int) -> str:  # by no other row, so that no row is held out for another
        return " ".join("".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(n))

    rows: list[dict] = [{"instruction": said(3), "output": said(1 + i % 5)} for i in range(12)]
    rows += [{"text": said(9 * (1 + i))} for i in range(6)]
    for asked, answered in (("What is the capital of France?", "Paris."), ("中国的首都在哪里?", "北京。")):
        texts = [asked, answered, said(2), said(2)]
        turns = zip(["user", "assistant"] * 2, texts, strict=True)
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    path = tmp_path_factory.mktemp("mixed") / "mixed.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


class PairView(SampleView):
    """Every two rows are one sample, which counts once."""

    def __init__(self, dataset: Any, rows: np.ndarray) -> None:
        super().__init__(dataset, rows)
        self.pairs = rows[: len(rows) // 2 * 2].reshape(-1, 2)
        self.lengths = 2 * dataset.lengths[self.pairs].max(axis=1)
        self.units = np.ones(len(self.pairs), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> Any:
        return Pair([self.dataset[int(row)] for row in self.pairs[position]])


class Pair(list):
    record = "a pair"


class RankedPairs(Objective):
    """The first of two texts is to be the likelier one, per token: a loss of sequences, not of tokens."""

    name, samples = "pairs", PairView

    def length(self, sample: Pair) -> int:
        return 2 * max(len(row.input_ids) for row in sample)

    def collate(self, samples: Sequence[Pair]) -> dict[str, torch.Tensor]:
        return collate([row for pair in samples for row in pair], pad_id=0)

    def loss(self, model: Any, batch: dict[str, torch.Tensor], *, chunk_tokens: int = 0) -> tuple[torch.Tensor, float]:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
        wanted = batch["labels"][:, 1:]
        each = -cross_entropy(logits.transpose(1, 2), wanted, reduction="none").sum(dim=1) / (wanted >= 0).sum(dim=1)
        margins = each.view(-1, 2)
        return -logsigmoid(margins[:, 0] - margins[:, 1]).sum(), len(margins)


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(registry.OBJECTIVES, "pairs", RankedPairs())
    return "pairs"


def logged(run: Path, name: str) -> list[float]:
    return [row[name] for row in read_log(run) if name in row]


def test_losses_and_gradients_of_a_mixed_file_are_those_of_the_version_before(
    tiny_base: Path, mixed: Path, tmp_path: Path
) -> None:
    run = finetune(tiny.config_for(tiny_base, mixed, tmp_path / "run", **OPTIONS))
    assert logged(run, "loss") == pytest.approx(LOSSES, rel=1e-5)
    assert logged(run, "grad_norm") == pytest.approx(GRAD_NORMS, rel=1e-4)
    assert logged(run, "eval_loss") == pytest.approx([EVAL_LOSS], rel=1e-5)
    assert yaml.safe_load((run / OPTIONS_NAME).read_text(encoding="utf-8"))["objective"] == "sft"
    bundle, _ = load_bundle(tiny.config_for(tiny_base, mixed, tmp_path / "run").model, str(run), "auto")
    assert bundle.objective == "sft"


def test_an_objective_of_pairs_goes_through_the_same_loop(
    pairs: str, tiny_base: Path, mixed: Path, tmp_path: Path
) -> None:
    """Its samples have two rows and one unit; rehearsal, evaluation and steps ask for nothing else."""
    settings = {**OPTIONS, "objective": pairs, "rehearsal": True, "learning_rate": 1e-2, "max_steps": 6, "num_epoch": 9}
    one, other = (
        finetune(tiny.config_for(tiny_base, mixed, tmp_path / name / "run", **{**settings, "micro_tokens": n_tokens}))
        for name, n_tokens in (("small", 1), ("large", 2000))
    )
    losses = logged(one, "loss")
    assert losses == pytest.approx(logged(other, "loss"), rel=1e-4), "it must not depend on how a step is cut"
    assert logged(one, "eval_loss") == pytest.approx(logged(other, "eval_loss"), rel=1e-4)
    assert losses[0] == pytest.approx(np.log(2), abs=0.1) and losses[-1] < losses[0]
    bundle, _ = load_bundle(tiny.config_for(tiny_base, mixed, one).model, str(one), "auto")
    assert bundle.objective == pairs


def test_an_objective_is_part_of_a_run(pairs: str, tiny_base: Path, mixed: Path, tmp_path: Path) -> None:
    """Runs from before there was a choice name none, and are of sft."""
    run = finetune(tiny.config_for(tiny_base, mixed, tmp_path / "run", **OPTIONS))
    state = run / "checkpoint-3" / "trainer_state.json"
    stored = json.loads(state.read_text(encoding="utf-8"))
    assert stored["identity"].pop("objective") == "sft"
    state.write_text(json.dumps(stored), encoding="utf-8")
    (run / "checkpoint-3" / "manifest.json").unlink(missing_ok=True)
    options = yaml.safe_load((run / OPTIONS_NAME).read_text(encoding="utf-8"))
    del options["objective"]
    (run / OPTIONS_NAME).write_text(yaml.safe_dump(options), encoding="utf-8")
    again = {**OPTIONS, "max_steps": 4, "num_epoch": 9, "resume_from_checkpoint": str(run / "checkpoint-3")}
    with pytest.raises(CheckpointError, match="--objective sft -> pairs"):
        finetune(tiny.config_for(tiny_base, mixed, tmp_path / "other", **again, objective=pairs))
    finetune(tiny.config_for(tiny_base, mixed, tmp_path / "same", **again))
    assert [step for step, _ in tiny.losses_of(tmp_path / "same")] == [4]


def test_a_name_that_is_in_no_table_is_refused() -> None:
    with pytest.raises(ModelError, match="telepathy is none of sft, documents"):
        objective_named("telepathy")


def test_an_encoder_of_its_own_has_a_cache_of_its_own(mixed: Path, sp_tokenizer: Any) -> None:
    template, settings = load_template("chatml", sp_tokenizer), EncodeSettings(64)
    keys = {
        cache_key(str(mixed), template, sp_tokenizer, settings, objective_named(name).encoder)
        for name in ("sft", "documents")
    }
    assert len(keys) == 2
