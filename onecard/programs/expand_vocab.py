"""Give a model a larger vocabulary, so that a language takes fewer tokens: train new pieces, merge them, apply them.

onecard expand-vocab train --data_path corpus.txt --vocab_size 8000 --output_path pieces
onecard expand-vocab merge --tokenizer_path BASE --new_path pieces --output_path grown-tokenizer
onecard expand-vocab apply --model_path BASE --tokenizer_path grown-tokenizer --output_path grown-model
"""

from __future__ import annotations

from onecard.config.parsing import parse_verb
from onecard.export.vocabulary.options import MergeTokenizerOptions, ResizeEmbeddingsOptions, TrainTokenizerOptions


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    verbs = {"train": TrainTokenizerOptions, "merge": MergeTokenizerOptions, "apply": ResizeEmbeddingsOptions}
    _, options = parse_verb(verbs, argv, description=__doc__)
    if isinstance(options, TrainTokenizerOptions):
        from onecard.export.vocabulary.train import train

        train(options)
    elif isinstance(options, MergeTokenizerOptions):
        from onecard.export.vocabulary.merge import merge

        merge(options)
    else:
        from onecard.export.vocabulary.resize import apply

        apply(options)
