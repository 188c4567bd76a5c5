"""The index: what is put in is found, kept up to date with its folders, and whole however it was killed."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.documents import calibrated, speed
from benchmarks.planted_documents import PlantedSet, planted, write
from onecard.console import run_main
from onecard.documents import vectors as vectors_module
from onecard.documents.chunks import TextChunk
from onecard.documents.index import DocumentIndex, StoredChunk
from onecard.documents.other_things import is_about_another, named_in
from onecard.documents.search import LEAST_COVERAGE, DocumentSearch, fused
from onecard.documents.update import ReadingLimits, UpdateCounts, update
from onecard.documents.vectors import TextVectors, VectorSearch, stored
from onecard.errors import ConfigError, DataError
from onecard.installation import SHIPPED as REPOSITORY
from onecard.programs import documents
from tests.curation.test_convert import write_pdf

LIMITS = ReadingLimits(chunk_size=100, max_file_mib=10)


@pytest.fixture(scope="module")
def corpus() -> PlantedSet:
    return planted()


@pytest.fixture(scope="module")
def corpus_folder(corpus: PlantedSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    write(corpus.files, folder)
    return folder


@pytest.fixture(scope="module")
def corpus_index(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DocumentIndex:
    index = DocumentIndex(tmp_path_factory.mktemp("index"), create=True)
    assert update(index, [corpus_folder], LIMITS) == UpdateCounts(n_read=200)
    return index


def test_of_200_documents_the_right_one_is_in_the_first_three(corpus: PlantedSet, corpus_index: DocumentIndex) -> None:
    search = DocumentSearch(corpus_index)
    found = {question: search.find([question.text], 3) for question in corpus.questions}
    assert len(found) == 100
    assert sum(q.source in [chunk.document for chunk in result.chunks] for q, result in found.items()) >= 95
    assert sum(result.is_there for result in found.values()) >= 95


def test_questions_from_elsewhere_are_not_in_the_documents(corpus: PlantedSet, corpus_index: DocumentIndex) -> None:
    search = DocumentSearch(corpus_index)
    assert len(corpus.elsewhere) == 20
    assert [q.text for q in corpus.elsewhere if search.find([q.text], 3).is_there] == []


def test_questions_about_another_thing_of_a_known_kind_are_not_in_the_documents(
    corpus: PlantedSet, corpus_index: DocumentIndex
) -> None:
    search = DocumentSearch(corpus_index)
    asked = [q.text for q in (*corpus.unknown_names, *corpus.unknown_names_later, *corpus.unknown_names_held_out)]
    assert len(asked) == 66
    # A number is no name.
    assert [text for text in asked if search.find([text], 3).is_there] == ["报警代码E104是什么意思？"]
    assert not search.find(["Who founded Quonnabog Foundry?", "And its main product?"], 3).is_there
    assert len(corpus.paraphrases) == 100
    assert sum(search.find([q.text], 3).is_there for q in corpus.paraphrases) >= 98


def test_a_name_and_its_kind_stand_beside_each_other() -> None:
    assert named_in("Who owns the Moor Tower, 龙泽大桥的栏杆?") == [("moor", "tower"), ("龙泽", "大桥")]
    assert named_in("the bridge at Netherby") == []
    assert named_in("the bridge at Netherby", with_places=True) == [("netherby", "bridge")]


def test_three_documents_make_a_kind_and_a_known_name_is_no_other_thing() -> None:
    def chunks(*titles: str) -> list[StoredChunk]:
        return [StoredChunk(k, f"{k}.md", 0, title, "The bridge is long.") for k, title in enumerate(titles)]

    bridges = chunks("The Moor bridge", "The Elm bridge", "The Low bridge")

    def is_other(question: str, found: list[StoredChunk], *known: str) -> bool:
        return is_about_another(question, found, lambda words: set(words) - {"moor", "bridge", *known})

    assert is_other("How long is the fell bridge?", bridges)
    assert not is_other("How long is the fell bridge?", bridges, "fell"), "what a document holds is no strange name"
    assert not is_other("How long is the old Moor bridge?", bridges) and not is_other("the fell mill", bridges)
    assert not is_other("How long is the fell bridge?", bridges[:2]) and not is_other("", bridges)
    assert not is_other("the fell bridge", chunks("The old bridge", "The old bridge", "The Low bridge"))
    assert not is_other("the many bridge", chunks("The 3 bridge", "The 4 bridge", "The 5 bridge"))


def test_a_question_that_leans_on_the_one_before_it_finds_what_both_are_about(corpus_index: DocumentIndex) -> None:
    search = DocumentSearch(corpus_index)
    name = next(d.name for d in corpus_index.documents() if d.name.startswith("en/bridge"))
    title = corpus_index.chunks(range(1, 500))
    first = next(chunk.text for chunk in title if chunk.document == name).split(":")[0]
    questions = [f"Who designed {first}?", "And what distance does it span?"]
    assert search.find(questions, 3).chunks[0].document == name
    assert search.find(questions[1:], 3).chunks[0].document != name
    assert not search.find([questions[0], "Which team won the football world cup of 1998?"], 3).is_there


def test_names_of_files_and_headings_are_searched_too(tmp_path: Path) -> None:
    index = DocumentIndex(tmp_path, create=True)
    index.put("/a", "vacation rules.md", "1", [TextChunk("Thirty days.", 0, ("Employees", "Leave"))])
    index.put("/a", "b.md", "1", [TextChunk("Nothing of that kind.", 0, ())])
    for question in ("vacation rules", "leave of employees", "thirty days"):
        (chunk,) = DocumentSearch(index).find([question], 1).chunks
        assert (chunk.document, chunk.headings) == ("vacation rules.md", "Employees > Leave")


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("The ﬁlter is new.", "filter"),
        ("\u1112\u1161\u11ab\u1100\u116e\u11a8", "한국"),
        ("代码Ｅ１０４", "E104"),
        ("ＥＲＲ", "err"),
    ],
)
def test_one_letter_is_found_in_every_form_of_it(written: str, asked: str, tmp_path: Path) -> None:
    index = DocumentIndex(tmp_path, create=True)
    index.put("/a", "a.md", "1", [TextChunk(written, 0, ()), TextChunk("nothing", 0, ())])
    assert [chunk.text for chunk in DocumentSearch(index).find([asked], 5).chunks] == [written]


def test_signs_of_the_search_language_are_only_words(corpus_index: DocumentIndex) -> None:
    search = DocumentSearch(corpus_index)
    for question in (
        '" OR NEAR(',
        "a AND NOT b*",
        "'; DROP TABLE chunks; --",
        "",
        "？？",
        "\0",
        "-" * 5000,
        "word " * 9000,
    ):
        search.find([question], 3)
    search.find([" ".join(f"w{k} " for k in range(5000))], 3)
    assert not corpus_index.check()


def test_counts_that_are_kept_are_counted_anew_after_each_change(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("onecard.documents.index.LONG_COUNT", 0)
    index, other = DocumentIndex(tmp_path, create=True), DocumentIndex(tmp_path)
    rare = index.weights(["pump"])["pump"]
    for number, changed in enumerate((index, other)):
        changed.put("/a", f"{number}.md", "1", [TextChunk("pumps", 0, ())] * 3)
        assert index.weights(["pump"])["pump"] == other.weights(["pump"])["pump"] < rare
        rare = index.weights(["pump"])["pump"]


def test_a_long_question_ranks_the_chunks_of_its_rarest_words(tmp_path: Path, monkeypatch: Any) -> None:
    index = DocumentIndex(tmp_path, create=True)
    texts = ["alpha beta", "beta gamma", "beta gamma delta", "gamma delta", "gamma"]
    index.put("/a", "a.md", "1", [TextChunk(text, 0, ()) for text in texts])
    weights = index.weights(["alpha", "beta", "gamma", "delta"])
    for most_rows, n_found in ((0, 1), (3, 3), (6, 4), (10, 5)):
        monkeypatch.setattr("onecard.documents.index.MOST_ROWS", most_rows)
        assert len(index.by_words(weights, 9)) == n_found, most_rows


def test_only_what_changed_is_read_and_what_is_gone_is_taken_out(tmp_path: Path) -> None:
    folder, index = tmp_path / "in", DocumentIndex(tmp_path / "index", create=True)
    write({"a.md": "alpha", "sub/b.md": "beta", ".hidden/c.md": "gamma"}, folder)
    assert update(index, [folder], LIMITS) == UpdateCounts(n_read=2)
    assert update(index, [], LIMITS) == UpdateCounts(n_same=2)
    write({"a.md": "delta", "d.md": "epsilon"}, folder)
    (folder / "sub" / "b.md").unlink()
    assert update(index, [], LIMITS) == UpdateCounts(n_read=2, n_gone=1)
    assert [document.name for document in index.documents()] == ["a.md", "d.md"]
    assert index.by_words(index.weights(["alpha"]), 5) == [] and len(index.by_words(index.weights(["delta"]), 5)) == 1
    # A file by itself is the same document, and takes nothing else out.
    assert update(index, [folder / "a.md"], LIMITS) == UpdateCounts(n_same=1)
    assert not index.check() and len(index.documents()) == 2
    shutil.rmtree(folder)  # such as a drive that is not there
    assert update(index, [], LIMITS) == UpdateCounts() and len(index.documents()) == 2


def test_a_folder_in_other_capitals_is_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS both names are one folder, whose documents would have been in the index twice."""
    index = DocumentIndex(tmp_path / "index", create=True)
    for name in ("Manuals", "manuals"):
        write({"a.md": "alpha"}, tmp_path / name)
    monkeypatch.setattr(Path, "samefile", lambda self, other: str(self).casefold() == str(other).casefold())
    assert update(index, [tmp_path / "Manuals"], LIMITS) == UpdateCounts(n_read=1)
    assert update(index, [tmp_path / "manuals"], LIMITS) == UpdateCounts(n_same=1)
    assert len(index.folders()) == len(index.documents()) == 1


def test_bad_documents_are_named_and_the_rest_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, outside = tmp_path / "in", tmp_path / "secret.txt"
    write({"good.md": "all is well", "empty.md": "", "long.txt": "word " * 300_000, "other.xyz": "x"}, folder)
    outside.write_text("secret", encoding="utf-8")
    for name in ("junk.txt", "junk.pdf", "junk.docx"):
        (folder / name).write_bytes(random.Random(1).randbytes(2000))
    write_pdf(folder / "locked.pdf", [["Text."]])
    locked = (folder / "locked.pdf").read_bytes().replace(b"/Root", b"/Encrypt << /Filter /Standard /V 9 >> /Root")
    (folder / "locked.pdf").write_bytes(locked)
    (folder / "link.txt").symlink_to(outside)
    index = ["--index", str(tmp_path / "index")]
    assert run_main(lambda: documents.main(["add", str(folder), *index, "--max_file_mib", "1"])) == 0
    out, err = capsys.readouterr()
    assert "1 documents read, 0 as before, 0 gone; 7 skipped" in out and "1 files are none of" in out
    named = dict(line.removeprefix("warning: ").split(": ", 1) for line in err.splitlines())
    assert set(named) == {"empty.md", "long.txt", "junk.txt", "junk.pdf", "junk.docx", "locked.pdf", "link.txt"}
    assert "no text" in named["empty.md"] and "leads out" in named["link.txt"] and "password" in named["locked.pdf"]
    documents.main(["list", *index])
    assert capsys.readouterr().out.splitlines() == ["      1  good.md", "1 documents in 1 passages"]


def test_a_document_that_may_not_be_read_keeps_its_older_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, index = tmp_path / "in", DocumentIndex(tmp_path / "index", create=True)
    write({"a.md": "alpha"}, folder)
    update(index, [folder], LIMITS)

    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("onecard.documents.update.sha256_of", refused)  # root may read everything
    assert update(index, [], LIMITS) == UpdateCounts(n_skipped=1)
    assert "a.md: [Errno 13] Permission denied" in capsys.readouterr().err and len(index.documents()) == 1


def test_what_is_removed_is_gone_and_a_slip_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({"old/a.md": "alpha", "old/b.md": "beta", "new.md": "gamma"}, tmp_path / "in")
    index = ["--index", str(tmp_path / "index")]
    documents.main(["add", str(tmp_path / "in"), *index])
    documents.main(["remove", "old/*", *index])
    assert "2 documents were taken out" in capsys.readouterr().out
    write({"cafe\u0301.md": "delta"}, tmp_path / "in")  # as macOS tells the name
    documents.main(["add", *index])
    documents.main(["remove", "café.md", *index])
    assert "1 documents were taken out" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"no document is called nwe.md \(did you mean new.md\?\)"):
        documents.main(["remove", "nwe.md", *index])
    with pytest.raises(DataError, match="holds no index; make one"):
        documents.main(["list", "--index", str(tmp_path / "none")])
    with pytest.raises(DataError, match="holds no index"):
        documents.main(["add", "--index", str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="there is no file or folder"):
        documents.main(["add", str(tmp_path / "nothing" / "here.md"), *index])


def test_a_file_that_is_no_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(DataError, match="the index cannot be used: file is not a database"):
        DocumentIndex(tmp_path)
    with pytest.raises(DataError, match="is a file; name a folder for the index"):
        DocumentIndex(tmp_path / "index.db", create=True)


# Put each document, and say so: the parent kills in the middle.
ADDING = """
import sys
from pathlib import Path
from onecard.documents.index import DocumentIndex, StoredChunk
from onecard.documents.other_things import is_about_another, named_in
from onecard.documents.update import ReadingLimits, update

class Telling(DocumentIndex):
    def put(self, *words):
        print("putting", flush=True)
        super().put(*words)

update(Telling(Path(sys.argv[1]), create=True), [Path(sys.argv[2])], ReadingLimits(100, 10))
"""


@pytest.mark.parametrize("n_kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_an_index_that_is_killed_while_it_grows_is_whole(
    n_kills: int, corpus_folder: Path, corpus_index: DocumentIndex, tmp_path: Path
) -> None:
    draw, sizes = random.Random(n_kills), [0]
    words = [sys.executable, "-c", ADDING, str(tmp_path), str(corpus_folder)]
    for _ in range(n_kills):
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as child:
            assert child.stdout is not None
            for _ in range(draw.randint(4, 15)):
                child.stdout.readline()
            child.kill()
        index = DocumentIndex(tmp_path)
        assert index.check() == []
        sizes.append(len(index.documents()))
        index.close()
    assert sizes == sorted(sizes) and 0 < sizes[-1] < 200
    index = DocumentIndex(tmp_path)
    assert update(index, [corpus_folder], LIMITS) == UpdateCounts(n_read=200 - sizes[-1], n_same=sizes[-1])
    assert index.check() == []
    texts = [[chunk[1:] for chunk in each.chunks(range(1, 2000))] for each in (index, corpus_index)]
    assert sorted(texts[0]) == sorted(texts[1])


def test_a_document_is_put_in_whole_or_not_at_all(tmp_path: Path) -> None:
    index = DocumentIndex(tmp_path, create=True)
    index.put("/a", "a.md", "1", [TextChunk("old", 0, ())])
    with pytest.raises(AttributeError):
        index.put("/a", "a.md", "2", [TextChunk("new", 0, ()), None])  # type: ignore[list-item]
    assert [chunk.text for chunk in index.chunks([1, 2, 3])] == ["old"] and index.check() == []


def test_the_check_sees_a_document_that_is_not_whole(tmp_path: Path) -> None:
    index = DocumentIndex(tmp_path, create=True)
    index.put("/a", "a.md", "1", [TextChunk("one", 0, ()), TextChunk("two", 0, ())])
    with sqlite3.connect(index.path) as db:
        db.execute("DELETE FROM chunks WHERE id = 1")
    assert index.check() == ["a.md is not whole"]


@pytest.mark.slow
def test_the_threshold_is_the_one_that_was_calibrated(corpus: PlantedSet, corpus_index: DocumentIndex) -> None:
    found = calibrated(DocumentSearch(corpus_index), corpus.calibration)
    assert found["questions"] == 120 and found["right"] == 120
    assert found["least"] <= LEAST_COVERAGE <= found["most"]


@pytest.mark.parametrize("n_chunks", [300, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_query_to_many_chunks_is_quick(n_chunks: int, tmp_path: Path) -> None:
    found = speed(tmp_path, n_chunks)
    assert found["chunks"] == n_chunks
    assert found["words_ms"]["cpu_p95"] < 100 and found["vectors_ms"]["cpu_p95"] < 100


def test_two_orders_are_fused_by_their_ranks() -> None:
    assert fused([[1, 2, 3], [3, 1]]) == [1, 3, 2]
    assert fused([[], [5]]) == [5] and fused([[4, 5]]) == [4, 5]


@pytest.fixture(scope="module")
def static_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of model2vec that knows that car and automobile are the same; directions of its vectors are chosen."""
    model2vec = pytest.importorskip("model2vec", reason="model2vec is not installed (requirements-documents.txt)")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "car", "automobile", "banana", "fruit", "price", "of", "the"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.eye(len(words), 16, dtype=np.float32)
    vectors[2], vectors[4] = vectors[1], vectors[3]
    folder = tmp_path_factory.mktemp("static")
    model2vec.StaticModel(vectors, tokenizer, {"normalize": True}).save_pretrained(folder)
    return folder


def test_by_meaning_other_words_are_found(static_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write({"a.md": "the car", "b.md": "the banana"}, folder)
    index = DocumentIndex(tmp_path / "index", create=True)
    update(index, [folder], LIMITS, str(static_model))
    by_words, both = DocumentSearch(index), DocumentSearch(index, VectorSearch(index, TextVectors(str(static_model))))
    assert by_words.find(["automobile"], 1).chunks == ()
    assert both.find(["automobile"], 1).chunks[0].document == "a.md"
    assert both.find(["fruit"], 1).chunks[0].document == "b.md"
    write({"c.md": "automobile"}, folder)
    version = index.version()
    update(index, [], LIMITS)  # the model is remembered, and the vectors are read again
    assert index.version() != version
    assert {chunk.document for chunk in both.find(["automobile"], 2).chunks} == {"a.md", "c.md"}
    with pytest.raises(DataError, match="and those of other/model do not go with them"):
        update(index, [], LIMITS, "other/model")


def test_vectors_come_back_as_they_were_kept() -> None:
    given = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    back = np.frombuffer(b"".join(stored(given)), np.float16).astype(np.float32).reshape(3, 8)
    assert np.abs(back - given).max() < 2e-3 * np.abs(given).max()


def test_a_model_of_vectors_that_is_not_there_costs_one_clear_line(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(vectors_module, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs model2vec: pip install -r requirements-documents.txt"):
        TextVectors("x")
    monkeypatch.undo()
    pytest.importorskip("model2vec")
    with pytest.raises(DataError, match="cannot be loaded"):
        TextVectors(str(tmp_path / "nothing"))
