"""Perplexity of texts, per token and per character; the latter can be compared between tokenizers.

A text is read in windows; each begins `stride` tokens after the one before, and only tokens that no earlier window
predicted count, so each token is predicted once, after at least window - stride tokens where there are so many.
https://huggingface.co/docs/transformers/perplexity
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.data.messages import Document
from onecard.data.sources import ReadReport, data_fingerprint, read
from onecard.data.special_tokens import beginning_ids
from onecard.errors import ConfigError, DataError
from onecard.evaluate.likelihood import log_probs
from onecard.evaluate.measures import Measure
from onecard.inference.call import ModelBundle
from onecard.inference.generate import longest_sequence
from onecard.statistics import mean_interval

MOST_WINDOW = 2048


@dataclass(frozen=True)
class TextItem:
    """A text with the place it was read from."""

    key: str
    text: str


class PerplexityTask:
    """Texts of a file and how they are read. window 0: what the model reads, at most 2,048; stride 0: half of it."""

    kind = "perplexity"

    def __init__(self, path: Path, *, window: int = 0, stride: int = 0, limit: int = 0) -> None:
        self.name = f"perplexity/{path.name}"
        self._path, self._window, self._stride = path, window, stride
        found = [sample for sample in read(str(path), report=ReadReport()) if isinstance(sample, Document)]
        self.items = [TextItem(f"{number}", one.text) for number, one in enumerate(found[: limit or None], start=1)]
        if not self.items:
            raise DataError("holds no text: a txt file, or records with a field text, are expected", str(path))
        self._used: dict[str, Any] = {}

    def depends_on(self) -> dict[str, Any]:
        """What the figures depend on, besides the model."""
        return {"digest": data_fingerprint(str(self._path)), "window": self._window, "stride": self._stride}

    def work(self, bundle: ModelBundle, items: Sequence[TextItem]) -> list[dict[str, Any]]:
        """The log-probability of each text, and over how many tokens, characters and bytes."""
        window, stride = self._sizes(bundle)
        prefix, named = prefix_ids(bundle.tokenizer)
        encoded = bundle.tokenizer([item.text for item in items], add_special_tokens=False)["input_ids"]
        rows = []
        for item, ids in zip(items, encoded, strict=True):
            whole = [*prefix, *ids]
            texts, asked = [], []
            for start, first, end in windows(len(whole), window, stride):
                texts.append(whole[start : end - 1])
                asked.append([(k - 1 - start, whole[k]) for k in range(max(first, 1), end)])
            total = sum(sum(values) for values in log_probs(bundle.model, texts, asked))
            rows.append({
                "key": item.key, "log_prob": total, "tokens": sum(map(len, asked)), "characters": len(item.text),
                "bytes": len(item.text.encode("utf-8")), "window": window, "stride": stride, "prefix": named,
            })  # fmt: skip
        return rows

    def _sizes(self, bundle: ModelBundle) -> tuple[int, int]:
        longest = longest_sequence(bundle.model) or MOST_WINDOW
        window = self._window or min(longest, MOST_WINDOW)
        if window > longest:
            raise ConfigError("--window", f"{window} tokens are more than the {longest} that the model reads")
        stride = self._stride or window // 2
        if stride >= window:
            raise ConfigError("--stride", f"{stride} is not below the window of {window} tokens")
        return window, stride

    def report(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Perplexities in total and of each text; the texts that surprise most per character first."""
        measures = [self._measure("total", "", rows)]
        if len(rows) > 1:
            per_character = [-row["log_prob"] / max(row["characters"], 1) for row in rows]
            measures[0].values["nats_per_character_of_texts"] = mean_interval(per_character)
        if len(rows) <= 100:
            measures += [self._measure("document", row["key"], [row]) for row in rows]
        texts = {item.key: item.text for item in self.items}
        worst = sorted(rows, key=lambda row: row["log_prob"] / max(row["characters"], 1))
        settings = {name: rows[0][name] for name in ("window", "stride", "prefix")} if rows else {}
        return {
            "settings": {"path": self._path.name, **settings},
            "measures": [measure.plain() for measure in measures],
            "worst": [
                {"key": row["key"], "question": texts[row["key"]][:500], "expected": "",
                 "got": f"perplexity per character {_exp(-row['log_prob'] / max(row['characters'], 1)):.4f}"}
                for row in worst
            ],
            "notes": {},
        }  # fmt: skip

    def _measure(self, group: str, name: str, rows: Sequence[dict[str, Any]]) -> Measure:
        total = -sum(row["log_prob"] for row in rows)
        sums = {unit: sum(row[unit] for row in rows) for unit in ("tokens", "characters", "bytes")}
        values = {
            "perplexity_per_token": _exp(total / max(sums["tokens"], 1)),
            "perplexity_per_character": _exp(total / max(sums["characters"], 1)),
            "bits_per_byte": total / max(sums["bytes"], 1) / math.log(2),
            "tokens": sums["tokens"],
            "characters": sums["characters"],
        }
        return Measure(group, name, len(rows), values)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def windows(n: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first token that counts, end) of each window over n tokens; each token counts once.

    n 10, window 6, stride 3  ->  (0, 0, 6) (3, 6, 9) (6, 9, 10)
    """
    start = first = 0
    while first < n:
        end = min(start + window, n)
        yield start, first, end
        first, start = end, start + stride


def prefix_ids(tokenizer: Any) -> tuple[list[int], str]:
    """What stands in front of a text, so that its first token is predicted, too: what the tokenizer writes there, else
    the end-of-text token; and how it is called in a report."""
    own = beginning_ids(tokenizer)
    ids = own or [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    return ids, " ".join(map(str, tokenizer.convert_ids_to_tokens(ids)))
