"""The options of growing a vocabulary. Imports nothing heavy: `--help` goes through here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onecard.config.data import ReadingOptions
from onecard.config.parsing import missing
from onecard.config.problems import Problem, too_small
from onecard.export.io.output import OutputOptions, ShardedOutputOptions


@dataclass
class TrainTokenizerOptions(ReadingOptions, OutputOptions):
    """Learn new pieces from a corpus.

    Nothing else is changed: merge decides which of them the old tokenizer can use.
    """

    data_path: str | list[str] = ""
    """Corpus: files (txt, json, jsonl, csv, parquet), folders of these, or Hub data sets; one or several."""
    output_path: str = ""
    """New directory for tokenizer.model (or tokenizer.json) and the held-out texts."""
    vocab_size: int = 8000
    """Pieces to learn, single characters included."""
    kind: Literal["sentencepiece", "bytelevel"] = "sentencepiece"
    """sentencepiece for LLaMA 1 and 2 or Mistral; bytelevel for LLaMA 3 or Qwen."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """How SentencePiece learns; bytelevel is always bpe."""
    tokenizer_path: str = ""
    """For bytelevel: the tokenizer that will grow, a directory or Hub id; it says where words are cut."""
    character_coverage: float = 0.9995
    """Share of the corpus' characters that must be made of pieces; the rarest are left to bytes."""
    max_sentences: int = 1_000_000
    """Lines held in memory, drawn evenly from the whole corpus."""
    held_out_share: float = 0.02
    """Share of the texts that is not learned from, for merge to measure on."""

    def problems(self) -> list[Problem]:
        found = super().problems() + missing(self, "data_path", "output_path")
        if self.vocab_size < 2:
            found.append(("--vocab_size", f"{self.vocab_size} is too few; use some thousands"))
        if self.kind == "bytelevel" and not self.tokenizer_path:
            found.append(("--tokenizer_path", "is needed with --kind bytelevel: the tokenizer that will grow"))
        if self.kind == "bytelevel" and self.model_type == "unigram":
            found.append(("--model_type", "unigram does not go with --kind bytelevel; leave it at bpe"))
        if not 0.9 <= self.character_coverage <= 1:
            found.append(("--character_coverage", f"{self.character_coverage} is not between 0.9 and 1"))
        if self.max_sentences < 1:
            found.append(("--max_sentences", f"{self.max_sentences} leaves nothing to learn from; use 1 or more"))
        if not 0 <= self.held_out_share <= 0.5:
            found.append(("--held_out_share", f"{self.held_out_share} is not between 0 and 0.5"))
        return found


@dataclass
class MergeTokenizerOptions(OutputOptions):
    """Put the new pieces behind the tokens of an old tokenizer; no old id moves."""

    tokenizer_path: str = ""
    """The old tokenizer: a directory or Hub id with tokenizer.model (LLaMA 1 and 2) or tokenizer.json."""
    new_path: str = ""
    """Directory that train wrote."""
    output_path: str = ""
    """New directory for the grown tokenizer."""
    max_new: int = 0
    """At most so many new tokens, the best first; 0: all that can be used."""
    eval_path: str = ""
    """Text to measure tokens per character on; without it, what train held out."""

    def problems(self) -> list[Problem]:
        return missing(self, "tokenizer_path", "new_path", "output_path") + too_small(self, max_new=0)


@dataclass
class ResizeEmbeddingsOptions(ShardedOutputOptions):
    """Give a model rows for the tokens of its grown tokenizer."""

    model_path: str = ""
    """The model: a directory or Hub id, not quantised."""
    tokenizer_path: str = ""
    """Directory that merge wrote, from this model's own tokenizer."""
    output_path: str = ""
    """New directory for the model."""
    pad_to_multiple_of: int = 64
    """The number of rows is rounded up to a multiple of this; 64 suits the matrix units of every card."""

    def problems(self) -> list[Problem]:
        found = missing(self, "model_path", "tokenizer_path", "output_path")
        if self.pad_to_multiple_of < 1:
            found.append(("--pad_to_multiple_of", f"{self.pad_to_multiple_of} is no multiple; use 1 for no padding"))
        return found + super().problems()
