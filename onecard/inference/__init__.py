"""A loaded model that answers: sampling, streaming, the request queue, chat history."""

from __future__ import annotations
