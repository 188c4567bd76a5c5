"""The memory plan of a run for the page, at every move of a slider. Runs in the studio's worker process.

What takes time is tracing the model's layers on fake tensors, for each number of bits, rank and stretch of lengths
(`model/memory/extrapolate.py` keeps the traces). So a move is answered at once from the traces that are there, by
nearest ones where its own are not (`model/memory/nearest_sample.py`), and the plan itself follows. After it the plans
at the sliders' other stops are made, the nearest first, while nobody asks.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from functools import lru_cache
from typing import Any

from onecard.config.parsing import parse
from onecard.config.training import FinetuneConfig
from onecard.errors import OneCardError
from onecard.studio.options import words_of

# Where the sliders stop. The page is told, so that it asks for what was prepared.
STOPS: dict[str, tuple[int, ...]] = {
    "bits": (4, 8, 16, 32),
    "cutoff_len": (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 65536),
    "lora_r": (2, 4, 8, 16, 32, 64, 128, 256),
    "micro_batch": (0, 1, 2, 4, 8, 16, 32),
}
DEFAULTS = {"bits": 4, "cutoff_len": 1024, "lora_r": 8, "micro_batch": 0}
FAR = 3  # stops from the present one that are prepared
MOST_LIMITS = 1000
WARNING = "warning: "
Options = tuple[tuple[str, Any], ...]
_limits: dict[tuple[str, Options, float, bool], dict[str, Any]] = {}


def plan(model: str, options: dict[str, Any], gib: float, is_old: bool = False) -> dict[str, Any]:
    """`report.plan_dict`, with what would help where it does not fit. Raises OneCardError as `onecard plan` does."""
    return dict(_plan(model, tuple(sorted(options.items())), gib, is_old))


def plan_at_once(model: str, options: dict[str, Any], gib: float, is_old: bool = False) -> dict[str, Any]:
    """As `plan`, where all traces are there; else about it, without making one.

    is_exact: whether it is the plan. is_near: whether traces of other settings of this model stand for those missing.
    """
    from onecard.model.memory.nearest_sample import known_traces_alone

    key = tuple(sorted(options.items()))
    with known_traces_alone() as stood_for:
        found = _new_plan(model, key, gib, is_old)
    return {**found, "is_exact": not stood_for, "is_near": all(stood_for)}


def limits(model: str, options: dict[str, Any], gib: float, is_old: bool = False) -> dict[str, Any]:
    """The longest context in tokens of this model, and the largest known model, that the card takes.

    They take seconds, so they are found while nobody asks (`prepare`), one after the other; then `ready` is true.
    """
    found = _limits.get((model, tuple(sorted(options.items())), gib, is_old), {})
    return {**found, "ready": "largest_known" in found}


def machine() -> dict[str, Any]:
    """The card of this machine, None where there is none, and the models that are known by name, smallest first."""
    from onecard.model.hardware import detect
    from onecard.model.memory.architecture import known_models

    found = detect("auto")
    card = {"name": found.name, "gib": found.total_bytes / 2**30, "is_old": not found.bf16_native}
    known = [{"name": each.name, "hub_id": each.hub_ids[0], "n_weights": each.n_parameters}
             for each in known_models().values()]  # fmt: skip
    return {"card": card if found.is_gpu else None, "known": known}


def prepare(model: str, options: dict[str, Any], gib: float, is_old: bool = False) -> Iterator[None]:
    """Plans at the next stops of the sliders, the limits, then what is further away; a little between two yields.

    A plan of another rank is the first: with it those of all ranks are quick.
    """
    for name in ("lora_r", "micro_batch", "cutoff_len", "bits"):
        yield from _prepare_plans(model, options, gib, is_old, {name: STOPS[name]}, 1)
    yield from _prepare_limits(model, tuple(sorted(options.items())), gib, is_old)
    for distance in range(2, FAR + 1):
        yield from _prepare_plans(model, options, gib, is_old, STOPS, distance)


def _prepare_plans(
    model: str, options: dict[str, Any], gib: float, is_old: bool, sliders: dict[str, tuple[int, ...]], distance: int
) -> Iterator[None]:
    for name, stops in sliders.items():
        at = stops.index(min(stops, key=lambda stop: abs(stop - int(options.get(name, DEFAULTS[name])))))
        for stop in (*stops[at + distance : at + distance + 1], *stops[max(0, at - distance) : at - distance + 1]):
            with suppress(OneCardError):  # the page is told when it asks
                _plan(model, tuple(sorted({**options, name: stop}.items())), gib, is_old)
            yield


def _prepare_limits(model: str, options: Options, gib: float, is_old: bool) -> Iterator[None]:
    from onecard.model.memory.architecture import known_models
    from onecard.model.memory.cards import card_of_size, element_bytes, fits_known
    from onecard.model.memory.extrapolate import ASKS_FOR_MANY
    from onecard.model.memory.plan import longest_context

    key = (model, options, gib, is_old)
    if "largest_known" in _limits.get(key, {}):
        return
    if len(_limits) >= MOST_LIMITS:
        _limits.clear()
    try:
        architecture, config = _architecture(model), _config(options)
        card, hardware = card_of_size(gib, is_old=is_old)
        width = element_bytes(config, hardware, architecture.model_type)
        longest = longest_context(architecture, config, card, element_bytes=width)
    except OneCardError:
        return
    _limits[key] = {"longest_context": longest}
    largest = None
    for name in reversed(known_models()):
        yield
        many = ASKS_FOR_MANY.set(False)  # one plan of each
        try:
            is_largest = fits_known(name, config, card, hardware)
        finally:
            ASKS_FOR_MANY.reset(many)
        if is_largest:
            largest = name
            break
    _limits[key] = {"longest_context": longest, "largest_known": largest}


@lru_cache(maxsize=512)
def _plan(model: str, options: Options, gib: float, is_old: bool) -> dict[str, Any]:
    return _new_plan(model, options, gib, is_old)


def _new_plan(model: str, options: Options, gib: float, is_old: bool) -> dict[str, Any]:
    from onecard.model.memory.activation_peak import warn_again
    from onecard.model.memory.cards import card_of_size, element_bytes
    from onecard.model.memory.plan import make_plan
    from onecard.model.memory.report import advice, plan_dict

    architecture, config = _architecture(model), _config(options)
    card, hardware = card_of_size(gib, is_old=is_old)
    width = element_bytes(config, hardware, architecture.model_type)
    warn_again()
    with redirect_stderr(io.StringIO()) as said:
        made = make_plan(architecture, config, card, element_bytes=width)
    found = plan_dict(made)
    positions = architecture.max_positions
    beyond = 0 < positions < made.longest_row // made.rows_per_sample
    return {
        **{key: found[key] for key in ("fits", "peak_bytes", "left_bytes", "ram_bytes", "parts", "choices",
                                       "longest_row_tokens", "micro_batch_tokens")},
        "card_bytes": card.total_bytes, "card_ram_bytes": card.ram_bytes,
        "rows": made.setup.rows, "element_bits": 8 * made.setup.element_bytes, "bits": made.setup.bits,
        "n_weights": architecture.n_weights, "model_type": architecture.model_type,
        "positions": positions if beyond else 0,
        "notes": list(architecture.notes), "advice": [] if made.fits else advice(made, None),
        "warnings": warnings_in(said.getvalue()),
    }  # fmt: skip


def warnings_in(said: str) -> list[str]:
    """What `console.warn` wrote among these lines."""
    return [line.removeprefix(WARNING) for line in said.splitlines() if WARNING in line]


@lru_cache(maxsize=512)
def _config(options: Options) -> FinetuneConfig:
    return parse(FinetuneConfig, words_of(dict(options)), opens_files=False)


@lru_cache(maxsize=16)
def _architecture(model: str) -> Any:
    from onecard.model.allocator import prefer_expandable_segments
    from onecard.model.memory.architecture import architecture_of
    from onecard.model.memory.extrapolate import ASKS_FOR_MANY

    prefer_expandable_segments()  # as the run will
    ASKS_FOR_MANY.set(True)
    return architecture_of(model)
