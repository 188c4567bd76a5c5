"""Records that should not be learned are found, named and left out."""
