"""The index: one SQLite database of documents, their chunks, the words of these, and vectors where a model makes some.

A document is put in, replaced or removed in one transaction (WAL), so that an index which is killed while it grows is
whole afterwards: https://sqlite.org/wal.html. Words are found by SQLite's own full-text search, whose `rank` is BM25:
https://sqlite.org/fts5.html. Knows SQL. Does not read documents, and decides nothing about answers.
"""

from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from heapq import nlargest
from pathlib import Path
from typing import NamedTuple

from onecard.console import first_line
from onecard.documents.chunks import TextChunk
from onecard.documents.words import search_words
from onecard.errors import DataError
from onecard.installation import command

FILE_NAME = "index.db"
EMBED_MODEL = "embed_model"  # the setting that names the model of the vectors
BUSY_SECONDS = 60.0  # another process may be adding
# A word that more than this share of the chunks holds orders nothing, and takes longest to look up.
COMMON_SHARE = 0.1
MOST_WORDS = 64  # of a question that is a whole text, those that tell most
FEW_CHUNKS = 1000  # of fewer chunks every word counts
MOST_ROWS = 20_000  # chunks that a query ranks: BM25 costs about a microsecond for each
LONG_COUNT = 1000  # a word in more chunks takes long to count, and there are few of them: their counts are kept
_FORMAT = "1"
_HEADING_WEIGHT = 2.0  # a word in the file's name or a heading counts as two in the text
_TOKENIZER = "tokenize='porter unicode61 remove_diacritics 2'"
_TABLES = f"""
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS documents (
    id INTEGER PRIMARY KEY, folder TEXT NOT NULL, name TEXT NOT NULL, sha256 TEXT NOT NULL, n_chunks INTEGER NOT NULL,
    UNIQUE (folder, name));
CREATE TABLE IF NOT EXISTS folders (path TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS chunks (
    id INTEGER PRIMARY KEY, document INTEGER NOT NULL REFERENCES documents (id), page INTEGER NOT NULL,
    headings TEXT NOT NULL, text TEXT NOT NULL, vector BLOB);
CREATE INDEX IF NOT EXISTS chunks_of_document ON chunks (document);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 (headings, text, {_TOKENIZER});
CREATE VIRTUAL TABLE IF NOT EXISTS counts USING fts5vocab (words, row);
"""
# The same tokenizer over texts that are not kept: which words, as they are indexed, a text has.
_SCRATCH = f"""
CREATE VIRTUAL TABLE temp.scratch USING fts5 (text, {_TOKENIZER});
CREATE VIRTUAL TABLE temp.scratch_words USING fts5vocab (temp, scratch, instance);
"""


class StoredDocument(NamedTuple):
    """A document of the index: its name in the folder that it was added from."""

    id: int
    folder: str
    name: str
    sha256: str
    n_chunks: int


class StoredChunk(NamedTuple):
    """A chunk and where it stands: page 0 is none; headings as "Guide > Setup"."""

    id: int
    document: str
    page: int
    headings: str
    text: str


class DocumentIndex:
    """The database, for the threads of one process; other processes may use it at the same time."""

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        """Open the index in a folder. Raises DataError: there is none, and none is to be made; it is broken."""
        self.path = folder.expanduser() / FILE_NAME
        if not create and not self.path.is_file():
            raise DataError(
                f"holds no index; make one: {command('documents')} add FOLDER --index {folder}", str(folder)
            )
        if self.path.parent.is_file():
            raise DataError("is a file; name a folder for the index", str(folder))
        self._lock, self._n_written = threading.RLock(), 0
        self._counted: tuple[tuple[int, int], dict[str, int]] | None = None
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(_TABLES + _SCRATCH)
            self._db.execute("INSERT OR IGNORE INTO settings VALUES ('format', ?)", (_FORMAT,))
        if self.setting("format") != _FORMAT:
            raise DataError("was made by another version; make it anew", str(self.path))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """One thread at a time; what SQLite says becomes a DataError."""
        with self._lock:
            try:
                yield
            except (sqlite3.Error, OSError) as reason:
                raise DataError(f"the index cannot be used: {first_line(reason)}", str(self.path)) from None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
                self._n_written += 1
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def setting(self, name: str, value: str | None = None) -> str:
        """A setting of the index, "" where it has none; set first where a value is given."""
        with self._explained():
            if value is not None:
                self._db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))
            row = self._db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else ""

    def folders(self, new: Sequence[str] = ()) -> list[str]:
        """The folders that documents were added from, with these from now on."""
        with self._explained():
            self._db.executemany("INSERT OR IGNORE INTO folders VALUES (?)", [(path,) for path in new])
            return [row[0] for row in self._db.execute("SELECT path FROM folders ORDER BY path")]

    def documents(self) -> list[StoredDocument]:
        """All documents, by folder and name."""
        query = "SELECT id, folder, name, sha256, n_chunks FROM documents ORDER BY folder, name"
        with self._explained():
            return [StoredDocument(*row) for row in self._db.execute(query)]

    def put(
        self, folder: str, name: str, sha256: str, chunks: Sequence[TextChunk], vectors: Sequence[bytes] | None = None
    ) -> None:
        """Put a document in, in the place of an older version of it."""
        with self._transaction() as db:
            for (old,) in db.execute(
                "SELECT id FROM documents WHERE folder = ? AND name = ?", (folder, name)
            ).fetchall():
                self._delete(db, old)
            row = (folder, name, sha256, len(chunks))
            insert = "INSERT INTO documents (folder, name, sha256, n_chunks) VALUES (?, ?, ?, ?)"
            document = db.execute(insert, row).lastrowid
            for number, chunk in enumerate(chunks):
                headings = " > ".join(chunk.headings)
                vector = vectors[number] if vectors is not None else None
                values = (document, chunk.page, headings, chunk.text, vector)
                insert = "INSERT INTO chunks (document, page, headings, text, vector) VALUES (?, ?, ?, ?, ?)"
                chunk_id = db.execute(insert, values).lastrowid
                title = " ".join(search_words(f"{Path(name).stem} {headings}"))
                insert = "INSERT INTO words (rowid, headings, text) VALUES (?, ?, ?)"
                db.execute(insert, (chunk_id, title, " ".join(search_words(chunk.text))))

    def remove(self, documents: Sequence[StoredDocument]) -> None:
        """Take documents out."""
        with self._transaction() as db:
            for document in documents:
                self._delete(db, document.id)

    def chunks(self, ids: Sequence[int]) -> list[StoredChunk]:
        """These chunks, in this order; those that are gone meanwhile are left out."""
        query = (
            "SELECT chunks.id, name, page, headings, text FROM chunks JOIN documents ON documents.id = document "
            "WHERE chunks.id = ?"
        )
        with self._explained():
            rows = [self._db.execute(query, (chunk_id,)).fetchone() for chunk_id in ids]
        return [StoredChunk(*row) for row in rows if row]

    def n_chunks(self) -> int:
        """How many chunks there are."""
        with self._explained():
            return int(self._db.execute("SELECT coalesce(sum(n_chunks), 0) FROM documents").fetchone()[0])

    def weights(self, words: Sequence[str]) -> dict[str, float]:
        """The words as they are indexed ("towers" -> "tower"), each with what it tells: ln(chunks / chunks with it)."""
        n, (indexed,) = max(self.n_chunks(), FEW_CHUNKS), self._indexed([" ".join(words)])
        return {
            word: math.log(1 + (n - n_with + 0.5) / (n_with + 0.5))  # never negative, as Lucene has it
            for word, n_with in zip(indexed, map(self._n_with, indexed), strict=True)
        }

    def unknown(self, words: Collection[str]) -> set[str]:
        """Those of some words that no chunk holds."""
        forms = zip(words, self._indexed(list(words)), strict=True)
        return {word for word, indexed in forms if not any(map(self._n_with, indexed))}

    def by_words(self, weights: dict[str, float], most: int) -> list[int]:
        """The chunks with these words, best first by BM25; words that tell little are left out."""
        least = math.log(1 / COMMON_SHARE) if self.n_chunks() > FEW_CHUNKS else 0.0
        telling = {word: weight for word, weight in weights.items() if weight >= least} or weights
        asked: list[str] = []
        n_rows = 0
        for word in nlargest(MOST_WORDS, telling, key=telling.__getitem__):
            n_rows += self._n_with(word)
            if asked and n_rows > MOST_ROWS:
                break
            asked.append(f'"{word}"')
        if not asked:
            return []
        query = f"SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words, {_HEADING_WEIGHT}) LIMIT ?"  # noqa: S608
        with self._explained():
            return [row[0] for row in self._db.execute(query, (" OR ".join(asked), most))]

    def words_of(self, chunks: Sequence[StoredChunk]) -> list[set[str]]:
        """The words of each chunk, as they are indexed, those of its file's name and its headings included."""
        texts = (f"{Path(chunk.document).stem} {chunk.headings} {chunk.text}" for chunk in chunks)
        return self._indexed([" ".join(search_words(text)) for text in texts])

    def vectors(self) -> Iterator[tuple[int, bytes]]:
        """(chunk, vector) of all chunks that have one."""
        with self._explained():
            yield from self._db.execute("SELECT id, vector FROM chunks WHERE vector IS NOT NULL")

    def version(self) -> tuple[int, int]:
        """Another one after each change, by this process or another one."""
        with self._explained():
            (foreign,) = self._db.execute("PRAGMA data_version").fetchone()
            return int(foreign), self._n_written

    def check(self) -> list[str]:
        """What is wrong with the database; nothing when it is whole."""
        with self._explained():
            found = [row[0] for row in self._db.execute("PRAGMA integrity_check") if row[0] != "ok"]
            self._db.execute("INSERT INTO words (words) VALUES ('integrity-check')")
            query = (
                "SELECT name FROM documents WHERE n_chunks != (SELECT count(*) FROM chunks JOIN words "
                "ON words.rowid = chunks.id WHERE document = documents.id)"
            )
            return found + [f"{row[0]} is not whole" for row in self._db.execute(query)]

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    @staticmethod
    def _delete(db: sqlite3.Connection, document: int) -> None:
        db.execute("DELETE FROM words WHERE rowid IN (SELECT id FROM chunks WHERE document = ?)", (document,))
        db.execute("DELETE FROM chunks WHERE document = ?", (document,))
        db.execute("DELETE FROM documents WHERE id = ?", (document,))

    def _n_with(self, word: str) -> int:
        """How many chunks hold a word, as it is indexed."""
        with self._explained():
            if self._counted is None or self._counted[0] != self.version():
                self._counted = self.version(), {}
            kept = self._counted[1]
            if word not in kept:
                row = self._db.execute("SELECT doc FROM counts WHERE term = ?", (word,)).fetchone()
                if row is None or row[0] <= LONG_COUNT:
                    return int(row[0]) if row else 0
                kept[word] = int(row[0])
            return kept[word]

    def _indexed(self, texts: Sequence[str]) -> list[set[str]]:
        """The words of each text as the index keeps words."""
        found: list[set[str]] = [set() for _ in texts]
        with self._explained():
            self._db.execute("DELETE FROM scratch")
            with self._db:  # commits, or rolls back; one transaction, which is much quicker than one for each text
                self._db.execute("BEGIN")
                self._db.executemany("INSERT INTO scratch (rowid, text) VALUES (?, ?)", enumerate(texts))
            for number, term in self._db.execute("SELECT DISTINCT doc, term FROM scratch_words"):
                found[number].add(term)
        return found
