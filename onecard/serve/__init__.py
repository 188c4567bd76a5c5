"""Listening sockets, and what guards them."""

from __future__ import annotations
