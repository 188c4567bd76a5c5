"""Activations in RAM, MLPs in tiles, embeddings and head in RAM."""

from __future__ import annotations
