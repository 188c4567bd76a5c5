"""Answers of a model that is being trained, typed out while they are written: for questions to a run."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from onecard.config.inference import SamplingOptions
from onecard.data.messages import Turn
from onecard.inference.call import Chunk, ModelBundle, StreamingOptions
from onecard.inference.generate import prepare, stream_rows
from onecard.inference.out_of_memory import memory_errors

ADVICE = (
    "out of memory while answering; training goes on. Ask for fewer tokens (max_new_tokens), with one beam, or shorter"
)
INTERVAL_SECONDS = 0.1  # of a file that is written anew each time
LONGEST_SECONDS = 300.0  # for which training waits, and other processes with it


def live_answer(
    bundle: ModelBundle, turns: Sequence[Turn], sampling: SamplingOptions, cancel: threading.Event
) -> Iterator[Chunk]:
    """The answer so far, again and again; the last chunk has a `finish_reason`.

    The model is asked in the mode in which it is; the bundle's `context` must leave it fit to be trained. Raises
    ContextTooLong, DataError, ConfigError and OutOfMemory, after which the model can be trained on.
    """
    streaming = StreamingOptions(interval_seconds=INTERVAL_SECONDS, max_seconds=LONGEST_SECONDS)
    with memory_errors(ADVICE):
        row = prepare(bundle, turns, sampling)
        for (chunk,) in stream_rows(bundle, [row], sampling, streaming, cancel):
            yield chunk
