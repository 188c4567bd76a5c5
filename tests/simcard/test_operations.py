"""Operations of the simulated card: the CPU's numbers, the kernels of each capability, two devices, random numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout, scaled_dot_product_attention

from tests.simcard.card import CONTEXT_BYTES, Card

pytestmark = pytest.mark.simcard


@pytest.fixture
def capability(card: Card) -> Iterator:
    """Gives device 0 another compute capability."""
    first = card.spec.devices[0]

    def change(major: int, minor: int) -> None:
        card.native.configure(0, first.total_bytes, CONTEXT_BYTES, major, minor)

    yield change
    change(*first.capability)


@pytest.fixture
def two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two simulated devices: --simcard sm75:11GiB,sm75:11GiB")


# dtype, key heads of 4, dim -> the kernel that torch takes on sm_75 and on sm_86
CHOICES = [
    (torch.float16, 4, 16, "efficient", "flash"),
    (torch.float16, 2, 16, "math", "flash"),
    (torch.float32, 4, 16, "efficient", "efficient"),
    (torch.float32, 2, 16, "math", "math"),
    (torch.float16, 4, 12, "math", "flash"),  # which pads to a multiple of 8
    (torch.bfloat16, 4, 16, "math", "flash"),
]


@pytest.mark.parametrize(("dtype", "key_heads", "dim", "turing", "ampere"), CHOICES)
@pytest.mark.parametrize("major", [7, 8])
def test_attention_takes_the_kernel_of_the_capability_and_gives_the_numbers_of_the_formula(
    card: Card, capability, dtype: torch.dtype, key_heads: int, dim: int, turing: str, ampere: str, major: int
) -> None:
    capability(major, 5 if major == 7 else 6)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, 40, dim, generator=generator) for heads in (4, key_heads, key_heads)]
    on_card = [x.to("cuda", dtype).requires_grad_() for x in inputs]
    on_cpu = [x.to(dtype).float().requires_grad_() for x in inputs]
    before = card.native.chosen_kernels()
    options = {"is_causal": True, "enable_gqa": key_heads != 4}
    out = scaled_dot_product_attention(*on_card, **options)
    after = card.native.chosen_kernels()
    assert [name for name in after if after[name] > before[name]] == [turing if major == 7 else ampere]
    with sdpa_kernel(SDPBackend.MATH):
        expected = scaled_dot_product_attention(*on_cpu, **options)
    weight = torch.randn(expected.shape, generator=generator).to(dtype).float()
    (out * weight.to("cuda", dtype)).sum().backward()
    (expected * weight).sum().backward()
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(out.cpu().float(), expected, **near)
    for got, want in zip(on_card, on_cpu, strict=True):
        torch.testing.assert_close(got.grad.cpu().float(), want.grad, **near)


@pytest.mark.parametrize("as_numbers", [True, False])
def test_attention_with_a_mask_is_that_of_the_cpu(as_numbers: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, 24, 16, generator=generator) for _ in range(3))
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    mask[1, :, :, :5] = False
    mask |= torch.eye(24, dtype=torch.bool)
    if as_numbers:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    got = scaled_dot_product_attention(q.cuda(), k.cuda(), v.cuda(), attn_mask=mask.cuda())
    torch.testing.assert_close(got.cpu(), scaled_dot_product_attention(q, k, v, attn_mask=mask), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_added_up_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b, c = (torch.randn(*size, generator=generator).to(dtype) for size in ((30, 500), (500, 20), (20,)))
    wide = a.float() @ b.float()
    assert torch.equal((a.cuda() @ b.cuda()).cpu(), wide.to(dtype))
    assert torch.equal(torch.addmm(c.cuda(), a.cuda(), b.cuda()).cpu(), (wide + c.float()).to(dtype))
    batched = torch.bmm(a.cuda().expand(3, -1, -1), b.cuda().expand(3, -1, -1))
    torch.testing.assert_close(batched[2].cpu(), wide.to(dtype))


def test_tensors_of_card_and_cpu_do_not_mix_but_numbers_do() -> None:
    on_card, on_cpu = torch.ones(3, device="cuda"), torch.ones(3)
    for operation in (torch.add, torch.maximum, torch.dot, torch.Tensor.add_):
        with pytest.raises(RuntimeError, match="at least two devices"):
            operation(on_card, on_cpu)
    assert (on_card + torch.tensor(2.0)).tolist() == [3, 3, 3]
    assert on_card[torch.tensor([0, 2])].shape == (2,)


def test_views_share_their_bytes_and_resizing_keeps_them() -> None:
    x = torch.arange(12.0, device="cuda")
    x.view(3, 4).transpose(0, 1)[1].zero_()
    assert x.tolist() == [0, 0, 2, 3, 4, 0, 6, 7, 8, 0, 10, 11]
    x.resize_(20)[12:] = 5
    assert x[:4].tolist() == [0, 0, 2, 3] and x[12:].tolist() == [5] * 8
    assert torch.cat([x[:2], x[18:]]).nonzero().flatten().tolist() == [2, 3]


def test_a_deep_copy_has_bytes_of_its_own_on_the_card() -> None:
    x = torch.arange(5.0, device="cuda")
    other = copy.deepcopy(x)
    x.zero_()
    assert other.tolist() == [0, 1, 2, 3, 4] and other.is_cuda


def test_random_numbers_of_the_card_have_a_state_of_their_own() -> None:
    torch.manual_seed(5)
    on_cpu = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(100, device="cuda")
    assert torch.equal(torch.rand(3), on_cpu)
    state = torch.cuda.get_rng_state()
    masks = [dropout(torch.ones(50, device="cuda"), 0.5)]
    torch.cuda.set_rng_state(state)
    masks.append(dropout(torch.ones(50, device="cuda"), 0.5))
    assert torch.equal(*masks) and set(masks[0].tolist()) == {0.0, 2.0}
    own = [torch.rand(3, device="cuda", generator=torch.Generator("cuda").manual_seed(9)) for _ in range(2)]
    assert torch.equal(*own)


@pytest.mark.usefixtures("two_devices")
def test_two_devices_have_their_own_memory_and_do_not_mix() -> None:
    before = [torch.cuda.memory_allocated(index) for index in range(2)]
    x = torch.ones(1000, device="cuda:1")
    assert [torch.cuda.memory_allocated(index) - before[index] for index in range(2)] == [0, 4096]
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cuda:1"):
        torch.ones(1000, device="cuda:0") + x
    assert torch.equal(x.to("cuda:0").cpu(), x.cpu())
    with torch.cuda.device(1):
        assert torch.empty(1, device="cuda").get_device() == torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device="cuda:7")
