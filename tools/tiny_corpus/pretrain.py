"""The training of the base model: a small Llama, from random weights, on the generated corpus.

Knows no prompt template: that is what fine-tuning is for.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from . import build
from .core import Task
from .tokenizer import MAX_LENGTH

DOCUMENTS, MICRO_BATCH = 128, 32
MUON_LR, ADAM_LR = 6e-3, 3e-3
WARMUP_STEPS, DECAY_SHARE = 30, 0.4
# The last part of the training, in which the rate falls, is on the tasks of the sample files alone.
FOCUS_SHARE = 0.4
LOG_STEPS = 25
QUESTION_WEIGHT = 0.1
NEWLINE = 3 + 0x0A
TAIL_TOKENS = 6

Row = tuple[list[int], list[float]]
"""Ids and the weight of each in the loss."""


def model_config(vocab_size: int) -> LlamaConfig:
    """Every linear layer has sides that are multiples of 64, as 4-bit blocks want them; heads are grouped."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def batches(
    tokenizer: Any, seed: int, tasks: Sequence[Task] | None = None
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Endless steps of `DOCUMENTS` documents, each step a few pairs of ids and weights `(batch, seq)`.

    A document is a row of its own, so that attention never has to learn where it begins; rows
    of like length stand together and are padded at the right with weight 0. Text and answer are tokenised apart, so an
    answer begins with a space, as in the chat template beside the model. What leads to an answer weighs little: most of
    it (which words a list holds, which heading a page has) cannot be foreseen, and learning it would drown the rest.

    "What is 1 + 1?\\n", "2\\nTom has" -> ids     <s> ▁What ...   ? <0x0A> ▁ 2 <0x0A> Tom ▁has
                                        weights 0   0.1   ... 0.1 0.1    1 1 1      0.1 0.1
    """
    documents = build.documents(seed, tasks)
    while True:
        texts, answers = zip(*itertools.islice(documents, DOCUMENTS), strict=True)
        text_ids = tokenizer(list(texts), add_special_tokens=False).input_ids
        answer_ids = tokenizer(list(answers), add_special_tokens=False).input_ids
        rows = []
        for before, after in zip(text_ids, answer_ids, strict=True):
            rows.append(_statement(before) if not after else _question(before, after))
        rows.sort(key=lambda row: len(row[0]))
        yield [_pad(rows[start : start + MICRO_BATCH]) for start in range(0, DOCUMENTS, MICRO_BATCH)]


def _statement(ids: list[int]) -> Row:
    return [1, *ids, 2], [0.0, *[1.0] * len(ids), 1.0]


def _question(before: list[int], after: list[int]) -> Row:
    """The page goes on after the answer's line; a few tokens of that are enough to say so."""
    end = after.index(NEWLINE) + 1
    tail = after[end : end + TAIL_TOKENS]
    weights = [0.0, *[QUESTION_WEIGHT] * len(before), *[1.0] * end, *[QUESTION_WEIGHT] * len(tail)]
    return [1, *before, *after[:end], *tail], weights


def _pad(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    return ids, torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows])


def learning_rate_share(step: int, steps: int) -> float:
    """Rise, stay, then fall to zero over the last `DECAY_SHARE` of the steps."""
    return min((step + 1) / WARMUP_STEPS, 1.0, (steps - step) / max(DECAY_SHARE * steps, 1.0))


def pretrain(
    model: LlamaForCausalLM,
    batches: Iterator[list[tuple[torch.Tensor, torch.Tensor]]],
    steps: int,
    say: Callable[[str], None],
) -> None:
    """Train every weight: Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    started, recent = time.monotonic(), 0.0
    for step, micro_batches in enumerate(itertools.islice(batches, steps)):
        for optimizer, peak in ((muon, MUON_LR), (adam, ADAM_LR)):
            optimizer.param_groups[0]["lr"] = peak * learning_rate_share(step, steps)
        loss = step_gradient(model, micro_batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad()
        recent = loss if step == 0 else 0.95 * recent + 0.05 * loss
        if step % LOG_STEPS == 0 or step == steps - 1:
            say(f"step {step + 1}/{steps}  loss {recent:.3f}  {time.monotonic() - started:.0f} s")


def step_gradient(model: LlamaForCausalLM, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Leave the gradient of the step's weighted mean loss in the parameters, and give that loss back."""
    total = sum(float(weights[:, 1:].sum()) for _, weights in micro_batches)
    mean = 0.0
    for ids, weights in micro_batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / total
        loss.backward()
        mean += loss.item()
    return mean


def make_model(tokenizer: Any, seed: int, steps: int, say: Callable[[str], None]) -> LlamaForCausalLM:
    """Train a new model and give it back in half precision."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config(len(tokenizer)))
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, {len(tokenizer)} pieces")
    n_broad = steps - int(FOCUS_SHARE * steps)
    broad = itertools.islice(batches(tokenizer, seed), n_broad)
    focus = batches(tokenizer, seed + 1, build.sample_tasks())
    pretrain(model, itertools.chain(broad, focus), steps, say)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    return model.half().eval()
