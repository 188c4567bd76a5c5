"""Option likelihoods equal those of lm-evaluation-harness (requirements-eval.txt), which runs for real."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from onecard.config.base_model import DEFAULT_BASE, ModelOptions
from onecard.config.inference import LimitOptions
from onecard.inference.load import load_bundle
from onecard.programs import _lm_eval
from tests.evaluate.harness import exact, in_this_process, say_largest, typed
from tests.serve.api.serving import open_tiny, serving


def save_adapter(base: Path, folder: Path) -> Path:
    """An adapter with random values."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    random = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    tuned.save_pretrained(folder)
    return folder


needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed (requirements-eval.txt)"
)


@pytest.mark.slow
@needs_harness
@pytest.mark.parametrize("shots", [0, 2])
def test_option_likelihoods_are_those_of_the_harness(
    shots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, so that nothing but the way of asking could differ."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = ModelOptions(model_path=DEFAULT_BASE, bits=32, device="cpu", dtype="fp32")
    ours, theirs = exact(load_bundle(options, None, "auto")[0], tmp_path, n=40, shots=shots)
    assert len(ours) == 160 and max(ours) - min(ours) > 1
    assert ours == pytest.approx(theirs, rel=0, abs=1e-6)
    say_largest(f"tiny-llama, {shots} shots", ours, theirs)


@pytest.mark.slow
@needs_harness
@pytest.mark.parametrize("what", ["adapter", "server"])
def test_what_is_typed_gives_the_same(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fp32, whose log-probabilities of -12 are 9.5e-7 apart. With an adapter the harness is a process of its own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if what == "server":
        monkeypatch.setattr(_lm_eval, "subprocess", SimpleNamespace(run=in_this_process))
    base, limits = Path(DEFAULT_BASE), LimitOptions()
    adapter = save_adapter(base, tmp_path / "adapter") if what == "adapter" else None
    with ExitStack() as stack:
        url = stack.enter_context(serving(open_tiny(base, limits), limits)).url if what == "server" else ""
        ours, theirs = typed(base, tmp_path, adapter=adapter, url=url)
    assert len(ours) == 40 and max(ours) - min(ours) > 0.1
    assert ours == pytest.approx(theirs, rel=1e-6)
    say_largest(what, ours, theirs)
