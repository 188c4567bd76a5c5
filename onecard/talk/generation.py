"""Answers from a model: prompts in, whole answers out, many at once.

Prompts are padded on the left by hand and masked; `model.generate` derives the positions from the mask. What it is fed
comes from `encode_prompt`, the same door that training uses. Does not know files (answers.py) or terminals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList

from onecard.config import SamplingOptions
from onecard.console import DataError
from onecard.talk.sampling import generation_config, logits_processors, seeded
from onecard.talk.stopping import FinishReason, RoomUsedUp, StopAtText, ended_answer
from onecard.text.conversation import Turn
from onecard.text.encode import encode_prompt
from onecard.text.template import Template


@dataclass(frozen=True)
class Generation:
    """One answer. `n_new_tokens` counts the end token too, although it is not shown."""

    text: str
    finish_reason: FinishReason
    n_prompt_tokens: int
    n_new_tokens: int


@dataclass(frozen=True)
class Talker:
    """A model that answers, with the tokenizer and the template that it was trained with."""

    model: Any
    tokenizer: Any
    template: Template


@dataclass(frozen=True)
class Row:
    """One prompt: ids (n_prompt,), the most new tokens it may get, and its number, which chooses its random numbers."""

    ids: list[int]
    room: int
    number: int = 0


def generate_batch(
    model: Any,
    tokenizer: Any,
    template: Template,
    conversations: Sequence[Sequence[Turn]],
    sampling: SamplingOptions,
) -> list[Generation]:
    """Answer the last user turn of each conversation; one generation each, in order.

    Greedy answers equal those of the conversations asked one by one (in fp32; in 16 bits the padding changes the last
    bits of the scores). Raises DataError for a prompt longer than the model can read.
    """
    talker = Talker(model, tokenizer, template)
    rows = [prepare(talker, turns, sampling, number=number) for number, turns in enumerate(conversations)]
    return answer_rows(talker, rows, sampling)


def prepare(talker: Talker, turns: Sequence[Turn], sampling: SamplingOptions, *, number: int = 0) -> Row:
    """The row for a conversation. Raises DataError when its prompt leaves no room for an answer."""
    ids = encode_prompt(turns, talker.template, talker.tokenizer)
    limit = longest_sequence(talker.model)
    room = sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - len(ids))
    if room < 1:
        raise DataError(f"the prompt has {len(ids)} tokens, and the model reads at most {limit}: shorten the question")
    return Row(ids, room, number)


def answer_rows(talker: Talker, rows: Sequence[Row], sampling: SamplingOptions) -> list[Generation]:
    """Answer prepared rows in one call of `model.generate`, in order."""
    if not rows:
        return []
    tokenizer, template = talker.tokenizer, talker.template
    stop_ids, stop_texts = template.stop_ids(tokenizer), template.stop_strings(tokenizer)
    pad_id = padding_id(tokenizer, stop_ids)
    device = talker.model.device
    input_ids, attention_mask = pad_left([row.ids for row in rows], pad_id)
    n_prompt = input_ids.shape[1]
    stopping = StoppingCriteriaList([RoomUsedUp([row.room for row in rows], n_prompt)])
    if stop_texts:
        stopping.append(StopAtText(stop_texts, tokenizer, n_prompt))
    numbers = [row.number for row in rows]
    with torch.inference_mode(), seeded(sampling, numbers, device):
        sequences = talker.model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=generation_config(
                sampling, stop_ids=stop_ids, pad_id=pad_id, max_new_tokens=max(row.room for row in rows)
            ),
            logits_processor=logits_processors(sampling, numbers),
            stopping_criteria=stopping,
        )
    answers = []
    for row, new_ids in zip(rows, sequences[:, n_prompt:].tolist(), strict=True):
        ended = ended_answer(new_ids, tokenizer, stop_ids=stop_ids, stop_texts=stop_texts, room=row.room)
        answers.append(Generation(ended.text, ended.reason, len(row.ids), ended.n_tokens))
    return answers


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, each (batch, longest row).

    [[5, 6, 7], [8]], pad 0  ->  [[5, 6, 7],   [[1, 1, 1],
                                  [0, 0, 8]]    [0, 0, 1]]
    """
    longest = max(len(ids) for ids in rows)
    input_ids = [[pad_id] * (longest - len(ids)) + list(ids) for ids in rows]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]
    return torch.tensor(input_ids), torch.tensor(mask)


def padding_id(tokenizer: Any, stop_ids: Sequence[int]) -> int:
    """An id for padding: BOS where there is one, for it stands in every prompt anyway.

    The mask hides padding from the model, but not from the repetition penalty: padded with the end token, only the
    shorter rows of a batch would be made to end later.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id):
        if token_id is not None and token_id not in stop_ids:
            return int(token_id)
    return next(token_id for token_id in range(len(stop_ids) + 1) if token_id not in stop_ids)


def longest_sequence(model: Any) -> int | None:
    """How many tokens the model can read, prompt and answer together, or None where its config sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None
