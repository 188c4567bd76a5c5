"""Proof that a merged model is its base with the adapters: by names, by values, and by predictions on probe prompts.

What the adapters change in the predictions must be kept by the merged tensors, and the written files must hold those
tensors bit for bit. The logits are computed while the layers are merged, so no model is in memory whole, and in fp32
for all sides alike: what is measured is the rounding of the merged weights. Does not know how layers are merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from onecard.console import first_line
from onecard.data.chat_template import load_template, own_chat_template
from onecard.data.messages import Turn
from onecard.data.tokenization import segment_tokenizer
from onecard.errors import DataError, ModelError
from onecard.export.io.base import LazyCheckpoint, open_base
from onecard.export.io.output import progress
from onecard.export.io.weights import stored_checksums
from onecard.export.merge.effect import AdapterEffect, effect_of
from onecard.export.merge.forward import ForwardPass, forward, run_together
from onecard.export.merge.lora_stack import LoraStack
from onecard.export.merge.tensors import LayerMerger, MergeReport
from onecard.installation import command
from onecard.model.load import load_tokenizer
from onecard.model.lora.adapter import load_adapter

NOISE = 1e-9  # nats per token that fp32 arithmetic alone moves
# Half of what fp16 holds: other texts than the probe prompts reach further.
LARGEST_ACTIVATION = 0.5 * 65504
QUESTIONS = ("What is the capital of France?", "把下面的句子翻译成英文：你好，世界。")
TEXTS = ("The quick brown fox jumps over the lazy dog, 7 + 2 = 9.", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。")
PROMPT_TOKENS = 64
SPREAD_IDS = 32


@dataclass(frozen=True)
class Predictions:
    """Logits of the same prompts: base + adapters, the base alone (None where it lacks a token's row), and merged."""

    adapted: list[Tensor]
    base: Sequence[Tensor | None]
    merged: list[Tensor]
    sums: list[Tensor] = field(default_factory=list)
    """Logits of the exact sums, where the models were in memory whole."""


def predict_while_merging(merger: LayerMerger, prompts: list[list[int]], *, must_fit_fp16: bool) -> Predictions:
    """Merge each layer when it is due; base, base + adapters and the result run side by side over one read of the base.

    Raises as merging does, and DoesNotFit with `must_fit_fp16` at the first layer that computes larger numbers.
    """
    adapted, base = merger.adapted, merger.base
    known = [max(ids) < base.rows for ids in prompts]  # a base whose vocabulary grew lacks the new rows
    alone = ForwardPass(base.skeleton, merger.as_stored, list(compress(prompts, known)))
    before = ForwardPass(adapted.stages[-1].model.get_base_model(), merger.before_last, prompts)
    limit = LARGEST_ACTIVATION if must_fit_fp16 else math.inf
    after = ForwardPass(base.build(adapted.rows), merger.merged, prompts, limit)
    run_together([*([alone] if alone.prompts else []), before, after])
    logits = iter(alone.logits)
    return Predictions(before.logits, [next(logits) if is_known else None for is_known in known], after.logits)


def verify_merge(
    directory: Path, adapted: LoraStack, adapters: Sequence[str], prompts: list[list[int]],
    found: Predictions | None, report: MergeReport, *, must_fit_fp16: bool = False,
) -> str:  # fmt: skip
    """Read a merged model back from the disk and judge what it predicts; returns one line that says what was proven.

    found: what the tensors predicted while they were merged; None for a base that cannot be run layer by layer: then
    the models are loaded whole. Raises ModelError: names missing or new, a tensor other than it was merged, an effect
    of the adapters that is lost by more than the rounding; DoesNotFit as `predict_while_merging` does.
    """
    merged, is_streamed = check_files(directory, adapted.base, report), found is not None
    if found is None:
        limit = LARGEST_ACTIVATION if must_fit_fp16 else math.inf
        found = _whole_predictions(adapted, merged, adapters, prompts, limit)
    effect = effect_of(found.adapted, found.base, found.merged)
    text = f"on {len(prompts)} probe prompts {effect}"
    if not effect.is_whole:
        text += _cause(adapted, merged, prompts, found, effect, report, is_streamed=is_streamed)
    n_changed = report.n_targets - len(report.unchanged)
    how = "layer by layer while merging" if is_streamed else "one whole model after the other"
    return (
        f"proven on the reopened files: {n_changed} of {report.n_targets} target layers changed, {report.n_tensors} "
        f"tensors finite and as merged, names as in the base; {text} (computed in float32, {how})"
    )


def _cause(
    adapted: LoraStack, merged: LazyCheckpoint, prompts: list[list[int]], found: Predictions, effect: AdapterEffect,
    report: MergeReport, *, is_streamed: bool,
) -> str:  # fmt: skip
    """Why the effect is not whole: the rounding, where the sums before it keep it. Raises ModelError where not."""
    exact = ForwardPass(merged.skeleton, adapted.merged, prompts, logits=found.sums)
    if is_streamed:  # the base is read again, for this alone
        run_together([exact])
        adapted.base.weights.close()
    before = effect_of(found.adapted, found.base, exact.logits)
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


def check_files(directory: Path, base: LazyCheckpoint, report: MergeReport) -> LazyCheckpoint:
    """Open a merged model; raises ModelError unless all tensors are there and, bit for bit, what was merged."""
    merged = open_base(str(directory), trust_remote_code=base.trust_remote_code)
    expected, found = set(base.weights.entries), set(merged.weights.entries)
    if base.is_tied and not merged.is_tied:
        pair = {f"{base.embedding}.weight", f"{base.head}.weight"}
        expected |= {base.own_name(name) or name for name in pair}
    if expected != found:
        lost, new = sorted(expected - found), sorted(found - expected)
        raise ModelError(f"the merged files hold other tensors than the base: without {lost[:3]}, with {new[:3]}")
    different = []
    with progress("checking", merged.weights.total_bytes, in_bytes=True) as move_on:
        for name, n_bytes, crc in stored_checksums(directory):
            different += [name] if crc != report.checksums[name] else []
            move_on(n_bytes)
    if different:
        raise ModelError(
            f"{len(different)} tensors are not as merged in the written files: {different[:3]}; the disk or the memory "
            "gives wrong data"
        )
    return merged


def _whole_predictions(
    adapted: LoraStack, merged: LazyCheckpoint, adapters: Sequence[str], prompts: list[list[int]], limit: float
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
    without, _ = forward(model, prompts)
    for number, adapter in enumerate(adapters):
        model = load_adapter(model, adapter, trainable=False, scale=adapted.scale).model
        if number < len(adapters) - 1:
            model = model.merge_and_unload()
    model.eval()
    expected, _ = forward(model, prompts)
    sums, _ = forward(model.merge_and_unload(), prompts)
    del model
    found, _ = forward(_load_whole(merged), prompts, limit)
    return Predictions(expected, without, found, sums)


def _load_whole(base: LazyCheckpoint) -> Any:
    from transformers import AutoModelForCausalLM

    scaled: dict[str, Any] = {} if base.rope_scaling == "none" else {"config": base.skeleton.config}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.directory, dtype=torch.float32, trust_remote_code=base.trust_remote_code, local_files_only=True,
            weights_only=True, output_loading_info=True, **scaled,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as reason:
        raise ModelError(f"{base.directory} cannot be loaded: {first_line(reason)}") from reason
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelError(f"{base.directory} lacks {len(missing)} tensors, such as {missing[0]}")
    return model.requires_grad_(False).eval()
