"""New records written by a model behind an OpenAI-compatible endpoint; every start goes on where the last one ended."""
