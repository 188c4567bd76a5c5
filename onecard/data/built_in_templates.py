"""The templates that come with this program, how one is known again by its text, and what a first line may say.

Knows files and texts. Does not know tokenizers or turns.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

from onecard.config.data import BUILT_IN_TEMPLATES
from onecard.errors import ConfigError

BUILT_IN = BUILT_IN_TEMPLATES
FLAG = "--prompt_type"
METADATA = re.compile(r"\A\{#-?\s*onecard:(.*?)-?#\}", re.DOTALL)
FOLDER = Path(__file__).resolve().parent / "templates"
_ANSWER = "{{- message['content'] + eos_token -}}"  # of alpaca, llama-2 and mistral


def built_in_name(jinja: str) -> str | None:
    """Which built-in template this is, by its text: a run stores the text alone.

    Without BOS, with a space before the answers, or as an earlier version had it, it is still the same one.
    """
    return _built_in_texts().get(jinja.strip())


def first_version(jinja: str) -> str:
    """The text that a built-in template had before it knew tools, which writes everything else alike; others as is.

    A run of an earlier version stored that one, and goes on.
    """
    for file in sorted((FOLDER / "earlier").glob("*.jinja")):
        now, then = (path.read_text(encoding="utf-8") for path in (FOLDER / file.name, file))
        if jinja in (now, without_bos(now)):
            return then if jinja == now else without_bos(then)
    return jinja


def without_bos(built_in: str) -> str:
    """The template for a tokenizer that names a BOS and never writes it."""
    return built_in.replace("{{- bos_token -}}\n", "", 1)


@lru_cache(maxsize=1)
def _built_in_texts() -> dict[str, str]:
    files = [*(FOLDER / f"{name}.jinja" for name in BUILT_IN), *(FOLDER / "earlier").glob("*.jinja")]
    texts = {file.read_text(encoding="utf-8").strip(): file.stem for file in files}
    texts |= {text.replace(_ANSWER, "{{- ' ' + " + _ANSWER.removeprefix("{{- ")): name for text, name in texts.items()}
    return texts | {without_bos(text): name for text, name in texts.items()}


def read_metadata(name: str, text: str) -> tuple[str, tuple[str, ...]]:
    """End and stops out of a first line such as {"end": "eos", "stop": []}. Raises ConfigError."""
    try:
        metadata = json.loads(text)
        end, stop = metadata["end"], metadata.get("stop", [])
    except (ValueError, KeyError, TypeError, AttributeError) as reason:
        raise ConfigError(
            FLAG, f'template {name}: its first line is not {{"end": ..., "stop": [...]}}: {reason}'
        ) from reason
    good = isinstance(end, str) and end and isinstance(stop, list) and all(isinstance(s, str) and s for s in stop)
    if not good:
        raise ConfigError(FLAG, f"template {name}: on its first line `end` must be a text and `stop` a list of texts")
    return end, tuple(stop)
