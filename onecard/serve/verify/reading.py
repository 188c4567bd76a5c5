"""What a model or a server answered to one prompt, and how far two such answers are apart.

Distances are Kullback-Leibler divergences in nats per token, of what is known: the likeliest tokens, and all others as
one. So they are lower than of whole distributions, by little where models are sure of what they say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Tops = Mapping[str, float]
SPACES = {ord("▁"): " ", ord("Ġ"): " ", ord("Ċ"): "\n"}
HALF = re.compile(r"^bytes:|^<0x[0-9A-Fa-f]{2}>$|\ufffd")
N_TOP = 5  # alternatives of a token, stored and asked for: the most that /v1/completions gives everywhere
LEAST = 1e-6  # a probability that stands for none
NO_LOGPROBS = 8.0  # nats, where texts are all that can be compared and they differ


@dataclass(frozen=True)
class AnswerReading:
    """An answer: its text, its tokens' texts, what ended it, and the tokens' likeliest alternatives.

    tops: for each of the first tokens, log-probability by text; empty where a server tells none. n_prompt: tokens of
    the prompt as the server counts them, 0 where it does not.
    """

    text: str
    finish: str = ""
    tokens: tuple[str, ...] = ()
    tops: tuple[Tops, ...] = ()
    n_prompt: int = 0

    def to_json(self) -> dict[str, Any]:
        """As `server_check.json` holds it."""
        content = asdict(self)
        content["tops"] = [{text: round(value, 5) for text, value in top.items()} for top in self.tops]
        return content


def reading_from_json(content: Mapping[str, Any]) -> AnswerReading:
    """What `AnswerReading.to_json` wrote. Raises KeyError, TypeError and ValueError."""
    tops = tuple({str(text): float(value) for text, value in top.items()} for top in content["tops"])
    tokens = tuple(map(str, content["tokens"]))
    return AnswerReading(str(content["text"]), str(content["finish"]), tokens, tops, int(content["n_prompt"]))


def plain_token(text: str) -> str:
    """A token's text as every server's spelling of it becomes: without the space before, half characters alike.

    "▁Hi", "ĠHi", " Hi" -> "Hi"    "<0xE4>", "bytes:\\xe4" -> "\\ufffd"
    """
    if HALF.search(text):
        return "\ufffd"
    spaced = text.translate(SPACES)
    return spaced.strip() or spaced


def merged(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Log-probabilities by plain text; those of tokens that are spelled alike are added up."""
    found: dict[str, float] = {}
    for text, logprob in pairs:
        key = plain_token(text)
        total = math.exp(found[key]) + math.exp(logprob) if key in found else math.exp(logprob)
        found[key] = math.log(max(total, 1e-300))
    return found


def divergence(wanted: Tops, found: Tops) -> float:
    """KL(wanted || found) over the likeliest tokens of `wanted`, with all others as one.

    A token that `found` does not list is at most as likely there as the least likely one that it lists. Where it is no
    likelier in `wanted`, that is as it should be, and it counts among the others.
    """
    found_rest = max(1 - sum(map(math.exp, found.values())), LEAST)
    unlisted = max(min([found_rest, *map(math.exp, found.values())]), LEAST)
    total, wanted_rest, other_rest = 0.0, 1.0, 1.0
    for text, logprob in wanted.items():
        p, q = math.exp(logprob), max(math.exp(found[text]) if text in found else unlisted, LEAST)
        if text not in found and p <= unlisted:
            continue
        total += p * math.log(max(p, LEAST) / q)
        wanted_rest, other_rest = wanted_rest - p, other_rest - q
    wanted_rest, other_rest = max(wanted_rest, LEAST), max(other_rest, LEAST)
    return max(total + wanted_rest * math.log(wanted_rest / other_rest), 0.0)


def divergences(wanted: AnswerReading, found: AnswerReading) -> list[float]:
    """The divergence of each token up to the first in which the answers differ, that one included.

    Without log-probabilities: one number, 0 for the same text. An answer that ended at once tells nothing: servers give
    no log-probabilities of the end.
    """
    if wanted.tops and not found.tops and not found.text:
        return []
    if not wanted.tops or not found.tops:
        return [0.0 if same_text(wanted, found) else NO_LOGPROBS]
    values = []
    for k, (one, other) in enumerate(zip(wanted.tops, found.tops, strict=False)):
        values.append(divergence(one, other))
        if wanted.tokens[k : k + 1] != found.tokens[k : k + 1]:
            break
    return values


def distance(wanted: Sequence[AnswerReading], found: Sequence[AnswerReading]) -> float:
    """The mean divergence over all tokens that can be compared, in nats per token."""
    values = [value for pair in zip(wanted, found, strict=True) for value in divergences(*pair)]
    return sum(values) / len(values) if values else NO_LOGPROBS


def same_text(one: AnswerReading, other: AnswerReading) -> bool:
    """Whether both say the same; one that was cut off where the other goes on does."""
    first, second = words_of(one.text), words_of(other.text)
    if one.finish == "length" and len(first) < len(second):
        return second.startswith(first)
    return first.startswith(second) if other.finish == "length" and len(second) < len(first) else first == second


def words_of(text: str) -> str:
    """A text without blanks and the marks of thoughts, which servers show or hide."""
    return re.sub(r"\s+|</?think>", "", text)
