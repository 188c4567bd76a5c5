"""The studio as one application: the routes of its parts, the guards around them, the clock that looks for news."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from onecard.config.studio import StudioOptions
from onecard.errors import OneCardError
from onecard.serve.security import AddedHeaders, NetworkRules, Protection
from onecard.studio import (
    data_api,
    events,
    export_api,
    jobs_api,
    pages,
    plan_api,
    runs_api,
    use_api,
)
from onecard.studio.context import StudioContext, open_context
from onecard.studio.http import answer_error

# Scripts, styles and requests of this origin only, none of them inside the page: what a name or an answer holds can
# then never run, wherever it is shown. https://developer.mozilla.org/docs/Web/HTTP/Guides/CSP
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "img-src 'self' data:"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()), (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"), (b"cross-origin-resource-policy", b"same-origin"),
)  # fmt: skip


def studio_app(options: StudioOptions, context: StudioContext | None = None) -> Starlette:
    """The application; `app.state.context` is what its parts were given, `app.state.context.events.close` ends streams.

    context: for tests; else the one of the options.
    """
    context = context or open_context(options)
    parts = (data_api, plan_api, runs_api, use_api, export_api, jobs_api)
    routes = [*pages.routes(), *events.routes(context.events)]
    routes += [route for part in parts for route in part.routes(context)]
    rules = NetworkRules(
        options.host, options.allowed_hosts, key=options.key, max_body_bytes=context.upload_max_bytes, is_closed=True,
    )  # fmt: skip
    app = Starlette(
        routes=routes,
        middleware=[Middleware(AddedHeaders, headers=HEADERS, replaces=True), Middleware(Protection, rules=rules)],
        exception_handlers={OneCardError: answer_error, HTTPException: answer_error, Exception: answer_error},
        lifespan=_poll_events,
    )
    app.state.context = context
    return app


@asynccontextmanager
async def _poll_events(app: Starlette) -> AsyncIterator[None]:
    """Look for news while the application runs."""
    task = asyncio.create_task(app.state.context.events.poll())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
