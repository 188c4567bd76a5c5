"""What a plan may give up for memory, one technique after the other, in the order of what they cost.

Knows options and a `MemoryConfig`; whether a step is needed or of use is `plan.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from onecard.config.training import FinetuneConfig
from onecard.model.memory.estimate import MemoryConfig

LOSS_CHUNKS = (1024, 512, 256, 128)
MLP_TILES = (8192, 4096, 2048)
EMBEDDINGS = "--offload_embeddings"


@dataclass(frozen=True)
class PlannedSetting:
    """One setting of the plan. `reason` is for a person; `by_hand` when it was typed and not chosen."""

    flag: str
    value: str
    reason: str
    by_hand: bool = False


Step = Callable[[MemoryConfig], Iterator[tuple[MemoryConfig, PlannedSetting]]]


def steps(config: FinetuneConfig, setup: MemoryConfig) -> list[Step]:
    """What may be given up, in this order; what was typed by hand is not among it."""
    memory, train = config.memory, config.train
    one = setup.n_cards == 1
    frozen = not config.lora.trains_vocabulary and one
    zero3 = bool(train.deepspeed) and train.divides_base
    may_offload = setup.gradient_checkpointing and setup.on_gpu and one and not zero3
    free: list[tuple[bool, Step]] = [
        (not train.micro_tokens and not train.micro_batch, _smaller_budget),
        (memory.loss_chunk == 0, _smaller_chunks),
        (memory.offload_activations == "auto" and may_offload, _offload),
        (train.optimizer == "auto" and not train.deepspeed, _small_optimizer),
        (memory.offload_embeddings == "auto" and setup.on_gpu and frozen, _embeddings_in_ram),
        (memory.head_bits == "auto" and frozen, partial(_small_head, may_move=memory.offload_embeddings == "auto")),
        (memory.mlp_tile == 0 and not zero3, _tiles),
    ]
    return [step for is_free, step in free if is_free]


def _smaller_budget(setup: MemoryConfig) -> Iterator[tuple[MemoryConfig, PlannedSetting]]:
    rows = setup.rows
    while rows > 1:
        rows = -(-rows // 2)
        smaller = replace(setup, rows=rows)
        yield smaller, PlannedSetting("--micro_tokens", f"{smaller.tokens:,}", "the step is cut into more pieces")


def _smaller_chunks(setup: MemoryConfig) -> Iterator[tuple[MemoryConfig, PlannedSetting]]:
    for chunk in LOSS_CHUNKS[1:]:
        yield replace(setup, loss_chunk=chunk), PlannedSetting("--loss_chunk", str(chunk), "fewer logits exist at once")


def _offload(setup: MemoryConfig) -> Iterator[tuple[MemoryConfig, PlannedSetting]]:
    yield (
        replace(setup, offload_activations=True),
        PlannedSetting("--offload_activations", "on", "layer inputs wait in RAM"),
    )


def _small_optimizer(setup: MemoryConfig) -> Iterator[tuple[MemoryConfig, PlannedSetting]]:
    small = "paged_adamw_8bit" if setup.on_gpu else "adamw_8bit"
    yield replace(setup, optimizer=small), PlannedSetting("--optimizer", small, "its state takes a quarter")


def _embeddings_in_ram(setup: MemoryConfig) -> Iterator[tuple[MemoryConfig, PlannedSetting]]:
    yield replace(setup, offload_embeddings=True), PlannedSetting(EMBEDDINGS, "on", "frozen rows come from RAM")


def _small_head(setup: MemoryConfig, *, may_move: bool) -> Iterator[tuple[MemoryConfig, PlannedSetting]]:
    # With it the embeddings of a tied model are free to go; alone each of the two would save nothing.
    for bits in (8, 4):
        for in_ram in (False, True) if setup.on_gpu and may_move else (False,):
            changed = replace(setup, head_bits=bits, offload_embeddings=setup.offload_embeddings or in_ram)
            yield changed, PlannedSetting("--head_bits", str(bits), "the head is quantised: the logits change a little")


def _tiles(setup: MemoryConfig) -> Iterator[tuple[MemoryConfig, PlannedSetting]]:
    for tile in MLP_TILES:
        if tile < setup.tokens:
            yield (
                replace(setup, mlp_tile=tile),
                PlannedSetting("--mlp_tile", str(tile), "MLPs take the tokens in turns"),
            )
