"""What is sent to the browser: vendored files as they were published, words in both languages, no foreign address."""

from __future__ import annotations

import hashlib
import re

import yaml

from onecard.studio.pages import STATIC, VIEWS, all_words

OWN = [file for file in STATIC.rglob("*") if file.suffix in (".js", ".html", ".css") and "vendor" not in file.parts]


def test_vendored_files_are_those_that_are_listed() -> None:
    folder = STATIC / "vendor"
    listed = yaml.safe_load((folder / "vendor.yaml").read_text(encoding="utf-8"))
    for entry in listed:
        assert hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"], entry["file"]
        assert "MIT" in (folder / entry["license"]).read_text(encoding="utf-8")
    known = {entry["file"] for entry in listed} | {entry["license"] for entry in listed} | {"vendor.yaml"}
    assert {file.name for file in folder.iterdir()} == known


def test_every_view_is_there_and_every_word_in_both_languages() -> None:
    for view in VIEWS:
        assert (STATIC / "views" / f"{view}.js").is_file() and (STATIC / "views" / f"{view}.html").is_file()
    words = all_words()
    assert list(words["en"]) == list(words["zh"]) and len(words["en"]) > 15
    for key, text in words["en"].items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", words["zh"][key])), key
        assert not re.search(r"[一-鿿]", text) and text.strip(), key


def test_every_word_that_is_asked_for_exists_and_nothing_comes_from_elsewhere() -> None:
    words, n_asked = all_words()["en"], 0
    for file in OWN:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"(?:src|href|url|import|from|fetch)\W{1,3}https?:", text), file.name
        assert not re.search(r"innerHTML(?! = html; // a file of this program)|x-html|\beval\(|new Function", text)
        for key in re.findall(r"""\bt\(['"](\w+\.\w+)['"](?!\s*\+)""", text):
            assert key in words, (file.name, key)
            n_asked += 1
    assert n_asked > 8
