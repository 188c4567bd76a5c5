"""Log-probabilities of given tokens after given texts, for many texts at once.

Texts are padded on the right: a causal model's token never sees what stands behind it, so neither a mask nor the
company changes its probability, and positions count from the text's own beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from onecard.inference.batch.run import in_halves
from onecard.inference.model_limits import go_together
from onecard.installation import command
from onecard.model.output_head import states_before_head

MICRO_TOKENS = 4096  # of a batch with its padding
LOGITS_AT_ONCE = 256  # positions whose logits exist at once
AskedTokens = Sequence[tuple[int, int]]  # (position, token): how likely is the token after the text up to the position


def log_probs(model: Any, texts: Sequence[Sequence[int]], asked: Sequence[AskedTokens]) -> list[list[float]]:
    """For each text (token ids) the natural log-probabilities of the tokens asked for, in their order.

    texts [[5, 6, 7]], asked [[(2, 8), (2, 9)]]  ->  [[log p(8 | 5 6 7), log p(9 | 5 6 7)]], from one forward pass

    Raises ModelError for a text that does not fit into memory alone.
    """
    found: list[list[float]] = [[] for _ in texts]

    def together(numbers: Sequence[int]) -> list[list[float]]:
        return _together(model, [texts[k] for k in numbers], [asked[k] for k in numbers])

    def too_large(number: int) -> str:
        n_tokens = len(texts[number])
        lowered = f"{command('evaluate')} with fewer --shots or a smaller --window"
        return f"a text of {n_tokens} tokens does not fit into memory; use fewer --bits, or {lowered}"

    with torch.inference_mode():
        for numbers in _batches(model, [len(ids) for ids in texts]):
            for number, values in zip(numbers, in_halves(together, numbers, too_large), strict=True):
                found[number] = values
    return found


def _batches(model: Any, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of texts that are read at once, those of like length together."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda k: (lengths[k], k)):
        joined = [lengths[k] for k in (*batch, number)]
        if batch and (len(joined) * lengths[number] > MICRO_TOKENS or not go_together(model, joined)):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _together(model: Any, texts: Sequence[Sequence[int]], asked: Sequence[AskedTokens]) -> list[list[float]]:
    longest = max(map(len, texts))
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts], device=model.device)
    places = sorted({(row, position) for row, pairs in enumerate(asked) for position, _ in pairs})
    states = states_before_head(model, {"input_ids": ids})
    whole = model(input_ids=ids, use_cache=False).logits if states is None else None
    values: dict[tuple[int, int, int], float] = {}
    wanted: dict[tuple[int, int], list[int]] = {}
    for row, pairs in enumerate(asked):
        for position, token in pairs:
            wanted.setdefault((row, position), []).append(token)
    for start in range(0, len(places), LOGITS_AT_ONCE):
        some = places[start : start + LOGITS_AT_ONCE]
        at = tuple(torch.tensor(part) for part in zip(*some, strict=True))
        logits: Tensor = whole[at] if whole is not None else states[1](states[0][at])  # type: ignore[index]
        table = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        rows = [k for k, place in enumerate(some) for _ in wanted[place]]
        tokens = [token for place in some for token in wanted[place]]
        picked = table[torch.tensor(rows, device=table.device), torch.tensor(tokens, device=table.device)].tolist()
        for k, token, value in zip(rows, tokens, picked, strict=True):
            values[(*some[k], token)] = value
    return [[values[row, position, token] for position, token in pairs] for row, pairs in enumerate(asked)]


def option_log_probs(
    model: Any, questions: Sequence[Sequence[Sequence[int]]], n_prompt: Sequence[int]
) -> list[list[list[float]]]:
    """For each question's options (whole token ids, prompt included) the log-probabilities of what follows the prompt.

    Options that differ in one last token, such as letters, take one forward pass together; others one pass each.

    [[5, 6, 8], [5, 6, 9]], prompt 1  ->  [[log p(6 | 5), log p(8 | 5 6)], [log p(6 | 5), log p(9 | 5 6)]]
    """
    texts: list[Sequence[int]] = []
    asked: list[AskedTokens] = []
    parts: list[tuple[int, int]] = []  # of each question: where its texts begin, and how many tokens all options share
    for options, first in zip(questions, n_prompt, strict=True):
        n_shared = shared_length(options)
        if all(len(ids) == n_shared + 1 for ids in options):
            parts.append((len(texts), n_shared - first))
            texts.append(options[0][:n_shared])
            shared = [(k - 1, options[0][k]) for k in range(first, n_shared)]
            asked.append([*shared, *((n_shared - 1, ids[-1]) for ids in options)])
        else:
            parts.append((len(texts), -1))
            texts += [ids[:-1] for ids in options]
            asked += [[(k - 1, ids[k]) for k in range(first, len(ids))] for ids in options]
    values = log_probs(model, texts, asked)
    return [
        [[*values[at][:n], value] for value in values[at][n:]] if n >= 0 else values[at : at + len(options)]
        for options, (at, n) in zip(questions, parts, strict=True)
    ]


def shared_length(options: Sequence[Sequence[int]]) -> int:
    """How many tokens all options begin with, leaving at least one of each."""
    most = min(map(len, options)) - 1
    return next((k for k in range(most) if len({ids[k] for ids in options}) > 1), most)
