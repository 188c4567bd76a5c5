"""How adapters are merged, as typed and as carried out. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onecard.config.problems import Problem
from onecard.export.io.output import ShardOptions


@dataclass
class MergeSettings(ShardOptions):
    """How adapters are merged."""

    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Type of the written weights. auto: fp16 where weights and activations fit, else bf16, which is coarser."""
    accept_other_base: bool = False
    """Merge although the adapter was trained on a base with other files."""
    verify: bool = True
    """Reopen the result, compare it and measure how much of the adapters' effect on predictions is kept."""
    trust_remote_code: bool = False
    """Run Python code that the base model brings along."""
    adapter_scale: float = 1.0
    """How strongly the adapters are put on; 1 is what was trained. For LoRA, LoHa and LoKr."""

    def problems(self) -> list[Problem]:
        return scale_problems(self.adapter_scale) + super().problems()


def scale_problems(scale: float) -> list[Problem]:
    """What is wrong with the --adapter_scale of what is merged."""
    if 0 < scale <= 10:
        return []
    return [("--adapter_scale", f"{scale} is not above 0, which would be the base, and up to 10")]
