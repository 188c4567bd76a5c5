"""A summary of one document, however long: its parts are summarised, then the summaries, until one is left.

Every prompt fits the model's context. Knows blocks and an engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from onecard.config.inference import SamplingOptions
from onecard.data.messages import Turn
from onecard.data.wordings import language_of
from onecard.documents.chunks import chunks_of
from onecard.documents.reading import Block
from onecard.documents.sources import wordings
from onecard.errors import DataError
from onecard.inference.call import Chunk
from onecard.inference.engine import GenerationRequest, InferenceEngine
from onecard.inference.history import prompt_budget

LARGEST_PIECE, SMALLEST_PIECE = 400, 25  # words of what parts are put together of
_LANGUAGE_CHARS = 2000  # of the beginning, which tell the language
_LEAST_SHRINK = 4  # a summary is at most such a part of what one prompt holds, so that several of them fit into one


class DocumentSummary:
    """Summarises with one model; `n_asked` prompts were answered so far."""

    def __init__(self, engine: InferenceEngine, sampling: SamplingOptions) -> None:
        self._engine, self._sampling = engine, sampling
        self._budget = prompt_budget(engine.context_limit, sampling.max_new_tokens, engine.limits.max_prompt_tokens)
        self.n_asked = 0

    def of(self, blocks: Sequence[Block]) -> Iterator[Chunk]:
        """The summary as it is written; the last chunk has a `finish_reason`. Raises DataError, and as the engine."""
        words = wordings()[language_of("".join(block.text for block in blocks)[:_LANGUAGE_CHARS])]
        texts, size = [""], LARGEST_PIECE
        while size >= SMALLEST_PIECE:
            texts = ["\n".join((*chunk.headings[-1:], chunk.text)) for chunk in chunks_of(blocks, size)]
            if all(self._fits(text, words["map"]) for text in texts):
                break
            size //= 2
        else:
            n_tokens = self._engine.context_limit
            raise DataError(f"the context of {n_tokens} tokens is too short to summarise in: lower --max_new_tokens")
        prompt, n_before = words["map"], math.inf
        while len(parts := self._grouped(texts, prompt)) > 1:
            if len(parts) >= n_before:
                raise DataError("the summaries of parts do not become fewer: lower --max_new_tokens")
            texts, n_before = [self._short(part, prompt) for part in parts], len(parts)
            prompt = words["reduce"]
        yield from self._asked(parts[0], prompt, self._sampling)

    def _grouped(self, texts: Sequence[str], prompt: str) -> list[str]:
        """Neighbours joined, as many as fit into one prompt."""
        found = [texts[0]]
        for text in texts[1:]:
            joined = f"{found[-1]}\n\n{text}"
            if self._fits(joined, prompt):
                found[-1] = joined
            else:
                found.append(text)
        return found

    def _fits(self, text: str, prompt: str) -> bool:
        return self._engine.count_tokens([Turn("user", prompt.format(text=text))]) <= self._budget

    def _short(self, text: str, prompt: str) -> str:
        """The summary of a part."""
        most = max(1, min(self._sampling.max_new_tokens, self._budget // _LEAST_SHRINK))
        least = min(self._sampling.min_new_tokens, most)
        chunks = self._asked(text, prompt, replace(self._sampling, max_new_tokens=most, min_new_tokens=least))
        return list(chunks)[-1].text.strip()

    def _asked(self, text: str, prompt: str, sampling: SamplingOptions) -> Iterator[Chunk]:
        self.n_asked += 1
        turns = (Turn("user", prompt.format(text=text)),)
        for (chunk,) in self._engine.stream(GenerationRequest(turns, sampling=sampling)):
            yield chunk
