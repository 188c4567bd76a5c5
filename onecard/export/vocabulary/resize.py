"""A model that gets rows for the new tokens of its grown tokenizer: in its embeddings and its head, shard by shard.

The new row of a token is the mean of the rows of the tokens that the old tokenizer wrote it with, so the model starts
from what it knew. https://nlp.stanford.edu/~johnhew/vocab-expansion.html says why random rows do harm.
Knows tensors and config.json. Does not know how the tokenizer came to its new tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.console import say
from onecard.errors import ConfigError, ModelError
from onecard.export.io.model_card import write_card
from onecard.export.io.output import new_directory, progress
from onecard.export.io.weights import ShardWriter, Weights, copy_small_files, open_weights, same_bits
from onecard.export.vocabulary.corpus import encode, locate_tokenizer, open_tokenizer
from onecard.export.vocabulary.embeddings import EmbeddingMatrices, find_tables
from onecard.export.vocabulary.options import ResizeEmbeddingsOptions
from onecard.installation import command
from onecard.model.files import locate, read_json, write_json
from onecard.model.lora.vocabulary import FORMAT, NEW_TOKENS

OF_OLD_FILES = (NEW_TOKENS, "manifest.json")  # speak of the files as they were
# Of the old model: what would contradict the new tokenizer. The new one brings its own.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "spiece.model",
)  # fmt: skip
CHUNK_ROWS = 8192


@dataclass(frozen=True)
class NewRows:
    """For each new token's id its text and the old ids that wrote it; and how many rows there are, before and after."""

    sources: dict[int, list[int]]
    pieces: dict[int, str]
    n_old: int
    n_rows: int

    @property
    def ids(self) -> list[int]:
        return sorted(self.sources)

    @property
    def n_reused(self) -> int:
        """Rows that were there already, as padding."""
        return sum(i < self.n_old for i in self.sources)


def apply(options: ResizeEmbeddingsOptions) -> None:
    """Write the model with the grown vocabulary, then reopen it and compare every tensor with the old one.

    RAM: about one shard of at most `max_shard_size`, and the embeddings twice. Raises ModelError (no model, quantised,
    damaged, mismatched vocabulary or shapes, NaN), ConfigError (nothing to add).
    """
    model, output_path = locate(options.model_path), Path(options.output_path)
    grown_path = locate_tokenizer(options.tokenizer_path)
    weights = open_weights(model)
    tables = find_tables(model, weights)
    rows = _new_rows(model, grown_path, tables.n_rows, options.pad_to_multiple_of)
    needed = weights.total_bytes + (rows.n_rows - rows.n_old) * tables.row_bytes
    inputs = [model, grown_path]
    with new_directory(output_path, overwrite=options.overwrite, inputs=inputs, needed_bytes=needed) as partial:
        copy_small_files(model, partial)
        write_card(partial, model, options.model_path, "finetune", [f"- its vocabulary has {rows.n_rows:,} rows now"])
        for name in (*TOKENIZER_FILES, *OF_OLD_FILES):
            (partial / name).unlink(missing_ok=True)
        _copy_tokenizer(grown_path, partial)
        _write_config(partial / "config.json", rows)
        _write_weights(weights, tables, rows, partial, options.max_shard_bytes)
        _write_new_tokens(rows, partial / NEW_TOKENS)
        _verify(weights, tables, rows, partial)
    _tell(tables, rows, output_path)


def _new_rows(model: Path, grown_path: Path, n_old: int, multiple: int) -> NewRows:
    """Compare the two tokenizers, token by token. Raises ModelError where an old token has another id."""
    old, grown = open_tokenizer(model), open_tokenizer(grown_path)
    old_vocab, vocab = old.get_vocab(), grown.get_vocab()
    moved = [piece for piece, i in old_vocab.items() if vocab.get(piece) != i]
    if moved:
        first = min(moved, key=lambda piece: old_vocab[piece])
        now = f"the id {vocab[first]}" if first in vocab else "no id"
        raise ModelError(
            f"mismatched vocabulary: {len(moved)} of the {len(old_vocab)} tokens of {model} have other ids in "
            f"{grown_path}; {first!r} has the id {old_vocab[first]} there and {now} here. Give the tokenizer that "
            "was merged from this model's own"
        )
    if max(old_vocab.values()) >= n_old:
        raise ModelError(
            f"mismatched vocabulary: the tokenizer of {model} has the id {max(old_vocab.values())}, and its embeddings "
            f"have only {n_old} rows; the tokenizer belongs to another model"
        )
    new = {i: piece for piece, i in vocab.items() if piece not in old_vocab}
    if not new:
        raise ConfigError("--tokenizer_path", f"{grown_path} has no token that {model} does not have already")
    added = {str(token) for token in grown.added_tokens_decoder.values()}
    bpe = old.backend_tokenizer.model
    sources = {i: _old_ids(old, bpe, piece, piece in added) for i, piece in new.items()}
    nameless = [new[i] for i, ids in sources.items() if not ids]
    if nameless:
        raise ModelError(f"the tokenizer of {model} cannot write {nameless[0]!r}, so its row has nothing to start from")
    n_rows = max(n_old, -(-(max(vocab.values()) + 1) // multiple) * multiple)
    return NewRows(sources, new, n_old, n_rows)


def _old_ids(old: Any, bpe: Any, piece: str, is_added: bool) -> list[int]:
    """The ids with which the old tokenizer writes a new token.

    A piece goes straight to its BPE, in the form in which it stands in the vocabulary (a space as "▁", a byte as a
    letter): as a text of its own it would get a space in front, and half a character is no text at all.
    """
    if is_added:
        return encode(old, piece)
    return [token.id for token in bpe.tokenize(piece)]


def grown_table(old: Tensor, rows: NewRows) -> Tensor:
    """Embeddings, head or bias with the new rows: (n_old, ...) -> (n_rows, ...), in the same dtype.

    Means are taken in fp32 and rounded once. A row of padding behind the last token is the mean of all rows, so that
    its logit is an average one. Rows that are there already are kept, but those of new tokens. Raises ModelError for
    NaN or infinity in what is averaged.
    """
    table = torch.empty((rows.n_rows, *old.shape[1:]), dtype=old.dtype)
    table[: rows.n_old] = old
    if rows.n_rows > rows.n_old:
        table[rows.n_old :] = mean_of_all(old).to(old.dtype)
    for i, ids in rows.sources.items():
        table[i] = old[ids].float().mean(dim=0).to(old.dtype)
    bad = [i for i in rows.ids if not bool(torch.isfinite(table[i]).all())]
    if bad:
        raise ModelError(
            f"the row for {rows.pieces[bad[0]]!r} would be NaN or infinite: the old rows {rows.sources[bad[0]]} that "
            "it is the mean of are; the model is damaged, download it again"
        )
    return table


def mean_of_all(table: Tensor) -> Tensor:
    """The mean row in fp32, a few rows at a time. Rows that are not finite are left out."""
    total = torch.zeros(table.shape[1:], dtype=torch.float64)
    count = 0
    for start in range(0, len(table), CHUNK_ROWS):
        chunk = table[start : start + CHUNK_ROWS].double()
        chunk = chunk[torch.isfinite(chunk).reshape(len(chunk), -1).all(dim=1)]
        total += chunk.sum(dim=0)
        count += len(chunk)
    return (total / max(count, 1)).float()


def _write_weights(
    weights: Weights, tables: EmbeddingMatrices, rows: NewRows, partial: Path, max_shard_bytes: int
) -> None:
    writer = ShardWriter(partial, max_shard_bytes)
    with progress("tensors", weights.total_bytes, in_bytes=True) as moved_on:
        for name, tensor in weights:
            writer.add(name, grown_table(tensor, rows) if name in tables.names else tensor)
            moved_on(tensor.nbytes)
    writer.finish()


def _write_config(file: Path, rows: NewRows) -> None:
    """vocab_size, in the text part too where a model has one."""
    config = read_json(file)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part.get("vocab_size") == rows.n_old:
            part["vocab_size"] = rows.n_rows
    if config.get("vocab_size", rows.n_rows) != rows.n_rows:
        raise ModelError(
            f"mismatched shapes: config.json says vocab_size {config['vocab_size']}, and the embeddings have "
            f"{rows.n_old} rows"
        )
    write_json(file, config)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in (*TOKENIZER_FILES, "chat_template.jinja", "chat_template.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_new_tokens(rows: NewRows, file: Path) -> None:
    """What `--train_new_tokens` reads: the ids of the rows that nothing has trained yet."""
    content = {
        "format": FORMAT,
        "first_new_id": rows.ids[0],
        "new_ids": rows.ids,
        "pieces": [rows.pieces[i] for i in rows.ids],
    }
    write_json(file, content)


def _verify(weights: Weights, tables: EmbeddingMatrices, rows: NewRows, partial: Path) -> None:
    """Reopen the export: the model fits its config, old rows and all other tensors are the same bits."""
    written = open_weights(partial)
    if written.entries.keys() != weights.entries.keys():
        raise ModelError(f"{partial} holds other tensors than were written; try again")
    for name, tensor in written:
        old = weights.read(name)
        if name in tables.names:
            tensor = tensor[: rows.n_old]
            reused = [i for i in rows.ids if i < rows.n_old]
            old[reused] = tensor[reused]
        if not same_bits(tensor, old):
            raise ModelError(f"{name} was not read back as it was written; check the disk and try again")
    weights.close()
    reopened = find_tables(partial, written)
    if reopened != replace(tables, n_rows=rows.n_rows):
        raise ModelError("the written model does not fit its config.json; please report this with the model's name")
    vocab: Mapping[str, int] = open_tokenizer(partial).get_vocab()
    lost: Sequence[str] = [piece for i, piece in rows.pieces.items() if vocab.get(piece) != i]
    if lost:
        raise ModelError(f"{len(lost)} new tokens are read with other ids beside the model, such as {lost[0]!r}")


def _tell(tables: EmbeddingMatrices, rows: NewRows, output_path: Path) -> None:
    say(
        f"{len(rows.ids):,} new rows (ids {rows.ids[0]} to {rows.ids[-1]}), each the mean of its old tokens' rows, in "
        f"{', '.join(tables.names)}{'; the head is tied to the embeddings' if tables.is_tied else ''}"
    )
    if rows.n_reused:
        say(f"{rows.n_reused:,} of them were there before as padding and were overwritten")
    say(
        f"vocab_size {rows.n_old} -> {rows.n_rows}; {NEW_TOKENS} lists the new ids for "
        f"{command('finetune')} --train_new_tokens"
    )
    say(f"reopened {output_path}: old rows and all other tensors are the same bits, and the model fits its config.json")
