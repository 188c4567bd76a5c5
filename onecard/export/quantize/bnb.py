"""Weights in 4 or 8 bits as bitsandbytes lays them, saved so that they need not be quantised again at each start.

Knows files and their check. How weights are quantised is `model/quantization.py`, how they load `model/load.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from onecard.config.base_model import ModelOptions
from onecard.errors import ModelError
from onecard.export.io.base import read_config, refuse_quantized
from onecard.export.io.weights import ShardWriter, Weights, copy_small_files, open_weights
from onecard.model.files import read_json, write_json
from onecard.model.hardware import Hardware
from onecard.model.load import load_base


def plain_weights(directory: Path) -> Weights:
    """The weights of a model, still on the disk. Raises ModelError: no model, quantised already, damaged files."""
    refuse_quantized(directory, read_config(directory), "give the unquantised model")
    return open_weights(directory)


def stored_dtype(weights: Weights) -> torch.dtype:
    """The 16-bit type that a model's matrices are stored in; fp16 for any other."""
    dtypes = {entry.dtype for entry in weights.entries.values() if len(entry.shape) == 2}
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float16


def save_quantized(options: ModelOptions, hardware: Hardware, source: Path, target: Path, max_shard_bytes: int) -> None:
    """Quantise the model in `source` to `options.bits` (4 or 8) and write it into the directory `target`.

    It is saved before its first forward, which on some CPUs repacks 4-bit weights for good. What is not quantised
    stays in 16 bits. Raises what `load_base` raises.
    """
    dtype = stored_dtype(plain_weights(source))
    model: Any = load_base(options, hardware, dtype=dtype).model
    written = target / ".written"
    model.save_pretrained(written)
    quantised = read_json(written / "config.json")["quantization_config"]
    del model
    writer = ShardWriter(target, max_shard_bytes)
    for name, tensor in open_weights(written):
        writer.add(name, tensor)
    writer.finish()
    shutil.rmtree(written)
    copy_small_files(source, target)
    write_config(source, target, dtype, quantised)


def write_config(source: Path, target: Path, dtype: torch.dtype, quantization_config: dict[str, Any]) -> None:
    """The config.json of `source` in `target`, with the dtype of what stays whole and how the rest is quantised."""
    config = read_json(source / "config.json")
    dtype_key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config |= {dtype_key: str(dtype).removeprefix("torch."), "quantization_config": quantization_config}
    write_json(target / "config.json", config)


def check_same_weights(model: Any, directory: Path) -> int:
    """Compare a model that was loaded from `directory` with the files there, bit by bit, before its first forward.

    Returns the number of quantised layers. Raises ModelError where a quantised weight is another, or none is there.
    """
    weights = open_weights(directory)
    loaded = dict(model.state_dict())
    integers = [name for name, entry in weights.entries.items() if entry.dtype in (torch.uint8, torch.int8)]
    layers = [name for name in integers if name.endswith(".weight")]
    for name in layers:
        if name not in loaded or not torch.equal(loaded[name].cpu(), weights.read(name)):
            raise ModelError(f"{directory}: {name} came back from the files as something else")
    if not layers:
        raise ModelError(f"{directory} holds no quantised layer")
    weights.close()
    return len(layers)
