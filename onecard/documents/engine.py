"""An engine that also answers out of documents: under the model name `documents`, for API, page and terminal.

The question is searched for; where the documents are about it, the passages go into the prompt and their places below
the answer; where they are not, the answer says so and the model is not asked. All other requests pass unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from onecard.config.inference import DOCUMENTS_MODEL, LimitOptions, ParallelOptions
from onecard.data.messages import Turn
from onecard.data.wordings import language_of
from onecard.documents.index import EMBED_MODEL, DocumentIndex, StoredChunk
from onecard.documents.search import DocumentSearch
from onecard.documents.sources import listing, prompt_of, source_fields, without_listing, wordings
from onecard.documents.vectors import TextVectors, VectorSearch
from onecard.errors import ConfigError
from onecard.inference.adapters import AdapterManager
from onecard.inference.call import Chunk
from onecard.inference.engine import GenerationRequest, InferenceEngine
from onecard.inference.history import PromptTooLong, fit_history, prompt_budget

N_SHOWN = 5  # passages that the model reads, where they fit into its context
FEWEST_CHARS = 80  # of the best passage, where even that has to be cut


def open_search(folder: Path) -> DocumentSearch:
    """The search in an index. Raises DataError."""
    index = DocumentIndex(folder)
    model = index.setting(EMBED_MODEL)
    return DocumentSearch(index, VectorSearch(index, TextVectors(model)) if model else None)


class DocumentsEngine(InferenceEngine):
    """`InferenceEngine`, with the model name `documents` behind those of the adapters: the first of these answers."""

    def __init__(
        self, search: DocumentSearch, adapters: AdapterManager, limits: LimitOptions,
        parallel: ParallelOptions | None = None,
    ) -> None:  # fmt: skip
        if DOCUMENTS_MODEL in adapters.names:
            raise ConfigError("--documents", f"an adapter is called {DOCUMENTS_MODEL}, too; rename its folder")
        super().__init__(adapters, limits, parallel)
        self._search = search

    @property
    def names(self) -> tuple[str, ...]:
        return (*super().names, DOCUMENTS_MODEL)

    def adapter_of(self, name: str) -> str:
        return super().adapter_of("" if name == DOCUMENTS_MODEL else name)

    def add_adapter(self, name: str, path: str) -> None:
        if name == DOCUMENTS_MODEL:
            raise ConfigError("--adapter", f"{name} is the model that answers out of documents; choose another name")
        super().add_adapter(name, path)

    def stream(self, request: GenerationRequest, cancel: threading.Event | None = None) -> Iterator[list[Chunk]]:
        """As that of every engine; a raw prompt, which has no question, goes on without documents."""
        questions = [turn.one_text().strip() for turn in request.turns if turn.role == "user"]
        if request.adapter != DOCUMENTS_MODEL or request.prompt_ids is not None or not questions:
            yield from super().stream(request, cancel)
            return
        found, language = self._search.find(questions, N_SHOWN), language_of(questions[-1])
        # An answer that is held to a grammar cannot say that there is none, but in the form that was asked for.
        if not found.is_there and request.grammar is None:
            n_rows = len(self._rows(request))  # refuses what cannot be asked
            yield [Chunk(wordings()[language]["not_there"], finish_reason="stop")] * n_rows
            return
        turns, shown = self._with_passages(request, found.chunks, language)
        # Neither JSON nor calls of tools may be added to.
        may_add = request.grammar is None and all(turn.role != "tool_list" for turn in turns)
        for chunks in super().stream(replace(request, turns=turns), cancel):
            yield [_with_sources(chunk, shown, language, may_add) for chunk in chunks]

    def _with_passages(
        self, request: GenerationRequest, passages: Sequence[StoredChunk], language: str
    ) -> tuple[tuple[Turn, ...], Sequence[StoredChunk]]:
        """The turns with as many passages before the last question as fit, and these; older turns make room for them.

        Raises PromptTooLong: there is no room for even a part of one.
        """
        budget = prompt_budget(self.context_limit, request.sampling.max_new_tokens, self.limits.max_prompt_tokens)
        turns = [replace(t, content=without_listing(t.content)) if t.role == "assistant" else t for t in request.turns]
        place = max(number for number, turn in enumerate(turns) if turn.role == "user")
        question = f"{turns[place].content}\n{turns[place].input}".strip()

        def count(candidate: Sequence[Turn]) -> int:
            return self.count_tokens(candidate, request.adapter, request.prompt_type)

        while True:
            turns[place] = replace(turns[place], content=prompt_of(question, passages, language), input="")
            try:
                return fit_history(turns, count, budget).turns, passages
            except PromptTooLong:
                if len(passages) == 1 and len(passages[0].text) > FEWEST_CHARS:
                    half = passages[0].text[: len(passages[0].text) // 2]
                    passages = [passages[0]._replace(text=half)]
                elif len(passages) > 1:
                    passages = passages[:-1]
                else:
                    raise


def _with_sources(chunk: Chunk, shown: Sequence[StoredChunk], language: str, may_add: bool) -> Chunk:
    """The last chunk with its sources; all others as they are. may_add: whether the text may grow, too."""
    if chunk.finish_reason not in ("stop", "length"):
        return chunk
    text = chunk.text + (listing(chunk.text, shown, language) if may_add else "")
    return replace(chunk, text=text, sources=source_fields(chunk.text, shown))
