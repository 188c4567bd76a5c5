"""One program a module: its options, and one call of what does the work. `onecard VERB` and the scripts start them."""
