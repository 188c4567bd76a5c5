"""The catalogue of open collections: one YAML entry each, and those that a person adds."""
