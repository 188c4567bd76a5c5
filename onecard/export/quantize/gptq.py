"""Weights in 2, 3, 4 or 8 bits by GPTQ (https://arxiv.org/abs/2210.17323), in AutoGPTQ's first format.

The only file that imports gptqmodel, and only inside functions. Knows which layers it can take, how its work is kept
layer by layer, and which files it is to leave. Does not know where calibration text comes from (`calibration.py`), how
good the result is (`evaluate.py`) or how it is loaded again (`model/gptq.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers

from onecard.console import first_line, say, warn
from onecard.errors import ConfigError, ModelError, Stopped
from onecard.export.io.left_out import has_own_head
from onecard.export.io.output import progress
from onecard.export.io.weights import Weights, copy_small_files, open_weights
from onecard.export.quantize.bnb import plain_weights, stored_dtype, write_config
from onecard.export.quantize.calibration import Rows
from onecard.export.quantize.options import GROUP_SIZES, GptqOptions, SourceOptions
from onecard.model.files import base_fingerprint, read_json, write_json
from onecard.model.gptq import QUANTIZE_CONFIG, quiet_gptqmodel
from onecard.model.hardware import detect
from onecard.storage import is_disk_full, move

KEPT_BY_LAYER = ("llama", "qwen3_moe")  # the families whose half-done work gptqmodel 7.6 can keep
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NO_LAYERS = ("embed", "lm_head", "wte", "wpe", "norm", "router", "mlp.gate.")
NOW_AT = re.compile(r"Quantizing layer (\d+) of (\d+)")


def check_source(directory: Path, settings: GptqOptions) -> Weights:
    """Look at config and headers before anything is loaded; returns the weights, still on the disk.

    Raises ModelError and ConfigError: a family that gptqmodel does not know, weights that are quantised
    already, layers too small for the bits or the group. Warns of a group that divides a layer's width with a rest.
    """
    weights = plain_weights(directory)
    config = read_json(directory / "config.json")
    family = str(config.get("model_type"))
    if family not in _known_families():
        raise ModelError(f"{directory} is a {family} model, a family that gptqmodel cannot quantise")
    layers = {
        entry.name: entry.shape
        for entry in weights.entries.values()
        if len(entry.shape) == 2 and entry.name.endswith(".weight") and not any(x in entry.name for x in NO_LAYERS)
    }
    _check_shapes(layers, settings)
    if config.get("tie_word_embeddings") and has_own_head(weights, EMBEDDING, HEAD):
        raise ModelError(
            f"{directory}: config.json says that {HEAD} is {EMBEDDING}, but the weights hold another one, which would "
            "be lost; set tie_word_embeddings to false in that config.json and start again"
        )
    return weights


def quantize(source: Path, rows: Rows, settings: GptqOptions, options: SourceOptions, target: Path, kept: Path) -> None:
    """Quantise the model in `source` and write it, with its tokenizer and template, into the directory `target`.

    rows: token ids to fit to. options: device, batch size and shards. kept: a directory that outlives a kill; where the
    family allows, each finished layer lies there and the next start with the same settings goes on behind it.
    gptqmodel's own account is in its log.

    Raises ModelError where gptqmodel fails, with the place of its log.
    """
    device = str(detect(options.device).device)
    if _same_work(kept, source, rows, settings, options.batch_size, device):
        say(f"going on with the layers that an earlier start left in {kept}")
    # Absolute before `_account_in`, inside which the current folder is another one.
    source, target, kept = source.absolute(), target.absolute(), kept.absolute()
    log, written = kept / "gptqmodel.log", target / ".written"
    n_layers = int(read_json(source / "config.json").get("num_hidden_layers", 0))
    try:
        with progress("quantising layers", n_layers) as advance, _account_in(log, advance):
            model = _quantized(source, rows, settings, kept, options.batch_size, device)
            model.save(str(written), max_shard_size=options.max_shard_bytes)
    except torch.OutOfMemoryError as reason:
        raise ModelError(
            f"quantising does not fit on {device}: use a smaller --batch_size or --calibration_len"
        ) from reason
    except (RuntimeError, ValueError, NotImplementedError, KeyError, TypeError, AttributeError) as reason:
        if is_disk_full(reason):
            raise
        raise ModelError(f"gptqmodel cannot quantise {source}: {first_line(reason)} (its log: {log})") from reason
    copy_small_files(source, target)
    for file in sorted(written.iterdir()):
        if file.name.startswith("model") and ".safetensors" in file.name:
            move(file, target / file.name)
    shutil.rmtree(written)
    _write_configs(source, target, settings)


def quantized_layers(directory: Path) -> list[str]:
    """The names of the layers that lie quantised in a GPTQ checkpoint.

    Raises ModelError where there are none, or where a scale is NaN or infinite.
    """
    weights = open_weights(directory)
    names = [name.removesuffix(".qweight") for name in weights.entries if name.endswith(".qweight")]
    if not names:
        raise ModelError(f"{directory} has no quantised layer")
    for name in names:
        if not torch.isfinite(weights.read(f"{name}.scales")).all():
            raise ModelError(f"{directory}: the scales of {name} are not finite; the layer could not be quantised")
    weights.close()
    return names


def _check_shapes(layers: Mapping[str, tuple[int, ...]], settings: GptqOptions) -> None:
    bits, group_size = settings.bits, settings.group_size
    for name, (n_outputs, n_inputs) in layers.items():
        if n_outputs * bits % 32 or n_inputs * bits % 32:
            raise ModelError(
                f"{name} has {n_outputs} outputs and {n_inputs} inputs; {bits}-bit weights are packed into words of 32 "
                f"bits, which do not come out even: the model is too small for --bits {bits}"
            )
        if group_size > n_inputs:
            fits = max((size for size in GROUP_SIZES if size <= n_inputs), default=-1)
            raise ConfigError("--group_size", f"{group_size} is wider than {name} ({n_inputs} inputs); use {fits}")
    uneven = sorted({n_inputs for _, n_inputs in layers.values() if group_size > 0 and n_inputs % group_size})
    if uneven:
        sizes = [size for size in GROUP_SIZES if size > 0 and not any(n % size for _, n in layers.values())]
        advice = f"; --group_size {max(sizes)} comes out even" if sizes else ""
        warn(
            f"--group_size {group_size} leaves a rest in layers with {', '.join(map(str, uneven))} inputs: this "
            f"project and GPTQModel's torch kernel read that, other loaders may refuse it{advice}"
        )


def _known_families() -> list[str]:
    with quiet_gptqmodel():
        from gptqmodel.models.auto import SUPPORTED_MODELS
    return SUPPORTED_MODELS


def _same_work(
    kept: Path, source: Path, rows: Rows, settings: GptqOptions, batch_size: int, device: str
) -> bool:  # fmt: skip
    """Make `kept` ready; what lies there of another model, text or setting is removed. True where work is done."""
    # `symmetric` and this order: work.json of earlier versions, which is compared by its text.
    how = {"symmetric" if name == "sym" else name: value for name, value in asdict(settings).items()}
    work = {**how, "batch_size": batch_size, "device": device, "source": base_fingerprint(str(source)),
            "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}  # fmt: skip
    note = kept / "work.json"
    is_same = note.is_file() and note.read_text(encoding="utf-8") == json.dumps(work)
    if not is_same and kept.exists():
        shutil.rmtree(kept)
    kept.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(work), encoding="utf-8")
    return is_same and (kept / "layers" / "CURRENT").is_file()


class _ProgressLog(io.TextIOBase):
    """What gptqmodel prints, into a file; moves a bar on where it names the layer that it is at.

    Its threads may still speak when the file is closed already; nobody reads that.
    """

    def __init__(self, file: TextIO, advance: Callable[[int], Any]) -> None:
        self._file, self._advance, self._at = file, advance, 0

    def write(self, text: str) -> int:
        if not self._file.closed:
            self._file.write(text)
        for number, _ in NOW_AT.findall(text):
            self._advance(max(0, int(number) - self._at))
            self._at = max(self._at, int(number))
        return len(text)


@contextmanager
def _account_in(log: Path, advance: Callable[[int], Any]) -> Iterator[None]:
    """Keep what gptqmodel and its company print and log off the terminal and the current folder, beside `log`."""
    speakers = [logging.getLogger(name) for name in ("logbar", "tokenicer.tokenicer")]
    levels = [speaker.level for speaker in speakers]
    transformers.utils.logging.disable_progress_bar()
    here = Path.cwd()
    with log.open("a", encoding="utf-8") as file, quiet_gptqmodel(), redirect_stdout(_ProgressLog(file, advance)):
        # gptqmodel keeps a second log in "logs" of the current folder and has no setting for it.
        os.chdir(log.parent)
        for speaker, level in zip(speakers, (logging.INFO, logging.WARNING), strict=True):
            speaker.setLevel(level)
        try:
            yield
        finally:
            os.chdir(here)
            for speaker, level in zip(speakers, levels, strict=True):
                speaker.setLevel(level)


def _quantized(source: Path, rows: Rows, settings: GptqOptions, kept: Path, batch_size: int, device: str) -> Any:
    """gptqmodel's model with its layers quantised."""
    from gptqmodel import CheckpointConfig, GPTQModel, QuantizeConfig
    from gptqmodel.looper.checkpoint import CheckpointStopped
    from gptqmodel.looper.checkpoint_store import CheckpointError

    config = read_json(source / "config.json")
    # It syncs directories in a way that Windows does not have.
    keeps = config.get("model_type") in KEPT_BY_LAYER and sys.platform != "win32"
    keeps = keeps and not any(source.glob("*.bin"))
    data = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()} for row in rows]
    for attempt in (1, 2):
        model = GPTQModel.load(
            str(source),
            QuantizeConfig(
                bits=settings.bits, group_size=settings.group_size, desc_act=settings.desc_act, sym=settings.sym,
                damp_percent=settings.damp_percent,
                act_group_aware=settings.group_size > 0 and not settings.desc_act,
                offload_to_disk=True, offload_to_disk_path=str(kept / "offload"),
            ),
            device=device, dtype=stored_dtype(open_weights(source)),
        )  # fmt: skip
        checkpoint = CheckpointConfig(path=str(kept / "layers")) if keeps else None
        try:
            model.quantize(data, batch_size=batch_size, calibration_data_min_length=1, checkpoint=checkpoint)
            break
        except CheckpointStopped as reason:  # Ctrl-C or SIGTERM, which gptqmodel takes at the end of a layer
            raise Stopped(f"stopped; the layers done are in {kept}, the same command goes on there", 130) from reason
        except CheckpointError:
            if attempt == 2:
                raise
            shutil.rmtree(kept / "layers")
    return model


def _write_configs(source: Path, target: Path, settings: GptqOptions) -> None:
    """config.json and quantize_config.json, both with the same account, without paths of this machine."""
    import gptqmodel

    stored = {
        "bits": settings.bits, "group_size": settings.group_size, "desc_act": settings.desc_act,
        "sym": settings.sym, "damp_percent": settings.damp_percent, "static_groups": False,
        "true_sequential": True, "lm_head": False, "quant_method": "gptq", "checkpoint_format": "gptq",
        "pack_dtype": "int32", "meta": {"quantizer": [f"gptqmodel:{gptqmodel.__version__}"]},
    }  # fmt: skip
    write_config(source, target, stored_dtype(open_weights(source)), stored)
    write_json(target / QUANTIZE_CONFIG, stored)
