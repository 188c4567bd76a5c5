"""Save a model in 4 or 8 bits by bitsandbytes: smaller on the disk, and faster to load.

onecard quantize-bnb --lora_path outputs/my-first-adapter --bits 4 --output_path outputs/my-model-4bit

Load it with the same --bits to ask, chat and train. It is what --bits makes of the model at each start (NF4 with
double quantisation, or LLM.int8), made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from onecard.config.parsing import parse
from onecard.export.quantize.options import BnbOptions, SourceOptions
from onecard.installation import SHIPPED


@dataclass
class BnbConfig:
    """Everything this tool needs; see the classes of its fields."""

    source: SourceOptions = field(default_factory=SourceOptions)
    bnb: BnbOptions = field(default_factory=BnbOptions)


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    config = parse(BnbConfig, argv, description=__doc__)

    from onecard.export.quantize.run import export_bnb, with_base

    source = with_base(config.source)
    export_bnb(source, config.bnb, text_for(source.model_path, config.bnb))


def text_for(base: str, options: BnbOptions) -> Any:
    """The MeasuredText: the user's text, or text of the kind that the base was trained on."""
    from onecard.export.io.base import read_config
    from onecard.export.quantize.calibration import MeasuredText, texts_of, tiny_corpus
    from onecard.model.files import locate

    if options.eval_path:
        return MeasuredText(options.eval_path, texts_of(options.eval_path, options))
    config, embedded = read_config(locate(base)), read_config(SHIPPED / "sample" / "tiny-llama")
    if all(config.get(name) == embedded[name] for name in ("model_type", "vocab_size", "hidden_size")):
        return MeasuredText("the corpus of sample/tiny-llama", tiny_corpus(0), packed=False)
    return MeasuredText("the pages of docs/en and docs/zh", documents())


def documents() -> Iterator[str]:
    """The paragraphs of the pages for users, English and Chinese in turns."""
    languages = [sorted((SHIPPED / "docs" / language).glob("*.md")) for language in ("en", "zh")]
    texts = ["\n\n".join(file.read_text(encoding="utf-8") for file in files).split("\n\n") for files in languages]
    for pair in zip_longest(*texts):
        yield from filter(None, pair)
