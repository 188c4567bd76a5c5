"""--kl_anchor: a step also learns to stay near the base, by its KL divergence from it on general texts.

The texts are those of forgetting.py, of which every second one is left to measure by. A step's are named by (seed,
step), and pass at once, without dropout and noise: how a step is cut, and into how many processes, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch import nn

from onecard.data.batches import step_samples
from onecard.model.divergence import kl_loss
from onecard.objectives.preference import adapter_off
from onecard.train.forgetting import MOST_TOKENS
from onecard.train.run import Run

TEXTS_PER_STEP = 4
LARGEST_PASS = TEXTS_PER_STEP * MOST_TOKENS  # tokens, padding included


@dataclass
class Anchor:
    """The token ids of the texts, and how much their divergence weighs beside the loss of a step."""

    rows: Sequence[Sequence[int]]
    weight: float
    last_kl: float = 0.0
    """KL(base || tuned) per token in nats of the texts of the last step, before its update."""

    def add_gradients(self, run: Run) -> None:
        """Add the gradients of `weight` times the divergence per token to those of the step."""
        accelerator, model = run.accelerator, run.model
        chosen = step_samples(run.state.step, len(self.rows), TEXTS_PER_STEP, run.options.seed).indices
        texts = [self.rows[int(number)] for number in chosen]
        _make_quiet(model)
        try:
            with run.engine.gathering(is_last=True), run.offload or nullcontext(), accelerator.autocast():
                total, n_tokens = kl_loss(model, texts, accelerator.device, _base)
            if run.offload is not None:
                run.offload.turn_back()
            # Each process computes all of it, and their gradients are added up.
            run.engine.backward(total * (self.weight / n_tokens / accelerator.num_processes), is_last=True)
        finally:
            model.train()
        self.last_kl = float(total.detach()) / n_tokens


@contextmanager
def _base(model: nn.Module) -> Iterator[None]:
    with adapter_off(model):
        yield
    _make_quiet(model)


def _make_quiet(model: nn.Module) -> None:
    """No dropout, and no noise of NEFTune; the rest stays in training mode, in which layers are recomputed."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) or hasattr(module, "neftune_noise_alpha"):
            module.eval()
