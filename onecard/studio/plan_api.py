"""Model and plan: which base, what of the card a run on it takes, what else would fit, and how long it would take."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute

from onecard.config.base_model import DEFAULT_BASE
from onecard.config.options import options_of
from onecard.config.training import FinetuneConfig
from onecard.serve.http_error import bad_request
from onecard.studio.context import StudioContext
from onecard.studio.http import in_language, json_route, language_of, route
from onecard.studio.named import base_name, local_models
from onecard.studio.options import checked_options
from onecard.studio.planning import DEFAULTS, STOPS
from onecard.studio.run_log import last_rows
from onecard.studio.worker import Worker
from onecard.train.trackers import LOG_NAME

# Cards by name: memory in GiB, and whether they are of the Turing generation, which has no bf16.
CARDS = (
    ("RTX 2060", 6, True), ("RTX 3070 / 4060", 8, False), ("RTX 2080 Ti", 11, True), ("RTX 3060 / 4070", 12, False),
    ("T4", 14.7, True), ("RTX 4060 Ti / 4080", 16, False), ("RTX 3090 / 4090", 24, False), ("RTX 5090", 32, False),
)  # fmt: skip
LARGEST_CARD = 1024.0  # GiB
# Paths, and what starts other code, come from the run's own view; a plan needs none of them.
NOT_PLANNED = (
    "model_path",
    "data_path",
    "data",
    "output_path",
    "trust_remote_code",
    "vram",
    "pretend_turing",
    "stages",
)
MOST_RUNS = 50
ASKED = ("model_path", "card")  # what a question about a plan must say


def routes(context: StudioContext, worker: Worker | None = None) -> list[BaseRoute]:
    """The paths of this part, all below /api/plan. worker: for tests; else a process of its own."""
    view = PlanView(context, worker or Worker())
    return [
        json_route("/api/plan", view.plan, *ASKED),
        json_route("/api/plan/at_once", view.plan_at_once, *ASKED),
        json_route("/api/plan/limits", view.limits, *ASKED),
        route("/api/plan/models", view.models),
        route("/api/plan/machine", view.machine),
        route("/api/plan/speeds", view.speeds),
    ]


class PlanView:
    """The answers. Plans are made in a process of its own, which starts with the first question."""

    def __init__(self, context: StudioContext, worker: Worker) -> None:
        self._context, self._worker = context, worker
        self._names = frozenset(options_of(FinetuneConfig)) - set(NOT_PLANNED)

    def models(self, request: Request) -> dict[str, Any]:
        """Bases on this disk, cards by name, and where the sliders stop: at once, without torch."""
        cards = [{"name": name, "gib": gib, "is_old": is_old} for name, gib, is_old in CARDS]
        return {"default": DEFAULT_BASE, "local": local_models(self._context), "cards": cards, "stops": STOPS,
                "defaults": DEFAULTS}  # fmt: skip

    def machine(self, request: Request) -> Any:
        """The card that is found here, and the models that are known by name; torch is asked in another process."""
        return self._worker.ask("machine", {})

    def plan(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """What a run of {model_path, options} takes of {card: {gib, is_old}}, and why its settings are as they are."""
        return self._planned(request, body, "plan", gives_way=True)

    def plan_at_once(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """As `plan`, without a trace (benchmarks/plan_moves.py); {is_exact: false} where it is about that."""
        return self._planned(request, body, "plan_at_once", gives_way=False)

    def _planned(self, request: Request, body: dict[str, Any], question: str, *, gives_way: bool) -> dict[str, Any]:
        arguments, page = self._asked(body)
        found: dict[str, Any] = self._worker.ask(question, arguments, replaces=f"plan {page}", gives_way=gives_way)
        language = language_of(request)
        for part in found["parts"]:
            part["name"] = in_language(part["name"], language)
        for choice in found["choices"]:
            choice["reason"] = in_language(choice["reason"], language)
        for key in ("notes", "advice", "warnings"):
            found[key] = in_language(found[key], language)
        return found

    def limits(self, request: Request, body: dict[str, Any]) -> Any:
        """The longest context and the largest known model; {ready: false} while they are being found."""
        arguments, page = self._asked(body)
        return self._worker.ask("limits", arguments, replaces=f"limits {page}", gives_way=True)

    def speeds(self, request: Request) -> dict[str, Any]:
        """Training speeds of the runs in the output root, the newest first: [{run, tokens_per_s, seconds}]."""
        return {"runs": run_speeds(self._context.output_root)}

    def _asked(self, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        card = body["card"]
        gib = card.get("gib") if isinstance(card, dict) else None
        if isinstance(gib, bool) or not isinstance(gib, (int, float)) or not 0 < gib <= LARGEST_CARD:
            raise bad_request(f"the card's memory must be between 0 and {LARGEST_CARD:g} GiB", "card")
        options = checked_options(body.get("options", {}), self._names)
        base = base_name(self._context, body["model_path"])
        arguments = {"model": base, "options": options, "gib": float(gib), "is_old": bool(card.get("is_old"))}
        return arguments, str(body.get("page", ""))[:40]


def run_speeds(root: Path) -> list[dict[str, Any]]:
    """The median speed of each run's last rows, and the time of a step."""
    logs = [path for pattern in (f"*/{LOG_NAME}", f"*/*/{LOG_NAME}") for path in root.glob(pattern)]
    newest = sorted(logs, key=lambda path: -path.stat().st_mtime)[:MOST_RUNS]
    found = []
    for log in newest:
        logged = [row.get("tokens_per_s") for row in last_rows(log.parent)]
        rates = [rate for rate in logged if isinstance(rate, (int, float)) and 0 < rate < math.inf]
        if rates:
            name = log.parent.relative_to(root).as_posix()
            found.append({"run": name, "tokens_per_s": statistics.median(rates), "n_rows": len(rates)})
    return found
