"""The verbs of `onecard documents` that need a model: ask and summarize."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from onecard.config.base_model import ModelOptions
from onecard.config.inference import AnsweringModelOptions, InferenceOptions, LimitOptions, SamplingOptions
from onecard.config.parsing import missing
from onecard.config.problems import Problem


@dataclass
class QuestionOptions:
    """What is asked of which documents."""

    question: str = ""
    """One question, also as the first words; without it a chat in the terminal begins."""
    index: str = "outputs/documents"
    """Folder of the index."""


@dataclass
class SummaryOptions:
    """What is summarised."""

    file: str = ""
    """The document, also as the first word; it need not be in an index."""
    max_file_mib: float = 100.0
    """A larger file is refused."""

    def problems(self) -> list[Problem]:
        return missing(self, "file")


@dataclass
class AskDocumentsConfig:
    """Answer a question out of the documents of an index, or chat about them in the terminal."""

    asked: QuestionOptions = field(default_factory=QuestionOptions)
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    model: ModelOptions = field(default_factory=AnsweringModelOptions)
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(max_new_tokens=512))
    limits: LimitOptions = field(default_factory=LimitOptions)


@dataclass
class SummarizeConfig:
    """Summarise one document, however long, within the model's context."""

    summary: SummaryOptions = field(default_factory=SummaryOptions)
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    model: ModelOptions = field(default_factory=AnsweringModelOptions)
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(max_new_tokens=512))
    limits: LimitOptions = field(default_factory=LimitOptions)


def ask_documents(config: AskDocumentsConfig) -> None:
    """Answer one question on standard output, or chat."""
    from onecard.documents.index import DocumentIndex

    DocumentIndex(Path(config.asked.index)).close()  # one that is not there is told before a model is loaded

    from collections.abc import Iterator

    from onecard.config.inference import DOCUMENTS_MODEL
    from onecard.inference.call import Chunk
    from onecard.inference.engine import GenerationRequest, open_engine
    from onecard.inference.history import ChatHistory
    from onecard.recipes import engine_kind
    from onecard.serve.terminal.ask import answer_once
    from onecard.serve.terminal.chat import chat_in_terminal

    sampling, session = config.sampling, ChatHistory(system=config.inference.system)
    engine = open_engine(config.model, config.inference, config.limits, kind=engine_kind(config.asked.index))
    if not config.asked.question:
        chat_in_terminal(engine, session, sampling, adapter=DOCUMENTS_MODEL)
        return

    def answer(question: str, number: int) -> Iterator[Chunk]:
        turns = session.ask(question).prompt
        request = GenerationRequest(turns, sampling=sampling, adapter=DOCUMENTS_MODEL, number=number)
        for (chunk,) in engine.stream(request):
            yield chunk

    answer_once(answer, config.asked.question, rewrites=sampling.num_beams > 1)


def summarize_document(config: SummarizeConfig) -> None:
    """Summarise one document on standard output."""
    from onecard.data.values import UnusableRecord
    from onecard.documents.reading import read_blocks
    from onecard.documents.summary import DocumentSummary
    from onecard.errors import DataError
    from onecard.inference.engine import open_engine
    from onecard.serve.terminal.ask import answer_once

    file = Path(config.summary.file).expanduser()
    try:
        blocks = read_blocks(file, config.summary.max_file_mib)
    except (UnusableRecord, OSError) as reason:
        raise DataError(str(getattr(reason, "strerror", None) or reason), str(file)) from None
    summary = DocumentSummary(open_engine(config.model, config.inference, config.limits), config.sampling)
    answer_once(lambda text, number: summary.of(blocks), "", rewrites=config.sampling.num_beams > 1)
