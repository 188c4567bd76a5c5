"""Scales of an adapter compared: what it gains and what it forgets at each, and which is best.

The gain is the paired difference from scale 0 over the same records, more is better; forgetting is KL(base || adapter)
per token over the texts of `train/forgetting.py`. The best scale forgets least among those that are in no suite worse
than that suite's best one beyond noise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onecard.console import warn
from onecard.curation.make.journal import Journal, JournalEntry
from onecard.errors import ModelError
from onecard.evaluate.compare import CHOICE_SCORE, SCORES, SuiteScore
from onecard.evaluate.measures import Measure
from onecard.inference.call import ModelBundle
from onecard.model.lora.peft_model import remove_adapter
from onecard.model.trained import load_trained, without_adapter
from onecard.statistics import Estimate, paired_test
from onecard.train.forgetting import measure_forgetting, noise_floor, text_rows

Rows = Collection[Mapping[str, Any]]


def at_scale(bundle: ModelBundle, source: str, scale: float) -> ModelBundle:
    """The same base with its adapter put on anew, `scale` times as strongly."""
    return replace(bundle, model=load_trained(remove_adapter(bundle.model), source, scale=scale).model.eval())


def forgetting_at(bundle: ModelBundle, scale: float, journal: Journal) -> tuple[float, float]:
    """KL(base || adapter) in nats per token at this scale, and the part of it that is rounding; kept in the journal.

    Raises ModelError where memory does not take one of the texts.
    """
    key = f"forgetting at {scale:g}"
    if key not in journal.done:
        rows, device = text_rows(bundle.tokenizer), bundle.model.device
        found = measure_forgetting(bundle.model, rows, device, without_adapter)
        noise = noise_floor(bundle.model, rows, device, without_adapter)
        if found is None or noise is None:
            raise ModelError("the texts for the forgetting do not fit into memory; use fewer --bits")
        journal.add(JournalEntry(key, [{"kl": found.kl, "noise": noise}]))
    (row,) = next(entry.rows for entry in journal.entries if entry.key == key)
    return row["kl"], row["noise"]


@dataclass(frozen=True)
class SweptSuite:
    """One suite at each scale: mean score, and gain over scale 0. kept: not worse than its best scale beyond noise."""

    name: str
    kind: str
    score: str
    n: int
    means: dict[float, float]
    gains: dict[float, Estimate]
    kept: frozenset[float]

    def part(self, forgetting: Mapping[float, float]) -> dict[str, Any]:
        """The suite in a report."""
        measures = [
            Measure(
                "scale", f"{scale:g}", self.n,
                {"gain": gain, self.score: self.means[scale], "forgetting": forgetting[scale]},
            ).plain()
            for scale, gain in self.gains.items()
        ]  # fmt: skip
        kept = ", ".join(f"{scale:g}" for scale in self.gains if scale in self.kept)
        return {"name": self.name, "kind": self.kind, "settings": {"gain_in": self.score, "kept_scales": kept},
                "measures": measures, "worst": [], "notes": {}}  # fmt: skip


def swept_suite(name: str, kind: str, rows: Mapping[float, Rows], seed: int) -> SweptSuite | None:
    """A suite from its rows at each scale, 0 among them; None, which is said, where no record has a score at all."""
    score = SCORES.get(kind, CHOICE_SCORE)
    values = {scale: _scores(score, some) for scale, some in rows.items()}
    keys = [key for key in values[0] if all(key in some for some in values.values())]
    if not keys:
        warn(f"{name} is left out: no record has a score ({score.name}) at every scale")
        return None
    # More is better, whatever the score.
    series = {scale: [score.is_better * some[key] for key in keys] for scale, some in values.items()}
    tests = {scale: paired_test(series[0], some, seed=seed) for scale, some in series.items()}
    top = max(series, key=lambda scale: (tests[scale].difference.value, -scale))
    kept = frozenset(
        scale for scale, some in series.items() if paired_test(series[top], some, seed=seed).direction >= 0
    )
    means = {scale: score.is_better * sum(some) / len(keys) for scale, some in series.items()}
    return SweptSuite(
        name, kind, score.name, len(keys), means, {scale: test.difference for scale, test in tests.items()}, kept
    )


def _scores(score: SuiteScore, rows: Rows) -> dict[str, float]:
    return {row["key"]: value for row in rows if (value := score.of(row)) is not None}


def best_scale(suites: Sequence[SweptSuite], forgetting: Mapping[float, float]) -> float | None:
    """The scale that forgets least among those that every suite keeps; None where the suites have none in common."""
    kept = set(forgetting).intersection(*(suite.kept for suite in suites))
    return min(kept, key=lambda scale: (forgetting[scale], scale), default=None)


def sweep_lines(suites: Sequence[SweptSuite], forgetting: Mapping[float, float], best: float | None) -> list[str]:
    """What is said on the screen: a line for each suite and scale, and the best scale with the reason."""
    lines = []
    for suite in suites:
        for scale, gain in suite.gains.items():
            lines.append(
                f"{suite.name} at scale {scale:g}: {suite.score} {suite.means[scale]:.4f}, gain {gain.value:+.4f} "
                f"({gain.low:+.4f} to {gain.high:+.4f}), forgetting {forgetting[scale]:.5f}"
            )
    if best is None:
        each = "; ".join(f"{suite.name} {', '.join(f'{s:g}' for s in sorted(suite.kept))}" for suite in suites)
        return [*lines, f"no scale is best: the suites keep other ones each: {each}"]
    why = "it forgets least of the scales that are in no suite worse than that suite's best one beyond noise"
    if best == 0:
        why = "0 is the base: no scale is better than it beyond noise in these suites"
    return [*lines, f"best scale: {best:g}; {why}"]
