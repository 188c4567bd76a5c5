"""Model and plan: what fits on the card."""

from __future__ import annotations

from starlette.routing import BaseRoute

from onecard.studio.context import StudioContext


def routes(context: StudioContext) -> list[BaseRoute]:
    """The paths of this part."""
    return []
