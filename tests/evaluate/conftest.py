"""One small random model for all tests of evaluation, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest

from onecard.config.base_model import ModelOptions
from onecard.inference.call import ModelBundle
from onecard.inference.load import load_bundle


@pytest.fixture(scope="session")
def bundle(tiny_base: Path) -> ModelBundle:
    options = ModelOptions(model_path=str(tiny_base), bits=32, device="cpu", dtype="fp32")
    return load_bundle(options, None, "alpaca")[0]
