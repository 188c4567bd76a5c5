"""From a base, a merged model or base + adapter to a quantised directory, and what that cost.

Knows the order of the work and what is told. How weights are quantised is `gptq.py` and `bnb.py`, what they are fitted
to `calibration.py`, how good they are `evaluate.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from onecard.config.base_model import ModelOptions
from onecard.console import say, warn
from onecard.data.chat_template import load_template
from onecard.errors import ConfigError
from onecard.export.io.base import build_skeleton
from onecard.export.io.left_out import check_quantised
from onecard.export.io.model_card import CARD, lines_of, write_card
from onecard.export.io.output import new_directory, progress
from onecard.export.io.weights import open_weights
from onecard.export.merge.merge import find_base, merge_into
from onecard.export.merge.options import MergeSettings
from onecard.export.quantize.bnb import check_same_weights, plain_weights, save_quantized, stored_dtype
from onecard.export.quantize.calibration import (
    Calibration,
    MeasuredText,
    Rows,
    calibration_of,
    data_rows,
    text_rows,
    texts_of,
    tiny_corpus,
    upto,
)
from onecard.export.quantize.evaluate import QuantizedQuality, quality_of, round_layers
from onecard.export.quantize.gptq import check_source, quantize, quantized_layers
from onecard.export.quantize.options import BnbOptions, CalibrationTextOptions, GptqOptions, SourceOptions
from onecard.installation import command
from onecard.model.files import locate, read_json
from onecard.model.gptq import check_gptq_installed
from onecard.model.hardware import Hardware, detect, free_and_total_bytes
from onecard.model.load import load_base, load_tokenizer
from onecard.objectives.registry import objective_named

OBJECTIVE = objective_named("documents")  # of fitting and measuring: a model is to predict each token as before
GOOD_SHARE = 0.04  # a 4-bit model whose perplexity rises by more has lost something that one notices
SPARE_BYTES = int(1.5 * 2**30)  # what a forward takes beside the weights


def with_base(options: SourceOptions) -> SourceOptions:
    """The options with the base by name, where the first adapter names it. Raises ConfigError where none is named."""
    if not options.adapters:
        return options
    return replace(options, model_path=find_base(options.model_path or "auto", options.adapters[0]))


@contextmanager
def whole_model(options: SourceOptions, staging: Path) -> Iterator[Path]:
    """The directory of the model to quantise; base and adapter are merged into a hidden folder that goes again."""
    if not options.adapters:
        yield locate(options.model_path, with_code=options.trust_remote_code)
        return
    folder = staging / ".merged"
    folder.mkdir()
    # In 16 bits, as every quantiser loads it; what was learned is in them on the mean, and that is measured here.
    settings = MergeSettings(accept_other_base=options.accept_other_base, trust_remote_code=options.trust_remote_code)
    report = merge_into(folder, options.model_path, options.adapters, settings)
    for note in report.notes:
        warn(note)
    say(f"merged {len(report.adapters)} adapter(s) into {options.model_path}, in {report.dtype}: {report.proof}")
    yield folder
    shutil.rmtree(folder)


def export_gptq(options: SourceOptions, settings: GptqOptions, calibration: CalibrationTextOptions) -> None:
    """Write a GPTQ checkpoint, prove that it loads, and say what it costs on held-out text.

    Raises ConfigError, ModelError and DataError, each before the long work wherever that can be.
    """
    check_gptq_installed(command("quantize-gptq"), "writes GPTQ weights")
    hardware = detect(options.device)
    kept = options.target.expanduser().absolute()
    kept = kept.with_name(f".{kept.name}.layers")
    with new_directory(options.target, overwrite=options.overwrite, inputs=options.inputs) as staging:
        with whole_model(options, staging) as source:
            before = check_source(source, settings)
            text = rows_for(source, calibration, options)
            say(f"fitting to {text.n_tokens:,} tokens in {len(text.rows)} samples, on {hardware.name}")
            quantize(source, text.rows, settings, options, staging, kept)
            write_card_of(staging, source, options, f"to {settings.bits} bits with GPTQ, {_group(settings.group_size)}")
            names = quantized_layers(staging)
            check_whole(source, staging, options)
            whole, rounded = _before(source, names, settings, text.held_out, hardware, options)
        model = _load(staging, hardware, options, stored_dtype(before))
        after = measured(model, text.held_out, "GPTQ", options, whole)
        n_after = open_weights(staging).total_bytes
    shutil.rmtree(kept, ignore_errors=True)
    say(
        f"quantised {len(names)} layers to {settings.bits} bits, {_group(settings.group_size)}: "
        f"{before.total_bytes / 2**20:,.1f} MiB -> {n_after / 2**20:,.1f} MiB in {options.target}"
    )
    say_quality(len(text.held_out), whole, {"GPTQ": after, "plain rounding": rounded})
    _judge(whole, after, rounded, settings)


def export_bnb(options: SourceOptions, settings: BnbOptions, text: MeasuredText) -> None:
    """Write a bitsandbytes checkpoint, prove that it comes back bit by bit, and say what it costs."""
    bits = settings.bits
    hardware = detect(options.device)
    with new_directory(options.target, overwrite=options.overwrite, inputs=options.inputs) as staging:
        with whole_model(options, staging) as source:
            before = plain_weights(source)
            dtype = stored_dtype(before)
            tokenizer = load_tokenizer(str(source), trust_remote_code=options.trust_remote_code)
            length = min(settings.eval_len, _longest(source))
            rows = text_rows(text.texts, tokenizer, length, packed=text.packed)
            held_out = list(islice((row for row in rows if len(row) > 1), settings.eval_samples))
            if not held_out:
                raise ConfigError("--eval_path", f"{text.name} holds no text to measure on; give more of it")
            n_tokens = sum(map(len, held_out))
            say(f"measuring on {len(held_out)} samples of {text.name}, {n_tokens:,} tokens")
            whole = measured(load_whole(source, hardware, options, dtype), held_out, "16-bit", options)
            save_quantized(_options(source, options, bits), hardware, source, staging, options.max_shard_bytes)
            write_card_of(staging, source, options, f"to {bits} bits with bitsandbytes")
            check_whole(source, staging, options)
        model = load_base(_options(staging, options, bits), hardware).model
        n_layers = check_same_weights(model, staging)
        after = measured(model, held_out, f"{bits}-bit", options, whole)
        n_after = open_weights(staging).total_bytes
    say(
        f"saved {n_layers} layers in {bits} bits: {before.total_bytes / 2**20:,.1f} MiB -> {n_after / 2**20:,.1f} MiB "
        f"in {options.target}; read back, every quantised weight is the same bit by bit"
    )
    say_quality(len(held_out), whole, {f"{bits}-bit": after})
    say(f"load it with --bits {bits}")


def check_whole(source: Path, staging: Path, options: SourceOptions) -> None:
    """Compare all tensors with the source, and say what was left out and why. Raises as `check_quantised` does."""
    model = build_skeleton(source, trust_remote_code=options.trust_remote_code)
    for line in check_quantised(open_weights(source), open_weights(staging), model):
        say(line)


def rows_for(source: Path, calibration: CalibrationTextOptions, options: SourceOptions) -> Calibration:
    """Token ids to fit to and to measure on, with the tokenizer of the model itself."""
    tokenizer = load_tokenizer(str(source), trust_remote_code=options.trust_remote_code)
    length, path = min(calibration.calibration_len, _longest(source)), calibration.calibration_path
    if calibration.calibration == "data":
        template = load_template(calibration.prompt_type, tokenizer)
        rows = data_rows(path, OBJECTIVE, template, tokenizer, length, calibration)
    elif path:
        rows = text_rows(texts_of(path, calibration), tokenizer, length)
    else:
        rows = text_rows(tiny_corpus(calibration.seed), tokenizer, length, packed=False)
    held_out: Rows | None = None
    if calibration.eval_path:
        texts = texts_of(calibration.eval_path, calibration)
        held_out = upto(text_rows(texts, tokenizer, length), calibration.eval_samples, length)
    return calibration_of(rows, calibration, held_out)


def write_card_of(directory: Path, source: Path, options: SourceOptions, how: str) -> None:
    """The card of a quantised model: that of its source, and `how` it was quantised."""
    lines = [*lines_of(source / CARD), f"- quantised {how}"]
    write_card(directory, source, options.model_path, "quantized", lines)


def _longest(source: Path) -> int:
    return int(read_json(source / "config.json").get("max_position_embeddings") or 2**20)


def _group(size: int) -> str:
    return "one group a row" if size == -1 else f"groups of {size}"


def _options(directory: Path, options: SourceOptions, bits: Literal[4, 8, 16]) -> ModelOptions:
    return ModelOptions(
        model_path=str(directory), bits=bits, device=options.device, gradient_checkpointing=False,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip


def _before(
    source: Path, names: list[str], settings: GptqOptions, rows: Rows, hardware: Hardware, options: SourceOptions
) -> tuple[QuantizedQuality, QuantizedQuality]:
    """How good the weights are as they are, and the same ones rounded to the nearest."""
    model = load_whole(source, hardware, options, stored_dtype(open_weights(source)))
    whole = measured(model, rows, "16-bit", options)
    round_layers(model, names, settings.bits, settings.group_size, symmetric=settings.sym)
    return whole, measured(model, rows, "plain rounding", options, whole)


def load_whole(source: Path, hardware: Hardware, options: SourceOptions, dtype: torch.dtype) -> Any:
    """The unquantised model, on the card where it fits there and in RAM where it does not."""
    needed = open_weights(source).total_bytes + SPARE_BYTES
    if hardware.is_gpu and free_and_total_bytes(hardware.device)[0] < needed:
        say("the 16-bit model does not fit on the card; it is measured on the CPU, which takes its time")
        hardware = detect("cpu")
    return _load(source, hardware, options, dtype)


def _load(directory: Path, hardware: Hardware, options: SourceOptions, dtype: torch.dtype) -> Any:
    # On a CPU in fp32, which holds 16-bit weights exactly and is the fastest there.
    dtype = dtype if hardware.is_gpu else torch.float32
    return load_base(_options(directory, options, 16), hardware, gptq=True, dtype=dtype).model


def measured(
    model: Any, rows: Rows, what: str, options: SourceOptions, before: QuantizedQuality | None = None
) -> QuantizedQuality:
    """How good a model is on held-out rows, said as it is counted; see `quality_of`."""
    with progress(f"measuring, {what}", len(rows)) as advance:
        return quality_of(model, rows, before, objective=OBJECTIVE, batch_size=options.batch_size, tell=advance)


def say_quality(n_samples: int, whole: QuantizedQuality, made: dict[str, QuantizedQuality]) -> None:
    """Say the perplexities, and how far the predictions went from those of the whole model."""
    words = [f"16-bit {whole.perplexity:.4g}"]
    words += [f"{name} {it.perplexity:.4g} ({it.perplexity / whole.perplexity - 1:+.1%})" for name, it in made.items()]
    say(f"perplexity on {n_samples} held-out samples: {', '.join(words)}")
    apart = [f"{name} {it.divergence:.3g}" for name, it in made.items() if it.divergence is not None]
    if apart:
        say(f"mean KL divergence from the 16-bit predictions, nats per token: {', '.join(apart)} (0: nothing changed)")


def _judge(whole: QuantizedQuality, after: QuantizedQuality, rounded: QuantizedQuality, settings: GptqOptions) -> None:
    # Of the two, only the divergence is no matter of luck: where rounding costs little, the noise that it brings into
    # the weights moves the perplexity up or down by more than the two differ.
    if after.divergence is not None and rounded.divergence is not None and after.divergence > rounded.divergence:
        warn(
            "GPTQ changed the predictions more than rounding to the nearest: the calibration text is too little or "
            "unlike what is measured; give more of it (--calibration_samples, --calibration_path)"
        )
    elif settings.bits >= 4 and after.perplexity > whole.perplexity * (1 + GOOD_SHARE):
        warn(f"perplexity rose by more than {GOOD_SHARE:.0%}; try more text, a smaller --group_size or --desc_act")
