"""The way of somebody who has never seen a terminal, with the real programs: a file, a plan, a run, a chat."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onecard.config.studio import StudioOptions
from onecard.installation import SHIPPED
from onecard.studio.app import studio_app
from onecard.studio.context import open_context
from tests.browser.conftest import is_foreign, wait_until
from tests.browser.test_accessibility import DESKTOP

pytestmark = pytest.mark.slow
DATA = SHIPPED / "sample" / "merge_sample.json"
LONGEST_S = 240.0
WORDS = {
    "en-US": {"use_data": "Use these data", "use_plan": "Use these settings", "done": "done"},
    "zh-CN": {"use_data": "使用这些数据", "use_plan": "使用这些设置", "done": "完成"},
}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of a studio on an empty folder."""
    import uvicorn

    from onecard.serve.listen import open_socket

    options = StudioOptions(output_root=str(tmp_path / "out"))
    context = open_context(options)
    app = studio_app(options, context)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    with open_socket("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        context.events.close()
        server.should_exit = True
        thread.join(30)


@pytest.mark.parametrize("locale", WORDS)
def test_from_a_file_to_a_chat_with_the_tuned_model(browser: Any, address: str, tmp_path: Path, locale: str) -> None:
    """By mouse; the keyboard types names and numbers alone."""
    words, began_s = WORDS[locale], time.monotonic()
    context = browser.new_context(**(DESKTOP | {"locale": locale}), bypass_csp=True)
    page = context.new_page()
    page.set_default_timeout(120_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda asked: errors.append(asked.url) if is_foreign(asked.url) else None)
    page.goto(f"{address}#data")
    page.wait_for_selector("body[data-ready]")

    page.locator("#view-data input[type=file]").set_input_files(str(DATA))
    page.wait_for_selector("#view-data .sources .name")
    page.locator("#view-data button.main").first.click()
    page.wait_for_selector("#view-data .tokens .token")
    page.get_by_role("button", name=words["use_data"]).click()

    page.click("#tab-model")
    page.wait_for_selector("#view-model .stack")
    page.locator("#view-model").get_by_role("button", name=words["use_plan"]).click()

    page.click("#tab-train")
    page.fill("#run-name", "mine")
    page.fill("#opt-num_epoch", "1")
    page.wait_for_selector("#command:has-text('--num_epoch=1')")
    page.click("#add-run")
    page.wait_for_selector("ol.queue li:has-text('mine')")
    page.wait_for_selector(f"ol.queue .badge:has-text('{words['done']}')", timeout=LONGEST_S * 1000)

    page.click("#tab-chat")
    page.wait_for_selector("#chat-source option", state="attached")
    page.click("#chat-start")
    page.wait_for_selector("#chat-question", state="visible")
    page.fill("#chat-question", "What is the capital of Poland?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer[aria-busy=false]")
    answer = page.inner_text(".answer .text")
    took_s = time.monotonic() - began_s
    print(f"{locale}: from the page to an answer in {took_s:.0f} s: {answer}")
    assert answer.strip() and errors == []
    assert (tmp_path / "out" / "mine" / "adapter_model.safetensors").is_file()
    context.close()
