#!/usr/bin/env python
"""Make `sample/tiny-llama`, the embedded base model, and its sample files from nothing but a seed.

Writes the tokenizer (SentencePiece BPE with byte fallback), trains a Llama of four million parameters on the corpus
of `tools/tiny_corpus` and saves it in half precision.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.console import run_main, say
from onecard.data.built_in_templates import FOLDER
from tools.tiny_corpus import build

ROOT = Path(__file__).resolve().parent.parent
N_TOKENIZER_DOCUMENTS = 40_000


def write_rows(rows: list[build.Row], file: Path) -> None:
    """Write alpaca rows as readable JSON, one row a line."""
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")


def write_chat_template(file: Path) -> None:
    """Alpaca's, with a space before the answers: that is how they begin in the corpus."""
    alpaca = (FOLDER / "alpaca.jinja").read_text(encoding="utf-8")
    spaced = alpaca.replace("{{- message['content'] + eos", "{{- ' ' + message['content'] + eos")
    file.write_text(spaced, encoding="utf-8", newline="\n")


def make(
    output_path: Path = ROOT / "sample" / "tiny-llama",
    steps: int = 1600,
    seed: int = 1,
    vocab_size: int = 4096,
    sample_path: Path | None = None,
) -> None:
    """Make the tokenizer, the base model and the sample files.

    Args:
        output_path: directory of the model; created, files in it are replaced.
        steps: optimizer steps of 128 documents; 2 is enough to see that all works.
        seed: seed of the corpus and of the weights; the split and the sample files do not depend on it.
        vocab_size: pieces of the tokenizer, a multiple of 64.
        sample_path: directory of merge_sample.json and held_out.json; the parent of output_path when not given.
    """
    from tools.tiny_corpus.pretrain import make_model
    from tools.tiny_corpus.tokenizer import make_tokenizer

    documents = itertools.islice(build.documents(seed), N_TOKENIZER_DOCUMENTS)
    tokenizer = make_tokenizer(documents, vocab_size, output_path)
    make_model(tokenizer, seed, steps, say).save_pretrained(output_path)
    write_chat_template(output_path / "chat_template.jinja")
    sample_path = sample_path or output_path.parent
    write_rows(build.merge_sample(), sample_path / "merge_sample.json")
    write_rows(build.held_out(), sample_path / "held_out.json")
    say(f"saved to {output_path}")


if __name__ == "__main__":
    sys.exit(run_main(lambda: auto_cli(make, as_positional=False)))
