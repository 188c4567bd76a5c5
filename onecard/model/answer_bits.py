"""In how many bits a base answers where nobody said it: the run's own on a card, what is fastest and fits on a CPU.

Knows sizes of files, and what was measured (docs/benchmarks.md). On a CPU 4 and 8 bits are there to fit: each token
dequantises all weights anew, so more bits answer faster.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from onecard.config.base_model import ModelOptions
from onecard.console import warn
from onecard.installation import command
from onecard.model.files import check_weights, locate, read_json, safetensors_header
from onecard.model.gptq import is_gptq, stored_quantization
from onecard.model.hardware import FP32_FAMILIES, Hardware, free_and_total_bytes

ON_A_CARD = 4
BYTES = {32: 4.0, 16: 2.0, 8: 1.1, 4: 0.6}  # of a weight, with scales
ROOM = 1.2  # for what is beside the weights: keys and values, activations, one tensor while it is read
TOLD_FROM = 50_000_000  # weights; smaller models are quick in any form


def with_answer_bits(options: ModelOptions, hardware: Hardware, trained_bits: int | None) -> ModelOptions:
    """The options with --bits auto filled in; others as they are. Warns that a CPU is slow, and of what is faster.

    trained_bits: of the run whose adapter answers, if any. Raises ModelError for a base that is not there.
    """
    if str(options.bits) != "auto":
        return options
    bits: Any = _stored_bits(options) or trained_bits or ON_A_CARD
    if hardware.is_gpu or _stored_bits(options):
        return replace(options, bits=bits)
    n_weights = count_weights(locate(options.model_path, with_code=options.trust_remote_code))
    bits = fastest_on_cpu(options, n_weights, psutil.virtual_memory().available)
    if n_weights >= TOLD_FROM:
        warn(
            f"no GPU is used: {n_weights / 1e9:.2f}B weights answer in {bits} bits, of what fits here the fastest "
            f"(--bits sets others). llama.cpp is made for CPUs: {command('gguf')} --gguf_type q4_0 writes its file"
        )
    return replace(options, bits=bits)


def with_streaming(options: ModelOptions, hardware: Hardware) -> ModelOptions:
    """The options with --stream_layers auto filled in: on where the weights are larger than what is free on the card.

    Raises ModelError for a base that is not there.
    """
    if options.stream_layers != "auto":
        return options
    off = replace(options, stream_layers="off")
    if not hardware.is_gpu or options.max_memory is not None:
        return off
    directory = locate(options.model_path, with_code=options.trust_remote_code)
    if is_gptq(stored_quantization(directory)):
        return off
    needed = count_weights(directory) * BYTES[options.bits]
    free, _ = free_and_total_bytes(hardware.device)
    if needed <= free:
        return off
    warn(
        f"the weights need about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free on {hardware.name}: the layers "
        "stay in RAM and pass through it, which is slow token by token (--stream_layers off refuses instead)"
    )
    return replace(options, stream_layers="on")


def fastest_on_cpu(options: ModelOptions, n_weights: int, free_bytes: int) -> int:
    """The bits per weight that answer fastest on a CPU, of those that fit into `free_bytes` and go with --dtype."""
    config_file = Path(options.model_path).expanduser() / "config.json"
    family = read_json(config_file).get("model_type") if config_file.is_file() else ""
    order = (32, 8, 4) if options.dtype == "fp32" or family in FP32_FAMILIES else (16, 8, 4)
    return next((bits for bits in order if n_weights * BYTES[bits] * ROOM <= free_bytes), order[-1])


def count_weights(directory: Path) -> int:
    """The weights in a model's files, by their headers; pickled ones are taken to be in 16 bits."""
    total = 0
    for file in check_weights(directory):
        if file.suffix != ".safetensors":
            total += file.stat().st_size // 2
            continue
        entries = safetensors_header(file)
        total += sum(math.prod(entry["shape"]) for name, entry in entries.items() if name != "__metadata__")
    return total


def _stored_bits(options: ModelOptions) -> int | None:
    """Of weights that lie there quantised, where their files say it."""
    directory = locate(options.model_path, with_code=options.trust_remote_code)
    stored = stored_quantization(directory)
    if stored.get("quant_method", "bitsandbytes") == "bitsandbytes" and stored:
        return 8 if stored.get("load_in_8bit") else 4
    return 4 if stored else None
