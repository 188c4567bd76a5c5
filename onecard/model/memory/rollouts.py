"""How many answers can be sampled at once while a model is trained: by what training leaves free between two steps."""

from __future__ import annotations

from dataclasses import replace

from onecard.model.memory.architecture import Architecture
from onecard.model.memory.estimate import account
from onecard.model.memory.plan import Plan

MOST_AT_ONCE = 64  # more answers at once make a small card no faster
VOCABULARY_BYTES = 24  # scores, probabilities and their sums in fp32 and fp64, for each entry


def answers_at_once(plan: Plan) -> int:
    """As many as have room beside weights and optimizer, at least one: sampling never is the peak of a run.

    While answers are sampled nothing is kept for gradients, so the room is that of a step's activations.
    """
    idle = account(plan.model, replace(plan.setup, rows=1, length=1, loss_chunk=1)).card_bytes
    room = plan.card.total_bytes - idle
    return max(1, min(MOST_AT_ONCE, room // row_bytes(plan.model, plan.longest_row, plan.setup.element_bytes)))


def row_bytes(model: Architecture, n_tokens: int, element_bytes: int) -> int:
    """What one answer takes with its prompt: keys and values of all layers, one layer's activations, the scores."""
    cache = 2 * model.n_layers * (model.n_kv_heads or 1) * (model.head_dim or model.hidden_size)
    layer = 4 * model.hidden_size + 3 * model.intermediate_size
    return n_tokens * element_bytes * (cache + layer) + VOCABULARY_BYTES * model.vocab_size
