"""Runs: the table, one run, its curves; those of the queue are in queue_api.py."""

from __future__ import annotations

from starlette.routing import BaseRoute

from onecard.studio.context import StudioContext


def routes(context: StudioContext) -> list[BaseRoute]:
    """The paths of this part."""
    return []
