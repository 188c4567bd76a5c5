"""The switch of the chat page that lets answers come out of documents, in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onecard.config.inference import DOCUMENTS_MODEL, PageOptions, SamplingOptions
from tests.browser.conftest import serving, wait_until
from tests.fake_engine import FakeEngine


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(names=("tiny-llama", "pirate", DOCUMENTS_MODEL))


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    from onecard.serve.web import app as web

    with serving(web.chat_page(engine, SamplingOptions(), PageOptions())) as address:  # type: ignore[arg-type]
        yield address


def ask(page: Any, engine: FakeEngine) -> str:
    """Which model a question goes to."""
    n = len(engine.asked)
    page.fill("#oc-box textarea", "who are you")
    page.click("#oc-submit")
    wait_until(lambda: len(engine.ended) > n)
    return engine.asked[-1].adapter


def test_the_switch_changes_who_answers_and_shows_it(open_page: Any, url: str, engine: FakeEngine) -> None:
    page = open_page(url)
    box = page.get_by_label("Answer from the documents")
    assert not box.is_checked() and ask(page, engine) == "tiny-llama"
    box.check()
    wait_until(lambda: page.input_value("#oc-adapter input") == DOCUMENTS_MODEL)
    wait_until(lambda: page.inner_text("#oc-model") == DOCUMENTS_MODEL)
    if picture := os.environ.get("ONECARD_PICTURE"):
        page.screenshot(path=str(Path(picture)))
    assert ask(page, engine) == DOCUMENTS_MODEL
    page.reload()
    wait_until(lambda: page.get_by_label("Answer from the documents").is_checked(), what="remembered with the settings")
    page.get_by_label("Answer from the documents").uncheck()
    wait_until(lambda: page.input_value("#oc-adapter input") == "tiny-llama")
    assert ask(page, engine) == "tiny-llama"
