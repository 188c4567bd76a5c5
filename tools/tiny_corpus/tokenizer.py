"""The Llama tokenizer of `sample/tiny-llama`: SentencePiece BPE with byte fallback, trained on the corpus."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import LlamaTokenizer

from .build import Document
from .vocabulary import CHINESE_WORDS

MAX_LENGTH = 1024


_HAN_WORDS = re.compile("|".join(sorted(CHINESE_WORDS, key=len, reverse=True)) + "|[\u4e00-\u9fff]")


def split_words(line: str) -> Iterator[str]:
    """Cut a line at its Chinese words, so that no piece of the tokenizer joins two of them.

    " 猫 is a cat" -> " ", "猫", " is a cat". Where it is not cut, the fixed wordings of the tasks would become pieces.
    """
    end = 0
    for found in _HAN_WORDS.finditer(line):
        yield line[end : found.start()]
        yield found[0]
        end = found.end()
    yield line[end:]


def train_sentencepiece(documents: Iterable[Document], vocab_size: int, file: Path) -> None:
    """Write `tokenizer.model`: ids 0 `<unk>`, 1 `<s>`, 2 `</s>`, 3 to 258 the bytes, then the pieces.

    The space that Llama puts before a text is set by hand here and switched on in the file afterwards: the trainer
    would put it before every piece of a line that `split_words` has cut.
    """
    model = io.BytesIO()
    lines = (line for text, answer in documents for line in f" {text}\n {answer}".splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(piece for line in lines for piece in split_words(line)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())  # type: ignore[attr-defined]
    proto.normalizer_spec.add_dummy_prefix = True
    file.write_bytes(proto.SerializeToString())


def make_tokenizer(documents: Iterable[Document], vocab_size: int, directory: Path) -> LlamaTokenizer:
    """Train, and leave `tokenizer.model` together with the files that `AutoTokenizer` reads in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").unlink(missing_ok=True)  # an older one would be read instead of the new model
    train_sentencepiece(documents, vocab_size, directory / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(
        directory, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=MAX_LENGTH, add_bos_token=True
    )
    tokenizer.save_pretrained(directory)
    config_file = directory / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "add_prefix_space", "extra_special_tokens"):
        config.pop(name, None)
    config["add_bos_token"] = True
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")
    return tokenizer
