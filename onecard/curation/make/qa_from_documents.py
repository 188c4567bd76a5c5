"""Questions with answers out of documents: each passage of a document is one request.

Knows prompts and how a document is cut. Does not know HTTP or files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from onecard.config.curation import QaFromDocumentsOptions
from onecard.curation.make.answers import prompts, texts_in
from onecard.curation.make.journal import Journal
from onecard.curation.make.run import Asker, MakingTask
from onecard.data.messages import Document
from onecard.data.sources import ReadReport, read, source_of
from onecard.errors import DataError

_MIN_CHARS = 50  # a heading or a page number answers nothing


def passages(text: str, most: int) -> list[str]:
    """The text in pieces of at most `most` characters, cut at blank lines, else at lines, sentences, anywhere."""
    found = [text.strip()]
    for mark in (r"(?<=\n)\s*\n", r"(?<=\n)", r"(?<=[.!?。！？；])", r"(?<=.)"):
        if all(len(piece) <= most for piece in found):
            break
        found = [whole for piece in found for whole in _filled(re.split(mark, piece), most, len(piece) > most)]
    return [piece.strip() for piece in found if len(piece.strip()) >= _MIN_CHARS]


def _filled(parts: list[str], most: int, is_long: bool) -> list[str]:
    """Neighbouring parts put together while they fit."""
    if not is_long:
        return ["".join(parts)]
    found = [""]
    for part in parts:
        if found[-1] and len(found[-1]) + len(part) > most:
            found.append("")
        found[-1] += part
    return found


def qa_tasks(options: QaFromDocumentsOptions, journal: Journal) -> Iterator[MakingTask]:
    """A task for each passage that is not done; the same passage twice is asked for once. Raises DataError."""
    seen: set[str] = set()
    n_documents = 0
    for sample in read(source_of(options), report=ReadReport()):
        if not isinstance(sample, Document):
            continue
        n_documents += 1
        for number, passage in enumerate(passages(sample.text, options.passage_chars), start=1):
            mark = hashlib.sha256(passage.encode("utf-8")).hexdigest()[:16]
            key = f"{sample.record} passage {number} {mark}"
            if mark not in seen and key not in journal.done:
                yield MakingTask(key, partial(_ask, options, sample.record, passage))
            seen.add(mark)
    if not n_documents:
        raise DataError("no document: texts are needed, and only conversations are there", source_of(options).name)


def _ask(options: QaFromDocumentsOptions, record: str, passage: str, asker: Asker) -> None:
    prompt = prompts()[options.prompt_language]["qa"].format(n_new=options.n_per_passage, passage=passage)
    for row in asker.rows(prompt, _usable)[: options.n_per_passage]:
        asker.entry.rows.append({**row, "provenance": asker.provenance("qa-from-documents", record=record)})


def _usable(item: dict[str, Any]) -> dict[str, Any] | None:
    question, answer = texts_in(item, "question", "answer")
    return {"instruction": question, "input": "", "output": answer} if question and answer else None
