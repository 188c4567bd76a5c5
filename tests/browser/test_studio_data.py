"""Data and Model of the studio in a real Chromium: read, looked at, cut by a slider, planned, handed on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Studio, held_back, serving_studio, wait_until
from tests.browser.test_accessibility import DESKTOP, PHONE, faults
from tests.data.test_cutoff_effect import at_limit

pytestmark = pytest.mark.slow
RECORDS = [{"instruction": f"Say {i}", "output": f"{i} times. " * (i % 7)} for i in range(1, 60)]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """One with the real worker."""
    with serving_studio(tmp_path_factory.mktemp("studio")) as found:
        yield found


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


def test_data_that_are_split_before_the_page_is_answered_are_told(open_view: Any, tmp_path: Path) -> None:
    page = open_view("data")
    view = upload(page, tmp_path)
    let_come = held_back(page, "**/api/data/make/split")
    page.evaluate("onecard.studio.on('job', (job) => { window.ended = job.state === 'done' }) && null")
    view.locator(".make select").first.select_option("split")
    view.locator(".make input[type=text]").first.fill("halves")
    view.locator(".make form button").first.click()
    page.wait_for_function("window.ended")
    let_come()
    view.locator(".make code:has-text('validation')").wait_for()


def test_a_list_that_was_closed_is_not_opened_by_a_late_answer(open_view: Any) -> None:
    page = open_view("data")
    view = page.locator("#view-data")
    view.get_by_role("button", name="Open collections").first.click()
    view.locator("input[type=search]").wait_for()
    let_come = held_back(page, "**/api/data/catalogue*")
    view.locator("input[type=search]").fill("math")
    page.wait_for_timeout(400)
    view.get_by_role("button", name="Close").click()
    let_come()
    page.wait_for_timeout(300)
    assert view.locator("input[type=search]").count() == 0


def test_sliders_that_were_moved_stay_when_the_view_was_opened_twice(open_view: Any) -> None:
    page = open_view("data")
    asked: list[str] = []
    page.on("request", lambda each: asked.append(each.url) if each.url.endswith("/api/plan/models") else None)
    let_come = held_back(page, "**/api/plan/models")
    for name in ("model", "data", "model"):
        page.click(f"#tab-{name}")
    let_come()
    page.wait_for_function("document.querySelector('#view-model input[name=lora_r]').max > 0")
    assert len(asked) == 1  # the answer to a second question would set the sliders back


def test_the_plan_follows_the_sliders(open_view: Any) -> None:
    page = open_view("model")
    view = page.locator("#view-model")
    page.wait_for_selector("#view-model .stack")
    plan = view.locator(".wide .card").first  # as a longer sample may leave the peak as it is, with fewer rows at once
    before = plan.inner_text()
    for name, place in (("lora_r", 7), ("cutoff_len", 8), ("bits", 3)):
        view.locator(f"input[name={name}]").fill(str(place))
        wait_until(lambda: plan.inner_text() != before, seconds=120, what=name)  # noqa: B023
        before = plan.inner_text()
    view.get_by_role("button", name="Use these settings").click()
    options = page.evaluate("JSON.parse(sessionStorage.getItem('onecard.draft'))")
    assert (options["lora_r"], options["cutoff_len"], options["bits"]) == (256, 4096, 32)


@pytest.mark.parametrize(
    ("device", "locale", "scheme"), product([DESKTOP, PHONE], ["en-US", "zh-CN"], ["light", "dark"])
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
    page.wait_for_selector("#view-model .wide[aria-busy=false]", timeout=120_000)
    assert faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
