"""New pieces put into an existing tokenizer: every old id stays, new ids come after all of them.

Knows the steps that both kinds share, and the proof after writing. The files of each kind are written by
sentencepiece.py and bytelevel.py. Does not know embeddings (resize.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.console import say, warn
from onecard.errors import ConfigError, ModelError
from onecard.export.io.output import new_directory, progress
from onecard.export.vocabulary import bytelevel
from onecard.export.vocabulary import sentencepiece as sentencepiece_kind
from onecard.export.vocabulary.bpe_growth import VocabularyExtension
from onecard.export.vocabulary.corpus import (
    Kind,
    compare,
    decode,
    encode,
    eval_texts,
    kind_of,
    locate_tokenizer,
    open_tokenizer,
    table,
)
from onecard.export.vocabulary.options import MergeTokenizerOptions
from onecard.model.files import read_json, write_json

# Beside the vocabulary itself; what else lies in a model's directory belongs to the model.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
# Texts that tokenizers are known to disagree on.
PROBES = (
    *(
        "Hello world",
        "The quick  brown   fox",
        "line\nbreaks\n\nand\ttabs ",
        "a\r\nb",
        "def f(x):\n    return x ** 2\n",
    ),
    *("中国的首都是北京。", "你好，world！", "mixed 中文 and English 混合 text", "2023年12月31日 3.14159", "𠮷野家"),
    *("🙂👍🏽 emoji", "Ünïcödé café", "カタカナ 한국어", "https://example.org/a?b=c&d=%20", "", "x\u200by\u3000z"),
)


@dataclass(frozen=True)
class BaseTokenizer:
    """The tokenizer that grows. `next_id` comes after every id it has, the added tokens' too."""

    directory: Path
    kind: Kind
    tokenizer: Any
    vocab: dict[str, int]

    @property
    def next_id(self) -> int:
        return max(self.vocab.values()) + 1


def merge(options: MergeTokenizerOptions) -> None:
    """Write the grown tokenizer and print tokens per character before and after.

    Raises ModelError (no tokenizer, other kinds, an old id that moved, files that disagree), ConfigError (nothing to
    add), DataError (--eval_path).
    """
    directory, new_path = locate_tokenizer(options.tokenizer_path), locate_tokenizer(options.new_path)
    kind, new_kind = kind_of(directory), kind_of(new_path)
    if kind != new_kind:
        raise ModelError(
            f"{directory} is a {kind} tokenizer and {new_path} a {new_kind} one; train new pieces with --kind {kind}"
        )
    tokenizer = open_tokenizer(directory)
    old = BaseTokenizer(directory, kind, tokenizer, tokenizer.get_vocab())
    texts = eval_texts(options.eval_path, new_path)
    output_path = Path(options.output_path)
    with new_directory(output_path, overwrite=options.overwrite, inputs=[directory, new_path]) as partial:
        growth, new_ids = _write(old, new_path, partial, options.max_new)
        grown = open_tokenizer(partial)
        n_probed = check(old, grown, new_ids, partial, texts)
    _tell(growth, new_ids, n_probed, output_path)
    if not texts:
        warn("no held-out text beside the new pieces; give --eval_path to see tokens per character")
        return
    comparison = compare(old.tokenizer, grown, texts, set(new_ids.values()))
    say(table(comparison))
    say(f"{len(comparison.used):,} of {len(new_ids):,} new tokens were met in the held-out text")


def _write(
    old: BaseTokenizer, new_path: Path, partial: Path, max_new: int
) -> tuple[VocabularyExtension, dict[str, int]]:
    candidates: list[str]
    if old.kind == "sentencepiece":
        proto = sentencepiece_kind.open_old(old.directory, old.vocab)
        candidates, left_out = sentencepiece_kind.candidates(new_path, proto, old.directory)
    else:
        candidates, left_out = bytelevel.candidates(new_path, old.tokenizer.backend_tokenizer)
    with progress("pieces", len(candidates)) as moved_on:
        if old.kind == "sentencepiece":
            growth = sentencepiece_kind.grown(proto, candidates, old.vocab, max_new, moved_on)
        else:
            content = backend_json(old)
            growth = bytelevel.grown(content, candidates, old.vocab, max_new, moved_on)
    growth.left_out.update(left_out)
    if not growth.pieces:
        raise ConfigError("--new_path", f"{new_path} has no piece that is new and can be used ({reasons(growth)})")
    fillers = fill_holes(old)
    new_ids = {piece: i for i, piece in enumerate(growth.pieces, start=old.next_id)}
    if old.kind == "sentencepiece":
        added = {i: (str(token), token.special) for i, token in old.tokenizer.added_tokens_decoder.items()}
        merges = sentencepiece_kind.write_model(proto, growth, added, fillers, partial / "tokenizer.model")
        content = backend_json(old)
        sentencepiece_kind.insert_merges(content, merges, old.vocab)
    else:
        content["model"]["merges"] += bytelevel.as_listed(content, growth.joins)
    content["model"]["vocab"] |= old.vocab | fillers | new_ids
    write_json(partial / "tokenizer.json", content)
    if (old.directory / "vocab.json").is_file():
        bytelevel.write_pair(content, partial)
    _copy_companions(old, partial)
    return growth, new_ids


def backend_json(old: BaseTokenizer) -> dict[str, Any]:
    """tokenizer.json as it lies there, else as transformers makes it; with every added token that it knows of.

    The file is preferred: what AutoTokenizer rebuilds from it follows the Python class, other programs read the file.
    """
    rebuilt: dict[str, Any] = json.loads(old.tokenizer.backend_tokenizer.to_str())
    file = old.directory / "tokenizer.json"
    content = read_json(file) if file.is_file() else rebuilt
    content["added_tokens"] = rebuilt["added_tokens"]
    content |= {"truncation": None, "padding": None}
    return content


def fill_holes(old: BaseTokenizer) -> dict[str, int]:
    """Names for ids below `next_id` that no token has: without them, later additions would take these ids."""
    taken = set(old.vocab.values())
    fillers: dict[str, int] = {}
    for i in range(max(taken)):
        name = f"<unused_{i}>"
        while i not in taken and name in old.vocab:
            name = f"<{name}>"
        if i not in taken:
            fillers[name] = i
    return fillers


def check(old: BaseTokenizer, grown: Any, new_ids: dict[str, int], directory: Path, texts: Sequence[str]) -> int:
    """Prove on the reopened files that nothing moved and that they agree; returns how many texts were compared.

    Raises ModelError.
    """
    vocab = grown.get_vocab()
    moved = [piece for piece, i in {**old.vocab, **new_ids}.items() if vocab.get(piece) != i]
    if moved:
        raise ModelError(
            f"{len(moved)} tokens did not keep their ids on reading the new tokenizer, such as {moved[0]!r}; "
            "nothing was written. Please report this with the name of the tokenizer"
        )
    probes = [*PROBES, *texts[:500]]
    for text in probes:
        before = decode(old.tokenizer, encode(old.tokenizer, text))
        after = decode(grown, encode(grown, text))
        if before != after:
            raise ModelError(f"{text[:80]!r} would be decoded as {after[:80]!r} instead of {before[:80]!r}")
    if old.kind == "sentencepiece":
        sentencepiece_kind.check_files(old, grown, directory, probes)
    return len(probes)


def reasons(growth: VocabularyExtension) -> str:
    """What was left out and why, the most frequent first."""
    return "; ".join(f"{count:,} {reason}" for reason, count in growth.left_out.most_common())


def _tell(growth: VocabularyExtension, new_ids: dict[str, int], n_probed: int, output_path: Path) -> None:
    say(
        f"{len(new_ids):,} new tokens with the ids {min(new_ids.values())} to {max(new_ids.values())} in {output_path}"
        f"; {growth.n_halves:,} of them are missing halves and {growth.n_characters:,} missing characters"
    )
    if growth.left_out:
        say(f"left out: {reasons(growth)}")
    say(f"reopened: every old id is where it was, and {n_probed:,} texts decode as before")


def _copy_companions(old: BaseTokenizer, directory: Path) -> None:
    for name in COMPANIONS:
        if (old.directory / name).is_file():
            shutil.copyfile(old.directory / name, directory / name)
    file = directory / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    # Without it the class would be looked up in config.json, which is the model's.
    settings.setdefault("tokenizer_class", type(old.tokenizer).__name__)
    write_json(file, settings)
