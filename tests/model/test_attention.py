"""Attention without FlashAttention gives what transformers' own gives; a card may be described as an older one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from onecard.errors import ConfigError
from onecard.model import kernels
from onecard.model.attention import NAME, attend, attend_packed, avoid_flash
from onecard.model.chunked_loss import summed_loss
from onecard.model.hardware import Hardware, choose_dtype, detect
from onecard.model.kernels import use_liger
from onecard.model.load import LoadedBase
from tests.model.model_families import small_batch

Loads = Callable[..., LoadedBase]


class Attention(nn.Module):
    def __init__(self, n_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = n_groups, True


def masked(rows: int, n_queries: int, n_keys: int) -> torch.Tensor:
    """Causal, and the last keys of each row but the first are pads."""
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries).expand(rows, 1, -1, -1).clone()
    for row in range(1, rows):
        mask[row, :, :, -row:] = False
        mask[row, :, :, 0] = True  # no row of scores is empty
    return mask


@pytest.mark.parametrize("key_heads", [1, 2, 8])
@pytest.mark.parametrize(
    ("n_queries", "n_keys", "with_mask"),
    [(12, 12, False), (12, 12, True), (1, 12, False), (1, 12, True), (5, 12, True), (5, 12, False)],
)
def test_it_is_the_same_function(key_heads: int, n_queries: int, n_keys: int, with_mask: bool) -> None:
    """Values and gradients; 5 queries and 12 keys without a mask are an empty static cache."""
    sizes = [(3, 8, n_queries, 16), (3, key_heads, n_keys, 16), (3, key_heads, n_keys, 16)]
    results = []
    for function in (sdpa_attention_forward, attend):
        torch.manual_seed(1)
        inputs = [torch.randn(size, requires_grad=True) for size in sizes]
        mask = masked(3, n_queries, n_keys) if with_mask else None
        out, weights = function(Attention(8 // key_heads), *inputs, mask, scaling=0.3, dropout=0.0)  # type: ignore
        assert weights is None
        (out * torch.arange(16)).sum().backward()
        results.append([out, *(tensor.grad for tensor in inputs)])
    assert len(results[0]) == 4
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_heads", [1, 2, 8])
@pytest.mark.parametrize("with_mask", [False, True])
def test_packed_rows_are_read_alike(key_heads: int, with_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache that holds seven tokens before five new ones, and the mask of two requests."""

    class Cache:
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, **_: Any) -> Any:
            before = torch.arange(7 * 16.0).reshape(1, 1, 7, 16).expand(-1, key_heads, -1, -1).sin()
            return tuple(torch.cat([before, states], dim=2) for states in (key_states, value_states))

    monkeypatch.setattr("transformers.integrations.sdpa_attention.PagedAttentionCache", Cache)
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, heads, 5, 16) for heads in (8, key_heads, key_heads))
    mask = torch.zeros(1, 1, 5, 12).masked_fill(~masked(1, 5, 12), torch.finfo(torch.float32).min)
    mask[..., 3:, 2:6] = torch.finfo(torch.float32).min
    module: Any = Attention(8 // key_heads)
    module.layer_idx = 0
    options: Any = {"scaling": 0.3, "dropout": 0.0, "cache": Cache()}
    given = mask if with_mask else None
    expected, _ = sdpa_attention_forward(module, query, key, value, given, **options)
    got, weights = attend_packed(module, query, key, value, given, **options)
    assert weights is None
    assert torch.equal(got, expected)


@pytest.mark.parametrize("cost", [0, 10**9])
def test_each_request_of_a_packed_row_reads_its_own_keys(cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three requests with 1, 3 and 1 new tokens; those of the others change nothing, however they are read."""
    monkeypatch.setattr("onecard.model.attention._PRODUCTS_PER_CALL", cost)
    kernel, n_keys = torch.nn.functional.scaled_dot_product_attention, []

    def counted(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        n_keys.append(key.shape[2])
        return kernel(query, key, *rest, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", counted)

    class Cache:
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, **_: Any) -> Any:
            return key_states, value_states

    torch.manual_seed(1)
    query, key, value = (torch.randn(1, heads, n, 16) for heads, n in ((8, 5), (2, 12), (2, 12)))
    lengths = [(0, 1, 0, 4), (1, 4, 4, 10), (4, 5, 10, 12)]  # queries and keys of each
    mask = torch.full((1, 1, 5, 12), torch.finfo(torch.float32).min)
    alone = []
    for start, end, first, last in lengths:
        mask[..., start:end, first:last] = torch.where(masked(1, end - start, last - first), 0.0, mask.min())
        part = (query[:, :, start:end], key[:, :, first:last], value[:, :, first:last])
        alone.append(kernel(*part, mask[..., start:end, first:last], enable_gqa=True).transpose(1, 2))
    ends = {"cu_seq_lens_q": torch.tensor([0, 1, 4, 5]), "cu_seq_lens_k": torch.tensor([0, 4, 10, 12])}
    module: Any = Attention(4)
    module.layer_idx = 0
    got, _ = attend_packed(module, query, key, value, mask, cache=Cache(), **ends)
    torch.testing.assert_close(got, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-6)
    assert n_keys == ([4, 6, 2] if cost == 0 else [12])


def test_a_soft_cap_is_refused_as_before() -> None:
    query = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="softcap"):
        attend(Attention(1), query, query, query, None, softcap=50.0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gemma3_text", "phi3", "gpt_neox"])
def test_a_whole_model(family: str, load_family: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss and the same gradients, and it is this function that was called."""
    batch, results, n_calls = small_batch(), [], 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        return attend(*args, **options)

    monkeypatch.setattr("onecard.model.attention.attend", counted)
    for changed in (False, True):
        model = load_family(family, attn_implementation="sdpa", gradient_checkpointing=False).model
        if changed:
            assert avoid_flash(model) and avoid_flash(model), "twice does no harm"
            assert model.config._attn_implementation == NAME
        inner = next(layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
        inner.requires_grad_(True)
        loss, _ = summed_loss(model, batch, chunk_tokens=8)
        loss.backward()
        answers = model.generate(batch["input_ids"][:, :4], max_new_tokens=5, do_sample=False, use_cache=True)
        results.append((loss.detach(), inner.weight.grad, answers))
    assert n_calls >= 2 + 2 * 5, "the model does not ask this function"
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)
    assert torch.equal(results[0][2], results[1][2])


def test_another_attention_is_left_alone(load_family: Loads) -> None:
    model = load_family("gemma2", attn_implementation="eager").model
    assert not avoid_flash(model)
    assert model.config._attn_implementation == "eager"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that seems to have an RTX 3090."""
    found = SimpleNamespace(name="RTX 3090", total_memory=24 * 2**30, major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: pytest.MonkeyPatch.context())


@pytest.mark.usefixtures("card")
def test_a_new_card_that_pretends_to_be_old() -> None:
    real, pretended = detect(), detect(pretend_turing=True)
    assert real.bf16_native and real.has_flash_attention
    assert not pretended.bf16_native and not pretended.has_flash_attention
    assert (pretended.name, pretended.total_bytes) == (real.name, real.total_bytes)
    assert choose_dtype("auto", 4, pretended, "llama")[0] == torch.float16
    with pytest.raises(ConfigError, match="--dtype"):
        choose_dtype("bf16", 4, pretended, "llama")


def test_a_cpu_has_nothing_to_pretend() -> None:
    assert detect("cpu", pretend_turing=True) == detect("cpu")


CARD = Hardware(torch.device("cuda", 0), "RTX 3090", 24 * 2**30, bf16_native=True, capability=(8, 6))


@pytest.mark.parametrize(
    ("hardware", "installed", "told"),
    [
        (CARD, False, "pip install liger-kernel"),
        (replace(CARD, name="RTX 2080 Ti", capability=(7, 5)), True, "not RTX 2080 Ti"),
        (detect("cpu"), True, "Ampere generation or newer"),
    ],
)
def test_liger_is_refused(
    hardware: Hardware, installed: bool, told: str, load_family: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(ConfigError, match=told) as refused:
        use_liger(load_family("llama").model, hardware)
    assert str(refused.value).startswith("--kernels")


def test_liger_gets_all_but_the_loss(load_family: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[dict[str, bool]] = []
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())

    def known(model: Any, what: Any) -> None:
        wanted.append(what)
        plain = model.model.norm.forward

        def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return plain(x)

        forward.__module__ = "liger_kernel.transformers.rms_norm"
        model.model.norm.forward = MethodType(forward, model.model.norm)

    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", known)
    use_liger(load_family("llama").model, CARD)
    assert {name for name, on in wanted[0].items() if on} == {"rope", "rms_norm", "swiglu"}
    assert not wanted[0]["cross_entropy"] and not wanted[0]["fused_linear_cross_entropy"]


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (None, "does not know llama"),  # it only writes to its log
        (TypeError("got an unexpected keyword argument 'swiglu'"), "does not know llama: got an"),
        (ImportError("liger-kernel >= 0.3.0 is not available"), "cannot be used: liger-kernel >= 0.3.0"),
    ],
)
def test_liger_that_does_nothing(
    reason: Exception | None, told: str, load_family: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apply(model: Any, what: Any) -> None:
        if reason is not None:
            raise reason

    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", apply)
    with pytest.raises(ConfigError, match=told):
        use_liger(load_family("llama").model, CARD)
