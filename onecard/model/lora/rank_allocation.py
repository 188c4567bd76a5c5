"""AdaLoRA's rank allocation: which singular values of each adapter stay, by how much the loss depends on them.

https://arxiv.org/abs/2303.10512 (algorithm 1; equations 8 to 12). PEFT holds P, Lambda and Q as lora_B, lora_E and
lora_A. The budget of a step is a pure function of the step and of the steps that are planned, so a schedule that is
laid anew is followed; scores and the final choice lie in checkpoints. Knows tensors by name; imports no peft.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from onecard.config.lora import LoraOptions
from onecard.errors import ConfigError

# Shares of the steps before the budget falls and after it has fallen, where --peft_option does not give them in steps:
# those of PEFT's own comparison of methods (200 and 500 of 5,000).
INITIAL_SHARE, FINAL_SHARE = 0.04, 0.1


class RankAllocation:
    """Cuts the singular values of all adapters of a model down to `target_r` for each, the least important first."""

    def __init__(self, peft_model: Any, config: Any, options: LoraOptions) -> None:
        """`config`: PEFT's of the adapter. Raises ConfigError where it leaves nothing to cut."""
        named = dict(peft_model.named_parameters())
        ends = (".lora_E.", ".lora_A.", ".lora_B.")
        names = [name for name in named if ends[0] in name]
        self.triplets = {name: [named[name.replace(ends[0], end)] for end in ends] for name in names}
        self.config, self.steps = (
            config,
            {name: int(options.peft_options.get(name, -1)) for name in ("tinit", "tfinal")},
        )
        self.first_budget = sum(len(values) for values, _, _ in self.triplets.values())
        self.last_budget = config.target_r * len(self.triplets)
        if not 0 < self.last_budget < self.first_budget:
            text = f"init_r={config.init_r} is to be above the rank that is left, --lora_r {config.target_r}, above 0"
            raise ConfigError("--peft_option", text)
        self.scores = {name: [_Score(tensor) for tensor in triplet] for name, triplet in self.triplets.items()}
        self.kept: dict[str, Tensor] | None = None
        """Which singular values stay, bool (init_r, 1) by name, once that is settled."""

    def phases(self, total_steps: int) -> tuple[int, int]:
        """Steps before the budget begins to fall, and the step by which it has fallen. Raises ConfigError."""
        first, last = self.steps["tinit"], self.steps["tfinal"]
        first = first if first >= 0 else int(INITIAL_SHARE * total_steps)
        last = total_steps - (last if last >= 0 else int(FINAL_SHARE * total_steps))
        return min(first, max(0, last - 1)), last

    def check(self, total_steps: int) -> None:
        """Raise ConfigError for a run whose steps leave none to cut ranks in."""
        first, last = self.steps["tinit"], self.steps["tfinal"]
        if max(first, 0) + max(last, 0) >= total_steps:
            text = f"tinit={max(first, 0)} and tfinal={max(last, 0)} leave no step of {total_steps:,} to cut ranks in"
            raise ConfigError("--peft_option", text)

    def budget(self, step: int, total_steps: int) -> int:
        """Singular values that stay after this step (from 1): all, then fewer by a cubic, then `last_budget`."""
        first, last = self.phases(total_steps)
        if step <= first:
            return self.first_budget
        left = (1 - (step - first) / (last - first)) ** 3 if step < last else 0
        return int((self.first_budget - self.last_budget) * left + self.last_budget)

    def penalty(self) -> Tensor:
        """How far P and Q are from orthogonal, weighted, as PEFT adds it to the loss."""
        distances = [
            torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device))
            for _, a, b in self.triplets.values()
            for product in (a @ a.T, b.T @ b)
        ]
        return self.config.orth_reg_weight * torch.stack([each.to(distances[0].device) for each in distances]).mean()

    @torch.no_grad()
    def observe(self) -> None:
        """Take the sensitivity of each weight, |weight * gradient|, into the scores; before the optimizer's step."""
        for name, triplet in self.triplets.items():
            for score, tensor in zip(self.scores[name], triplet, strict=True):
                score.add(tensor, self.config.beta1, self.config.beta2)

    @torch.no_grad()
    def allocate(self, step: int, total_steps: int) -> None:
        """Set the singular values to zero that this step's budget has no room for; after the optimizer's step."""
        self.config.total_step = total_steps
        first, last = self.phases(total_steps)
        if step < last:
            self.kept = None
            kept = self._chosen(step, total_steps) if step > first and step % self.config.deltaT == 0 else {}
        else:
            kept = self.kept = self.kept or self._chosen(step, total_steps)
        for name, which in kept.items():
            self.triplets[name][0].masked_fill_(~which, 0.0)

    def _chosen(self, step: int, total_steps: int) -> dict[str, Tensor]:
        """Which singular values stay: those whose triplets, its value and both its vectors, matter most."""
        importance = {
            name: of_values.view(-1) + of_a.mean(dim=1) + of_b.mean(dim=0)
            for name, scores in self.scores.items()
            for of_values, of_a, of_b in [[score.importance() for score in scores]]
        }
        every = torch.cat([each.cpu() for each in importance.values()])
        threshold = every.kthvalue(self.first_budget - self.budget(step, total_steps)).values
        return {name: (each > threshold.to(each.device))[:, None] for name, each in importance.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the scores, and the final choice."""
        scores = {name: [score.tensors() for score in scores] for name, scores in self.scores.items()}
        return {"scores": scores, "kept": self.kept}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, bit for bit. Raises ValueError for other adapters."""
        if stored["scores"].keys() != self.scores.keys():
            raise ValueError("it is of other layers")
        for name, scores in self.scores.items():
            for score, tensors in zip(scores, stored["scores"][name], strict=True):
                score.put(tensors)
        places = {name: values.device for name, (values, _, _) in self.triplets.items()}
        self.kept = stored["kept"] and {name: which.to(places[name]) for name, which in stored["kept"].items()}


class _Score:
    """The smoothed sensitivity of a tensor's weights, and how much it varies."""

    def __init__(self, tensor: Tensor) -> None:
        self.sensitivity, self.uncertainty = torch.zeros_like(tensor), torch.zeros_like(tensor)

    def add(self, tensor: nn.Parameter, beta1: float, beta2: float) -> None:
        assert tensor.grad is not None
        now = (tensor * tensor.grad).abs_()
        self.sensitivity.lerp_(now, 1 - beta1)
        self.uncertainty.lerp_(now.sub_(self.sensitivity).abs_(), 1 - beta2)

    def importance(self) -> Tensor:
        return self.sensitivity * self.uncertainty

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.sensitivity, self.uncertainty

    def put(self, tensors: tuple[Tensor, Tensor]) -> None:
        self.sensitivity.copy_(tensors[0])
        self.uncertainty.copy_(tensors[1])


def widened(tensors: dict[str, Tensor], rank_pattern: dict[str, list[bool]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an adapter that PEFT saved without its cut singular values, with zeros in their places.

    The model that they make is the same: PEFT keeps dividing by the first rank.
    """
    kept = {name.replace(".default", "").rpartition(".lora_E")[0]: which for name, which in rank_pattern.items()}
    for name, tensor in tensors.items():
        layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        which = torch.tensor(kept.get(layer, []), dtype=torch.bool)
        dim = 1 if part == "B" else 0
        if layer in kept and tensor.shape[dim] != len(which):
            shape = (len(tensor), len(which)) if dim else (len(which), *tensor.shape[1:])
            wide = tensor.new_zeros(shape)
            wide[(slice(None), which) if dim else which] = tensor
            yield name, wide
        else:
            yield name, tensor
