"""How the next token is chosen: from `SamplingOptions` to what `model.generate` takes. The only place that builds it.

Four modes, by two options: greedy (temperature 0, one beam), sample, beam and beam-sample. Knows options and scores.
It does not know text, templates or when an answer ends (`stopping.py`).

Sampling draws one number per row and step from a stream of the row's own, so a row's answer depends on the seed and
the row's number, and not on the rows that happen to lie beside it. What remains: a batch changes the last bits of the
scores in fp16 and bf16, and on rare ties the token. Beam-sample draws inside transformers for all rows at once, so
there the composition of the batch counts too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from onecard.config.inference import SamplingOptions

Mode = Literal["greedy", "sample", "beam", "beam-sample"]


def mode_of(sampling: SamplingOptions) -> Mode:
    """The mode that these options ask for."""
    if sampling.num_beams > 1:
        return "beam-sample" if sampling.temperature > 0 else "beam"
    return "sample" if sampling.temperature > 0 else "greedy"


@dataclass(frozen=True)
class CacheOptions:
    """The key-value cache: `static` reserves it at once; `compile`, which needs that, compiles decoding on a GPU.

    Compiled without CUDA graphs: those belong to the thread that recorded them, and answers come from several.
    """

    static: bool = False
    compile: bool = False

    def settings(self) -> dict[str, Any]:
        """What these are to `GenerationConfig`. Left alone, transformers compiles whenever the cache is static."""
        settings: dict[str, Any] = {"disable_compile": not self.compile}
        if self.static:
            settings["cache_implementation"] = "static"
        if self.compile:
            settings["compile_config"] = CompileConfig(mode="default", fullgraph=False)
        return settings


def generation_config(
    sampling: SamplingOptions,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    cache: CacheOptions | None = None,
) -> GenerationConfig:
    """What `model.generate` needs for this mode.

    Every setting is given, neutral ones too: transformers fills what is left out from the generation_config.json of
    the base model, and an answer would then depend on a file nobody looked at.
    """
    is_beam_sample = mode_of(sampling) == "beam-sample"
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(sampling.min_new_tokens, max_new_tokens) or None,
        num_beams=sampling.num_beams,
        # Plain sampling is done by `PickByRow`; generate itself then takes the one token left.
        do_sample=is_beam_sample,
        temperature=sampling.temperature if is_beam_sample else 1.0,
        top_p=sampling.top_p if is_beam_sample else 1.0,
        top_k=sampling.top_k if is_beam_sample else 50,  # 50 is the value that transformers takes for "not set"
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        repetition_penalty=sampling.repetition_penalty,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size,
        length_penalty=1.0,
        early_stopping=False,
        num_return_sequences=num_return_sequences,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **(cache or CacheOptions()).settings(),
    )


def penalties(
    sampling: SamplingOptions, n_prompt: int, stop_ids: Sequence[int], max_new_tokens: int, device: torch.device
) -> LogitsProcessorList:
    """What `model.generate` makes of `generation_config` for one row, in its order; where it is not called."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.no_repeat_ngram_size > 0:
        processors.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    if (least := min(sampling.min_new_tokens, max_new_tokens)) and stop_ids:
        processors.append(MinNewTokensLengthLogitsProcessor(n_prompt, least, list(stop_ids), device=str(device)))
    return processors


def logits_processors(sampling: SamplingOptions, row_numbers: Sequence[int], n_drawn: int = 0) -> LogitsProcessorList:
    """What changes the scores besides `generation_config`; `row_numbers` choose each row's stream of random numbers.

    n_drawn: tokens of each row that were drawn before.
    """
    processors = LogitsProcessorList()
    if mode_of(sampling) != "sample":
        return processors
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(PickByRow(sampling.seed, row_numbers, n_drawn))
    return processors


@contextmanager
def seeded(sampling: SamplingOptions, row_numbers: Sequence[int], device: torch.device) -> Iterator[None]:
    """Seed torch for the draws of beam-sample, and put its state back afterwards; does nothing in other modes."""
    if mode_of(sampling) != "beam-sample":
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence((sampling.seed, *row_numbers)).generate_state(1)[0]))
        yield


class PickByRow(LogitsProcessor):
    """Draws each row's token from its own stream of random numbers, and leaves only that token possible.

    Inverse of the distribution function: the first token at which the summed probabilities exceed the drawn number.

        probabilities 0.2 0.5 0.3, drawn 0.65  ->  sums 0.2 0.7 1.0  ->  scores -inf 0 -inf
    """

    def __init__(self, seed: int, row_numbers: Sequence[int], n_drawn: int = 0) -> None:
        self._streams = [np.random.Generator(np.random.PCG64((seed, number))) for number in row_numbers]
        for stream in self._streams:
            stream.random(n_drawn)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (batch, vocab), after temperature, top-k and top-p -> the same shape, 0 for one token per row."""
        drawn = [[stream.random()] for stream in self._streams]
        # float64: over 100,000 tokens the sums of float32 would lose the unlikely ones.
        sums = scores.softmax(dim=-1, dtype=torch.float32).double().cumsum(dim=-1)
        target = torch.tensor(drawn, dtype=torch.float64, device=scores.device) * sums[:, -1:]
        chosen = torch.searchsorted(sums, target, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
