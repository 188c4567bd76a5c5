"""Options of learning from rewards (--objective grpo). A field's docstring is its help text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from onecard.config.problems import Problem

# Checkers by name, and whether each needs an argument (True), may have one (None) or has none (False).
CHECKERS: dict[str, bool | None] = {
    "exact": False, "number": False, "json_schema": None, "regex": True, "length": None, "language": True,
}  # fmt: skip
NEEDS_REFERENCE = ("exact", "number")
_NEXT = re.compile(rf",\s*(?=(?:{'|'.join(CHECKERS)})(?:[:,]|$))")
_WEIGHT = re.compile(r"(?:(?P<argument>.*):)?(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", re.DOTALL)
_RANGE = re.compile(r"(\d*)-(\d*)")


class RewardSpec(NamedTuple):
    """One checker of --reward: regex:^\\d+$:0.5 is RewardSpec("regex", "^\\d+$", 0.5)."""

    name: str
    argument: str = ""
    weight: float = 1.0

    @property
    def range(self) -> tuple[int, float]:
        """Of length: the fewest and the most characters; 50-200, 50- and -200."""
        low, high = _RANGE.fullmatch(self.argument).groups()  # type: ignore[union-attr]
        return int(low or 0), int(high) if high else math.inf


def reward_specs(text: str) -> list[RewardSpec]:
    """The checkers of --reward. Raises ValueError that says which part cannot be read, and what could.

    number,length:-200:0.2 -> number with weight 1, length with the argument -200 and weight 0.2
    """
    return [_spec(part.strip()) for part in _NEXT.split(text)] if text.strip() else []


def _spec(part: str) -> RewardSpec:
    name, _, rest = part.partition(":")
    if name not in CHECKERS:
        raise ValueError(f"{name!r} is no checker; there are {', '.join(CHECKERS)}, and --reward_file for your own")
    found = _WEIGHT.fullmatch(rest)
    # regex:5 is a pattern; a weight has an argument in front of it where one is needed.
    is_weighted = found is not None and (found["argument"] is not None or not CHECKERS[name])
    argument, weight = ((found["argument"] or ""), float(found["weight"])) if found and is_weighted else (rest, 1.0)
    spec = RewardSpec(name, argument, weight)
    if CHECKERS[name] and not argument:
        raise ValueError(f"{name} needs an argument: {name}:{'zh' if name == 'language' else 'PATTERN'}")
    if CHECKERS[name] is False and argument:
        raise ValueError(f"{name} takes nothing but a weight, such as {name}:0.5, and not {argument!r}")
    if name == "regex":
        try:
            re.compile(argument)
        except re.error as reason:
            raise ValueError(f"{argument!r} is no regular expression: {reason}") from None
    if name == "length" and argument and (not _RANGE.fullmatch(argument) or spec.range[0] > spec.range[1]):
        raise ValueError(f"{argument!r} is no range of characters; write length:50-200, length:50- or length:-200")
    return spec


def reward_file_parts(text: str) -> tuple[str, str]:
    """--reward_file as (file, function): rewards.py:score -> ("rewards.py", "score"); the function is `reward` else."""
    file, _, function = text.rpartition(":")
    return (file, function) if file.endswith(".py") and function.isidentifier() else (text, "reward")


@dataclass
class RolloutOptions:
    """Answers that are sampled while training, and what they are worth (--objective grpo)."""

    reward: str = field(default="", metadata={"several": "texts"})
    """What an answer is worth: exact (equals the recorded answer), number (its last number does), regex:PATTERN,
    json_schema:FILE (without FILE: the row's field json_schema), length (shorter is better; length:50-200 characters),
    language:zh. Each with a weight if wanted; they are added: number:1,length:-200:0.2."""
    reward_file: str = ""
    """A Python file of your own, rewards.py or rewards.py:function: reward(answer, reference, row) gives a number."""
    reward_seconds: float = 10.0
    """Most seconds that the function of --reward_file, or a pattern of regex, may take for one answer."""
    rollouts: int = 8
    """Answers that are sampled to each prompt of a step and compared with one another."""
    rollout_temperature: float = 1.0
    """Temperature of sampling them; the loss is that of the same distribution."""
    rollout_max_tokens: int = 256
    """Most tokens of an answer; those of prompts are at most --cutoff_len less these."""
    rollout_batch: int = 0
    """Answers that are sampled at once; 0: as many as have room. A matter of memory and speed."""
    grpo_loss: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    """What the loss is divided by. grpo: each answer by its tokens; dapo: the step by its tokens; dr_grpo: each answer
    by --rollout_max_tokens, and advantages are not divided by the deviation of a group's rewards."""
    grpo_updates: int = 1
    """Updates by the answers of a step; only from the second on the ratio is not 1 and --grpo_clip counts."""
    grpo_clip: float = 0.2
    """How far the ratio of new to old probability may leave 1 and still pull."""
    grpo_clip_high: float = 0.0
    """The same above 1 (DAPO: 0.28); 0: as --grpo_clip."""
    kl_beta: float = 0.0
    """Weight of the KL divergence from the base without adapter; 0: none, which saves a forward pass."""
    mask_overlong: bool = False
    """Learn nothing from answers that --rollout_max_tokens cut off (DAPO's overlong filtering)."""
    log_rollouts: bool = False
    """Keep all sampled answers with their rewards in OUTPUT_PATH/rollouts.jsonl."""

    def rollout_problems(self, objective: str) -> list[Problem]:
        """What is wrong with these, or does not go with the objective."""
        if objective != "grpo":
            default = RolloutOptions()
            return [(f"--{name}", f"is of --objective grpo, and this one is {objective}")
                    for name, value in vars(default).items() if getattr(self, name) != value]  # fmt: skip
        found: list[Problem] = []
        try:
            if not reward_specs(self.reward) and not self.reward_file:
                found.append(("--reward", "is missing: say what an answer is worth, such as exact, or --reward_file"))
        except ValueError as reason:
            found.append(("--reward", str(reason)))
        for name, least in (("rollouts", 2), ("rollout_max_tokens", 1), ("grpo_updates", 1), ("rollout_batch", 0)):
            if getattr(self, name) < least:
                found.append((f"--{name}", f"{getattr(self, name)} is too few; use {least} or more"))
        for name, high in (("reward_seconds", math.inf), ("rollout_temperature", 100.0), ("grpo_clip", 1.0)):
            if not 0 < getattr(self, name) < high:
                found.append((f"--{name}", f"{getattr(self, name):g} is not between 0 and {high:g}"))
        for name in ("grpo_clip_high", "kl_beta"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append((f"--{name}", f"{getattr(self, name):g} is not 0 or more"))
        return found
