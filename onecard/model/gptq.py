"""Weights in GPTQ form, of this project and of AutoGPTQ: what their files say, and what transformers must be told.

transformers loads them through gptqmodel and optimum (requirements-gptq.txt), which are imported by it and never here.
Making such files is `export/quantize/gptq.py`. Does not know adapters or training: weights in this form are for
answering.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from onecard.errors import ModelError
from onecard.installation import install_command
from onecard.model.files import read_json, weight_files

QUANTIZE_CONFIG = "quantize_config.json"
# GPTQModel's portable kernel, on every device. Its others are compiled by nvcc at their first use, want a card newer
# than Turing, or (the one it takes on a CPU) refuse a layer whose width is no multiple of the group.
BACKEND = "torch"


def stored_quantization(directory: Path, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a model's files say of how its weights are quantised; empty for plain weights. config: None: that there.

    AutoGPTQ before 0.5 wrote it into quantize_config.json alone. Raises ModelError for a file that is no JSON object.
    """
    if config is None:
        if not (directory / "config.json").is_file():
            return {}
        config = read_json(directory / "config.json")
    if stored := config.get("quantization_config"):
        return stored if isinstance(stored, dict) else {"quant_method": "unknown"}
    beside = directory / QUANTIZE_CONFIG
    return {"quant_method": "gptq", **read_json(beside)} if beside.is_file() else {}


def is_gptq(stored: dict[str, Any]) -> bool:
    """Whether `stored_quantization` tells of GPTQ weights."""
    return stored.get("quant_method") == "gptq"


def check_gptq_installed(directory: Path | str, why: str = "holds GPTQ weights") -> None:
    """Raise ModelError, in one line, where the libraries for this form are missing."""
    missing = [name for name in ("gptqmodel", "optimum") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{directory} {why}, which needs {' and '.join(missing)}: {install_command('gptq')} (a model's "
            "unquantised form works without)"
        )


def quantized_model_config(config: Any, directory: Path, stored: dict[str, Any]) -> Any:
    """Let the transformers config say that the weights lie quantised as `stored` says; returns it.

    Raises ModelError for GPTQ bits that no kernel here knows.
    """
    if not is_gptq(stored):
        config.update({"quantization_config": stored})
        return config
    if stored.get("bits") not in (2, 3, 4, 8):
        raise ModelError(f"{directory} says its GPTQ weights have {stored.get('bits')} bits; known are 2, 3, 4 and 8")
    # optimum takes the second for true by itself and refuses both together; it matters while quantising only.
    orders = {"desc_act": bool(stored.get("desc_act")), "act_group_aware": False}
    config.update({"quantization_config": {**stored, **orders, "backend": BACKEND}})
    files = weight_files(directory)
    if len(files) == 1 and files[0].name != "model.safetensors":
        config.update({"transformers_weights": files[0].name})  # such as gptq_model-4bit-128g.safetensors
    return config


@contextmanager
def quiet_gptqmodel() -> Iterator[None]:
    """Ready this process for gptqmodel, and keep its banner and its account of kernels off the terminal inside.

    Its thread pool does not start on one or two cores unless it is told how many threads to take. It wraps its layers
    into torch.compile, which wants a C++ compiler and takes half a minute at the first token; they run as they are.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    torch.compiler.set_stance("force_eager")
    # optimum looks at every attribute of the model; some of them answer with a warning.
    asked = logging.getLogger("transformers.modeling_utils")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        asked.addFilter(_not_about_loss_type)
        try:
            yield
        finally:
            asked.removeFilter(_not_about_loss_type)
    logging.getLogger("logbar").setLevel(logging.ERROR)  # what it says later, layer by layer


def _not_about_loss_type(record: logging.LogRecord) -> bool:
    return "loss_type=None" not in str(record.msg)
