"""Answer questions out of your own documents: pdf, docx, markdown, html and text, with the sources of each answer.

onecard documents add manuals --index outputs/manuals
onecard documents ask "How long is the warranty?" --index outputs/manuals --lora_path outputs/my-first-adapter
onecard documents serve --index outputs/manuals --lora_path outputs/my-first-adapter
onecard documents summarize manuals/pump.pdf --lora_path outputs/my-first-adapter
onecard documents list --index outputs/manuals
onecard documents remove "manuals-2019/*" --index outputs/manuals
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.config.inference import ServeConfig
from onecard.config.parsing import missing, parse, parse_verb
from onecard.config.problems import Problem
from onecard.inference.run_files import stored_by_first
from onecard.programs._documents_ask import AskDocumentsConfig, SummarizeConfig, ask_documents, summarize_document


@dataclass
class IndexOptions:
    """Which index."""

    index: str = "outputs/documents"
    """Folder of the index."""


@dataclass
class AddOptions(IndexOptions):
    """Bring documents into an index; without any, read again what was added before and has changed."""

    data_path: str | list[str] = ""
    """Files and folders, also as the first words; those of a folder that are gone are taken out."""
    embed_model: str = ""
    """For finding by meaning as well as by words: a model of model2vec, a directory or a Hub id such as
    minishlab/potion-multilingual-128M. Chosen with the first documents."""
    chunk_size: int = 300
    """Most words, or Chinese characters, of a passage that is found and shown to the model."""
    max_file_mib: float = 100.0
    """Larger files are skipped."""

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if self.chunk_size < 20:
            found.append(("--chunk_size", f"{self.chunk_size} is too short to answer anything; use 20 or more"))
        if not self.max_file_mib > 0:
            found.append(("--max_file_mib", f"{self.max_file_mib} allows no file; use more than 0"))
        return found


@dataclass
class ListedOptions(IndexOptions):
    """Show the documents of an index."""


@dataclass
class ServeDocumentsConfig(ServeConfig):
    """Serve them over the OpenAI API, with the options of `onecard serve`."""


@dataclass
class RemoveOptions(IndexOptions):
    """Take documents out of an index; the files stay, and come again when their folder is added again."""

    names: str = ""
    """Which, also as the first words: names as `list` shows them, with commas between; * stands for any text."""

    def problems(self) -> list[Problem]:
        return missing(self, "names")


def add_documents(options: AddOptions) -> None:
    """Bring documents into the index, and say what came of it."""
    from onecard.console import say
    from onecard.documents.index import DocumentIndex
    from onecard.documents.update import ReadingLimits, update

    given = [options.data_path] if isinstance(options.data_path, str) else options.data_path
    index = DocumentIndex(Path(options.index), create=bool(given[0]))
    limits = ReadingLimits(options.chunk_size, options.max_file_mib)
    counts = update(index, [Path(path) for path in given if path], limits, options.embed_model)
    more = f"; {counts.n_skipped:,} skipped" if counts.n_skipped else ""
    say(f"{counts.n_read:,} documents read, {counts.n_same:,} as before, {counts.n_gone:,} gone{more}")
    say(f"{len(index.documents()):,} documents in {index.n_chunks():,} passages are in {options.index}")


def list_documents(options: ListedOptions) -> None:
    """Print name and size of each document."""
    from onecard.console import say
    from onecard.documents.index import DocumentIndex

    found = DocumentIndex(Path(options.index)).documents()
    for document in found:
        say(f"{document.n_chunks:>7,}  {document.name}")
    say(f"{len(found):,} documents in {sum(document.n_chunks for document in found):,} passages")


def remove_documents(options: RemoveOptions) -> None:
    """Take out what the names fit."""
    from fnmatch import fnmatchcase
    from unicodedata import normalize

    from onecard.config.parsing import comma_list
    from onecard.console import nearest, say
    from onecard.documents.index import DocumentIndex, StoredDocument
    from onecard.errors import DataError

    index, wanted = DocumentIndex(Path(options.index)), comma_list(options.names)
    documents = index.documents()

    def fits(document: StoredDocument, name: str) -> bool:
        # macOS tells names with their accents apart, which nobody types.
        return fnmatchcase(normalize("NFC", document.name), normalize("NFC", name))

    for name in wanted:
        if not any(fits(document, name) for document in documents):
            known = [document.name for document in documents]
            raise DataError(f"no document is called {name}{nearest(name, known)}", options.index)
    gone = [document for document in documents if any(fits(document, name) for name in wanted)]
    index.remove(gone)
    say(f"{len(gone):,} documents were taken out")


def serve_documents(words: list[str]) -> None:
    """`onecard serve` with these documents."""
    from onecard.programs import serve

    given = any(word.partition("=")[0] in ("--index", "--documents") for word in words)
    index = [] if given else ["--documents", IndexOptions.index]
    serve.main([*index, *(f"--documents{word[7:]}" if word.partition("=")[0] == "--index" else word for word in words)])


# Each verb: its options, what its first words are, and what is done.
VERBS: dict[str, tuple[type, str, Callable[[Any], None]]] = {
    "add": (AddOptions, "--data_path", add_documents),
    "ask": (AskDocumentsConfig, "--question", ask_documents),
    "serve": (ServeDocumentsConfig, "", lambda _: None),  # it reads its words itself
    "list": (ListedOptions, "", list_documents),
    "remove": (RemoveOptions, "--names", remove_documents),
    "summarize": (SummarizeConfig, "--file", summarize_document),
}


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words[0] if words else ""
    if verb == "serve":
        serve_documents(words[1:])
        return
    # `documents add manuals` is `documents add --data_path manuals`.
    if verb in VERBS and VERBS[verb][1] and len(words) > 1 and not words[1].startswith("-"):
        n_plain = next((k for k, word in enumerate(words) if word.startswith("-")), len(words))
        plain = words[1:n_plain] if verb == "add" else [("," if verb == "remove" else " ").join(words[1:n_plain])]
        words = [verb, VERBS[verb][1], *plain, *words[n_plain:]]
    options: Any
    kinds = {name: kind for name, (kind, _, _) in VERBS.items()}
    if verb in ("ask", "summarize"):
        # The adapter knows its base model; what is typed wins over that.
        about = f"{verb}: {(kinds[verb].__doc__ or '')}"
        options = parse(kinds[verb], words[1:], description=about, verb=verb, stored=stored_by_first)
    else:
        verb, options = parse_verb(kinds, words, description=__doc__ or "")
    VERBS[verb][2](options)
