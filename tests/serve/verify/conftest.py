"""A run on the trained sample base, as training leaves it, and servers in front of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions
from onecard.inference.engine import open_engine
from onecard.installation import SHIPPED
from onecard.recipes import finetune
from tests import tiny
from tests.serve.api.serving import Running, serving

BASE = SHIPPED / "sample" / "tiny-llama"


@pytest.fixture(scope="session")
def checked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some steps of LoRA in fp32 on the sample data, some rows held out."""
    run = tmp_path_factory.mktemp("verify") / "my-run"
    records = json.loads((SHIPPED / "sample" / "merge_sample.json").read_text(encoding="utf-8"))[:160]
    data = run.parent / "data.json"
    data.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    options = {"server_check": True, "test_size": 20, "save_steps": 100, "total_batch": 24, "micro_batch": 24,
               "learning_rate": 5e-3, "cutoff_len": 128}  # fmt: skip
    finetune(tiny.config_for(BASE, data, run, **options))
    return run


@pytest.fixture(scope="session")
def serve_run(request: pytest.FixtureRequest) -> Iterator[Callable[..., Running]]:
    """Servers of a run, of `checked_run` if none is given, or of a base; `prompt_type` may name another template."""
    with ExitStack() as stack:

        def start(
            lora_path: Path | str | None = "", prompt_type: str = "auto", model_path: Path = BASE, bits: Any = 32
        ) -> Running:
            lora_path = request.getfixturevalue("checked_run") if lora_path == "" else lora_path
            model = ModelOptions(str(model_path), bits=bits, device="cpu", gradient_checkpointing=False)
            inference = InferenceOptions(lora_path=lora_path and str(lora_path), prompt_type=prompt_type)
            engine = open_engine(model, inference, LimitOptions(), model_name="served")
            return stack.enter_context(serving(engine, LimitOptions()))

        yield start
