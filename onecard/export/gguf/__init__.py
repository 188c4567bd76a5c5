"""Export to llama.cpp and Ollama."""

from __future__ import annotations
