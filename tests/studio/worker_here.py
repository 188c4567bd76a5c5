"""The studio's worker without its process: questions are answered in this one, which has the libraries loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from onecard.errors import OneCardError
from onecard.studio import data_api, plan_api, worker_process
from onecard.studio.context import StudioContext
from onecard.studio.http import answer_error
from onecard.studio.worker import Worker, error_of
from tests.studio.conftest import Client

SAMPLE = Path(__file__).resolve().parents[2] / "sample"


class WorkerHere(Worker):
    """`asked`: every question that came."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def ask(self, question: str, arguments: dict[str, Any], *, replaces: str = "", gives_way: bool = False) -> Any:
        self.asked.append((question, arguments))
        answer = worker_process.answer(question, arguments)
        if "error" in answer:
            raise error_of(answer["error"])
        return answer["result"]


def client(context: StudioContext, worker: Worker) -> Client:
    """Both parts with this worker."""
    routes = [*data_api.routes(context, worker), *plan_api.routes(context, worker)]
    handlers = {OneCardError: answer_error, HTTPException: answer_error}
    return Client(Starlette(routes=routes, exception_handlers=handlers))
