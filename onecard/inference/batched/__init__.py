"""Many answers in one batch that requests join and leave at any step, over transformers' continuous batching."""
