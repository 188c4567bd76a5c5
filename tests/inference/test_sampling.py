"""The mode follows from the options; drawn tokens follow the probabilities, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onecard.config.inference import SamplingOptions
from onecard.inference.sampling import PickByRow, generation_config, logits_processors, mode_of, seeded


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, "greedy"),
        ({"temperature": 0.7}, "sample"),
        ({"num_beams": 2}, "beam"),
        ({"num_beams": 2, "temperature": 0.7}, "beam-sample"),
    ],
)
def test_the_mode_follows_from_temperature_and_beams(options, mode) -> None:
    assert mode_of(SamplingOptions(**options)) == mode


def test_drawn_tokens_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.0, 0.2])
    n = 20_000
    pick = PickByRow(seed=1, row_numbers=range(n))
    drawn = pick(torch.zeros(n, 1), probabilities.log().expand(n, 4)).argmax(dim=-1)
    shares = np.bincount(drawn.numpy(), minlength=4) / n
    for token, probability in enumerate(probabilities.tolist()):
        sigma = (probability * (1 - probability) / n) ** 0.5
        assert abs(shares[token] - probability) <= 4 * sigma, (token, shares[token])


def test_exactly_one_token_stays_possible_and_never_a_forbidden_one() -> None:
    scores = torch.full((50, 1000), -torch.inf)
    scores[:, [7, 990]] = torch.tensor([0.0, 1.0])
    picked = PickByRow(3, range(50))(torch.zeros(50, 1), scores)
    assert (picked > -torch.inf).sum(dim=-1).tolist() == [1] * 50
    assert set(picked.argmax(dim=-1).tolist()) == {7, 990}


def test_a_rows_draws_depend_on_seed_number_and_step_alone() -> None:
    scores = torch.zeros(3, 5000)
    one = PickByRow(1, [10, 11, 12])
    first, second = (one(torch.zeros(3, 1), scores).argmax(-1).tolist() for _ in range(2))
    assert len({*first, *second}) == 6, "rows and steps share their random numbers"
    alone = PickByRow(1, [11])
    assert [alone(torch.zeros(1, 1), scores[:1]).argmax(-1).item() for _ in range(2)] == [first[1], second[1]]
    assert PickByRow(2, [11])(torch.zeros(1, 1), scores[:1]).argmax(-1).item() != first[1]


def test_temperature_top_k_and_top_p_shape_what_is_drawn_from() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).expand(400, 5)
    reached = {}
    for name, options in {"top_k": {"top_k": 2}, "top_p": {"top_p": 0.9}, "cold": {}, "hot": {}}.items():
        temperature = {"cold": 0.05, "hot": 50.0}.get(name, 1.0)
        processors = logits_processors(SamplingOptions(temperature=temperature, **options), range(400))
        reached[name] = set(processors(torch.zeros(400, 1, dtype=torch.long), scores).argmax(-1).tolist())
    # softmax of 4 3 2 1 0 is 0.636 0.234 0.086 0.032 0.012: the first three together pass 0.9
    assert reached == {"top_k": {0, 1}, "top_p": {0, 1, 2}, "cold": {0}, "hot": {0, 1, 2, 3, 4}}


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"num_beams": 3}, {"num_beams": 3, "temperature": 0.5}])
def test_nothing_is_left_for_the_base_models_own_settings_to_fill(options) -> None:
    config = generation_config(SamplingOptions(**options), stop_ids=[2], pad_id=0, max_new_tokens=5)
    sampling_settings = (
        "do_sample", "num_beams", "temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
        "repetition_penalty", "no_repeat_ngram_size", "length_penalty", "early_stopping", "num_return_sequences",
    )  # fmt: skip
    assert [name for name in sampling_settings if getattr(config, name) is None] == []


def test_beam_samples_seed_leaves_the_global_state_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with seeded(SamplingOptions(num_beams=2, temperature=1.0), [0], torch.device("cpu")):
        inside = torch.rand(1)
    assert torch.equal(torch.rand(1), expected)
    assert not torch.equal(inside, expected)
