"""The difference of two models as a file, and the model rebuilt from it."""
