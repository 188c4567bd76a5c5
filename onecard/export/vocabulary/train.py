"""New pieces learned from a corpus: SentencePiece (BPE or Unigram), or byte-level BPE cut as its target cuts words.

Knows the two trainers and what they say of a bad corpus. Does not know which of the pieces a model's tokenizer can
use: merging decides that.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onecard.console import say, warn
from onecard.data.sources import source_of
from onecard.errors import ConfigError, DataError, ModelError
from onecard.export.io.output import new_directory
from onecard.export.vocabulary.corpus import Corpus, Kind, kind_of, locate_tokenizer, open_tokenizer, write_held_out
from onecard.export.vocabulary.options import TrainTokenizerOptions

MAX_PIECE_BYTES = 48  # 16 Chinese characters, SentencePiece's own limit


def train(options: TrainTokenizerOptions) -> None:
    """Learn pieces and write `tokenizer.model` or `tokenizer.json`, and the texts that were held out.

    Memory: at most `max_sentences` lines, drawn evenly from the whole corpus, and the trainer's own tables.
    Raises DataError (no text, binary, too small for so many pieces), ConfigError, ModelError (no target).
    """
    source, output_path = source_of(options), Path(options.output_path)
    corpus = Corpus(source, options.held_out_share)
    # Before the corpus is read, which may take long.
    target = _bytelevel_target(options.tokenizer_path) if options.kind == "bytelevel" else None
    inputs = [Path(name) for name in (*source.paths, options.tokenizer_path) if name and Path(name).exists()]
    with new_directory(output_path, overwrite=options.overwrite, inputs=inputs) as partial:
        say(f"reading {source.name} and learning {options.vocab_size:,} pieces; a large corpus takes a while")
        if target is None:
            _train_sentencepiece(options, corpus, partial)
        else:
            _train_bytelevel(options, corpus, partial, target)
        write_held_out(partial, corpus.held_out)
        n_pieces = _count_pieces(partial, options.kind)
    for line in corpus.report.summary_lines():
        say(line)
    say(
        f"{corpus.n_lines:,} lines with {corpus.n_characters:,} characters to learn from, "
        f"{len(corpus.held_out):,} texts held out; {n_pieces:,} pieces reopened in {output_path}"
    )
    if not corpus.held_out:
        warn("nothing was held out of so small a corpus; give --eval_path to merge, to measure on other text")


def _train_sentencepiece(options: TrainTokenizerOptions, corpus: Corpus, directory: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=corpus.guarded_lines(),
            model_writer=model,
            vocab_size=options.vocab_size,
            model_type=options.model_type,
            character_coverage=options.character_coverage,
            input_sentence_size=options.max_sentences,
            shuffle_input_sentence=True,
            max_sentence_length=1 << 20,
            split_digits=True,
            # As LLaMA: text is taken as it is. No space is put before a line, because pieces such as "▁中国" would
            # then be learned from lines and never be met inside a text.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as reason:
        corpus.check()
        raise _too_small(str(reason), options.vocab_size, corpus.source.name) from reason
    corpus.check()
    (directory / "tokenizer.model").write_bytes(model.getvalue())


def _too_small(message: str, vocab_size: int, corpus: str) -> Exception:
    """SentencePiece's message about a vocabulary that the corpus does not give, in one line with the right number."""
    high = re.search(r"value <= (\d+)", message)
    low = re.search(r"(\d+) vs (\d+)", message)
    if "too high" in message and high:
        return ConfigError("--vocab_size", f"{vocab_size} is more than {corpus} can give; at most {high[1]}")
    if "required_chars" in message and low:
        return ConfigError(
            "--vocab_size",
            f"{vocab_size} is less than the different characters of {corpus}; at least "
            f"{low[2]}, or a lower --character_coverage",
        )
    if "sentences_.empty()" in message:
        return DataError("no text is left to learn from; give a larger corpus", corpus)
    return DataError(f"SentencePiece cannot learn from it: {' '.join(message.split())[:300]}", corpus)


def _bytelevel_target(tokenizer_path: str) -> Any:
    directory = locate_tokenizer(tokenizer_path)
    if kind_of(directory) != "bytelevel":
        raise ModelError(f"{directory} is a SentencePiece tokenizer; use --kind sentencepiece")
    return open_tokenizer(directory).backend_tokenizer


def _train_bytelevel(options: TrainTokenizerOptions, corpus: Corpus, directory: Path, target: Any) -> None:
    """https://huggingface.co/docs/tokenizers/api/trainers"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer.from_str(_empty_like(target, Tokenizer(models.BPE()), decoders.ByteLevel()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        initial_alphabet=alphabet,
        max_token_length=MAX_PIECE_BYTES,
        show_progress=False,
    )
    # The trainer keeps every different word, and Chinese has clauses where English has words: so the lines are drawn.
    lines = draw(corpus.lines(), options.max_sentences)
    corpus.check()
    core.train_from_iterator(lines, trainer)
    n_learned = core.get_vocab_size()
    if n_learned < options.vocab_size:
        raise ConfigError(
            "--vocab_size", f"{options.vocab_size} is more than {corpus.source.name} can give; at most {n_learned}"
        )
    core.save(str(directory / "tokenizer.json"))


def _empty_like(target: Any, empty: Any, decoder: Any) -> str:
    """The JSON of a tokenizer without pieces that normalises and cuts text as `target` does."""
    content = json.loads(empty.to_str())
    old = json.loads(target.to_str())
    content |= {"normalizer": old["normalizer"], "pre_tokenizer": old["pre_tokenizer"]}
    content["decoder"] = json.loads(decoder.__getstate__())
    return json.dumps(content)


def draw(lines: Iterable[str], n: int, seed: int = 0) -> list[str]:
    """At most `n` of the lines, each equally likely, read once (reservoir sampling)."""
    chosen: list[str] = []
    generator = random.Random(seed)
    for i, line in enumerate(lines):
        if i < n:
            chosen.append(line)
        elif (place := generator.randrange(i + 1)) < n:
            chosen[place] = line
    return chosen


def _count_pieces(directory: Path, kind: Kind) -> int:
    """Reopen what was written."""
    if kind == "sentencepiece":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).vocab_size()
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()
