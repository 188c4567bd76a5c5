"""The studio with the programs of the kit behind it in a real Chromium: a run is steered, data are made better."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.browser.conftest import serving_studio, set_option, wait_until
from tests.browser.test_accessibility import DESKTOP

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 240.0  # programs that import torch, on a machine that does other things as well


class RealStudio(NamedTuple):
    """Where it listens, where its runs are, and a folder that it reads data from."""

    address: str
    output: Path
    data: Path


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealStudio]:
    folder = tmp_path_factory.mktemp("studio")
    with serving_studio(folder, data_root=[str(folder)]) as found:
        yield RealStudio(found.address, found.context.output_root, folder)


@pytest.fixture
def page(browser: Any, studio: RealStudio) -> Iterator[Any]:
    context = browser.new_context(**DESKTOP, locale="en-US", bypass_csp=True)
    page, errors = context.new_page(), []
    page.set_default_timeout(1000 * PATIENCE_SECONDS)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(studio.address)
    page.wait_for_selector("body[data-ready]")
    yield page
    context.close()
    assert errors == []


def write_rows(path: Path, texts: list[str]) -> str:
    rows = [{"instruction": f"Say {text}", "output": text} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def steps_of(run: Path) -> list[int]:
    """The steps in the log of a run."""
    path = run / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [row["step"] for row in map(json.loads, lines) if "loss" in row]


def wait_for_steps(run: Path, beyond: int) -> None:
    wait_until(lambda: max(steps_of(run), default=0) > beyond, PATIENCE_SECONDS, f"a step behind {beyond}")


def checkpoints(run: Path) -> set[str]:
    return {path.parent.name for path in run.glob("checkpoint-*/manifest.json")}


def test_a_run_is_paused_saved_asked_given_back_stopped_and_resumed(page: Any, studio: RealStudio) -> None:
    data = write_rows(studio.data / "numbers.jsonl", [f"the number {k}" for k in range(40)])
    run, badge = studio.output / "steered", "#view-train .facts .badge"
    page.click("#tab-train")
    page.fill("#run-name", "steered")
    for name, value in {"data_path": data, "num_epoch": "500", "cutoff_len": "64", "lora_r": "2", "total_batch": "4",
                        "test_size": "0"}.items():  # fmt: skip
        page.fill(f"#opt-{name}", value)
        page.press(f"#opt-{name}", "Tab")
    set_option(page, "log_steps", "1")
    page.select_option("#opt-bits", "32")
    page.wait_for_selector("#command:has-text('--bits=32'):has-text('--log_steps=1')")
    page.click("#add-run:enabled")
    page.wait_for_selector(f"{badge}:has-text('trains')")
    wait_for_steps(run, 1)

    page.click("#pause")
    page.wait_for_selector(f"{badge}:has-text('paused')")
    at_rest = steps_of(run)
    page.click("#save")
    wanted = f"checkpoint-{at_rest[-1]}"  # beside those that it saves by itself
    wait_until(lambda: wanted in checkpoints(run), PATIENCE_SECONDS, "a checkpoint of a run that pauses")
    assert steps_of(run) == at_rest

    page.click("#continue")
    page.wait_for_selector(f"{badge}:has-text('trains')")
    wait_for_steps(run, at_rest[-1])
    page.fill("#question", "Say the number 7")
    page.click("#ask")
    page.wait_for_selector("#view-train caption:has-text('Say the number 7')")

    page.click("#give-back")
    page.wait_for_selector(f"{badge}:has-text('in RAM')")
    given_back = steps_of(run)
    assert not page.is_visible("#pause") and page.is_visible("#take-back")
    page.wait_for_timeout(1500)
    assert steps_of(run) == given_back
    page.click("#take-back")
    page.wait_for_selector(f"{badge}:has-text('trains')")
    wait_for_steps(run, given_back[-1])

    page.click("#stop")
    page.wait_for_selector(f"{badge}:has-text('stopped')")
    stopped = steps_of(run)
    assert f"checkpoint-{stopped[-1]}" in checkpoints(run)
    page.click("#resume")
    page.wait_for_selector(f"{badge}:has-text('trains')")
    wait_for_steps(run, stopped[-1])
    assert steps_of(run)[: len(stopped)] == stopped == sorted(set(stopped)), "it goes on from where it stopped"
    page.click("#stop")
    page.wait_for_selector(f"{badge}:has-text('stopped')")


def test_data_are_cleaned_split_and_mixed(page: Any, studio: RealStudio) -> None:
    places = ("the mill of a town", "seven quiet farms", "a bridge made of iron", "gardens", "us")
    sentences = [f"{word} rivers flow past {place}" for word in ("Wide", "Cold", "Old", "Loud") for place in places]
    planted = write_rows(studio.data / "planted.jsonl", [*sentences, *sentences[:6]])
    other = write_rows(studio.data / "other.jsonl", [f"{k} is a number" for k in range(10)])
    view = page.locator("#view-data")

    def add(path: str) -> None:
        view.locator("form.row input[type=text]").first.fill(path)
        view.locator("form.row button.low").first.click()
        page.wait_for_selector(f"#view-data .sources .name:has-text('{Path(path).name}')")

    def make(program: str, name: str) -> Path:
        view.locator(".make select").first.select_option(program)
        view.locator(".make input[required]").fill(name)
        view.locator(".make form button").first.click()
        page.wait_for_selector(f"#view-data .make code:has-text('{name}')")
        return studio.output / "data" / name

    add(planted)
    cleaned = make("clean", "cleaned") / "data.jsonl"
    assert len(cleaned.read_text(encoding="utf-8").splitlines()) == len(sentences), "the six repeated ones are gone"
    view.locator(".make p:has(code) button").first.click()
    page.wait_for_selector("#view-data .sources .name:has-text('cleaned')")
    page.wait_for_selector("#view-data .tokens .token")
    split = make("split", "parts")
    parts = [(split / name).read_text(encoding="utf-8").splitlines() for name in ("train.jsonl", "validation.jsonl")]
    assert sorted(parts[0] + parts[1]) == sorted(cleaned.read_text(encoding="utf-8").splitlines()) and all(parts)
    view.locator(".make p:has(code:has-text('train.jsonl')) button").click()
    page.wait_for_selector("#view-data .sources .name:has-text('train.jsonl')")
    page.wait_for_selector("#view-data .tokens .token")

    add(other)
    view.locator(".sources tr:has-text('other.jsonl') input").first.fill("0.5")
    with page.expect_response("**/api/data/read") as read:
        view.locator("button.main").first.click()
    assert read.value.json()["n_records"] == len(parts[0]) + 10
    page.wait_for_selector("#view-data .tokens .token")
    view.get_by_role("button", name="Use these data").click()
    page.click("#tab-train")
    page.fill("#opt-num_epoch", "1")
    page.press("#opt-num_epoch", "Tab")
    page.fill("#run-name", "mixed")
    page.wait_for_selector("#command:has-text('other.jsonl:0.5')")
    page.click("#add-run:enabled")
    page.wait_for_selector("ol.queue li:has-text('mixed') .badge:has-text('done')")
    assert (studio.output / "mixed" / "adapter_model.safetensors").is_file()
