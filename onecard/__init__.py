"""OneCard: fine-tune, resume, chat with and quantise language models on the one GPU you own."""

__version__ = "0.1.0"
