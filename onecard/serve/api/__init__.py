"""The HTTP API in OpenAI's form."""

from __future__ import annotations
