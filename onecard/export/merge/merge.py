"""Adapters merged into their base: a whole Hugging Face directory, written layer by layer.

https://arxiv.org/abs/2106.09685 section 4.1: W + B A * scale; peft's own merge does it for every variant, in fp32, and
the result is rounded once. Knows files, dtypes, tied heads, tokenizers and which base an adapter belongs to. Does not
know how one layer is merged (`lora_stack.py`) and rounded (`rounding.py`), or how the result is proven (`verify.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from onecard.console import say
from onecard.errors import ConfigError, ModelError
from onecard.export.io.base import LazyCheckpoint, open_base
from onecard.export.io.model_card import adapter_lines, write_card
from onecard.export.io.output import new_directory, progress
from onecard.export.io.weights import ShardWriter, checksum, copy_small_files
from onecard.export.merge.forward import units_of
from onecard.export.merge.lora_stack import LoadedLora, LoraStack, adapt
from onecard.export.merge.options import MergeSettings
from onecard.export.merge.rounding import DTYPES, NAMES, DoesNotFit
from onecard.export.merge.tensors import LayerMerger, MergeReport
from onecard.export.merge.verify import Predictions, predict_while_merging, probe_prompts, verify_merge
from onecard.model.files import base_fingerprint, locate, write_json
from onecard.model.load import TOKENIZER_FILES, load_tokenizer
from onecard.model.lora.formats import base_of_adapter, kept_fingerprint, other_base, read_adapter, scaling_of_adapters

TEMPLATE = "chat_template.jinja"
TOKENIZER_AND_TEMPLATE = (
    *TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.json", TEMPLATE
)  # fmt: skip
PROGRAM_BYTES = int(0.7 * 2**30)  # Python with torch, transformers and peft


def merge_into(
    directory: Path, base: str, adapters: Sequence[str], settings: MergeSettings | None = None, *,
    stored: LazyCheckpoint | None = None,
) -> MergeReport:  # fmt: skip
    """Write base + adapters, in their order, as a Hugging Face model into an existing empty `directory`.

    The base is read once, one layer at a time has weights, in fp32; about one shard read and one being written are in
    memory. With `settings.verify` the predictions are compared meanwhile, and the result is read back and compared
    before this returns. dtype auto begins in fp16 and again, in bf16, at the first layer that does not fit.

    stored: the base, where it is open already.

    Raises ModelError and ConfigError: an adapter that does not fit or was trained on another base, a quantised base,
    values that overflow in fp16, NaN, files missing or damaged, a result that does not agree with the adapters.
    """
    if not adapters:
        raise ConfigError("--lora_path", "names no adapter; there is nothing to merge")
    settings = settings or MergeSettings()
    stored = stored or _open(base, adapters, settings)
    dtypes, notes = target_dtypes(settings.dtype), list[str]()
    for dtype in dtypes[:-1]:
        try:
            return _merge_as(dtype, directory, base, stored, adapters, settings)
        except DoesNotFit as reason:
            notes.append(f"{reason}; the result is stored in {NAMES[dtypes[-1]]}, whose steps are 8 times as coarse")
            say(notes[0])
        for path in directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = _merge_as(dtypes[-1], directory, base, stored, adapters, settings)
    report.notes[:0] = notes
    return report


def _open(base: str, adapters: Sequence[str], settings: MergeSettings) -> LazyCheckpoint:
    """The base with the positions that its adapters were trained with."""
    scaling = scaling_of_adapters(adapters)
    return open_base(base, trust_remote_code=settings.trust_remote_code, rope_scaling=scaling)


def _merge_as(
    dtype: torch.dtype,
    directory: Path,
    base: str,
    stored: LazyCheckpoint,
    adapters: Sequence[str],
    settings: MergeSettings,
) -> MergeReport:
    adapted = adapt(stored, adapters, settings.adapter_scale)
    report = MergeReport(directory, NAMES[dtype], list(adapters), is_tied=stored.is_tied)
    for stage in adapted.stages:
        report.notes += [*stage.notes, *check_same_base(stage, base, accept=settings.accept_other_base)]
    copy_small_files(stored.directory, directory)
    report.notes += _write_tokenizer(adapted, directory)
    prompts = probe_prompts(directory, adapted.rows, stored) if settings.verify else []
    say(
        f"merging {len(adapters)} adapter(s) into {len(adapted.targets)} layers of {base}, in {report.dtype}; this "
        f"takes about {ram_bytes(adapted, settings, prompts) / 2**30:.1f} GiB of RAM"
    )
    must_fit = settings.dtype == "auto" and dtype == torch.float16
    found = _write_weights(adapted, dtype, settings, report, prompts, must_fit_fp16=must_fit)
    _write_config(adapted, dtype, directory, is_tied=report.is_tied)
    made_of = [adapter_lines(name, stage.files.directory) for name, stage in zip(adapters, adapted.stages, strict=True)]
    scaled = [f"- adapter_scale {settings.adapter_scale:g}"] * (settings.adapter_scale != 1)
    lines = [*chain.from_iterable(made_of), *scaled, f"- merged in {report.dtype}"]
    write_card(directory, stored.directory, base, "finetune", lines)
    if stored.rope_scaling != "none":
        say(f"config.json holds the positions of --rope_scaling {stored.rope_scaling}")
    if adapted.rows != stored.rows:
        report.notes.append(f"the vocabulary has {adapted.rows} rows now; the base has {stored.rows}")
    if stored.unties:
        report.notes.append(
            "config.json of the base says that embeddings and head share their weight, but its files hold two "
            "different ones: both are kept, as transformers loads them, and tie_word_embeddings is false now"
        )
    if stored.is_tied and not report.is_tied:
        report.notes.append(
            "embeddings and head share their weight in the base, and the adapter changed one of them alone: the result "
            "stores both (tie_word_embeddings is false), which keeps every logit"
        )
    if len(report.unchanged) == report.n_targets:
        raise ModelError(
            f"merging changed none of {report.n_targets} layers: the adapter was never trained, or all it does is lost "
            f"in {report.dtype}"
        )
    if settings.verify:
        report.proof = verify_merge(directory, adapted, adapters, prompts, found, report, must_fit_fp16=must_fit)
    return report


def find_base(model_path: str, adapter: str) -> str:
    """The base to merge into; "auto" is the one that the adapter names. Raises ConfigError where it names none."""
    if model_path != "auto":
        return model_path
    named = base_of_adapter(adapter)
    if named is None:
        read_adapter(adapter)  # what is no adapter at all is told as that
        raise ConfigError("--model_path", f"is needed: the adapter {adapter} does not name its base model")
    try:
        locate(named)
    except ModelError as reason:
        raise ConfigError("--model_path", f"is needed: {adapter} names a base that cannot be had: {reason}") from reason
    return named


def target_dtypes(wanted: str) -> list[torch.dtype]:
    """The dtypes to try for the result, the preferred one first. Raises ConfigError for a name that is none."""
    if wanted == "auto":
        return [torch.float16, torch.bfloat16]
    if wanted not in DTYPES:
        raise ConfigError("--dtype", f"{wanted!r} is none of auto, {', '.join(DTYPES)}")
    return [DTYPES[wanted]]


def ram_bytes(adapted: LoraStack, settings: MergeSettings, prompts: list[list[int]]) -> int:
    """About what merging takes: a shard read (its pages count), one written and its copy on the way, the adapters,
    the largest layer in fp32, and three times the logits."""
    weights = adapted.base.weights
    shard = min(settings.max_shard_bytes, weights.total_bytes)
    held = sum(tensor.nbytes for stage in adapted.stages for tensor in stage.files.tensors.values())
    layer = max(sum(p.numel() for p in unit.parameters()) for unit in units_of(adapted.base.skeleton).values())
    logits = 3 * adapted.rows * sum(map(len, prompts))
    return PROGRAM_BYTES + weights.largest_file_bytes + shard + held + 4 * (layer + logits)


def check_same_base(stage: LoadedLora, base: str, *, accept: bool) -> list[str]:
    """Compare the base's fingerprint with the one that the adapter's run kept; returns what could not be checked.

    Raises ModelError for another base, unless that is accepted.
    """
    directory = stage.files.directory
    if kept_fingerprint(directory) is None:
        return [f"{directory} keeps no fingerprint of its base, so it could not be checked that this is it"]
    other = other_base(directory, base, base_fingerprint(base))
    if other is None:
        return []
    if accept:
        return [f"{other}; accepted"]
    raise ModelError(
        f"{other}. Give that base; or, if this is the same model in another form (other shards, another dtype, an "
        "adapter before this one merged in), add --accept_other_base"
    )


def export_merged(
    target: Path,
    base: str,
    adapters: Sequence[str],
    settings: MergeSettings,
    *,
    file_format: str = "hf",
    overwrite: bool = False,
) -> MergeReport:
    """`merge_into` a directory that gets its name only when everything is written and proven.

    `file_format` hf: a Hugging Face directory; pth: consolidated.0x.pth and params.json, as LLaMA was published.
    Raises as `merge_into` and `output.new_directory` do.
    """
    stored = _open(base, adapters, settings)
    itemsize = target_dtypes(settings.dtype)[0].itemsize
    n_bytes = sum(entry.n_bytes // entry.dtype.itemsize * itemsize for entry in stored.weights.entries.values())
    inputs = [stored.directory, *(Path(adapter).expanduser() for adapter in adapters)]
    copies = 2 if file_format == "pth" else 1
    with new_directory(target, overwrite=overwrite, inputs=inputs, needed_bytes=copies * n_bytes) as partial:
        if file_format == "hf":
            return merge_into(partial, base, adapters, settings, stored=stored)
        from onecard.export.llama_pth.pth import hf_to_pth

        between = partial / ".hf"
        between.mkdir()
        report = merge_into(between, base, adapters, settings, stored=stored)
        report.files_proof = "; ".join(hf_to_pth(between, partial))
        shutil.rmtree(between)
    return report


def _write_weights(
    adapted: LoraStack, dtype: torch.dtype, settings: MergeSettings, report: MergeReport, prompts: list[list[int]], *,
    must_fit_fp16: bool,
) -> Predictions | None:  # fmt: skip
    """Write every tensor of the base, the merged ones in their place; returns what base and result predict meanwhile.

    None without prompts, and for a base that transformers stores in another form than it runs (experts one by one).
    """
    writer, weights = ShardWriter(report.directory, settings.max_shard_bytes), adapted.base.weights
    with progress("merging", weights.total_bytes, in_bytes=True) as move_on:

        def write(name: str, tensor: Tensor) -> None:
            writer.add(name, tensor)
            report.checksums[name] = checksum(tensor)
            report.n_tensors += 1
            move_on(weights.entries[name].n_bytes if name in weights.entries else 0)

        merger, found = LayerMerger(adapted, dtype, report, write, strict=settings.dtype == "auto"), None
        if prompts and not adapted.base.unknown_names():
            found = predict_while_merging(merger, prompts, must_fit_fp16=must_fit_fp16)
        merger.finish()
    report.total_bytes = sum(file.stat().st_size for file in writer.finish())
    return found


def _write_config(adapted: LoraStack, dtype: torch.dtype, directory: Path, *, is_tied: bool) -> None:
    """Write the base's config.json with the new dtype, rows of vocabulary and tying."""
    base = adapted.base
    config = json.loads(json.dumps(base.config))
    parts = [config, *(config[name] for name in ("text_config",) if isinstance(config.get(name), dict))]
    for part in parts:
        dtype_keys = [key for key in ("dtype", "torch_dtype") if key in part] or (["dtype"] if part is config else [])
        part |= dict.fromkeys(dtype_keys, str(dtype).removeprefix("torch."))
        part |= {"vocab_size": adapted.rows} if "vocab_size" in part else {}
        part |= {"tie_word_embeddings": False} if (base.is_tied or base.unties) and not is_tied else {}
    write_json(directory / "config.json", config)


def _write_tokenizer(adapted: LoraStack, directory: Path) -> list[str]:
    """Put the last adapter's tokenizer and template in place of the base's, where its run keeps them."""
    source = adapted.stages[-1].files.directory
    places = [source, source.parent] if source.name.startswith("checkpoint-") else [source]
    run = next((place for place in places if list(_matching(place, TOKENIZER_FILES))), None)
    if run is not None:
        kept = _still_true(adapted, directory, run)
        for file in _matching(directory, TOKENIZER_AND_TEMPLATE):
            if file.name != TEMPLATE and file.name not in kept:
                file.unlink()
    for place in reversed(places):
        for file in _matching(place, TOKENIZER_AND_TEMPLATE if place == run else (TEMPLATE,)):
            shutil.copyfile(file, directory / file.name)
    if not list(_matching(directory, TOKENIZER_FILES)):
        return ["neither the run nor the base holds a tokenizer; copy one into the result before you use it"]
    return _check_vocabulary(adapted, directory, run)


def _still_true(adapted: LoraStack, directory: Path, run: Path) -> list[str]:
    """Files of the base's tokenizer that the run lacks and that tell the same: tokenizer.model, in most cases.

    A run that transformers 5 wrote holds tokenizer.json alone, but llama.cpp and Meta's programs read the other one.
    Kept while both tokenizers give the same tokens the same ids; `directory` holds the base's files at this moment.
    """
    lacking = [file.name for file in _matching(directory, ("*.model", "*.tiktoken")) if not (run / file.name).is_file()]
    original = adapted.base.directory / "original" / "tokenizer.model"  # where LLaMA-3 keeps Meta's own
    if not list(_matching(directory, TOKENIZER_FILES)) or not (lacking or original.is_file()):
        return []
    one, other = (
        load_tokenizer(str(place), trust_remote_code=adapted.base.trust_remote_code).get_vocab()
        for place in (adapted.base.directory, run)
    )
    if one != other:
        return []
    if original.is_file():
        (directory / "original").mkdir()
        shutil.copyfile(original, directory / "original" / original.name)
    return lacking


def _matching(directory: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for pattern in dict.fromkeys(patterns):
        yield from sorted(directory.glob(pattern))


def _check_vocabulary(adapted: LoraStack, directory: Path, run: Path | None) -> list[str]:
    tokenizer = load_tokenizer(str(directory), trust_remote_code=adapted.base.trust_remote_code)
    n_tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if n_tokens <= adapted.rows:
        return []
    counts = f"the tokenizer of {run or adapted.base.directory} has {n_tokens} tokens, the model {adapted.rows} rows"
    if run is None:
        return [f"{counts}: the last ones cannot be used, as in the base"]
    raise ModelError(
        f"{counts}: tokens were added, and neither the base nor an adapter holds rows for them; merge into the base "
        "with the grown vocabulary that the adapter was trained on"
    )
