"""Training objectives: how records become samples, samples a batch, and a batch its loss."""
