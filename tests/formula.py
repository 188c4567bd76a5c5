"""A memory plan's peak by a formula, for tests of what is decided and said with it."""

from __future__ import annotations

import pytest

from onecard.model.memory.activation_peak import ActivationPeak
from onecard.model.memory.architecture import Architecture
from onecard.model.memory.estimate import MemoryConfig
from onecard.model.memory.simulate import BACKWARD


def plan_by_formula(patch: pytest.MonkeyPatch) -> None:
    """Neither the peak of tensors nor what the allocator reserves beyond them is traced."""
    patch.setattr("onecard.model.memory.estimate.find_peak", peak_by_formula)
    patch.setattr("onecard.model.memory.estimate.reserved_beyond_tensors", lambda *_: None)


def peak_by_formula(model: Architecture, setup: MemoryConfig) -> ActivationPeak:
    """In the place of the model on fake tensors, for what is decided with its answers: it reacts to each technique."""
    hidden = setup.tokens * model.hidden_size * setup.element_bytes
    n_kept = 2 if setup.offload_activations else model.n_layers * (1 if setup.gradient_checkpointing else 30)
    wide = min(setup.tokens, setup.mlp_tile or setup.tokens) * model.intermediate_size * 16
    logits = min(setup.tokens, setup.loss_chunk or setup.tokens) * model.vocab_size * 6
    sent = (hidden,) * model.n_layers if setup.offload_activations else ()
    return ActivationPeak(n_kept * hidden, max(12 * hidden + wide, logits), 0, BACKWARD, sent)
