from __future__ import annotations

import pytest
import torch

from onecard.errors import ConfigError
from onecard.model import hardware
from onecard.model.hardware import FP16_FRAGILE_FAMILIES, Hardware, choose_dtype, detect

GIB = 2**30
CPU = Hardware(torch.device("cpu"), "a CPU", 32 * GIB, bf16_native=True, capability=None)
TURING = Hardware(torch.device("cuda", 0), "RTX 2080 Ti", 11 * GIB, bf16_native=False, capability=(7, 5))
AMPERE = Hardware(torch.device("cuda", 0), "RTX 3090", 24 * GIB, bf16_native=True, capability=(8, 6))
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32

CHOSEN = [
    # hardware, requested, bits, family, dtype, a word of the reason
    (AMPERE, "auto", 4, "llama", BF16, "natively"),
    (AMPERE, "auto", 8, "gemma2", BF16, "natively"),
    (AMPERE, "auto", 16, "qwen3", BF16, "RTX 3090"),
    (AMPERE, "fp16", 4, "llama", FP16, "--dtype fp16"),
    (TURING, "auto", 4, "llama", FP16, "no native bf16"),
    (TURING, "auto", 16, "llama", FP16, "scaler"),
    (TURING, "auto", 4, "gemma2", FP32, "overflows"),
    (TURING, "auto", 8, "gemma3_text", FP32, "overflows"),
    (TURING, "auto", 32, "gemma2", FP32, "--bits 32"),
    (TURING, "fp32", 4, "llama", FP32, "--dtype fp32"),
    (CPU, "auto", 4, "llama", FP32, "CPU"),
    (CPU, "auto", 8, "gemma", FP32, "CPU"),
    (CPU, "auto", 16, "llama", BF16, "CPU"),
    (CPU, "auto", 32, "llama", FP32, "--bits 32"),
    (CPU, "bf16", 4, "llama", BF16, "--dtype bf16"),
]
REFUSED = [
    (TURING, "auto", 16, "gemma2", "--bits", "overflows in fp16"),
    (TURING, "bf16", 4, "llama", "--dtype", "emulated"),
    (TURING, "fp16", 4, "gemma2", "--dtype", "NaN"),
    (AMPERE, "fp16", 16, "gemma3_text", "--dtype", "use auto"),
    (CPU, "fp16", 16, "llama", "--dtype", "needs a GPU"),
    (CPU, "fp32", 16, "llama", "--bits", "--bits 32"),
    (AMPERE, "bf16", 32, "llama", "--bits", "--bits 16"),
    (AMPERE, "fp64", 32, "llama", "--dtype", "unknown"),
]


@pytest.mark.parametrize(("hardware", "requested", "bits", "family", "dtype", "word"), CHOSEN)
def test_chosen_dtype_and_its_reason(hardware, requested, bits, family, dtype, word) -> None:
    chosen, reason = choose_dtype(requested, bits, hardware, family)
    assert chosen == dtype
    assert word in reason


@pytest.mark.parametrize(("hardware", "requested", "bits", "family", "flag", "word"), REFUSED)
def test_what_cannot_work_is_refused(hardware, requested, bits, family, flag, word) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_dtype(requested, bits, hardware, family)
    assert caught.value.flag == flag
    assert word in str(caught.value)


def test_fragile_families_never_compute_in_fp16() -> None:
    tried = [(family, bits) for family in FP16_FRAGILE_FAMILIES for bits in (4, 8, 32)]
    assert len(tried) == 18
    assert {choose_dtype("auto", bits, TURING, family)[0] for family, bits in tried} == {FP32}


@pytest.mark.parametrize(("hardware", "in_fp32", "in_16_bits"), [
    (CPU, True, True), (AMPERE, False, True), (TURING, False, False),
])  # fmt: skip
def test_where_attention_reads_shared_keys_without_copies(hardware, in_fp32, in_16_bits) -> None:
    assert [hardware.has_flash_attention_in(n_bytes) for n_bytes in (4, 2)] == [in_fp32, in_16_bits]


def test_detect_cpu() -> None:
    found = detect("cpu")
    assert found.device == torch.device("cpu") and found.total_bytes > 2**28 and found.name and not found.is_gpu


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda0", ""])
def test_unknown_device(device) -> None:
    with pytest.raises(ConfigError, match="--device"):
        detect(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu() -> None:
    assert detect("auto").device.type == "cpu"
    with pytest.raises(ConfigError, match="sees none"):
        detect("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_card_that_cannot_be_used_is_told_before_the_cpu_is_taken(monkeypatch, capsys) -> None:
    reason = "driver 535.1 is too old for a torch of CUDA 13.0; update the NVIDIA driver"
    monkeypatch.setattr(hardware, "_missing_gpu", lambda: reason)
    assert detect("auto").device.type == "cpu"
    assert f"warning: the CPU computes: {reason}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"sees none.*535\.1 is too old"):
        detect("cuda")
    assert detect("cpu").device.type == "cpu" and capsys.readouterr().err == "", "it is meant"
    monkeypatch.setattr(hardware, "_missing_gpu", lambda: "")
    assert detect("auto").device.type == "cpu" and capsys.readouterr().err == "", "nothing speaks of a card"


def test_a_card_older_than_the_kernels_of_this_torch_is_refused(monkeypatch) -> None:
    def card(name: str, *capability: int) -> Hardware:
        return Hardware(torch.device("cuda", 0), name, 11 * 2**30, False, capability)

    monkeypatch.setattr(hardware, "_kernels", lambda: "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120")
    for old in (card("GTX 1080 Ti", 6, 1), card("Tesla V100", 7, 0)):
        with pytest.raises(ConfigError, match=rf"{old.name}.*begins at 7\.5; pip install .*whl/cu126, or --device cpu"):
            hardware._refuse_too_old(old)
    hardware._refuse_too_old(card("RTX 2080 Ti", 7, 5))
    hardware._refuse_too_old(card("RTX 5090", 12, 0))
    monkeypatch.setattr(hardware, "_kernels", lambda: "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90")
    hardware._refuse_too_old(card("GTX 1080 Ti", 6, 1))


def test_gpus_are_counted_and_shared_out(monkeypatch) -> None:
    """Fake counts: the choice of index needs no card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="GPU number 5"):
        detect("cuda:5")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="GPU number 2"):
        detect("auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="every process on the same GPU"):
        detect("cuda:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_questions_about_memory_without_a_gpu() -> None:
    """They are asked on every machine, in the middle of a run."""
    assert hardware.count_gpus() == 0
    assert hardware.peak_reserved_bytes() is None
    hardware.reset_peak()
    hardware.empty_cache()
