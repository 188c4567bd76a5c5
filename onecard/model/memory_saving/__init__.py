"""Activations in RAM, MLPs in tiles, embeddings and head in RAM."""
