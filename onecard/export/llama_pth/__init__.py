"""Export to Meta's consolidated .pth files."""
