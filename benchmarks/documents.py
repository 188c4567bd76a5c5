#!/usr/bin/env python
"""Documents that are asked: whether the right one is found, what is not in them, and how long 100,000 chunks take.

    python benchmarks/documents.py [--chunks 100000]

The 200 documents and their questions are those of planted_documents.py; the threshold is calibrated on questions other
than those that it is measured with. The many chunks are random words with the frequencies of language (Zipf), half of
them Chinese characters; a query is ten words out of one chunk. Writes benchmarks/results/documents.json.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, write_result  # noqa: E402
from benchmarks.planted_documents import ANSWERED, LANGUAGES, UNANSWERED, PlantedQuestion, planted, write  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main  # noqa: E402

WIDTH = 256  # of the vectors, as minishlab's multilingual models have
CHUNKS_PER_DOCUMENT = 100
WORDS_OF_CHUNK, WORDS_OF_QUERY = 150, 10
N_QUERIES = 200


@dataclass
class DocumentsBenchmarkOptions:
    """What is measured."""

    chunks: int = 100_000
    """Chunks of the large index; 0: only what is found is measured."""
    output: str = str(RESULTS / "documents.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def found_share(search: Any, questions: Sequence[PlantedQuestion]) -> dict[str, Any]:
    """How often the right document is the first, and among the first three."""
    shown = [[chunk.document for chunk in search.find([each.text], 3).chunks] for each in questions]
    return {
        "questions": len(questions),
        "first": sum(each.source in names[:1] for each, names in zip(questions, shown, strict=True)),
        "in_first_3": sum(each.source in names for each, names in zip(questions, shown, strict=True)),
    }


def calibrated(search: Any, questions: Sequence[PlantedQuestion]) -> dict[str, Any]:
    """The thresholds of coverage, in hundredths, that tell most questions apart that are answered and that are not."""
    coverages = [(search.find([each.text], 3).coverage, bool(each.source)) for each in questions]
    right = {
        hundredths: sum((coverage >= hundredths / 100) == is_there for coverage, is_there in coverages)
        for hundredths in range(5, 96)
    }
    best = [hundredths / 100 for hundredths, n in right.items() if n == max(right.values())]
    return {"questions": len(questions), "right": max(right.values()), "least": best[0], "most": best[-1]}


def quality(folder: Path) -> dict[str, Any]:
    """What is found in the planted documents."""
    from onecard.documents.index import DocumentIndex
    from onecard.documents.search import LEAST_COVERAGE, DocumentSearch
    from onecard.documents.update import ReadingLimits, update

    given = planted()
    write(given.files, folder / "in")
    index = DocumentIndex(folder / "index", create=True)
    update(index, [folder / "in"], ReadingLimits(300, 100))
    search = DocumentSearch(index)
    asked: dict[str, list[PlantedQuestion]] = {name: getattr(given, name) for name in (*ANSWERED, *UNANSWERED)}
    there = {name: sum(search.find([each.text], 3).is_there for each in them) for name, them in asked.items()}
    index.close()
    return {
        "documents": len(given.files),
        "found": {
            language: found_share(search_of(folder), [q for q in given.questions if q.source.startswith(language)])
            for language in LANGUAGES
        },
        "threshold": LEAST_COVERAGE,
        "calibration": calibrated(search_of(folder), given.calibration),
        "said_to_be_there": there,
        "of": {name: len(them) for name, them in asked.items()},
    }


def turned_away(folder: Path) -> dict[str, int]:
    """Questions to this project's own pages, which name no other thing: how many are taken for such ones."""
    from onecard.documents.index import DocumentIndex
    from onecard.documents.other_things import is_about_another
    from onecard.documents.search import N_COVERED
    from onecard.documents.update import ReadingLimits, update

    shutil.copytree(ROOT / "docs", folder / "in")
    questions: list[str] = []
    for page in sorted(folder.glob("in/*/faq.md")):
        questions += re.findall(r"^### (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        page.unlink()  # else each question would find itself
    for file in sorted(ROOT.glob("field-recipes/*/data.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines()[::7]:
            row = json.loads(line)
            questions.append(row["messages"][1]["content"] if "messages" in row else row["instruction"])
    index = DocumentIndex(folder / "index", create=True)
    update(index, [folder / "in"], ReadingLimits(300, 100))
    search = search_of(folder)
    found = [is_about_another(each, search.find([each], N_COVERED).chunks, index.unknown) for each in questions]
    index.close()
    return {"questions": len(questions), "turned_away": sum(found)}


def search_of(folder: Path) -> Any:
    """The search in the index of a folder."""
    from onecard.documents.engine import open_search

    return open_search(folder / "index")


def random_texts(seed: int = 1) -> Callable[[int], str]:
    """The text of each chunk: words of one of 50,000, or characters of one of 5,000, with the frequencies of Zipf."""
    draw = random.Random(seed)
    latin = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(50_000)]
    han = [chr(0x4E00 + k) for k in range(5000)]
    weights = {len(words): list(accumulate(1 / rank for rank in range(1, len(words) + 1))) for words in (latin, han)}

    def text(number: int) -> str:
        words, blank = (latin, " ") if number % 2 else (han, "")
        return blank.join(draw.choices(words, cum_weights=weights[len(words)], k=WORDS_OF_CHUNK))

    return text


def speed(folder: Path, n_chunks: int) -> dict[str, Any]:
    """Seconds to fill an index, and milliseconds of a query by words and by vectors."""
    import numpy as np

    from onecard.documents.chunks import TextChunk
    from onecard.documents.index import DocumentIndex
    from onecard.documents.search import N_RANKED, DocumentSearch
    from onecard.documents.vectors import VectorSearch, stored

    index, text, vectors = DocumentIndex(folder, create=True), random_texts(), np.random.default_rng(0)
    queries, begun = [], time.perf_counter()
    for first in range(0, n_chunks, CHUNKS_PER_DOCUMENT):
        texts = [text(number) for number in range(first, min(first + CHUNKS_PER_DOCUMENT, n_chunks))]
        made = vectors.normal(size=(len(texts), WIDTH)).astype(np.float32)
        chunks = [TextChunk(each, 0, ()) for each in texts]
        index.put("/a", f"{first}.txt", str(first), chunks, stored(made))
        queries.append(query_of(texts[(first // CHUNKS_PER_DOCUMENT) % 2]))
    seconds = time.perf_counter() - begun
    queries = queries[:N_QUERIES]
    model: Any = type(
        "RandomVectors", (), {"of": lambda self, texts: vectors.random((len(texts), WIDTH), np.float32)}
    )()
    search, by_vectors = DocumentSearch(index), VectorSearch(index, model)
    by_vectors.nearest("", 1)  # reads the vectors
    return {
        "chunks": index.n_chunks(),
        "fill_s": round(seconds, 1),
        "mib": round(index.path.stat().st_size / 2**20),
        "words_ms": milliseconds(lambda query: search.find([query], 5), queries),
        "vectors_ms": milliseconds(lambda query: by_vectors.nearest(query, N_RANKED), queries),
        "vector_width": WIDTH,
    }


def query_of(text: str) -> str:
    """Some words that stand together in a text."""
    return " ".join(text.split()[:WORDS_OF_QUERY]) if " " in text else text[:WORDS_OF_QUERY]


def milliseconds(work: Callable[[str], Any], queries: Sequence[str]) -> dict[str, float]:
    """The median of the times, the time that 95 % keep below, and the longest; the same in time of processors.

    The latter adds up the threads, and says what other work on the machine does not change.
    """
    clocks: dict[str, Callable[[], float]] = {"": time.perf_counter, "cpu_": time.process_time}
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for query in queries:
        begun = {name: clock() for name, clock in clocks.items()}
        work(query)
        for name, clock in clocks.items():
            times[name].append(1000 * (clock() - begun[name]))
    found: dict[str, float] = {}
    for name, each in times.items():
        each.sort()
        at = {"median": each[len(each) // 2], "p95": each[int(len(each) * 0.95)], "longest": each[-1]}
        found |= {f"{name}{what}": round(value, 1) for what, value in at.items()}
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure and write the result."""
    options = parse(DocumentsBenchmarkOptions, argv, description=__doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        result = {"machine": machine("cpu"), "quality": quality(Path(name) / "planted")}
        result["own_pages"] = turned_away(Path(name) / "pages")
        if options.chunks:
            result["speed"] = speed(Path(name) / "large", options.chunks)
    write_result(options.output, result)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
