"""What a run logs: the progress bar, log.jsonl, the loss curve, and W&B or TensorBoard when asked for.

Only the first process of a multi-process run reports. Nothing leaves the machine unless ``--wandb`` is typed.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from onecard.console import say, warn
from onecard.errors import ConfigError
from onecard.train.step_log import LOG_NAME, StepLog, read_log
from onecard.translation import translated

SECONDS_PER_LINE = 30
OF_SOURCE = "loss/"  # names the loss of one source of a mixture in a row
REWARD, REWARDS, ACCURACY = "reward", "rewards/", "rewards/accuracies"  # metrics in a row; of evaluations behind eval_
FORGETTING = "forgetting"  # KL(base || tuned) per token
ANCHOR = "kl_anchor"  # the same on the texts of a step, before its update


class Reporter:
    """Everything a person or a program can watch while a run goes on.

    Args:
        run_dir: where log.jsonl and loss.png go.
        total_steps: optimizer steps of the whole run.
        first_step: steps already done. Rows of log.jsonl beyond it belong to work that was lost, and are dropped.
        enabled: False on every process but the first, which makes all methods do nothing.
        unit: what the loss is divided by, in words.
    """

    def __init__(
        self, run_dir: Path, total_steps: int, first_step: int, enabled: bool = True, unit: str = "supervised token"
    ) -> None:
        self.run_dir, self.total_steps, self.enabled, self.unit = run_dir, total_steps, enabled, unit
        self.trackers: list[Any] = []
        self._tokens, self._seconds = 0, 0.0  # since the last logged row
        if not enabled:
            return
        self._log = StepLog(run_dir, LOG_NAME)
        self._log.keep_up_to(first_step)
        (run_dir / LOG_NAME).touch()  # there from the beginning, for who watches
        # A bar redraws itself and would fill a log file, so a file gets one line per logged step instead.
        self.is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not self.is_terminal
        )

    def plan_for(self, total_steps: int) -> None:
        """Show so many steps as the whole run from now on: the clock may have cut it."""
        if self.enabled and total_steps != self.total_steps:
            self.total_steps = self._bar.total = total_steps
            self._bar.refresh()

    def step(self, row: dict[str, Any], *, to_file: bool, tokens: int, seconds: float) -> None:
        """Show one optimizer step; with `to_file` also log it. `row` needs step, epoch, loss and learning_rate.

        tokens, seconds: of this step, padding excluded. The speed that is told is that of the steps since the last
        logged row, without evaluations and checkpoints.
        """
        if not self.enabled:
            return
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        speed = self._tokens / max(1e-9, self._seconds)
        row = {**row, "tokens_per_s": round(speed, 1)}
        peak_gib = row.get("peak_bytes", 0) / 2**30
        memory = f" {peak_gib:.2f}GiB" if peak_gib else ""
        metrics = {"accuracy": ACCURACY, "reward": REWARD}
        shown = "".join(f"{label} {row[name]:.2f}  " for label, name in metrics.items() if name in row)
        self._bar.set_postfix_str(f"loss {row['loss']:.4f} {shown}{speed:,.0f}tok/s{memory}", refresh=False)
        self._bar.update(1)
        if not to_file:
            return
        self._tokens, self._seconds = 0, 0.0
        self._write(row)
        if not self.is_terminal:
            say(
                f"step {row['step']}/{self.total_steps}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  "
                f"{shown}lr {row['learning_rate']:.2e}  {speed:,.0f} tokens/s{memory}"
            )

    def event(self, row: dict[str, Any], message: str | None = None) -> None:
        """Log something that happened at a step (an evaluation, a resume) and say it."""
        if not self.enabled:
            return
        self._write(row)
        if message:
            tqdm.write(translated(message), file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def evaluation(self, step: int) -> Iterator[Callable[[int, int], None]]:
        """Show how far an evaluation is while it goes on, in rows: on a bar; in a file on a line every half minute."""
        bar = tqdm(unit="row", desc="evaluation", leave=False, dynamic_ncols=True,
                   disable=not (self.enabled and self.is_terminal))  # fmt: skip
        said_s = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal said_s
            if bar.total != total:
                bar.reset(total)
            bar.update(done - bar.n)
            if self.enabled and not self.is_terminal and done < total and time.monotonic() - said_s >= SECONDS_PER_LINE:
                said_s = time.monotonic()
                say(f"step {step}: evaluated on {done:,} of {total:,} rows")

        with bar:
            yield progress

    def close(self) -> None:
        """Finish the bar and draw loss.png."""
        if not self.enabled:
            return
        self._bar.close()
        for tracker in self.trackers:
            tracker.finish()
        try:
            draw_loss(self.run_dir, self.unit)
        except OSError as reason:
            warn(f"loss.png was not written: {reason}")

    def _write(self, row: dict[str, Any]) -> None:
        self._log.write(row["step"], [row])
        numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
        for tracker in self.trackers:
            tracker.log(numbers, step=row["step"])


def rounded(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics as they are logged."""
    return {name: round(value, 6) for name, value in metrics.items()}


def draw_loss(run_dir: Path, unit: str = "supervised token") -> Path | None:
    """Draw training and evaluation loss over the steps into loss.png, below them the accuracies and the rewards of
    preference steps, and forgetting; None when there is nothing to draw.

    unit: what the loss is divided by.
    """
    from matplotlib.figure import Figure

    rows = read_log(run_dir)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    sources = dict.fromkeys(name for row in rows for name in row if name.startswith(OF_SOURCE))
    if not train and not held_out:
        return None
    rewards = dict.fromkeys(name for row in rows for name in row if name.startswith(REWARDS) or name == REWARD)
    below = {"accuracy": [name for name in rewards if name == ACCURACY],
             "reward": [name for name in rewards if name != ACCURACY]}  # fmt: skip
    forgetting = [(row["step"], row[FORGETTING]) for row in rows if FORGETTING in row]
    panels = {label: names for label, names in below.items() if names} | ({FORGETTING: []} if forgetting else {})
    figure = Figure(figsize=(8, 4.5 + 3 * len(panels)), dpi=120, layout="constrained")
    heights = [4.5] + [3] * len(panels)
    axes, *others = figure.subplots(len(heights), height_ratios=heights, sharex=True, squeeze=False)[:, 0]
    if train:
        steps, losses = zip(*train, strict=True)
        marker = "o" if len(steps) == 1 else None  # a line through one point is nothing
        axes.plot(steps, losses, marker=marker, color="#9db8d9", linewidth=1, label="training, each logged step")
        axes.plot(steps, _smooth(losses), color="#1f4e8c", linewidth=2, label="training, running mean")
    for name in sources:
        _draw_series(axes, rows, name, linestyle="--", label=name.removeprefix(OF_SOURCE))
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#c8561b", linewidth=2, label="evaluation")
    axes.set_ylabel(f"loss per {unit} (nats)")
    for panel, (label, names) in zip(others, panels.items(), strict=True):
        panel.set_ylabel(label)
        for name in names:
            _draw_series(panel, rows, name, label=name.removeprefix(REWARDS))
    if forgetting:
        others[-1].plot(*zip(*forgetting, strict=True), "o-", color="#7a4fa3", label="KL from the base, nats per token")
        others[-1].set_ylim(0, 1.1 * max(kl for _, kl in forgetting) or 1)
    for panel in (axes, *others):
        panel.grid(alpha=0.3)
        panel.legend()
    panel.set_xlabel("optimizer step")
    path = run_dir / "loss.png"
    figure.savefig(path)
    return path


def _draw_series(axes: Any, rows: list[dict[str, Any]], name: str, **style: Any) -> None:
    """The running mean of what the steps logged under a name, and a dot for each evaluation."""
    steps, values = zip(*((row["step"], row[name]) for row in rows if name in row), strict=True)
    (line,) = axes.plot(steps, _smooth(values), linewidth=1.2, **style)
    evaluated = [(row["step"], row[f"eval_{name}"]) for row in rows if f"eval_{name}" in row]
    axes.plot([step for step, _ in evaluated], [value for _, value in evaluated], "o", color=line.get_color())


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Exponential running mean with the start corrected, as Adam does, so that it does not begin at zero."""
    smoothed, mean, weight = [], 0.0, 0.9
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**count))
    return smoothed


def open_trackers(
    run_dir: Path, settings: dict[str, Any], *, tensorboard: bool, wandb_project: str | None
) -> list[Any]:
    """The trackers of accelerate that were asked for; under W&B a run that is resumed keeps its id.

    TensorBoard's files lie in OUTPUT_PATH/tensorboard, the id in OUTPUT_PATH/wandb_id.txt.
    """
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    trackers: list[Any] = [TensorBoardTracker("tensorboard", run_dir)] if tensorboard else []
    if wandb_project is not None:
        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        run_id = id_file.read_text(encoding="utf-8")
        trackers.append(WandBTracker(wandb_project, id=run_id, resume="allow", dir=str(run_dir), config=settings))
    for tracker in trackers:
        tracker.start()
    return trackers


def check_trackers(*, wandb: bool, tensorboard: bool) -> None:
    """Say before anything is loaded that a reporting package is missing. Raises ConfigError with the remedy."""
    from importlib.util import find_spec

    for wanted, package in ((wandb, "wandb"), (tensorboard, "tensorboard")):
        if wanted and find_spec(package) is None:
            raise ConfigError(f"--{package}", f"needs the package {package}: pip install {package}")
