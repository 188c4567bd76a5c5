"""The page itself: index.html, what it loads, and its words."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from onecard.studio.http import route
from onecard.studio.runs import FAST_LOADER

STATIC = Path(__file__).parent / "static"
VIEWS = ("data", "model", "train", "runs", "chat", "export")  # in the order of the tabs


def routes() -> list[BaseRoute]:
    """GET /, /static/..., /api/words and /health."""
    return [
        Route("/", page), route("/api/words", lambda _: all_words()), route("/health", lambda _: {"status": "ok"}),
        Mount("/static", FreshFiles(directory=STATIC)),
    ]  # fmt: skip


class FreshFiles(StaticFiles):
    """Files that a browser asks about each time: after an update it must not run old scripts with new ones."""

    def file_response(self, *arguments: Any, **names: Any) -> Response:
        response = super().file_response(*arguments, **names)
        response.headers["cache-control"] = "no-cache"
        return response


def page(request: Request) -> Response:
    """The one page."""
    return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})


@cache
def all_words() -> Mapping[str, Mapping[str, str]]:
    """The texts of `static/words/VIEW.yaml` under VIEW.KEY."""
    found: dict[str, dict[str, str]] = {"en": {}, "zh": {}}
    for file in sorted((STATIC / "words").glob("*.yaml")):
        for language, texts in yaml.load(file.read_text(encoding="utf-8"), FAST_LOADER).items():  # noqa: S506 (a safe one)
            found[language] |= {f"{file.stem}.{key}": str(text) for key, text in texts.items()}
    return found
