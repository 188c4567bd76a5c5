"""pytest plugin: `--simcard sm75:11GiB` gives torch a simulated CUDA card for the whole process.

Tests marked `gpu`, and those of the card itself, run on it; where it cannot be had they are skipped and say why.
A test marked `shapes_only` computes no large tensors there: its allocations are those of the real step.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.simcard.build import Unavailable
from tests.simcard.card import Card, Spec, install, parse

CARD = pytest.StashKey[Card]()
REASON = pytest.StashKey[str]()
HELP = (
    "run on a simulated CUDA card: sm75:11GiB, or several as sm86:24GiB,sm86:24GiB; add ,late for streams that run "
    "late, ,garbage for memory that is filled with NaN when it is taken and freed, ,expandable for expandable segments"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--simcard", metavar="DEVICES", help=HELP)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before any conftest.py, since they import torch."""
    text = early_config.known_args_namespace.simcard
    if text is None:
        early_config.stash[REASON] = "needs the simulated card: --simcard sm75:11GiB"
        return
    try:
        spec: Spec = parse(text)
    except ValueError as error:
        raise pytest.UsageError(f"--simcard: {error}") from error
    try:
        early_config.stash[CARD] = install(spec)
    except Unavailable as error:
        early_config.stash[REASON] = f"no simulated card: {error}"


def pytest_report_header(config: pytest.Config) -> str | None:
    if config.getoption("simcard") is None:
        return None
    return f"simulated card: {config.getoption('simcard') if CARD in config.stash else config.stash[REASON]}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """First, so that the reason shown is the one why there is no simulated card."""
    if CARD in config.stash:
        return
    wanted = config.getoption("simcard") is not None
    for item in items:
        if item.get_closest_marker("simcard") or (wanted and item.get_closest_marker("gpu")):
            item.add_marker(pytest.mark.skip(reason=config.stash[REASON]))


@pytest.fixture
def card(request: pytest.FixtureRequest) -> Card:
    """The simulated card of this process."""
    return request.config.stash[CARD]


@pytest.fixture(autouse=True)
def _shapes_only(request: pytest.FixtureRequest) -> Iterator[None]:
    if CARD not in request.config.stash or request.node.get_closest_marker("shapes_only") is None:
        yield
        return
    with request.config.stash[CARD].shapes_only():
        yield
