"""Data and Model of the studio in a real Chromium: read, looked at, cut by a slider, planned, handed on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onecard.config.studio import StudioOptions
from onecard.data.cutoff_effect import at_limit
from onecard.studio.app import studio_app
from onecard.studio.context import open_context
from tests.browser.conftest import is_foreign, wait_until
from tests.browser.test_accessibility import DESKTOP, PHONE, faults

pytestmark = pytest.mark.slow
RECORDS = [{"instruction": f"Say {i}", "output": f"{i} times. " * (i % 7)} for i in range(1, 60)]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a studio with the real worker."""
    import uvicorn

    from onecard.serve.listen import open_socket

    options = StudioOptions(output_root=str(tmp_path_factory.mktemp("studio") / "out"))
    context = open_context(options)
    server = uvicorn.Server(
        uvicorn.Config(studio_app(options, context), log_level="warning", timeout_graceful_shutdown=1)
    )
    with open_socket("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        context.events.close()
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def open_view(browser: Any, address: str) -> Iterator[Any]:
    """open_view("data") -> a page; foreign requests and errors in it fail the test."""
    contexts: list[Any] = []
    errors: list[str] = []

    def opened(view: str, **options: Any) -> Any:
        # The page's own policy forbids `eval`, by which axe-core is brought in.
        context = browser.new_context(**(DESKTOP | {"locale": "en-US"} | options), bypass_csp=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda asked: errors.append(asked.url) if is_foreign(asked.url) else None)
        page.goto(f"{address}#{view}")
        page.wait_for_selector("body[data-ready]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


def upload(page: Any, tmp_path: Path) -> Any:
    """The Data view with these records uploaded and read."""
    file = tmp_path / "my data.jsonl"
    lines = [*map(json.dumps, RECORDS), '{"instruction": "no answer"}']
    file.write_text("\n".join(lines), encoding="utf-8")
    view = page.locator("#view-data")
    view.locator("input[type=file]").set_input_files(str(file))
    page.wait_for_selector("#view-data .sources .name")
    view.locator("button.main").first.click()
    page.wait_for_selector("#view-data .tokens .token")
    return view


def test_data_from_upload_to_the_draft(open_view: Any, tmp_path: Path) -> None:
    page = open_view("data")
    with page.expect_response("**/api/data/read") as waiting:
        view = upload(page, tmp_path)
    effect = waiting.value.json()["effect"]
    seen = set()
    for limit in (8, 60, 70, 90, 500):
        view.locator("input[type=number].short").first.fill(str(limit))
        expected = at_limit(effect, limit)
        shown = [view.locator(".effect span").nth(i) for i in range(3)]
        for place, key in zip(shown, ("n_samples", "n_cut", "n_dropped"), strict=True):
            wait_until(lambda: f"{expected[key]:,} " in f"{place.inner_text()} ", what=f"{limit} {key}")  # noqa: B023
        seen.add((expected["n_cut"] > 0, expected["n_dropped"] > 0))
    assert len(seen) > 1
    assert "my_data.jsonl:60" in view.locator(".tall").inner_text()
    view.locator(".tokens .token").nth(3).hover()
    assert "id " in view.locator(".at-line").inner_text()
    view.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    wait_until(lambda: "token 5" in view.locator(".at-line").inner_text())
    view.get_by_role("button", name="Use these data").click()
    options = page.evaluate("JSON.parse(sessionStorage.getItem('onecard.draft'))")
    assert options["cutoff_len"] == 500
    assert options["data_path"].endswith("my_data.jsonl")


def test_the_plan_follows_the_sliders(open_view: Any) -> None:
    page = open_view("model")
    view = page.locator("#view-model")
    page.wait_for_selector("#view-model .stack")
    before = view.locator(".verdict").inner_text()
    for name, place in (("lora_r", 7), ("cutoff_len", 8), ("bits", 3)):
        view.locator(f"input[name={name}]").fill(str(place))
        wait_until(lambda: view.locator(".verdict").inner_text() != before, seconds=120, what=name)  # noqa: B023
        before = view.locator(".verdict").inner_text()
    view.get_by_role("button", name="Use these settings").click()
    options = page.evaluate("JSON.parse(sessionStorage.getItem('onecard.draft'))")
    assert (options["lora_r"], options["cutoff_len"], options["bits"]) == (256, 4096, 32)


@pytest.mark.parametrize(
    ("device", "locale", "scheme"), [(DESKTOP, "en-US", "light"), (PHONE, "zh-CN", "dark"), (PHONE, "en-US", "light")]
)
def test_axe_finds_no_serious_fault(
    open_view: Any, tmp_path: Path, device: dict[str, Any], locale: str, scheme: str
) -> None:
    page = open_view("data", **device, locale=locale, color_scheme=scheme)
    assert faults(page) == []
    upload(page, tmp_path)
    page.locator("#view-data details summary").first.click()
    assert faults(page) == []
    page.locator("#tab-model").click()
    page.wait_for_selector("#view-model .stack")
    wait_until(lambda: page.locator("#view-model .stale").count() == 0, seconds=120)
    assert faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
