"""Options: declared once, parsed from the command line and YAML, checked before anything heavy is loaded."""
