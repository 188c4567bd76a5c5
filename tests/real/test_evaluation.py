"""Option likelihoods of a real model, in fp64, equal those of lm-evaluation-harness (requirements-eval.txt)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from onecard.config.base_model import ModelOptions
from onecard.inference.load import load_bundle
from tests.evaluate.harness import exact, say_largest


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (requirements-eval.txt)")
@pytest.mark.parametrize("shots", [0, 2])
def test_option_likelihoods_are_those_of_the_harness(
    smollm2: dict[str, Path], shots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = ModelOptions(model_path=str(smollm2["bf16"]), bits=32, device="cpu", dtype="fp32")
    ours, theirs = exact(load_bundle(options, None, "auto")[0], tmp_path, n=5, shots=shots)
    assert len(ours) == 20 and max(ours) - min(ours) > 0.1
    say_largest(f"SmolLM2-135M, {shots} shots", ours, theirs)
    assert ours == pytest.approx(theirs, rel=0, abs=1e-6)
