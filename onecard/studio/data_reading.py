"""What training would learn from data, for the page: counts, lengths for any limit, bad records, samples by tokens.

Runs in the studio's worker process. The page names sources that `data_api.py` has checked; nothing here asks who may
read what. Encoded data lie in the kit's cache, so that what was read once is there at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from onecard.config.data import DataOptions, toy_base_problem
from onecard.config.parsing import parse
from onecard.errors import DataError
from onecard.studio.options import words_of

MOST_NAMED = 500  # bad and dropped records in one answer
MOST_TOKENS = 4000  # of one shown sample
MOST_SHOWN = 20  # samples in one answer
REPLACEMENT = "\ufffd"


def read_data(options: dict[str, Any], model_path: str) -> dict[str, Any]:
    """What is in the data, by the tokenizer and template that `options` of DataOptions and the base give.

    effect: see `data/cutoff_effect.py`. shapes: [file, shape, records, the keys it is known by]. Raises OneCardError.
    """
    whole, template, tokenizer = _encoded(_frozen(options), model_path)
    from onecard.data.cutoff_effect import cutoff_effect  # numpy and more

    report, read = whole.report, whole.report.read
    shapes = [[file, shape, count, _keys_of(shape)] for file, counts in read.shapes.items()
              for shape, count in counts.most_common()]  # fmt: skip
    return {
        "template": template.name,
        "model_path": model_path,
        "n_records": read.n_seen,
        "n_bad": read.n_bad,
        "n_samples": len(whole),
        "n_tokens": report.n_tokens,
        "n_learned": report.n_supervised,
        "shapes": shapes,
        "notes": [[text, count, first] for text, (count, first) in read.notes.items()],
        "ignored_fields": list(read.ignored_fields),
        "skipped_files": read.skipped_files[:MOST_NAMED],
        "bad": [[bad.file, bad.line, bad.nth, bad.reason] for bad in sorted(read.bad)[:MOST_NAMED]],
        "unlearned": [list(each) for each in report.dropped_records[:MOST_NAMED]],
        "n_unlearned": sum(report.dropped.values()),
        "effect": cutoff_effect(whole, template, tokenizer),
        "toy": toy_base_problem(model_path, options.get("data") or options.get("data_path") or ""),
    }


def tokens_of(options: dict[str, Any], model_path: str, numbers: Sequence[int]) -> dict[str, Any]:
    """Samples by number, each as [id, text, learned, weight] of its tokens, before any limit on their length.

    The texts of a sample put together are its text; of a character that several tokens make, the last has it.
    """
    from onecard.data.encode import IGNORE_INDEX

    whole, _, tokenizer = _encoded(_frozen(options), model_path)
    found = []
    for number in [n for n in numbers if 0 <= n < len(whole)][:MOST_SHOWN]:
        sample = whole[number]
        ids = sample.input_ids[:MOST_TOKENS]
        weights = sample.weights or [1.0] * len(ids)
        learned = [label != IGNORE_INDEX for label in sample.labels[: len(ids)]]
        tokens = [[each, text, is_learned, weight] for each, text, is_learned, weight in
                  zip(ids, token_texts(ids, tokenizer), learned, weights, strict=False)]  # fmt: skip
        question = int(sample.fields) if sample.fields else None  # tokens in front of the last answer; None for a text
        found.append({"number": number, "record": sample.record, "n_tokens": len(sample.input_ids),
                      "question": question, "tokens": tokens})  # fmt: skip
    return {"samples": found, "n_samples": len(whole)}


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that each token adds, control tokens by their names.

    A window of a few tokens is decoded, since a decoder may drop the space of the first one it sees. A token that ends
    within a character adds nothing; the one that completes it adds all of it.
    """
    texts: list[str] = []
    start, shown = 0, ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith(REPLACEMENT) and end < len(ids) and end - start < 16:
            texts.append("")
            continue
        texts.append(text[len(shown) :] if text.startswith(shown) else text)
        start, shown = end - 1, tokenizer.decode(ids[end - 1 : end], skip_special_tokens=False,
                                                 clean_up_tokenization_spaces=False)  # fmt: skip
    return texts


def _keys_of(shape: str) -> list[str]:
    """The fields by which a shape is known; none for what a description or a text file gives."""
    from onecard.data.formats import required_keys

    return required_keys(shape)


def _frozen(options: dict[str, Any]) -> tuple[tuple[str, str | tuple[str, ...]], ...]:
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in sorted(options.items()))


@lru_cache(maxsize=2)
def _encoded(options: tuple[tuple[str, Any], ...], model_path: str) -> tuple[Any, Any, Any]:
    """The data set without a limit, its template and its tokenizer."""
    from onecard.data.chat_template import load_template
    from onecard.data.cutoff_effect import QuestionLengthEncoder
    from onecard.data.dataset import cache_directory
    from onecard.data.encode import EncodeSettings
    from onecard.data.inspect import NO_LIMIT
    from onecard.data.joined import encode_parts
    from onecard.data.mixture import parts_of

    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in options}
    data = parse(DataOptions, words_of(plain))
    tokenizer = _tokenizer(model_path)
    template = load_template(data.prompt_type, tokenizer, dialogue=data.dialogue)
    settings = EncodeSettings(NO_LIMIT, data.train_on, data.strict, data.thinking)
    parts = parts_of(data)
    whole = encode_parts(
        parts, template, tokenizer, settings, cache_directory(data.cache_path), encoder=QuestionLengthEncoder
    )
    if not len(whole):
        raise DataError("nothing can be learned from it", parts[0].name)
    return whole, template, tokenizer


@lru_cache(maxsize=4)
def _tokenizer(model_path: str) -> Any:
    """The tokenizer of a base; of a Hub id only the small files are fetched, never weights."""
    from onecard.model.files import SMALL_FILES, locate
    from onecard.model.load import load_tokenizer

    return load_tokenizer(str(locate(model_path, what="tokenizer", patterns=SMALL_FILES)))
