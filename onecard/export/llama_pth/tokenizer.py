"""The tokenizer.model beside LLaMA's original weights: SentencePiece in LLaMA-1 and -2, tiktoken ranks in LLaMA-3.

Knows both files and what transformers wants beside config.json. Knows no weights.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from onecard.errors import ModelError
from onecard.export.llama_pth.layout import LlamaParams, SpecialIds
from onecard.export.vocabulary.corpus import is_tiktoken
from onecard.model.files import write_json

MODEL_FILE = "tokenizer.model"
# How LLaMA-3 cuts text before merging: https://github.com/meta-llama/llama-models (models/llama3/tokenizer.py).
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
N_SPECIAL = 256
BOS, EOS, END_OF_TURN, END_OF_MESSAGE = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"
# Names at fixed places after the text tokens; every other place is reserved. 3.1 named three of the reserved ones.
SPECIAL_3 = {0: BOS, 1: EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: END_OF_TURN}
SPECIAL_31 = {**SPECIAL_3, 4: "<|finetune_right_pad_id|>", 8: END_OF_MESSAGE, 10: "<|python_tag|>"}


def tokenizer_model(directory: Path, *, look_above: bool = True) -> Path | None:
    """The tokenizer.model of a directory of Meta's files; LLaMA-1 keeps it one folder above."""
    places = [directory, directory / "original", *([directory.resolve().parent] if look_above else [])]
    return next((place / MODEL_FILE for place in places if (place / MODEL_FILE).is_file()), None)


def copy_tokenizer_model(source: Path, target: Path) -> str | None:
    """Copy the tokenizer.model of `source`, a model directory; returns what is missing, or None."""
    found = tokenizer_model(source)
    if found is not None:
        shutil.copyfile(found, target / MODEL_FILE)
        return None
    return f"there is no {MODEL_FILE}, which Meta's programs read; put the base model's beside the .pth files"


def write_hf_tokenizer(
    file: Path | None, directory: Path, params: LlamaParams, *, instruct: bool
) -> tuple[SpecialIds, list[str]]:
    """Write what transformers needs of a tokenizer; returns the ids for config.json and remarks for the reader.

    Raises ModelError when the tokenizer is damaged or has more tokens than the model.
    """
    if file is None:
        missing = f"no {MODEL_FILE} was found, so the result has no tokenizer; put its tokenizer files there"
        return SpecialIds(), [missing]
    if is_tiktoken(file):
        return _write_tiktoken(file, directory, params, instruct)
    return _write_sentencepiece(file, directory, params)


def _write_sentencepiece(file: Path, directory: Path, params: LlamaParams) -> tuple[SpecialIds, list[str]]:
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as reason:
        raise ModelError(f"{file} is neither a SentencePiece model nor tiktoken ranks; copy it again") from reason
    _check_size(file, pieces.get_piece_size(), params)
    shutil.copyfile(file, directory / MODEL_FILE)
    names = {
        kind: pieces.id_to_piece(i) for kind, i in (("unk", 0), ("bos", pieces.bos_id()), ("eos", pieces.eos_id()))
    }
    settings: dict[str, Any] = {f"{kind}_token": name for kind, name in names.items()}
    settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    settings |= {"legacy": False, "clean_up_tokenization_spaces": False}
    write_json(directory / "tokenizer_config.json", settings)
    return SpecialIds(pieces.bos_id(), pieces.eos_id()), [
        f"SentencePiece tokenizer of {pieces.get_piece_size()} tokens copied"
    ]


def _write_tiktoken(file: Path, directory: Path, params: LlamaParams, instruct: bool) -> tuple[SpecialIds, list[str]]:
    ranks = _ranks(file)
    special = _special_names(SPECIAL_31 if params.use_scaled_rope else SPECIAL_3)
    _check_size(file, len(ranks) + len(special), params)
    id_of = {name: len(ranks) + place for place, name in enumerate(special)}
    _tokenizer(ranks, special).save(str(directory / "tokenizer.json"))
    ends = [EOS, *([END_OF_MESSAGE] if END_OF_MESSAGE in special else []), END_OF_TURN] if instruct else [EOS]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": ends[-1],
        "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    write_json(directory / "tokenizer_config.json", settings)
    shutil.copyfile(file, _kept_aside(directory))
    ids = [id_of[name] for name in ends]
    remark = f"tiktoken tokenizer of {len(ranks)} + {len(special)} tokens written as tokenizer.json"
    return SpecialIds(id_of[BOS], ids if instruct else ids[0]), [remark]


def _tokenizer(ranks: dict[bytes, int], special: Sequence[str]) -> Any:
    """The same tokenizer as the `tokenizers` library has it: https://huggingface.co/docs/tokenizers."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    texts = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {texts[token]: rank for token, rank in ranks.items()}
    merges = [(texts[left], texts[right]) for left, right in _merges(ranks)]
    found = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, byte_fallback=False, ignore_merges=True))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), by_bytes])
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    found.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, found.token_to_id(BOS))]
    )
    return found


def _kept_aside(directory: Path) -> Path:
    """original/tokenizer.model, as on the Hub: beside config.json, programs would take it for SentencePiece."""
    (directory / "original").mkdir(exist_ok=True)
    return directory / "original" / MODEL_FILE


def _ranks(file: Path) -> dict[bytes, int]:
    """Token -> rank. Raises ModelError that names the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            word, rank = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except ValueError as reason:
            raise ModelError(f"{file}:{number} is no base64 token with its rank; copy the file again") from reason
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ModelError(f"{file} skips or repeats ranks; copy it again")
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to make a token of two others, in the order of ranks: what byte-pair encoding replays."""
    found = []
    for token, rank in ranks.items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        found += [(rank, ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
    return [(a, b) for _, _, _, a, b in sorted(found)]


def _special_names(known: dict[int, str]) -> list[str]:
    """All 256 control tokens of LLaMA-3: the known names at their places, the others numbered in order."""
    reserved = count()
    return [known.get(n) or f"<|reserved_special_token_{next(reserved)}|>" for n in range(N_SPECIAL)]


def _check_size(file: Path, n_tokens: int, params: LlamaParams) -> None:
    if n_tokens > params.vocab_size:
        raise ModelError(
            f"{file} has {n_tokens} tokens, but the model has rows for {params.vocab_size}; it belongs to another"
        )
