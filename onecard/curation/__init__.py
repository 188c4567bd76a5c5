"""Data made better before it is learned: cleaned, split, and made anew by a model; never in place."""
