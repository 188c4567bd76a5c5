"""Validation of a run: the loss of its held-out rows, forgetting, and which step is the best so far.

How the sums are computed within the memory that there is: `evaluate.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from onecard.console import warn
from onecard.objectives.base import Objective
from onecard.objectives.preference import adapter_off
from onecard.train.evaluate import Evaluator
from onecard.train.forgetting import measure_forgetting, noise_floor
from onecard.train.run import Run, RunEvent, report_events
from onecard.train.trackers import ACCURACY, FORGETTING, Reporter, rounded

NOT_MEASURED = "out of memory: forgetting is not measured in this start of the run"
LARGEST_EXPONENT = 700.0  # exp of more is no float


def validate(run: Run, reporter: Reporter) -> bool:
    """Evaluate if there are held-out rows; True when this is the best step so far, by any count that is kept."""
    state = run.state
    if not run.test_samples:
        return False
    started_s = time.monotonic()
    with reporter.evaluation(state.step) as progress:
        loss, more = _held_out_losses(run, progress)
    seconds = time.monotonic() - started_s
    if not math.isfinite(loss):
        warn(f"step {state.step}: the evaluation loss is {loss}, so this step is not taken for the best; the base "
             "cannot compute a held-out row, or the weights diverge (lower --learning_rate)")  # fmt: skip
    # A NaN, of an older start too, must not stay the best.
    best = state.best_loss if state.best_loss is not None and math.isfinite(state.best_loss) else math.inf
    improved = loss < best
    if improved:
        state.best_step, state.best_loss = state.step, loss
    forgetting = _forgetting(run)
    balanced = bool(run.options.balances) and _is_better_balanced(run, loss, forgetting)
    # Those by the clock do not count: where a run ends must not depend on how fast the machine is.
    if balanced if run.options.stop_on == "balanced" else improved:
        state.evaluations_since_best = 0
    elif state.step % run.options.eval_steps == 0:
        state.evaluations_since_best += 1
    report_events(run, reporter)
    row = {"step": state.step, **({"eval_loss": loss} if run.rollouts is None else {}), "best_step": state.best_step}
    row |= {"balanced_step": state.balanced_step} if run.options.balances else {}
    accuracy = f", accuracy {more[f'eval_{ACCURACY}']:.1%}" if f"eval_{ACCURACY}" in more else ""
    said = f"evaluation loss {loss:.4f}" if run.rollouts is None else f"mean reward of held-out prompts {-loss:.4f}"
    best_so_far = " (best so far)" if improved else ""
    took = f"{len(run.test_samples):,} rows in {seconds:,.1f} s"
    perplexities = _perplexities(run, loss)
    if perplexities:
        both = " and ".join(f"{value:,.4g}" for value in perplexities.values())
        took = f"perplexity per token and per character {both}, {took}"
    best_balance = " (best balanced so far)" if balanced else ""
    forgot = "".join(
        f"\nstep {state.step}: forgetting {kl:.2g} nats per token{best_balance}" for kl in forgetting.values()
    )
    reporter.event(
        row | more | perplexities | forgetting, f"step {state.step}: {said}{accuracy}{best_so_far}, {took}{forgot}"
    )
    return improved or balanced


def _is_better_balanced(run: Run, loss: float, forgetting: dict[str, float]) -> bool:
    """Whether the sum of loss and forgetting, both in nats, is the lowest so far; the state then keeps it.

    No other evaluation has less of both, so the step is on their front; a nat gained is worth a nat forgotten.
    """
    state, total = run.state, loss + forgetting.get(FORGETTING, math.nan)
    improved = total < (math.inf if state.balanced_sum is None else state.balanced_sum)
    if improved:
        state.balanced_step, state.balanced_sum = state.step, total
    return improved


def _forgetting(run: Run) -> dict[str, float]:
    """How far the model has moved from its base, for the log; the first time, what rounding alone gives is said."""
    rows = run.forgetting_rows
    if not rows:
        return {}
    device = run.accelerator.device
    if not run.knows_noise:
        run.knows_noise = True
        noise = noise_floor(run.model, rows, device, adapter_off)
        if noise is not None:
            floor = {"step": run.state.step, "event": "forgetting", "texts": len(rows), "noise": noise}
            message = f"forgetting is measured on {len(rows)} texts; rounding alone gives {noise:.1g}"
            run.events.append(RunEvent(floor, message))
    found = measure_forgetting(run.model, rows, device, adapter_off, run.base_states)
    if found is None:
        run.events.append(RunEvent({"step": run.state.step, "event": "forgetting", "kl": None}, NOT_MEASURED))
        run.forgetting_rows = ()
    return {} if found is None else {FORGETTING: found.kl}


def _perplexities(run: Run, loss: float) -> dict[str, float]:
    """Of texts: exp of the loss per token, and per character, which is the same unit for every tokenizer."""
    per_character = getattr(run.test_samples, "tokens_per_character", None)
    if per_character is None:
        return {}
    nats = {"perplexity": loss, "perplexity_per_character": loss * per_character}
    return {name: math.exp(value) if value < LARGEST_EXPONENT else math.inf for name, value in nats.items()}


def _held_out_losses(run: Run, progress: Callable[[int, int], None]) -> tuple[float, dict[str, float]]:
    """The loss of all held-out samples per unit; each metric as eval_NAME and, where there are several sources, their
    losses as eval_loss/NAME."""
    sources = run.test_sources
    if sources is None:
        whole, of_sources = evaluate(run, run.test_samples, progress), {}
    else:
        members = [np.flatnonzero(sources.parts == number) for number in range(len(sources.names))]
        of_sources = {
            name: evaluate(run, [run.test_samples[int(i)] for i in chosen], progress)
            for name, chosen in zip(sources.names, members, strict=True)
            if len(chosen)
        }
        whole = sum(of_sources.values(), torch.zeros(()))
    loss, n_units, *metrics = whole.tolist()
    means = {f"eval_{name}": mean for name, mean in rounded(run.objective.means(metrics)).items()}
    return loss / n_units, means | {f"eval_loss/{name}": float(sums[0] / sums[1]) for name, sums in of_sources.items()}


def evaluate(
    run: Run, samples: Sequence[Any], progress: Callable[[int, int], None] = lambda done, total: None,
    objective: Objective | None = None,
) -> torch.Tensor:  # fmt: skip
    """The sums of held-out samples (`Evaluator.sums`) by the run's objective, or this one, under the run's limits; of
    sampled answers the loss is the reward, negated."""
    if run.rollouts is not None:
        found: torch.Tensor = run.rollouts.evaluate(run, samples)
        return found
    return evaluator_of(run, progress).sums(objective or run.objective, samples)


def evaluator_of(run: Run, progress: Callable[[int, int], None] = lambda done, total: None) -> Evaluator:
    """What evaluates with the run's model under its limits; that memory ran out is reported as an event."""

    def on_change(change: str) -> None:
        message = f"evaluation after step {run.state.step}: out of memory; {change}. The result does not change."
        run.events.append(RunEvent({"step": run.state.step, "event": "out_of_memory", "change": change}, message))

    return Evaluator(run.model, run.accelerator, run.limits, run.evaluation_limits, on_change, progress)
