"""Proof that a merged model is its base with the adapters: by names, by values, and by logits on probe prompts.

The logits of both sides are computed layer by layer, each layer's weights read when it is due, so no model is in
memory whole. The arithmetic is fp32 (fp64 for an fp32 result, whose bound is near fp32's own noise), for both sides
alike: what is measured is the rounding of the merged weights. Does not know how they were merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from onecard.console import DataError, ModelError, first_line
from onecard.export.adapted import Adapted, adapt, empty, fill, plain_name
from onecard.export.output import progress
from onecard.export.stored_base import StoredBase, open_base
from onecard.export.tensors import same_bits
from onecard.model.adapters import load_adapter
from onecard.model.load import load_tokenizer
from onecard.text.conversation import Turn
from onecard.text.template import load_template, own_chat_template
from onecard.text.tokenization import segment_tokenizer

if TYPE_CHECKING:
    from onecard.export.merge import MergeReport

# The largest difference of a logit, as a part of the largest logit. Measured on small random models, whose logits are
# flat: 4e-4 to 7e-4 in fp16, 4e-3 to 6e-3 in bf16 (3 bits less: eight times), 1e-7 to 2e-7 in fp32. Some models magnify
# rounding more, up to 2e-3 in fp16; see `_is_rounded_once`.
TOLERANCES = {"fp16": 1e-3, "bf16": 8e-3, "fp32": 1e-6}
NOISE = 1e-5  # what fp32 arithmetic alone makes of the same weights, merged or not
QUESTIONS = ("What is the capital of France?", "把下面的句子翻译成英文：你好，世界。")
TEXTS = ("The quick brown fox jumps over the lazy dog, 7 + 2 = 9.", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。")
PROMPT_TOKENS = 64
SPREAD_IDS = 32

ReadLayer = Callable[[str], dict[str, Tensor]]


def verify_merge(directory: Path, base: StoredBase, adapters: Sequence[str], report: MergeReport) -> str:
    """Reopen a merged model and compare it with base and adapters; returns one line that says what was proven.

    Raises ModelError: names missing or new, a target layer that did not change, NaN, logits that do not agree.
    """
    merged, adapted = open_base(str(directory), trust_remote_code=base.trust_remote_code), adapt(base, adapters)
    _compare_names(base, merged)
    n_finite = _check_values(adapted, merged, report)
    prompts = probe_prompts(directory, adapted.rows, base)
    # Experts that are one tensor are multiplied by kernels that know no fp64; then fp32's own noise is in the bound.
    has_experts = any(parameter.dim() == 3 for parameter in base.skeleton.parameters())
    dtype = torch.float64 if report.dtype == "fp32" and not has_experts else torch.float32
    is_streamed = not base.unknown_names()
    compute = _streamed_logits if is_streamed else _whole_logits
    expected, found = compute(adapted, merged, adapters, prompts, dtype)
    difference, n_same = relative_difference(expected, found), _n_same_choice(expected, found)
    n_positions = sum(row.shape[0] for row in expected)
    bound = NOISE if report.dtype == "fp32" and dtype == torch.float32 else TOLERANCES[report.dtype]
    how = "layer by layer from the disk" if is_streamed else "one whole model after the other"
    told = (
        f"logits of {len(prompts)} probe prompts differ by {difference:.1e} of the largest (bound {bound:.0e}), and "
        f"the likeliest token is the same at {n_same} of {n_positions} places"
    )
    if not difference <= bound:
        if not math.isfinite(difference) or not _is_rounded_once(base, adapters, merged, report):
            raise ModelError(
                f"the merged model does not agree with its adapters: {told}. It was not kept; --dtype fp32 rounds "
                "less, and --verify false keeps it as it is"
            )
        told += (
            f"; that is over the bound, but every tensor is the exact sum rounded once to {report.dtype}, so it is "
            "what 16 bits cost this model (--dtype fp32 costs less)"
        )
    n_changed = report.n_targets - len(report.unchanged)
    return (
        f"proven on the reopened files: {n_changed} of {report.n_targets} target layers changed, {n_finite} tensors "
        f"finite, names as in the base; {told} (computed in {str(dtype).removeprefix('torch.')}, {how})"
    )


def relative_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest |a - b| over the largest |a|; NaN where one of them holds NaN."""
    largest = torch.stack([row.abs().max() for row in expected]).max()
    apart = torch.stack([(one - other).abs().max() for one, other in zip(expected, found, strict=True)]).max()
    return float(apart / largest)


def probe_prompts(directory: Path, rows: int, base: StoredBase) -> list[list[int]]:
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


def _compare_names(base: StoredBase, merged: StoredBase) -> None:
    expected, found = set(base.weights.entries), set(merged.weights.entries)
    if base.is_tied and not merged.is_tied:
        pair = {f"{base.embedding}.weight", f"{base.head}.weight"}
        expected |= {base.own_name(name) or name for name in pair}
    if expected != found:
        lost, new = sorted(expected - found), sorted(found - expected)
        raise ModelError(f"the merged files hold other tensors than the base: without {lost[:3]}, with {new[:3]}")


def _check_values(adapted: Adapted, merged: StoredBase, report: MergeReport) -> int:
    """Every tensor finite, every target layer changed but those that the merge said it did not; counts tensors."""
    base, n_finite = adapted.base, 0
    with progress("checking", merged.weights.total_bytes, in_bytes=True) as move_on:
        for name, tensor in merged.weights:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ModelError(f"the merged {name} holds NaN or Inf")
            n_finite += 1
            move_on(tensor.nbytes)
    same = [module for module in adapted.targets if not _is_changed(module, adapted, merged)]
    unexpected = sorted(set(same) ^ set(report.unchanged))
    if unexpected:
        raise ModelError(f"{len(unexpected)} target layers are not as merged in the written files: {unexpected[:3]}")
    base.weights.close()
    merged.weights.close()
    return n_finite


def _is_rounded_once(base: StoredBase, adapters: Sequence[str], merged: StoredBase, report: MergeReport) -> bool:
    """Whether each written tensor is, bit for bit, what merging in fp32 and rounding once gives when done again.

    Then no better file of this dtype exists, however far a model magnifies the rounding.
    """
    from onecard.export.merge import DTYPES, MergeReport, merged_tensors

    again = MergeReport(report.directory, report.dtype, report.adapters, is_tied=base.is_tied)
    n_same = 0
    # Adapted anew: comparing logits may have left the adapters in fp64.
    for name, tensor in merged_tensors(adapt(base, adapters), DTYPES[report.dtype], again):
        if not same_bits(merged.weights.read(name), tensor):
            return False
        n_same += 1
    merged.weights.close()
    return n_same == report.n_tensors


def _is_changed(module: str, adapted: Adapted, merged: StoredBase) -> bool:
    for name in adapted.parameters_of(module):
        found = merged.weights.read(merged.required_name(name))
        if not torch.equal(found, adapted.base.read(name).to(found.dtype)):
            return True
    return False


def _streamed_logits(
    adapted: Adapted, merged: StoredBase, adapters: Sequence[str], prompts: list[list[int]], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits with the last adapter at work on what the adapters before it made of the base, and of the result."""

    def read_adapted(module: str) -> dict[str, Tensor]:
        if module in adapted.touched:
            return adapted.through(module, len(adapted.stages) - 1)
        return {name: adapted.base.read(name) for name in adapted.parameters_of(module)}

    def read_merged(module: str) -> dict[str, Tensor]:
        layer = merged.skeleton.get_submodule(module)
        return {
            f"{module}.{name}": merged.read(f"{module}.{name}") for name, _ in layer.named_parameters(recurse=False)
        }

    expected = _logits_of(adapted.stages[-1].model.get_base_model(), read_adapted, prompts, dtype)
    adapted.base.weights.close()
    found = _logits_of(merged.skeleton, read_merged, prompts, dtype)
    merged.weights.close()
    return expected, found


def _logits_of(model: Any, read: ReadLayer, prompts: list[list[int]], dtype: torch.dtype) -> list[Tensor]:
    model.to(dtype)
    units = _units(model)
    with progress("comparing", len(units)) as move_on, _weights_on_demand(units, read, dtype, move_on):
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
def _weights_on_demand(
    units: dict[str, nn.Module], read: ReadLayer, dtype: torch.dtype, move_on: Callable[[int], Any]
) -> Iterator[None]:
    """Inside, each unit gets its weights right before it runs and loses them right after."""
    hooks = []
    for name, unit in units.items():
        filled: list[str] = []

        def load(module: nn.Module, _: Any, name: str = name, filled: list[str] = filled) -> None:
            filled += fill(module, _weights_of(name, module, read, dtype))

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


def _weights_of(unit: str, module: nn.Module, read: ReadLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that a unit lacks, by their plain names inside it; one that was trained in full lacks none."""
    missing = [
        plain_name(f"{unit}.{name}")
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.is_meta and "original_module." not in name
    ]
    found: dict[str, Tensor] = {}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in missing):
        found |= {name.removeprefix(f"{unit}."): tensor.to(dtype) for name, tensor in read(layer).items()}
    return found


def _forward(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    """Logits (prompt, vocabulary) of each prompt, all in one pass; padding stands behind and is cut off again."""
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [row[: len(prompt)] for row, prompt in zip(logits, prompts, strict=True)]


def _whole_logits(
    adapted: Adapted, merged: StoredBase, adapters: Sequence[str], prompts: list[list[int]], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """The same for a base that transformers stores in another form than it runs (experts one by one): loaded whole."""
    n_bytes = sum(parameter.numel() for parameter in adapted.base.skeleton.parameters()) * dtype.itemsize
    free_bytes = psutil.virtual_memory().available
    if n_bytes * 1.2 > free_bytes:
        raise ModelError(
            f"comparing logits takes about {n_bytes * 1.2 / 2**30:.1f} GiB of RAM, because this base is stored in "
            f"another form than it runs in, and {free_bytes / 2**30:.1f} GiB are free; use --verify false to go without"
        )
    if adapted.rows != adapted.base.rows:
        raise ModelError("a base in this form cannot be verified with a grown vocabulary; use --verify false")
    model = _load_whole(adapted.base, dtype)
    for number, adapter in enumerate(adapters):
        model = load_adapter(model, adapter, trainable=False).model
        if number < len(adapters) - 1:
            model = model.merge_and_unload()
    model.eval()
    expected = _forward(model, prompts)
    del model
    return expected, _forward(_load_whole(merged, dtype), prompts)


def _load_whole(base: StoredBase, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.directory, dtype=dtype, trust_remote_code=base.trust_remote_code, local_files_only=True,
            weights_only=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as reason:
        raise ModelError(f"{base.directory} cannot be loaded: {first_line(reason)}") from reason
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelError(f"{base.directory} lacks {len(missing)} tensors, such as {missing[0]}")
    return model.requires_grad_(False).eval()


def _n_same_choice(expected: Sequence[Tensor], found: Sequence[Tensor]) -> int:
    return sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, found, strict=True))
