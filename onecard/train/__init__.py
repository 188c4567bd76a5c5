"""One run: its steps, checkpoints, resume, evaluation and trackers."""
