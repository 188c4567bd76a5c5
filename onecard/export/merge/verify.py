"""Proof that a merged model is its base with the adapters: by names, by values, and by predictions on probe prompts.

Every tensor must read back as it was merged, and what the adapters change in the predictions must be kept. The logits
are computed layer by layer, each layer's weights read when it is due, so no model is in memory whole, and in fp32 for
all sides alike: what is measured is the rounding of the merged weights. Does not know how they were merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from onecard.console import first_line
from onecard.data.chat_template import load_template, own_chat_template
from onecard.data.messages import Turn
from onecard.data.tokenization import segment_tokenizer
from onecard.errors import DataError, ModelError
from onecard.export.io.base import LazyCheckpoint, open_base
from onecard.export.io.left_out import TABLES
from onecard.export.io.output import progress
from onecard.export.io.weights import checksum
from onecard.export.merge.effect import AdapterEffect, effect_of
from onecard.export.merge.lora_stack import LoraStack, adapt, empty, fill, plain_name
from onecard.export.merge.rounding import DoesNotFit, is_finite
from onecard.export.merge.tensors import MergeReport
from onecard.installation import command
from onecard.model.load import load_tokenizer
from onecard.model.lora.adapter import load_adapter

# Half of what fp16 holds: other texts than the probe prompts reach further.
NOISE = 1e-9  # nats per token that fp32 arithmetic alone moves
LARGEST_ACTIVATION = 0.5 * 65504
QUESTIONS = ("What is the capital of France?", "把下面的句子翻译成英文：你好，世界。")
TEXTS = ("The quick brown fox jumps over the lazy dog, 7 + 2 = 9.", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。")
PROMPT_TOKENS = 64
SPREAD_IDS = 32

ReadLayer = Callable[[str], dict[str, Tensor]]


@dataclass(frozen=True)
class Predictions:
    """Logits of the same prompts: base + adapters, the base alone (None where it lacks a token's row), and merged."""

    adapted: list[Tensor]
    base: Sequence[Tensor | None]
    merged: list[Tensor]
    largest: float
    """The largest absolute value between the layers of the merged model."""
    sums: list[Tensor] = field(default_factory=list)
    """Logits of the exact sums, where the models were in memory whole."""


def verify_merge(
    directory: Path, base: LazyCheckpoint, adapters: Sequence[str], report: MergeReport, *, needs_fp16: bool = False
) -> str:
    """Reopen a merged model and compare it with base and adapters; returns one line that says what was proven.

    Raises ModelError: names missing or new, a tensor other than it was merged, NaN, an effect of the adapters that is
    lost by more than the rounding; DoesNotFit with `needs_fp16` for a model that computes larger numbers than fp16 has.
    """
    merged, adapted = open_base(str(directory), trust_remote_code=base.trust_remote_code), adapt(base, adapters)
    _compare_names(base, merged)
    n_finite = _check_values(merged, report)
    prompts = probe_prompts(directory, adapted.rows, base)
    is_streamed = not base.unknown_names()
    compute = _streamed_predictions if is_streamed else _whole_predictions
    found = compute(adapted, merged, adapters, prompts)
    if needs_fp16 and report.dtype == "fp16" and found.largest > LARGEST_ACTIVATION:
        raise DoesNotFit(
            f"this model computes numbers up to {found.largest:.3g} on the probe prompts, and fp16 ends at 65504"
        )
    effect = effect_of(found.adapted, found.base, found.merged)
    told = f"on {len(prompts)} probe prompts {effect}"
    if not effect.is_whole:
        told += _cause(adapted, merged, adapters, prompts, found, effect, report, is_streamed=is_streamed)
    n_changed = report.n_targets - len(report.unchanged)
    how = "layer by layer from the disk" if is_streamed else "one whole model after the other"
    return (
        f"proven on the reopened files: {n_changed} of {report.n_targets} target layers changed, {n_finite} tensors "
        f"finite and as merged, names as in the base; {told} (computed in float32, {how})"
    )


def _cause(
    adapted: LoraStack, merged: LazyCheckpoint, adapters: Sequence[str], prompts: list[list[int]], found: Predictions,
    effect: AdapterEffect, report: MergeReport, *, is_streamed: bool,
) -> str:  # fmt: skip
    """Why the effect is not whole: the rounding, where the sums before it keep it. Raises ModelError where not."""
    exact = _logits_of(merged.skeleton, _reader(adapted, adapted.merged), prompts)[0] if is_streamed else found.sums
    before = effect_of(found.adapted, found.base, exact)
    if not math.isfinite(effect.apart) or not (before.is_whole or before.apart <= NOISE):
        raise ModelError(
            f"the merged model does not agree with its adapters: {effect}; before rounding, {before.kept:.1%}. It was "
            "not kept; report this with the adapter's adapter_config.json, or keep it as it is by "
            f"{command('merge')} --verify false"
        )
    return f"; the rest is lost to the rounding to {report.dtype} ({command('merge')} --dtype fp32 loses nothing)"


def probe_prompts(directory: Path, rows: int, base: LazyCheckpoint) -> list[list[int]]:
    """Token ids to compare logits on, at most 64 each, in English and in Chinese.

    Questions through the stored template, plain text, ids from all over the vocabulary, and its last ones, among which
    added tokens are.
    """
    spread = [i * (rows - 1) // (SPREAD_IDS - 1) for i in range(SPREAD_IDS)]
    last = list(range(max(0, rows - SPREAD_IDS), rows))
    try:
        tokenizer = load_tokenizer(str(directory), trust_remote_code=base.trust_remote_code)
    except ModelError:  # a base without a tokenizer of its own; that was told before
        return [spread, last]
    limit = min(PROMPT_TOKENS, int(getattr(base.skeleton.config, "max_position_embeddings", 0) or PROMPT_TOKENS))
    texts = [tokenizer([text])["input_ids"][0] for text in TEXTS]
    prompts = [*_questions(directory, tokenizer), *texts, spread, last]
    usable = [[token for token in ids if token < rows][-limit:] for ids in prompts]
    return [ids for ids in usable if ids]


def _questions(directory: Path, tokenizer: Any) -> list[list[int]]:
    stored = directory / "chat_template.jinja"
    if not stored.is_file() and own_chat_template(tokenizer) is None:
        return []
    try:
        words = segment_tokenizer(load_template(str(stored) if stored.is_file() else "auto", tokenizer), tokenizer)
        return [words.prompt_ids([Turn("user", question)]) for question in QUESTIONS]
    except DataError:  # a template that wants more than a question, such as a system message
        return []


def _compare_names(base: LazyCheckpoint, merged: LazyCheckpoint) -> None:
    expected, found = set(base.weights.entries), set(merged.weights.entries)
    if base.is_tied and not merged.is_tied:
        pair = {f"{base.embedding}.weight", f"{base.head}.weight"}
        expected |= {base.own_name(name) or name for name in pair}
    if expected != found:
        lost, new = sorted(expected - found), sorted(found - expected)
        raise ModelError(f"the merged files hold other tensors than the base: without {lost[:3]}, with {new[:3]}")


def _check_values(merged: LazyCheckpoint, report: MergeReport) -> int:
    """Every tensor finite and, bit for bit, what the merge had in memory; counts tensors."""
    different = []
    with progress("checking", merged.weights.total_bytes, in_bytes=True) as move_on:
        for name, tensor in merged.weights:
            if not name.endswith(TABLES) and not is_finite(tensor):
                raise ModelError(f"the merged {name} holds NaN or Inf")
            different += [name] if checksum(tensor) != report.checksums[name] else []
            move_on(tensor.nbytes)
    if different:
        raise ModelError(
            f"{len(different)} tensors are not as merged in the written files: {different[:3]}; the disk or the memory "
            "gives wrong data"
        )
    return len(report.checksums)


def _streamed_predictions(
    adapted: LoraStack, merged: LazyCheckpoint, adapters: Sequence[str], prompts: list[list[int]]
) -> Predictions:
    """With the last adapter at work on what the adapters before it made of the base; nothing is in memory whole."""
    base = adapted.base
    known = [ids if max(ids) < base.rows else None for ids in prompts]
    logits = iter(_logits_of(base.skeleton, _reader_of(base), [ids for ids in known if ids])[0])
    without = [next(logits) if ids else None for ids in known]
    last = len(adapted.stages) - 1
    read = _reader(adapted, lambda module: adapted.through(module, last))
    expected, _ = _logits_of(adapted.stages[-1].model.get_base_model(), read, prompts)
    base.weights.close()
    found, largest = _logits_of(merged.skeleton, _reader_of(merged), prompts)
    merged.weights.close()
    return Predictions(expected, without, found, largest)


def _reader_of(model: LazyCheckpoint) -> ReadLayer:
    def read(module: str) -> dict[str, Tensor]:
        layer = model.skeleton.get_submodule(module)
        return {f"{module}.{name}": model.read(f"{module}.{name}") for name, _ in layer.named_parameters(recurse=False)}

    return read


def _reader(adapted: LoraStack, touched: ReadLayer) -> ReadLayer:
    def read(module: str) -> dict[str, Tensor]:
        if module in adapted.touched:
            return touched(module)
        return {name: adapted.base.read(name) for name in adapted.parameters_of(module)}

    return read


def _logits_of(model: Any, read: ReadLayer, prompts: list[list[int]]) -> tuple[list[Tensor], float]:
    units = _units(model)
    with progress("comparing", len(units)) as move_on, _weights_on_demand(units, read, move_on):
        return _forward(model, prompts)


def _units(model: nn.Module) -> dict[str, nn.Module]:
    """What gets its weights at once: each member of a list of layers, and else whatever holds weights of its own."""
    units: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{unit}.") for unit in units)
        is_member = name.rpartition(".")[2].isdigit()
        is_wrapper = hasattr(module, "base_layer") or hasattr(module, "token_adapter")
        is_wrapper = is_wrapper or hasattr(module, "modules_to_save")
        if not is_inside and (is_member or is_wrapper or next(module.parameters(recurse=False), None) is not None):
            units[name] = module
    return units


@contextmanager
def _weights_on_demand(units: dict[str, nn.Module], read: ReadLayer, move_on: Callable[[int], Any]) -> Iterator[None]:
    """Inside, each unit gets its weights right before it runs and loses them right after."""
    hooks = []
    for name, unit in units.items():
        filled: list[str] = []

        def load(module: nn.Module, _: Any, name: str = name, filled: list[str] = filled) -> None:
            filled += fill(module, _weights_of(name, module, read))

        def unload(module: nn.Module, _: Any, __: Any, filled: list[str] = filled) -> None:
            empty(module, filled)
            filled.clear()
            move_on(1)

        hooks += [unit.register_forward_pre_hook(load), unit.register_forward_hook(unload)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _weights_of(unit: str, module: nn.Module, read: ReadLayer) -> dict[str, Tensor]:
    """The weights that a unit lacks, by their plain names inside it; one that was trained in full lacks none."""
    missing = [
        plain_name(f"{unit}.{name}")
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.is_meta and "original_module." not in name
    ]
    found: dict[str, Tensor] = {}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in missing):
        found |= {name.removeprefix(f"{unit}."): tensor for name, tensor in read(layer).items()}
    return found


def _forward(model: Any, prompts: list[list[int]]) -> tuple[list[Tensor], float]:
    """Logits (places, vocabulary) of each prompt, all in one pass, and the largest value between the layers.

    Padding stands behind and is cut off again.
    """
    longest, largest = max(map(len, prompts)), [0.0]
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])

    def look(_: nn.Module, __: Any, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        if isinstance(values, Tensor) and values.is_floating_point():
            largest.append(max(abs(float(value)) for value in torch.aminmax(values)))

    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2] != "lm_head"]
    hooks = [module.register_forward_hook(look) for module in layers]
    try:
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return [row[: len(prompt)] for row, prompt in zip(logits, prompts, strict=True)], max(largest)


def _whole_predictions(
    adapted: LoraStack, merged: LazyCheckpoint, adapters: Sequence[str], prompts: list[list[int]]
) -> Predictions:
    """The same for a base that transformers stores in another form than it runs (experts one by one): loaded whole."""
    n_bytes = sum(parameter.numel() for parameter in adapted.base.skeleton.parameters()) * 4
    free_bytes = psutil.virtual_memory().available
    if n_bytes * 1.2 > free_bytes:
        raise ModelError(
            f"comparing logits takes about {n_bytes * 1.2 / 2**30:.1f} GiB of RAM, because this base is stored in "
            f"another form than it runs in, and {free_bytes / 2**30:.1f} GiB are free; go without by "
            f"{command('merge')} --verify false"
        )
    if adapted.rows != adapted.base.rows:
        raise ModelError(
            f"a base in this form cannot be verified with a grown vocabulary: {command('merge')} --verify false"
        )
    model = _load_whole(adapted.base)
    without, _ = _forward(model, prompts)
    for number, adapter in enumerate(adapters):
        model = load_adapter(model, adapter, trainable=False).model
        if number < len(adapters) - 1:
            model = model.merge_and_unload()
    model.eval()
    expected, _ = _forward(model, prompts)
    sums, _ = _forward(model.merge_and_unload(), prompts)
    del model
    found, largest = _forward(_load_whole(merged), prompts)
    return Predictions(expected, without, found, largest, sums)


def _load_whole(base: LazyCheckpoint) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.directory, dtype=torch.float32, trust_remote_code=base.trust_remote_code, local_files_only=True,
            weights_only=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as reason:
        raise ModelError(f"{base.directory} cannot be loaded: {first_line(reason)}") from reason
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelError(f"{base.directory} lacks {len(missing)} tensors, such as {missing[0]}")
    return model.requires_grad_(False).eval()
