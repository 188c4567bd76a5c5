"""What the studio's page spares itself while runs go on, in a real Chromium; benchmarks/studio_live.py measures it."""

from __future__ import annotations

from typing import Any

from tests.browser.test_studio import studio  # noqa: F401 (a fixture)

DRAWS = """async () => {
  const { Chart } = await import("/static/charts.js");
  const element = document.createElement("div");
  element.style.width = "600px";
  document.getElementById("main").append(element);
  const chart = new Chart(element, { title: "loss", tell: String });
  const steps = [...Array(2000).keys()];
  const values = steps.map((step) => Math.sin(step / 50));
  const line = { label: "a", values: [steps, values], colour: "#123456" };
  const frame = () => new Promise(requestAnimationFrame);
  chart.draw([line]);
  await frame();
  let drawn = 0;
  const { setData } = chart.plot;
  chart.plot.setData = (...given) => { drawn += 1; setData(...given); };
  const grow = async (value) => {
    steps.push(steps.length);
    values.push(value);
    chart.draw([line]);
    await frame();
    return drawn;
  };
  const counts = [await grow(0), await grow(0), await grow(5), await grow(0), await grow(0)];
  chart.plot.setScale("x", { min: 100, max: 200 });
  await frame();
  counts.push(await grow(0));
  const { min, max } = chart.plot.scales.x;
  const told = element.getAttribute("aria-label");
  element.remove();
  return { counts, min, max, told };
}"""


def test_a_curve_is_drawn_anew_where_that_can_be_seen_and_stays_zoomed(open_view: Any) -> None:
    """A row of two thousand is a third of a pixel here: the second, and a new extreme, are drawn."""
    found = open_view("runs").evaluate(DRAWS)
    assert found["counts"] == [0, 1, 2, 2, 3, 4]
    assert (found["min"], found["max"]) == (100, 200)
    assert found["told"] == "loss, a 0 (2005)", "a screen reader hears of each row"


def test_the_runs_that_are_compared_are_remembered(open_view: Any) -> None:
    page = open_view("runs")
    page.wait_for_selector("#chart-compare canvas")
    page.uncheck("[aria-label='first: compare']")
    page.wait_for_selector("#chart-compare[aria-label*='second']")
    page.reload()
    page.wait_for_selector("#chart-compare[aria-label*='second']")
    assert page.is_checked("[aria-label='second: compare']") and not page.is_checked("[aria-label='first: compare']")
