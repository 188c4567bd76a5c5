"""A studio in this process, asked without sockets, with a program that takes the place of `onecard`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from onecard.config.studio import StudioOptions
from onecard.studio.app import studio_app
from onecard.studio.context import StudioContext, open_context

STUB = Path(__file__).with_name("stub_program.py")


class Client:
    """Requests to an application; `__call__` gives (status, JSON)."""

    def __init__(self, app: Any, headers: dict[str, str] | None = None) -> None:
        self.app, self.headers = app, {"host": "127.0.0.1:7861", **(headers or {})}

    def raw(self, method: str, path: str, **options: Any) -> httpx.Response:
        import anyio

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            headers = {**self.headers, **options.pop("headers", {})}
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7861") as client:
                return await client.request(method, path, headers=headers, **options)

        return anyio.run(ask)

    def __call__(self, method: str, path: str, content: Any = None, **options: Any) -> tuple[int, Any]:
        found = self.raw(method, path, **({"json": content} if content is not None else {}), **options)
        return found.status_code, found.json()


@pytest.fixture
def options(tmp_path: Path) -> StudioOptions:
    (tmp_path / "data").mkdir()
    return StudioOptions(data_root=[str(tmp_path / "data")], output_root=str(tmp_path / "out"), upload_max_mb=1)


@pytest.fixture
def context(options: StudioOptions) -> StudioContext:
    found = open_context(options)
    found.jobs.program = (sys.executable, str(STUB))
    return found


@pytest.fixture
def ask(options: StudioOptions, context: StudioContext) -> Client:
    return Client(studio_app(options, context))


def eventually(condition: Callable[[], Any], what: str = "", seconds: float = 60.0) -> Any:
    """The first true value of `condition`; the time is generous, because other tests run beside this one."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return value
