"""Many questions from a file, and held-out losses."""
