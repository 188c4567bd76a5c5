"""Options of the best of several answers (generate --best_of). A field's docstring is its help text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from onecard.config.data import ReadingOptions
from onecard.config.problems import Problem
from onecard.config.rollouts import reward_specs

SAMPLES = ".samples.jsonl"  # behind the name of the file of answers


@dataclass
class BestOfOptions(ReadingOptions):
    """Several answers to each question of a file, of which the best is kept."""

    best_of: int = 1
    """With --data_path: sample so many answers to each question (--temperature above 0), and write the best one."""
    reward: str = field(default="", metadata={"several": "texts"})
    """With --best_of, what an answer is worth: the directory of a run of finetune --objective reward, or checkers:
    exact, number, json_schema:FILE, regex:PATTERN, length:50-200, language:zh, each with a weight if wanted."""
    reward_file: str = ""
    """With --best_of: a Python file of your own, rewards.py or rewards.py:function, as for --objective grpo."""
    reward_seconds: float = 10.0
    """Most seconds that the function of --reward_file, or a pattern of regex, may take for one answer."""
    save_pairs: str | None = None
    """With --best_of: a jsonl file for preference pairs of the best and the worst answer (finetune --objective dpo)."""
    pair_margin: float = 0.0
    """Least difference of the rewards of a pair; pairs with equal rewards are left out in any case."""

    @property
    def reward_run(self) -> str:
        """The directory of a reward model; empty where checkers are meant."""
        return self.reward if self.reward and Path(self.reward).expanduser().is_dir() else ""

    def best_of_problems(self) -> list[Problem]:
        """What is wrong with these by themselves."""
        if self.best_of < 1:
            return [("--best_of", f"{self.best_of} is too few; use 2 or more answers")]
        given = [name for name in ("reward", "reward_file", "save_pairs", "pair_margin") if getattr(self, name)]
        if self.best_of == 1:
            return [(f"--{name}", "goes with --best_of 2 or more") for name in given]
        found: list[Problem] = []
        if not (self.reward or self.reward_file):
            found.append(
                ("--reward", "is missing: say what an answer is worth, such as a reward run, number, or exact")
            )
        if self.reward_run and self.reward_file:
            found.append(("--reward_file", "does not go with a reward run; give one of them"))
        try:
            specs = [] if self.reward_run else reward_specs(self.reward)
            if any(spec.name == "length" and not spec.argument for spec in specs):
                raise ValueError("length needs a range here: length:50-200, length:50- or length:-200")
        except ValueError as reason:
            found.append(("--reward", f"{reason}; nor is it the directory of a reward run"))
        for name in ("reward_seconds", "pair_margin"):
            if not (0 <= getattr(self, name) < math.inf) or (name == "reward_seconds" and not self.reward_seconds):
                found.append((f"--{name}", f"{getattr(self, name):g} is not a number above 0"))
        return found
