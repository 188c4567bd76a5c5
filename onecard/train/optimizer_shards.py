"""Optimizer state that lies flat over several processes, and its whole form, in which it is stored.

Knows where each parameter lies in the partitions, and tensors; not who divided them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ShardLayout:
    """Where the parameters of the undivided optimizer lie in the partitions of the processes."""

    names: list[list[str]]
    """Per parameter group, the parameters in the optimizer's order."""
    shapes: dict[str, torch.Size]
    pieces: list[list[dict[str, tuple[int, int]]]]
    """Per process, per group: name -> (start, length) in its flat partition; the parts of one parameter follow
    the ranks."""

    def index(self, group: int) -> int:
        """The number that the first parameter of a group has in `optimizer.pt`."""
        return sum(len(names) for names in self.names[:group])


def pieces_of_each(
    names: Sequence[Sequence[str]], shapes: Mapping[str, torch.Size], n_processes: int
) -> list[list[dict[str, tuple[int, int]]]]:
    """`ShardLayout.pieces` where each parameter is cut into as many equal parts as there are processes, as in ZeRO-3.

    Two processes, parameters a (3 values) and b (2): [a0 a1 b0] and [a2 pad b1].
    """
    return [[_pieces_of_group(group, shapes, rank, n_processes) for group in names] for rank in range(n_processes)]


def _pieces_of_group(
    group: Sequence[str], shapes: Mapping[str, torch.Size], rank: int, n_processes: int
) -> dict[str, tuple[int, int]]:
    found, start = {}, 0
    for name in group:
        n_values = shapes[name].numel()
        part = -(-n_values // n_processes)
        length = min(part, n_values - rank * part)
        if length > 0:
            found[name] = (start, length)
        start += part
    return found


def join_states(shards: Sequence[dict[str, Any]], layout: ShardLayout) -> dict[str, Any]:
    """One optimizer state out of the flat ones of all processes.

    Two processes, parameters a (3 values) and b (2), padded to 3 per process:

        process 0: exp_avg [a0 a1 a2]      ->  state {0: {"exp_avg": [a0 a1 a2]}, 1: {"exp_avg": [b0 b1]}}
        process 1: exp_avg [b0 b1 pad]
    """
    state: dict[int, dict[str, Any]] = {}
    groups = []
    for number, names in enumerate(layout.names):
        first = layout.index(number)
        groups.append({**shards[0]["param_groups"][number], "params": list(range(first, first + len(names)))})
        flat = [shard["state"].get(number, {}) for shard in shards]
        for position, name in enumerate(names):
            pieces = [where[number].get(name) for where in layout.pieces]
            entry = {key: _joined([part[key] for part in flat], pieces, layout.shapes[name]) for key in flat[0]}
            if entry:  # before the first step there is no state
                state[first + position] = entry
    return {"state": state, "param_groups": groups}


def split_state(state: dict[str, Any], layout: ShardLayout, rank: int, sizes: Sequence[int]) -> dict[str, Any]:
    """The flat optimizer state of process `rank` out of a whole one: the opposite of `join_states`.

    sizes: length of this process's partition per parameter group, padding included; the padding gets zeros.
    """
    flat: dict[int, dict[str, Any]] = {}
    groups = []
    for number, names in enumerate(layout.names):
        first = layout.index(number)
        groups.append({**state["param_groups"][number], "params": [number]})
        entries = {name: state["state"].get(first + position) for position, name in enumerate(names)}
        pieces = [where[number] for where in layout.pieces[: rank + 1]]
        part = {key: _cut({name: entry[key] for name, entry in entries.items()}, pieces, sizes[number])
                for key in entries[names[0]] or ()}  # fmt: skip
        if part:
            flat[number] = part
    return {"state": flat, "param_groups": groups}


def _cut(values: dict[str, Any], pieces: list[dict[str, tuple[int, int]]], size: int) -> Any:
    """One process's part of a value of all parameters; `pieces` are those of the processes before it and its own."""
    example = next(iter(values.values()))
    if not isinstance(example, Tensor):
        return example
    if example.dim() == 0:
        return example.clone()
    target = torch.zeros(size, dtype=example.dtype)
    for name, (start, length) in pieces[-1].items():
        before = sum(where.get(name, (0, 0))[1] for where in pieces[:-1])
        target[start : start + length] = values[name].flatten()[before : before + length]
    return target


def _joined(parts: list[Any], pieces: list[tuple[int, int] | None], shape: torch.Size) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    if parts[0].dim() == 0:
        # The number of steps, the same everywhere; each parameter counts on with a tensor of its own.
        return parts[0].clone()
    found = [part[piece[0] : piece[0] + piece[1]] for part, piece in zip(parts, pieces, strict=True) if piece]
    return torch.cat(found).reshape(shape).clone()
