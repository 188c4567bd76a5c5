"""Options of measuring a model: on what, and how it is asked. A field's docstring is its help text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onecard.config.inference import scale_problems
from onecard.config.parsing import comma_list, missing
from onecard.config.problems import Problem, too_small


@dataclass
class EvaluateOptions:
    """What is measured, and how it is asked."""

    suite: str | list[str] = ""
    """What to measure on, KIND:PATH, may be repeated. KIND: ceval, cmmlu, mmlu, mmcu, gaokao (folders as their authors
    publish them), open, extraction or perplexity (files); without a kind it is told by the layout."""
    output_path: str = ""
    """Folder for the report, answers.jsonl, and journal.jsonl, by which the same command goes on where it was cut."""
    lora_path: str | None = None
    """Adapter: a run directory, one of its checkpoints, or a Hub id. Without it the base model is measured."""
    adapter_scale: float = 1.0
    """How strongly the adapter is put on: 0 is the base, 1 what was trained. For LoRA, LoHa and LoKr."""
    sweep_scale: str = ""
    """Measure at each of these scales of the adapter, with commas between them, and at 0: gain over the base against
    forgetting, and the scale that is best. More scales may be added later to the same --output_path; empty: none."""
    prompt_type: str = "auto"
    """Prompt template. auto takes the one stored with the adapter."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether the model thinks before it answers, where its prompt template has a switch for that."""
    prompt: Literal["auto", "base", "chat"] = "auto"
    """Multiple choice as plain text (base) or in the prompt template (chat). auto: chat with an adapter, or where the
    tokenizer has a template of its own."""
    method: Literal["likelihood", "choice", "free"] = "likelihood"
    """Multiple choice by the likelihood of the options' letters, by decoding that may only write one of them (choice),
    or by an answer that is written freely, whose letter is then looked for."""
    shots: int = 0
    """Examples in front of each question: of the split dev, or drawn by --seed where there is none."""
    cot: bool = False
    """With --method free: the model reasons before it answers."""
    split: Literal["auto", "dev", "val", "test"] = "auto"
    """Which questions of a benchmark. auto: val for C-Eval, whose test has no answers; test for the others."""
    subjects: str = ""
    """Only these subjects of the benchmarks, with commas between them."""
    limit: int = 0
    """Only so many records of each suite from the top; 0: all."""
    batch_size: int = 8
    """Questions that are answered at once."""
    max_new_tokens: int = 0
    """Longest answer in tokens. 0: 16 for a letter, 512 otherwise."""
    window: int = 0
    """Perplexity: tokens that are read at once. 0: what the model can read, at most 2,048."""
    stride: int = 0
    """Perplexity: tokens between the beginnings of two windows. 0: half a window."""
    seed: int = 42
    """Seed of the intervals by resampling, and of drawn examples."""
    base_url: str = ""
    """Address of an OpenAI-compatible endpoint that grades open answers, such as that of onecard serve; empty: none."""
    judge_model: str = ""
    """Name of the model there."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; without one in it none is sent."""
    timeout_s: float = 300.0
    """Seconds until a grading must be whole."""
    max_attempts: int = 6
    """Times that the endpoint is asked before the evaluation ends; what was graded is kept."""
    compare: str | list[str] = ""
    """Measure nothing; compare two folders that this program wrote, A B, over the records that both answered, with the
    interval of the difference. A run of finetune --eval_suites stands for what it measured at its end, "base" for what
    the other run measured before its first step. --output_path is then the folder for comparison.json and
    comparison.md; empty: none."""

    def problems(self) -> list[Problem]:
        if self.compare:
            found = [("--suite", "and --compare contradict each other: one measures, the other reads")] * bool(
                self.suite
            )
            is_pair = isinstance(self.compare, list) and len(self.compare) == 2
            return found if is_pair else [*found, ("--compare", "takes two folders: A B")]
        found = missing(self, "suite", "output_path") + scale_problems(self.adapter_scale) + self._sweep_problems()
        if self.cot and self.method != "free":
            found.append(("--cot", f"needs --method free: {self.method} leaves no room to reason"))
        if bool(self.base_url) != bool(self.judge_model):
            found.append(("--judge_model", "and --base_url go together: which model grades, and where it is"))
        found += too_small(self, batch_size=1, shots=0, limit=0, max_new_tokens=0, window=0, stride=0, seed=0,
                           max_attempts=1)  # fmt: skip
        if self.window == 1:
            found.append(("--window", "1 token tells nothing of the next; use 2 or more"))
        elif 0 < self.window <= self.stride:
            found.append(("--stride", f"{self.stride} is not below the window of {self.window} tokens"))
        return found

    def _sweep_problems(self) -> list[Problem]:
        if not self.sweep_scale:
            return []
        try:
            wrong = [scale for scale in self.scales if not 0 <= scale <= 10]
        except ValueError:
            return [("--sweep_scale", f"{self.sweep_scale!r} is no list of numbers, such as 0.25,0.5,1")]
        found = [("--sweep_scale", f"{scale:g} is not between 0 (the base) and 10") for scale in wrong]
        if not self.lora_path:
            found.append(("--sweep_scale", "needs an adapter to scale: give --lora_path"))
        if self.adapter_scale != 1:
            found.append(("--adapter_scale", "and --sweep_scale contradict each other: one scale, or several"))
        if self.base_url:
            found.append(("--base_url", "does not go with --sweep_scale, which compares scores without a judge"))
        return found

    @property
    def scales(self) -> list[float]:
        """The scales of --sweep_scale and 0, in order. Raises ValueError for what is no number."""
        return sorted({0.0, *map(float, comma_list(self.sweep_scale))})

    @property
    def suites(self) -> list[str]:
        """The suites, one or several."""
        return [self.suite] if isinstance(self.suite, str) else list(self.suite)
