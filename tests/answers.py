"""What a model answers to several conversations at once, without the engine that serves them."""

from __future__ import annotations

from collections.abc import Sequence

from onecard.config.inference import SamplingOptions
from onecard.data.messages import Turn
from onecard.inference.call import ModelBundle
from onecard.inference.generate import Generation, answer_rows, prepare


def answers_of(
    bundle: ModelBundle, conversations: Sequence[Sequence[Turn]], sampling: SamplingOptions
) -> list[Generation]:
    rows = [prepare(bundle, turns, sampling, number=number) for number, turns in enumerate(conversations)]
    return answer_rows(bundle, rows, sampling)
