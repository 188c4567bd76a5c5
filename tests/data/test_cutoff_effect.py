"""The effect of any limit, from one encoding without a limit, is what encoding with that limit does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onecard.data.chat_template import load_template
from onecard.data.cutoff_effect import QuestionLengthEncoder, cutoff_effect
from onecard.data.dataset import encode_dataset
from onecard.data.encode import EncodeSettings
from onecard.data.inspect import NO_LIMIT
from onecard.errors import DataError
from tests.data.conftest import APPEND_ONLY, REWRITES_HISTORY, SPACED

LIMITS = (8, 20, 33, 48, 90, 100, 250, 1000)


def at_limit(effect: dict[str, Any], limit: int) -> dict[str, int]:
    """n_samples, n_cut and n_dropped at a limit: what the page computes while a slider moves."""
    n_short = at_least(effect["questions"], limit)
    n_talks = at_least(effect["lengths"], 0)
    room = max(1, limit - effect["n_bos"])
    pieces = sum(count * -(-n_tokens // room) for n_tokens, count in effect["documents"])
    return {
        "n_samples": n_talks - n_short + pieces,
        "n_cut": at_least(effect["lengths"], limit + 1) - n_short,
        "n_dropped": at_least(effect["records"], limit),
    }


def at_least(counts: list[tuple[int, int]], least: int) -> int:
    return sum(count for value, count in counts if value >= least)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of one to four exchanges, long questions, long answers, an unlearned end, and texts."""
    rows = []
    for i in range(12):
        turns = [{"role": "system", "content": "Be brief."}] * (i % 2)
        for j in range(1 + i % 4):
            turns.append({"role": "user", "content": "why " * (1 + 7 * ((i + j) % 5))})
            turns.append({"role": "assistant", "content": "so " * (1 + 11 * ((i * j) % 4))})
        rows.append({"messages": turns})
    rows[3]["messages"][-1]["weight"] = 0
    rows += [{"text": "The quick brown fox jumps. " * n} for n in (1, 4, 30)]
    file = tmp_path_factory.mktemp("ragged") / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("kind", "template", "train_on"),
    [
        ("sp_tokenizer", "alpaca", "all"),
        ("sp_tokenizer", "vicuna-chat", "last"),
        ("sp_tokenizer", SPACED, "all"),
        ("bytelevel_tokenizer", "chatml", "all"),
        ("bytelevel_tokenizer", APPEND_ONLY, "everything"),
        ("bytelevel_tokenizer", REWRITES_HISTORY, "all"),
    ],
)
def test_equals_encoding_with_the_limit(kind, template, train_on, request, ragged, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    if "{" in template:
        written = tmp_path / "template.jinja"
        written.write_text(template, encoding="utf-8")
        template = str(written)
    loaded = load_template(template, tokenizer)
    settings = EncodeSettings(NO_LIMIT, train_on)
    whole = encode_dataset(ragged, loaded, tokenizer, settings, tmp_path, encoder=QuestionLengthEncoder)
    effect = cutoff_effect(whole, loaded, tokenizer)
    seen = []
    for limit in LIMITS:
        try:
            limited = encode_dataset(ragged, loaded, tokenizer, replace(settings, cutoff_len=limit), tmp_path)
        except DataError:
            continue  # nothing is left
        report = limited.report
        expected = {"n_samples": len(limited), "n_cut": report.n_cut, "n_dropped": sum(report.dropped.values())}
        assert at_limit(effect, limit) == expected, limit
        seen.append((expected["n_cut"] > 0, expected["n_dropped"] > 0))
    assert {(True, True), (False, False)} <= set(seen)
    assert len(seen) >= 5
