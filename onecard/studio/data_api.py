"""Data: what is in a file, and what would be learned of it."""

from __future__ import annotations

from starlette.routing import BaseRoute

from onecard.studio.context import StudioContext


def routes(context: StudioContext) -> list[BaseRoute]:
    """The paths of this part."""
    return []
