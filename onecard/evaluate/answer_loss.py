"""The loss of known answers: records in any shape that training reads, each with the loss of its last answer.

The loss is that of training: the same template, ids and labels, in nats per token of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.data.encode import IGNORE_INDEX, DroppedSample, EncodeSettings, encode_sample
from onecard.data.messages import Conversation
from onecard.data.sources import ReadReport, data_fingerprint, read
from onecard.errors import DataError
from onecard.evaluate.likelihood import log_probs
from onecard.evaluate.measures import Measure
from onecard.inference.batch.evaluate import UNLIMITED
from onecard.inference.call import ModelBundle
from onecard.inference.generate import longest_sequence
from onecard.objectives.registry import of_answers
from onecard.statistics import mean_interval


@dataclass(frozen=True)
class AnsweredRecord:
    """A conversation that ends with a known answer, and the number of its record."""

    key: str
    conversation: Conversation


class AnswerLossTask:
    """The records of a file that end with an answer; one that does not fit into the model whole has no loss."""

    kind = "loss"

    def __init__(self, path: Path, *, seed: int = 42, limit: int = 0) -> None:
        self.name = f"loss/{path.name}"
        self._path, self._seed = path, seed
        found = [
            sample
            for sample in read(str(path), report=ReadReport())
            if isinstance(sample, Conversation) and sample.turns[-1].learn
        ]
        self.items = [AnsweredRecord(str(number), one) for number, one in enumerate(found[: limit or None], start=1)]
        if not self.items:
            raise DataError("holds no record with an answer", str(path))

    def depends_on(self) -> dict[str, Any]:
        """What the figures depend on, besides the model."""
        return {"digest": data_fingerprint(str(self._path))}

    def work(self, bundle: ModelBundle, items: Sequence[AnsweredRecord]) -> list[dict[str, Any]]:
        """The log-probability of each answer, and over how many tokens."""
        settings = EncodeSettings(longest_sequence(bundle.model) or UNLIMITED, train_on="last")
        encoder = of_answers(bundle.objective).encoder
        rows: list[dict[str, Any]] = []
        texts, asked = [], []
        for item in items:
            one = encode_sample(item.conversation, bundle.template, bundle.tokenizer, settings, encoder=encoder)
            if isinstance(one, DroppedSample) or one[0].cut:
                why = one.reason if isinstance(one, DroppedSample) else "longer than the model can read"
                rows.append({"key": item.key, "problem": why})
                continue
            ids, labels = one[0].input_ids, one[0].labels
            texts.append(ids[:-1])
            asked.append([(k - 1, ids[k]) for k in range(1, len(ids)) if labels[k] != IGNORE_INDEX])
            rows.append({"key": item.key, "tokens": len(asked[-1])})
        values = iter(log_probs(bundle.model, texts, asked))
        return [row if "problem" in row else {**row, "log_prob": sum(next(values))} for row in rows]

    def report(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The loss per token of all answers and as the mean of records; the dearest records first."""
        scored = [row for row in rows if "log_prob" in row]
        n_tokens = sum(row["tokens"] for row in scored)
        values: dict[str, Any] = {"tokens": n_tokens}
        if scored:
            values["nats_per_answer_token"] = -sum(row["log_prob"] for row in scored) / n_tokens
            values["mean_of_records"] = mean_interval(list(map(record_loss, scored)), seed=self._seed)
        turns = {item.key: item.conversation.turns for item in self.items}
        worst = sorted(scored, key=record_loss, reverse=True)
        return {
            "settings": {"path": self._path.name},
            "measures": [Measure("total", "", len(scored), values).plain()],
            "worst": [
                {"key": row["key"], "question": asked.content, "expected": answer.content,
                 "got": f"{record_loss(row):.4f} nats per token"}
                for row in worst
                for asked, answer in [turns[row["key"]][-2:]]
            ],
            "notes": {"no_loss": len(rows) - len(scored)},
        }  # fmt: skip


def record_loss(row: dict[str, Any]) -> float:
    """Nats per token of the answer in a row that has them."""
    return -float(row["log_prob"]) / int(row["tokens"])
