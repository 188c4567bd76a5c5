"""Save a model in 4 or 8 bits by bitsandbytes: smaller on the disk, and faster to load.

onecard quantize-bnb --lora_path outputs/my-first-adapter --bits 4 --output_path outputs/my-model-4bit

Load it with the same --bits to ask, chat and train. It is what --bits makes of the model at each start (NF4 with
double quantisation, or LLM.int8), made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

from onecard.config.data import ReadingOptions
from onecard.config.parsing import parse
from onecard.config.problems import Problem, too_small
from onecard.export.quantize.options import SourceOptions
from onecard.installation import SHIPPED


@dataclass
class BnbOptions(ReadingOptions):
    """How weights are quantised, and what the result is measured on."""

    bits: Literal[4, 8] = 4
    """Bits per weight: 4 (NF4 with double quantisation) or 8 (LLM.int8)."""
    eval_path: str = ""
    """Text to measure on: a file, a folder or a Hub data set. Without it: the pages of docs, English and Chinese."""
    eval_samples: int = 64
    """Samples to measure on, at most."""
    eval_len: int = 512
    """Longest sample in tokens."""

    def problems(self) -> list[Problem]:
        return super().problems() + too_small(self, eval_samples=1, eval_len=16)


@dataclass
class BnbConfig:
    """Everything this tool needs; see the classes of its fields."""

    source: SourceOptions = field(default_factory=SourceOptions)
    bnb: BnbOptions = field(default_factory=BnbOptions)


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    config = parse(BnbConfig, argv, description=__doc__)

    quantize(config)


def quantize(config: BnbConfig) -> None:
    """Write what the options ask for."""
    from onecard.export.quantize.calibration import CalibrationOptions
    from onecard.export.quantize.run import export_bnb, request_of

    options, request = config.bnb, request_of(config.source)
    amount = CalibrationOptions(length=options.eval_len, n_held_out=options.eval_samples)
    export_bnb(request, options.bits, text_for(request.base, options), amount)


def text_for(base: str, options: BnbOptions) -> Any:
    """The TextSource to measure on: the user's text, or text of the kind that the base was trained on."""
    from onecard.export.io.base import read_config
    from onecard.export.quantize.calibration import texts_of, tiny_corpus
    from onecard.export.quantize.run import TextSource
    from onecard.model.files import locate

    if options.eval_path:
        return TextSource(lambda: texts_of(options.eval_path, options), name=options.eval_path)
    config, embedded = read_config(locate(base)), read_config(SHIPPED / "sample" / "tiny-llama")
    if all(config.get(name) == embedded[name] for name in ("model_type", "vocab_size", "hidden_size")):
        return TextSource(lambda: tiny_corpus(0), packed=False, name="the corpus of sample/tiny-llama")
    return TextSource(documents, name="the pages of docs/en and docs/zh")


def documents() -> Iterator[str]:
    """The paragraphs of the pages for users, English and Chinese in turns."""
    languages = [sorted((SHIPPED / "docs" / language).glob("*.md")) for language in ("en", "zh")]
    texts = ["\n\n".join(file.read_text(encoding="utf-8") for file in files).split("\n\n") for files in languages]
    for pair in zip_longest(*texts):
        yield from filter(None, pair)
