"""Asking and chatting in a terminal."""

from __future__ import annotations
