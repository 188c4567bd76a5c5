"""Data in the studio: uploads are whole or not there, names lead nowhere else, and the page sees what training sees."""

from __future__ import annotations

import json
import os
from pathlib import Path

import anyio
import pytest

from onecard.errors import OneCardError
from onecard.serve.http_error import ApiError
from onecard.studio.named import FIRST_ROWS, named_data
from onecard.studio.uploads import PARTIAL, remove_stale, safe_name, save_upload
from onecard.studio.worker import Worker
from tests.data.test_cutoff_effect import at_limit
from tests.studio.worker_here import SAMPLE, WorkerHere, client

RECORDS = [{"instruction": f"Say {i}", "output": f"{i} times 你好"} for i in range(20)]
RECORDS += [{"instruction": "q", "output": "fox " * 200}, {"instruction": "long " * 300, "output": "b"}]
BAD = [{"instruction": "q", "output": "a</s>"}, {"instruction": "q"}]


@pytest.fixture
def here() -> WorkerHere:
    return WorkerHere()


@pytest.fixture
def page(context, here):
    return client(context, here)


@pytest.fixture
def question(context, tiny_base, tmp_path, monkeypatch):
    """A question about a file with records of all fates, in the page's form."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("onecard.data.dataset.cache_directory", lambda typed: tmp_path / "cache")
    file = context.data_roots[0] / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS + BAD)), encoding="utf-8")
    monkeypatch.setattr("onecard.studio.data_api.base_name", lambda context, text: text)
    return {"sources": [{"name": "data.jsonl"}], "options": {"prompt_type": "alpaca"}, "model_path": str(tiny_base)}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/我的 data?.jsonl", "我的_data_.jsonl"),
        ("C:\\x\\.hidden.JSON", "hidden.json"),
        ("con.csv", "_con.csv"),
        ("a" * 300 + ".txt", "a" * 80 + ".txt"),
        ("字" * 300 + ".txt", None),
    ],
)
def test_names_of_uploads(given, kept):
    name = safe_name(given)
    assert name == (kept or name)
    assert len(name.encode()) <= 255
    assert not set(name) & set('/\\:*?"<>|\0 ')


@pytest.mark.parametrize("given", ["", "x", ".json", "x.py", "x.jsonl/", "data.json\0.exe", "../.."])
def test_no_data_file(given):
    with pytest.raises(ApiError) as caught:
        safe_name(given)
    assert caught.value.status_code == 400


def test_uploads(ask, context):
    kind = {"content-type": "application/octet-stream"}
    first = ask.raw("PUT", "/api/data/uploads/a%20b.jsonl", content=b"one", headers=kind)
    again = ask.raw("PUT", "/api/data/uploads/a%20b.jsonl", content=b"two", headers=kind)
    assert (first.status_code, again.status_code) == (201, 201)
    assert [Path(each.json()["path"]).name for each in (first, again)] == ["a_b.jsonl", "a_b-2.jsonl"]
    assert Path(again.json()["path"]).read_bytes() == b"two"
    for content, status in ((b"", 400), (b"x" * 1_000_001, 413)):
        assert ask.raw("PUT", "/api/data/uploads/c.jsonl", content=content, headers=kind).status_code == status
    assert ask.raw("PUT", "/api/data/uploads/c.exe", content=b"x", headers=kind).status_code == 400
    assert ask.raw("PUT", "/api/data/uploads/c.jsonl", content=b"x").status_code == 415
    assert sorted(path.name for path in context.upload_root.iterdir()) == ["a_b-2.jsonl", "a_b.jsonl"]


def test_a_cut_upload_leaves_nothing(tmp_path):
    async def pieces():
        yield b"half"
        raise ConnectionError("the browser has gone")

    async def too_many():
        for _ in range(5):
            yield b"half"

    with pytest.raises(ConnectionError):
        anyio.run(save_upload, pieces(), "a.json", tmp_path, 100)
    with pytest.raises(ApiError, match="larger than"):
        anyio.run(save_upload, too_many(), "a.json", tmp_path, 10)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_studio_left_is_removed(tmp_path):
    old, new = tmp_path / f".a{PARTIAL}", tmp_path / f".b{PARTIAL}"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    remove_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [new.name]


def test_files(page, context, tmp_path):
    root = context.data_roots[0]
    (root / "in").mkdir()
    for name in ("b.jsonl", "a.txt", "x.py", ".h.json"):
        (root / name).write_text("x", encoding="utf-8")
    status, found = page("GET", f"/api/data/files?folder={root}")
    assert (status, [entry["name"] for entry in found["entries"]]) == (200, ["in", "a.txt", "b.jsonl"])
    assert found["above"] == ""
    _, found = page("GET", f"/api/data/files?folder={root / 'in'}")
    assert (found["entries"], found["above"]) == ([], str(root))
    assert page("GET", f"/api/data/files?folder={tmp_path}")[0] == 403
    assert page("GET", f"/api/data/files?folder={root}/nothing")[0] == 404
    assert str(root) in [entry["path"] for entry in page("GET", "/api/data/files")[1]["entries"]]


def test_catalogue(page):
    _, found = page("GET", "/api/data/catalogue?q=alpaca")
    assert 0 < len(found["entries"]) < len(page("GET", "/api/data/catalogue")[1]["entries"])
    assert {"name", "about", "rows", "licence", "here"} <= set(found["entries"][0])


def test_sources(context, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.json").write_text("[]", encoding="utf-8")
    file = context.data_roots[0] / "mine.json"
    file.write_text("[]", encoding="utf-8")
    plain = named_data(context, [{"name": "mine.json"}], {"train_on": "last"})
    assert plain.for_run == plain.for_page == {"train_on": "last", "data_path": str(file)}
    mixed = named_data(context, [{"name": str(file), "amount": 2}, {"name": "owner/name"}, {"name": "belle"}], {})
    if mixed.remote == ["owner/name", "belle"]:
        assert mixed.for_run == {"data": [f"{file}:2", "owner/name", "belle"]}
        assert mixed.for_page == {"data": [f"{file}:2", f"owner/name#{FIRST_ROWS}", f"belle#{FIRST_ROWS}"]}
    for name in ("secret.json", str(tmp_path / "secret.json"), "../secret.json", "nothing.json", "~/x.json", "a b"):
        with pytest.raises(ApiError):
            named_data(context, [{"name": name}], {})
    for source in ({"name": "mine.json", "amount": 0}, {"name": "mine.json", "limit": -1}, {"name": 5}, "mine.json"):
        with pytest.raises(ApiError) as caught:
            named_data(context, [source], {})
        assert caught.value.param == "sources[0]"


def test_what_is_read(page, question):
    status, found = page("POST", "/api/data/read", question)
    assert status == 200, found
    assert (found["n_records"], found["n_bad"], found["n_samples"]) == (24, 2, 22)
    assert found["shapes"] == [["data.jsonl", "instruction/input/output", 23, ["instruction", "output"]]]
    assert [(file, line) for file, line, _, _ in found["bad"]] == [("data.jsonl", 23), ("data.jsonl", 24)]
    assert "holds the text '</s>'" in found["bad"][0][3]
    # What `onecard inspect --cutoff_len 200` says of such records (tests/test_inspect_data.py).
    assert at_limit(found["effect"], 200) == {"n_samples": 21, "n_cut": 1, "n_dropped": 1}
    assert found["options"]["data_path"].endswith("data.jsonl")
    _, chinese = page("POST", "/api/data/read", question, headers={"x-language": "zh"})
    assert chinese["bad"][1][3] != found["bad"][1][3]


def test_tokens_are_the_text_and_the_mask(page, question, tiny_base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    status, found = page("POST", "/api/data/tokens", {**question, "numbers": [0, 3, 999]})
    assert (status, len(found["samples"]), found["n_samples"]) == (200, 2, 22)
    sample = found["samples"][1]
    ids = [token[0] for token in sample["tokens"]]
    text = "".join(token[1] for token in sample["tokens"])
    assert text == tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "".join(token[1] for token in sample["tokens"] if token[2]) == "3 times 你好</s>"
    assert sample["question"] == sum(not token[2] for token in sample["tokens"])


def test_refusals(page, context, here):
    good = {"sources": [{"name": str(SAMPLE / "merge_sample.json")}], "model_path": "sample/tiny-llama"}
    for wrong, param in (
        ({"options": {"cache_path": "/tmp"}}, "--cache_path"),
        ({"options": {"prompt_type": "/etc/passwd"}}, None),
        ({"model_path": "/etc"}, None),
        ({"sources": []}, "sources"),
    ):
        status, found = page("POST", "/api/data/read", {**good, **wrong})
        assert status in (400, 403), wrong
        assert param in (None, found["error"]["param"])
    assert here.asked == []


def test_make(page, context, question):
    status, found = page("POST", "/api/data/make/split", {**question, "options": {"seed": 7}, "name": "mine"})
    assert status == 202, found
    job = context.jobs.get(found["job"])
    target = context.output_root / "data" / "mine"
    assert job["command"][-5:] == ["data", "split", f"--data_path={context.data_roots[0] / 'data.jsonl'}",
                                   f"--output_path={target}", "--seed=7"]  # fmt: skip
    assert found["results"] == [str(target / "train.jsonl"), str(target / "validation.jsonl")]
    target.mkdir(parents=True, exist_ok=True)
    for change, expected in (
        ({"name": "mine"}, 409),
        ({"name": "../mine"}, 400),
        ({"name": "b", "options": {"overwrite": True}}, 400),
        ({"name": "b", "sources": [{"name": "owner/name"}]}, 400),
        ({"name": "b", "sources": [{"name": "data.jsonl", "amount": 2}]}, 400),
        ({"name": "b", "options": {"evaluation_path": "/etc/passwd"}}, 400),
    ):
        body = {**question, "options": {}, **change}
        assert page("POST", "/api/data/make/split", body)[0] == expected, change
    assert page("POST", "/api/data/make/other", {**question, "name": "b"})[0] == 404


def test_the_worker_is_a_process_that_comes_again():
    worker = Worker()
    try:
        with pytest.raises(OneCardError, match="not foreseen"):
            worker.ask("nothing", {})
        worker.stop()
        with pytest.raises(OneCardError, match="not foreseen"):
            worker.ask("nothing", {})
    finally:
        worker.stop()
