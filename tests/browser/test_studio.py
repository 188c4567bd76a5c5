"""Train and Runs of the studio in a real Chromium, with a stub in place of training; axe-core looks for faults."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Studio, held_back, press_until, serving_studio, set_option, wait_until
from tests.browser.test_accessibility import DESKTOP, LOOKS, PHONE, faults

STUB = Path(__file__).resolve().parents[1] / "studio" / "stub_program.py"


def make_run(root: Path, name: str, rows: int, **settings: Any) -> Path:
    run = root / name
    run.mkdir()
    lines = [{"step": k, "loss": 3 / k, "learning_rate": 1 / k, "tokens_per_s": 900.0} for k in range(1, rows + 1)]
    lines += [{"step": rows, "eval_loss": 0.5, "forgetting": 0.02}]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    options = {"model_path": "org/base", "data_path": "rows.jsonl", "objective": "sft", "bits": 4, **settings}
    (run / "onecard.yaml").write_text("".join(f"{key}: {value}\n" for key, value in options.items()), encoding="utf-8")
    (run / "manifest.json").write_text("{}", encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """One with two runs in it."""
    with serving_studio(tmp_path_factory.mktemp("studio"), program=(sys.executable, str(STUB))) as found:
        make_run(found.context.output_root, "first", 40, bits=4)
        make_run(found.context.output_root, "second", 90, bits=8)
        yield found


def test_a_run_is_queued_by_keyboard_alone_and_watched_on_a_second_page(open_view: Any, studio: Studio) -> None:
    """Under the page's own policy: nothing in it is refused by the browser."""
    page = open_view("data", with_policy=True)
    press_until(page, "#tab-data")
    for name in ("model", "train"):
        page.keyboard.press("ArrowRight")
        page.wait_for_selector(f"#tab-{name}[aria-selected=true]:focus")
    press_until(page, "#run-name")
    page.keyboard.type("by-keyboard")
    press_until(page, "#more-options")
    page.keyboard.type("wandb_project")
    page.keyboard.press("Enter")
    page.wait_for_selector("#opt-wandb_project:focus")
    page.keyboard.type("wait")
    page.keyboard.press("Tab")
    page.wait_for_selector("#command:has-text('--wandb_project=wait')")
    press_until(page, "#add-run")
    page.keyboard.press("Enter")
    page.wait_for_selector("ol.queue li:has-text('by-keyboard')")
    other = open_view("train", locale="zh-CN")
    other.wait_for_selector("ol.queue .badge:has-text('进行中')")
    other.wait_for_selector("#run-log:has-text('step 1')")
    page.wait_for_selector("#chart-loss canvas")
    (studio.context.output_root / "by-keyboard" / "go").touch()
    page.wait_for_selector("ol.queue .badge:has-text('done')")
    other.wait_for_selector("ol.queue .badge:has-text('完成')")
    wait_until(lambda: "by-keyboard" in page.input_value("#watched-run"))


def test_a_row_that_comes_while_the_log_is_loaded_is_drawn(
    open_view: Any, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to the first request was made before the row was written, and comes behind the news of it."""
    run = make_run(studio.context.output_root, "late", 0)
    whole = (run / "log.jsonl").read_text(encoding="utf-8")
    (run / "log.jsonl").write_text("", encoding="utf-8")
    told: list[str] = []
    publish = studio.context.events.publish
    monkeypatch.setattr(
        studio.context.events, "publish", lambda name, content: (publish(name, content), told.append(name))
    )
    page = open_view("train")
    page.wait_for_selector("#watched-run option[value=late]", state="attached")
    n_asked = 0

    def late(route: Any) -> None:
        nonlocal n_asked
        n_asked += 1
        answer = route.fetch()
        if n_asked == 1:
            told.clear()
            (run / "log.jsonl").write_text(whole, encoding="utf-8")
            wait_until(lambda: "rows" in told, seconds=60)
            time.sleep(0.3)  # until the page has heard it; where that takes longer, nothing is tested
        route.fulfill(response=answer)

    page.route("**/api/runs/late/rows*", late)
    page.select_option("#watched-run", "late")
    page.wait_for_selector("#chart-loss[aria-label*='0.5'] canvas")
    assert n_asked
    page.unroute_all(behavior="wait")


def test_a_run_that_is_over_can_be_looked_at_while_another_goes_on(open_view: Any, studio: Studio) -> None:
    page = open_view("train")
    page.fill("#run-name", "goes-on")
    set_option(page, "wandb_project", "wait")
    page.wait_for_selector("#command:has-text('--wandb_project=wait')")
    page.click("#add-run")
    wait_until(lambda: page.input_value("#watched-run") == "goes-on")
    page.wait_for_selector("#run-log:has-text('step 1')")
    page.select_option("#watched-run", "second")
    page.wait_for_selector("#chart-loss[aria-label*='(90)']")
    run = studio.context.output_root / "goes-on"
    for step in (2, 3):
        with (run / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(f'{{"step": {step}, "loss": 0.25}}\n')
        page.wait_for_function(f"onecard.studio.Alpine.$data(document.querySelector('#view-train > div')).runs"
                               f".find((row) => row.id === 'goes-on').step === {step}")  # fmt: skip
        assert page.input_value("#watched-run") == "second"
    (run / "go").touch()
    page.wait_for_selector("ol.queue .badge:has-text('done')")


def test_an_option_that_is_typed_before_the_options_have_come_is_found(open_view: Any) -> None:
    page = open_view("train")
    let_come = held_back(page, "**/api/options")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.fill("#more-options", "wandb_project")
    page.press("#more-options", "Enter")
    let_come()
    page.wait_for_selector("#opt-wandb_project:focus")
    assert not page.is_visible("[role=alert]:has-text('wandb_project')")


def test_a_name_that_is_typed_while_a_run_is_added_is_that_of_the_next(open_view: Any) -> None:
    page = open_view("train")
    page.fill("#run-name", "sent-before")
    page.wait_for_selector("#command:has-text('sent-before')")
    let_come = held_back(page, "**/api/queue")
    page.click("#add-run")
    page.fill("#run-name", "the next")
    let_come()
    page.wait_for_selector(".toast.done:has-text('sent-before')")
    page.wait_for_selector("#add-run:enabled")
    assert page.input_value("#run-name") == "the next"


def test_what_was_typed_last_is_checked_before_a_run_is_added(open_view: Any) -> None:
    page = open_view("train")
    page.wait_for_selector("#add-run:enabled")
    added: list[str] = []
    page.on("request", lambda asked: added.append(asked.url) if asked.url.endswith("/api/queue") else None)
    let_come = held_back(page, "**/api/queue/check")
    page.fill("#opt-num_epoch", "many")
    page.press("#opt-num_epoch", "Tab")
    page.click("#add-run")
    let_come()
    page.wait_for_selector("#opt-num_epoch[aria-invalid=true]")
    wait_until(lambda: page.get_attribute("#add-run", "disabled") is not None)
    assert added == []


def test_the_queue_is_not_called_empty_before_it_is_known(open_view: Any) -> None:
    page = open_view("train")
    let_come = held_back(page, "**/api/queue")
    page.reload()
    page.wait_for_selector("#hold:disabled")
    assert "Nothing waits" not in page.inner_text("#view-train")
    let_come()
    page.wait_for_selector("#hold:enabled")


def test_the_run_that_was_opened_last_is_shown(open_view: Any) -> None:
    page = open_view("runs")
    let_come = held_back(page, "**/api/runs/first")
    page.click("#runs button:has-text('first')")
    page.click("#runs button:has-text('second')")
    page.wait_for_selector("#details-title:has-text('second'):focus")
    page.focus("#notes")
    let_come()
    page.wait_for_timeout(300)
    assert "second" in page.inner_text("#details-title")
    page.wait_for_selector("#notes:focus")


def test_a_run_that_is_renamed_stays_open_until_the_answer_comes(open_view: Any, studio: Studio) -> None:
    make_run(studio.context.output_root, "old-name", 2)
    page = open_view("runs")
    page.click("#runs button:has-text('old-name')")
    page.wait_for_selector("#details-title:focus")
    let_come = held_back(page, "**/api/runs/old-name")
    page.fill("#new-name", "its-new-name")
    page.press("#new-name", "Enter")
    page.wait_for_selector("#runs tr:has-text('its-new-name')")  # it was heard
    page.wait_for_selector("#runs tr:has-text('old-name')", state="detached")
    assert page.is_visible("#details-title:has-text('old-name')")
    let_come()
    page.wait_for_selector("#details-title:has-text('its-new-name')")


def test_a_run_that_comes_while_the_table_is_read_stays_in_it(open_view: Any, studio: Studio) -> None:
    page = open_view("runs")
    page.wait_for_selector("#runs tr:has-text('second')")
    let_come = held_back(page, "**/api/runs")
    page.evaluate("dispatchEvent(new CustomEvent('studio:online', { detail: true }))")
    page.wait_for_timeout(300)
    make_run(studio.context.output_root, "came-late", 2)
    page.wait_for_selector("#runs tr:has-text('came-late')")
    let_come()
    page.wait_for_timeout(300)
    assert page.is_visible("#runs tr:has-text('came-late')")


def test_a_trash_that_is_closed_before_its_answer_comes_stays_closed(open_view: Any) -> None:
    page = open_view("runs")
    let_come = held_back(page, "**/api/trash")
    page.click("#show-trash")
    page.wait_for_selector("#show-trash[aria-expanded=true]")
    page.click("#show-trash")
    let_come()
    page.wait_for_timeout(300)
    assert page.is_hidden("#trash-title")
    page.click("#show-trash")
    page.wait_for_selector("#trash-title")


def test_what_is_wrong_stands_at_its_field_and_a_failure_says_why(open_view: Any) -> None:
    page = open_view("train")
    page.fill("#opt-num_epoch", "many")
    page.press("#opt-num_epoch", "Tab")
    page.wait_for_selector("#opt-num_epoch[aria-invalid=true]")
    assert page.is_disabled("#add-run")
    page.fill("#opt-num_epoch", "1")
    page.fill("#run-name", "fails")
    set_option(page, "seed", "2")
    page.wait_for_selector("#command:has-text('--seed=2')")
    page.click("#add-run")
    page.wait_for_selector("ol.queue li:has-text('there is no usable row; give another file')")
    page.wait_for_selector("ol.queue li:has-text('Put these settings right')")


def test_runs_are_compared_noted_deleted_and_restored(open_view: Any, studio: Studio) -> None:
    page = open_view("runs")
    page.wait_for_selector("#runs tr:has-text('second')")
    page.check("[aria-label='first: compare']")
    page.check("[aria-label='second: compare']")
    page.wait_for_selector("#chart-compare canvas")
    page.wait_for_selector("#differences tr:has-text('--bits')")
    page.fill("#filter", "second")
    page.wait_for_function("document.querySelectorAll('#runs tbody tr').length === 1")
    page.click("#runs button:has-text('second')")
    page.wait_for_selector("#details-title:focus")
    page.fill("#notes", "the better one")
    page.press("#notes", "Tab")
    wait_until(lambda: (studio.context.output_root / "second" / "studio.json").exists())
    page.fill("#new-name", "renamed")
    page.press("#new-name", "Enter")
    page.wait_for_selector("#details-title:has-text('renamed')")
    page.fill("#filter", "better")
    page.wait_for_selector("#runs tr:has-text('renamed')")
    page.click("#delete")
    page.wait_for_selector("#runs tr:has-text('renamed')", state="detached")
    page.click("#show-trash")
    page.click("button:has-text('Restore')")
    page.wait_for_selector("#runs tr:has-text('renamed')")
    (studio.context.output_root / "renamed").rename(studio.context.output_root / "second")


@pytest.mark.parametrize(("device", "locale", "scheme"), LOOKS)
def test_axe_finds_no_serious_fault_and_nothing_is_too_wide(
    open_view: Any, device: str, locale: str, scheme: str
) -> None:
    view = DESKTOP if device == "desktop" else PHONE
    page = open_view("train", **view, locale=locale, color_scheme=scheme)
    page.wait_for_selector("#chart-loss canvas")
    assert faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("#tab-runs")
    page.wait_for_selector("#chart-compare canvas")
    page.click("#runs button:has-text('first')")
    page.wait_for_selector("#details-title:focus")
    assert faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_keyboard_comes_back_to_the_views_from_the_end_of_a_page(open_view: Any) -> None:
    page = open_view("runs")
    page.wait_for_selector("#runs tr:has-text('second')")
    assert page.get_attribute("#tab-runs", "accesskey") == "t"
    assert page.locator("#to-tabs").bounding_box()["x"] < 0
    page.focus("#to-tabs")
    box = page.locator("#to-tabs").bounding_box()
    assert box["x"] >= 0 and box["y"] >= 0, "it is seen while it has the focus"
    page.keyboard.press("Enter")
    page.wait_for_selector("#tab-runs:focus")
