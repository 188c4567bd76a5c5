"""From a base, a merged model or base + adapter to a quantised directory, and what that cost.

Knows the order of the work and what is told. How weights are quantised is `gptq.py` and `bnb.py`, what they are fitted
to `calibration.py`, how good they are `evaluate.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from onecard.config.base_model import ModelOptions
from onecard.config.data import ReadingOptions
from onecard.config.parsing import comma_list
from onecard.console import say, warn
from onecard.data.chat_template import load_template
from onecard.errors import ConfigError
from onecard.export.io.base import build_skeleton
from onecard.export.io.left_out import check_quantised
from onecard.export.io.model_card import CARD, lines_of, write_card
from onecard.export.io.output import new_directory, progress
from onecard.export.io.weights import open_weights
from onecard.export.merge.merge import MergeSettings, find_base, merge_into
from onecard.export.quantize.bnb import check_same_weights, plain_weights, save_quantized, stored_dtype
from onecard.export.quantize.calibration import (
    Calibration,
    CalibrationOptions,
    Rows,
    calibration_of,
    data_rows,
    text_rows,
    texts_of,
    upto,
)
from onecard.export.quantize.evaluate import QuantizedQuality, quality_of, round_layers
from onecard.export.quantize.gptq import GptqSettings, check_source, quantize, quantized_layers
from onecard.export.quantize.options import CalibrationTextOptions, SourceOptions
from onecard.installation import command
from onecard.model.files import locate, read_json
from onecard.model.gptq import check_gptq_installed
from onecard.model.hardware import Hardware, detect, free_and_total_bytes
from onecard.model.load import load_base, load_tokenizer
from onecard.objectives.registry import objective_named

OBJECTIVE = objective_named("documents")  # of fitting and measuring: a model is to predict each token as before
GOOD_SHARE = 0.04  # a 4-bit model whose perplexity rises by more has lost something that one notices
SPARE_BYTES = int(1.5 * 2**30)  # what a forward takes beside the weights


@dataclass(frozen=True)
class QuantizeRequest:
    """Which model, and where the result goes. Without `adapters` the model is taken as it is."""

    base: str
    adapters: tuple[str, ...]
    target: Path
    overwrite: bool = False
    max_shard_bytes: int = 5 * 10**9
    device: str = "auto"
    batch_size: int = 4
    trust_remote_code: bool = False
    accept_other_base: bool = False

    @property
    def inputs(self) -> list[Path]:
        """The directories that are read."""
        return [path for path in map(Path, (self.base, *self.adapters)) if path.exists()]


@dataclass(frozen=True)
class TextSource:
    """What to fit to and to measure on: `texts` as plain text, or training data through a template.

    packed: the texts follow one another in rows of full length. `held_out`: texts to measure on; None: some of the
    texts are kept back for that. `reading`: how the training data are read.
    """

    texts: Callable[[], Iterable[str]] | None
    data_path: str = ""
    prompt_type: str = "auto"
    packed: bool = True
    held_out: Callable[[], Iterable[str]] | None = None
    name: str = "the calibration text"
    reading: ReadingOptions | None = None


def request_of(options: SourceOptions) -> QuantizeRequest:
    """What the shared options of the tools ask for. Raises ConfigError: no base named, a size that is none."""
    adapters = comma_list(options.lora_path)
    base = find_base(options.model_path or "auto", adapters[0]) if adapters else options.model_path
    return QuantizeRequest(
        base, tuple(adapters), Path(options.output_path), options.overwrite,
        options.max_shard_bytes, options.device, options.batch_size,
        options.trust_remote_code, options.accept_other_base,
    )  # fmt: skip


def text_source_of(options: CalibrationTextOptions, embedded: Callable[[], Iterable[str]]) -> TextSource:
    """The text that the options name; `embedded` is taken where they name none, each text in a row of its own."""
    path = options.calibration_path
    held_out = (lambda: texts_of(options.eval_path, options)) if options.eval_path else None
    if options.calibration == "data":
        return TextSource(None, path, options.prompt_type, held_out=held_out, reading=options)
    if path:
        return TextSource(lambda: texts_of(path, options), held_out=held_out)
    return TextSource(embedded, packed=False, held_out=held_out)


@contextmanager
def whole_model(request: QuantizeRequest, staging: Path) -> Iterator[Path]:
    """The directory of the model to quantise; base and adapter are merged into a hidden folder that goes again."""
    if not request.adapters:
        yield locate(request.base, with_code=request.trust_remote_code)
        return
    folder = staging / ".merged"
    folder.mkdir()
    # In 16 bits, as every quantiser loads it; what was learned is in them on the mean, and that is measured here.
    settings = MergeSettings(accept_other_base=request.accept_other_base, trust_remote_code=request.trust_remote_code)
    report = merge_into(folder, request.base, request.adapters, settings)
    for note in report.notes:
        warn(note)
    say(f"merged {len(report.adapters)} adapter(s) into {request.base}, in {report.dtype}: {report.proof}")
    yield folder
    shutil.rmtree(folder)


def export_gptq(
    request: QuantizeRequest, settings: GptqSettings, corpus: TextSource, amount: CalibrationOptions
) -> None:
    """Write a GPTQ checkpoint, prove that it loads, and say what it costs on held-out text.

    Raises ConfigError, ModelError and DataError, each before the long work wherever that can be.
    """
    check_gptq_installed(command("quantize-gptq"), "writes GPTQ weights")
    hardware = detect(request.device)
    kept = request.target.expanduser().absolute()
    kept = kept.with_name(f".{kept.name}.layers")
    with new_directory(request.target, overwrite=request.overwrite, inputs=request.inputs) as staging:
        with whole_model(request, staging) as source:
            before = check_source(source, settings)
            text = rows_for(source, corpus, amount, request)
            say(f"fitting to {text.n_tokens:,} tokens in {len(text.rows)} samples, on {hardware.name}")
            quantize(source, text.rows, settings, staging, kept, request.max_shard_bytes)
            write_card_of(staging, source, request, f"to {settings.bits} bits with GPTQ, {_group(settings.group_size)}")
            names = quantized_layers(staging)
            check_whole(source, staging, request)
            whole, rounded = _before(source, names, settings, text.held_out, hardware, request)
        model = _load(staging, hardware, request, stored_dtype(before))
        after = measured(model, text.held_out, "GPTQ", request, whole)
        n_after = open_weights(staging).total_bytes
    shutil.rmtree(kept, ignore_errors=True)
    say(
        f"quantised {len(names)} layers to {settings.bits} bits, {_group(settings.group_size)}: "
        f"{before.total_bytes / 2**20:,.1f} MiB -> {n_after / 2**20:,.1f} MiB in {request.target}"
    )
    say_quality(len(text.held_out), whole, {"GPTQ": after, "plain rounding": rounded})
    _judge(whole, after, rounded, settings)


def export_bnb(request: QuantizeRequest, bits: Literal[4, 8], corpus: TextSource, amount: CalibrationOptions) -> None:
    """Write a bitsandbytes checkpoint, prove that it comes back bit by bit, and say what it costs."""
    hardware = detect(request.device)
    with new_directory(request.target, overwrite=request.overwrite, inputs=request.inputs) as staging:
        with whole_model(request, staging) as source:
            before = plain_weights(source)
            dtype = stored_dtype(before)
            tokenizer = load_tokenizer(str(source), trust_remote_code=request.trust_remote_code)
            length = min(amount.length, _longest(source))
            texts = corpus.texts() if corpus.texts is not None else ()
            rows = text_rows(texts, tokenizer, length, packed=corpus.packed)
            held_out = list(islice((row for row in rows if len(row) > 1), amount.n_held_out))
            if not held_out:
                raise ConfigError("--eval_path", f"{corpus.name} holds no text to measure on; give more of it")
            n_tokens = sum(map(len, held_out))
            say(f"measuring on {len(held_out)} samples of {corpus.name}, {n_tokens:,} tokens")
            whole = measured(load_whole(source, hardware, request, dtype), held_out, "16-bit", request)
            save_quantized(_options(source, request, bits), hardware, source, staging, request.max_shard_bytes)
            write_card_of(staging, source, request, f"to {bits} bits with bitsandbytes")
            check_whole(source, staging, request)
        model = load_base(_options(staging, request, bits), hardware).model
        n_layers = check_same_weights(model, staging)
        after = measured(model, held_out, f"{bits}-bit", request, whole)
        n_after = open_weights(staging).total_bytes
    say(
        f"saved {n_layers} layers in {bits} bits: {before.total_bytes / 2**20:,.1f} MiB -> {n_after / 2**20:,.1f} MiB "
        f"in {request.target}; read back, every quantised weight is the same bit by bit"
    )
    say_quality(len(held_out), whole, {f"{bits}-bit": after})
    say(f"load it with --bits {bits}")


def check_whole(source: Path, staging: Path, request: QuantizeRequest) -> None:
    """Compare all tensors with the source, and say what was left out and why. Raises as `check_quantised` does."""
    model = build_skeleton(source, trust_remote_code=request.trust_remote_code)
    for line in check_quantised(open_weights(source), open_weights(staging), model):
        say(line)


def rows_for(source: Path, corpus: TextSource, amount: CalibrationOptions, request: QuantizeRequest) -> Calibration:
    """Token ids to fit to and to measure on, with the tokenizer of the model itself."""
    tokenizer = load_tokenizer(str(source), trust_remote_code=request.trust_remote_code)
    length = min(amount.length, _longest(source))
    if corpus.texts is None:
        template = load_template(corpus.prompt_type, tokenizer)
        rows: Iterator[list[int]] = data_rows(corpus.data_path, OBJECTIVE, template, tokenizer, length, corpus.reading)
    else:
        rows = text_rows(corpus.texts(), tokenizer, length, packed=corpus.packed)
    held_out: Rows | None = None
    if corpus.held_out is not None:
        held_out = upto(text_rows(corpus.held_out(), tokenizer, length), amount.n_held_out, length)
    return calibration_of(rows, amount, held_out)


def write_card_of(directory: Path, source: Path, request: QuantizeRequest, how: str) -> None:
    """The card of a quantised model: that of its source, and `how` it was quantised."""
    lines = [*lines_of(source / CARD), f"- quantised {how}"]
    write_card(directory, source, request.base, "quantized", lines)


def _longest(source: Path) -> int:
    return int(read_json(source / "config.json").get("max_position_embeddings") or 2**20)


def _group(size: int) -> str:
    return "one group a row" if size == -1 else f"groups of {size}"


def _options(directory: Path, request: QuantizeRequest, bits: Literal[4, 8, 16]) -> ModelOptions:
    return ModelOptions(
        model_path=str(directory), bits=bits, device=request.device, gradient_checkpointing=False,
        trust_remote_code=request.trust_remote_code,
    )  # fmt: skip


def _before(
    source: Path, names: list[str], settings: GptqSettings, rows: Rows, hardware: Hardware, request: QuantizeRequest
) -> tuple[QuantizedQuality, QuantizedQuality]:
    """How good the weights are as they are, and the same ones rounded to the nearest."""
    model = load_whole(source, hardware, request, stored_dtype(open_weights(source)))
    whole = measured(model, rows, "16-bit", request)
    round_layers(model, names, settings.bits, settings.group_size, symmetric=settings.symmetric)
    return whole, measured(model, rows, "plain rounding", request, whole)


def load_whole(source: Path, hardware: Hardware, request: QuantizeRequest, dtype: torch.dtype) -> Any:
    """The unquantised model, on the card where it fits there and in RAM where it does not."""
    needed = open_weights(source).total_bytes + SPARE_BYTES
    if hardware.is_gpu and free_and_total_bytes(hardware.device)[0] < needed:
        say("the 16-bit model does not fit on the card; it is measured on the CPU, which takes its time")
        hardware = detect("cpu")
    return _load(source, hardware, request, dtype)


def _load(directory: Path, hardware: Hardware, request: QuantizeRequest, dtype: torch.dtype) -> Any:
    # On a CPU in fp32, which holds 16-bit weights exactly and is the fastest there.
    dtype = dtype if hardware.is_gpu else torch.float32
    return load_base(_options(directory, request, 16), hardware, gptq=True, dtype=dtype).model


def measured(
    model: Any, rows: Rows, what: str, request: QuantizeRequest, before: QuantizedQuality | None = None
) -> QuantizedQuality:
    """How good a model is on held-out rows, said as it is counted; see `quality_of`."""
    with progress(f"measuring, {what}", len(rows)) as advance:
        return quality_of(model, rows, before, objective=OBJECTIVE, batch_size=request.batch_size, tell=advance)


def say_quality(n_samples: int, whole: QuantizedQuality, made: dict[str, QuantizedQuality]) -> None:
    """Say the perplexities, and how far the predictions went from those of the whole model."""
    words = [f"16-bit {whole.perplexity:.4g}"]
    words += [f"{name} {it.perplexity:.4g} ({it.perplexity / whole.perplexity - 1:+.1%})" for name, it in made.items()]
    say(f"perplexity on {n_samples} held-out samples: {', '.join(words)}")
    apart = [f"{name} {it.divergence:.3g}" for name, it in made.items() if it.divergence is not None]
    if apart:
        say(f"mean KL divergence from the 16-bit predictions, nats per token: {', '.join(apart)} (0: nothing changed)")


def _judge(whole: QuantizedQuality, after: QuantizedQuality, rounded: QuantizedQuality, settings: GptqSettings) -> None:
    # Of the two, only the divergence is no matter of luck: where rounding costs little, the noise that it brings into
    # the weights moves the perplexity up or down by more than the two differ.
    if after.divergence is not None and rounded.divergence is not None and after.divergence > rounded.divergence:
        warn(
            "GPTQ changed the predictions more than rounding to the nearest: the calibration text is too little or "
            "unlike what is measured; give more of it (--calibration_samples, --calibration_path)"
        )
    elif settings.bits >= 4 and after.perplexity > whole.perplexity * (1 + GOOD_SHARE):
        warn(f"perplexity rose by more than {GOOD_SHARE:.0%}; try more text, a smaller --group_size or --desc_act")
