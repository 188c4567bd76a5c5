"""Chat with the result of a run, and compare."""

from __future__ import annotations

from starlette.routing import BaseRoute

from onecard.studio.context import StudioContext


def routes(context: StudioContext) -> list[BaseRoute]:
    """The paths of this part."""
    return []
