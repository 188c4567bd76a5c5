"""Perplexity: every token counts once, and the sum is that of a hand computation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from onecard.errors import ConfigError, DataError, ModelError
from onecard.evaluate import likelihood
from onecard.evaluate.perplexity import PerplexityTask, windows
from tests.evaluate.test_choice import by_hand


@pytest.mark.parametrize(("n", "window", "stride"), [(10, 6, 3), (7, 7, 2), (1, 4, 2), (23, 5, 1), (23, 5, 4)])
def test_each_token_counts_once_after_enough_others(n: int, window: int, stride: int) -> None:
    seen: list[int] = []
    for start, first, end in windows(n, window, stride):
        assert end - start <= window and (start == 0 or first - start >= window - stride)
        seen += range(first, end)
    assert seen == list(range(n))


def test_sums_are_a_hand_computation(bundle: Any, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    texts = ["The quick brown fox jumps over the lazy dog.", "中国的首都是北京。What is the capital?"]
    file.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
    for window in (0, 16):
        rows = (task := PerplexityTask(file, window=window)).work(bundle, task.items)
        for text, row in zip(texts, rows, strict=True):
            ids = bundle.tokenizer(text)["input_ids"]
            assert row["tokens"] == len(ids) - 1, "<s> stands in front and is predicted by nothing"
            assert (row["characters"], row["bytes"], row["prefix"]) == (len(text), len(text.encode()), "<s>")
            expected = sum(
                by_hand(bundle.model, ids[start:end], max(first - start, 1))
                for start, first, end in windows(len(ids), window or 512, (window or 512) // 2)
            )
            assert row["log_prob"] == pytest.approx(expected, abs=1e-4)
    total = task.report(rows)["measures"][0]["values"]
    log_prob = sum(row["log_prob"] for row in rows)
    assert total["perplexity_per_character"] == pytest.approx(math.exp(-log_prob / sum(map(len, texts))), rel=1e-6)
    assert total["perplexity_per_token"] == pytest.approx(math.exp(-log_prob / total["tokens"]), rel=1e-6)
    assert task.report(rows)["settings"] == {"path": "texts.jsonl", "window": 16, "stride": 8, "prefix": "<s>"}


def test_windows_that_cannot_be_are_refused(bundle: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text\n", encoding="utf-8")
    for options, message in (({"window": 4096}, "--window: 4096 tokens"), ({"window": 8, "stride": 8}, "--stride: 8")):
        task = PerplexityTask(file, **options)
        with pytest.raises(ConfigError, match=message):
            task.work(bundle, task.items)
    (tmp_path / "b.jsonl").write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.jsonl: holds no text"):
        PerplexityTask(tmp_path / "b.jsonl")


def test_texts_too_large_for_the_card_together_are_read_in_halves(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text": "{"word " * n}"}}\n' for n in (3, 4, 5, 6)), encoding="utf-8")
    task = PerplexityTask(file, window=4)
    expected, together, sizes = task.work(bundle, task.items), likelihood._together, []

    def small_card(model: Any, texts: Any, asked: Any) -> Any:
        sizes.append(len(texts))
        if len(texts) > most:
            raise torch.OutOfMemoryError
        return together(model, texts, asked)

    monkeypatch.setattr(likelihood, "_together", small_card)
    most = 2
    found = task.work(bundle, task.items)
    assert [row["log_prob"] for row in found] == pytest.approx([row["log_prob"] for row in expected], abs=1e-4)
    assert max(sizes) > 2 and 2 in sizes
    most = 0
    with pytest.raises(ModelError, match=r"a text of \d+ tokens does not fit into memory; use fewer --bits"):
        task.work(bundle, task.items)
