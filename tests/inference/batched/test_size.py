"""How much memory the batch gets, and the reason that is told."""

from __future__ import annotations

import pytest

from onecard.config.inference import ParallelOptions
from onecard.inference.batched import size as sizes
from onecard.inference.batched.size import BatchSize, choose_size
from onecard.inference.call import ModelBundle

MIB = 2**20


def test_as_much_as_the_answers_need(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bundle.model.config
    found = choose_size(bundle.model, 4, 0.0, 0.0)
    assert found.n_tokens == 4 * 512 and found.step_tokens == 512  # the model reads 512 tokens
    head = config.hidden_size // config.num_attention_heads
    assert found.token_bytes == 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4
    assert "512 tokens each" in found.summary() and "up to 4 answers" in found.summary()
    monkeypatch.setattr(sizes, "free_bytes", lambda _: 2 * 640 * found.token_bytes + 2**30)
    scarce = choose_size(bundle.model, 4, 0.0, 1.0)
    assert scarce.n_tokens == 640 and "half of the 1.0 GiB" in scarce.summary()
    typed = choose_size(bundle.model, 4, 320 * found.token_bytes / 2**30, 1.0)
    assert typed.n_tokens == 320 and "--kv_cache_gib" in typed.summary()


def test_less_and_less_until_it_is_one() -> None:
    size, seen = BatchSize(8, 64, 512, 1024), []
    while size is not None:
        seen.append((size.n_parallel, size.n_blocks, size.step_tokens))
        size = size.smaller()
    assert seen == [(8, 64, 512), (4, 32, 256), (2, 16, 128), (1, 8, 64)]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"max_parallel": 0}, "--max_parallel"),
        ({"max_parallel": 257}, "--max_parallel"),
        ({"max_parallel": 2, "kv_cache_gib": -1.0}, "--kv_cache_gib"),
        ({"max_parallel": 2, "kv_cache_gib": float("nan")}, "--kv_cache_gib"),
        ({"kv_cache_gib": 1.0}, "--kv_cache_gib"),
        ({"max_parallel": 8, "kv_cache_gib": 1.0}, None),
    ],
)
def test_options_are_checked(options: dict, flag: str | None) -> None:
    assert [name for name, _ in ParallelOptions(**options).problems()] == ([flag] if flag else [])
