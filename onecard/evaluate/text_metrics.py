"""An answer beside its reference: exact match, F1, and through sacrebleu and rouge-score BLEU, chrF and ROUGE.

Chinese is counted in characters, other writing in words; BLEU and ROUGE cut Chinese as sacrebleu's own tokenizer does.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from onecard.data.wordings import language_of
from onecard.errors import ConfigError

_UNITS = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W\u3400-\u9fff\uf900-\ufaff]+")


def check_metrics() -> None:
    """Raise ConfigError, in one line, where sacrebleu or rouge-score is not installed."""
    _libraries()


@lru_cache(maxsize=1)
def _libraries() -> tuple[Any, Any, Any]:
    try:
        import sacrebleu  # optional: requirements-eval.txt
        from rouge_score import rouge_scorer
        from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh
    except ImportError as reason:
        raise ConfigError("--suite", f"open answers need {reason.name}: pip install -r requirements-eval.txt") from None
    return sacrebleu, rouge_scorer, TokenizerZh


def units(text: str) -> list[str]:
    """Single Chinese characters, and words in small letters: "我有2 cats" -> 我 有 2 cats."""
    return _UNITS.findall(unicodedata.normalize("NFKC", text).lower())


def exact_match(answer: str, reference: str) -> float:
    """1 where both are the same, blanks around them aside."""
    return float(answer.strip() == reference.strip())


def f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall over units, as for SQuAD (https://arxiv.org/abs/1606.05250)."""
    ours, theirs = Counter(units(answer)), Counter(units(reference))
    n_shared = sum((ours & theirs).values())
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * n_shared / (sum(ours.values()) + sum(theirs.values()))


def record_metrics(answer: str, reference: str) -> dict[str, float]:
    """All metrics of one record, each from 0 to 1."""
    sacrebleu, rouge_scorer, tokenizer = _libraries()
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_SacrebleuWords(tokenizer()))
    rouge = scorer.score(reference, answer)
    return {
        "exact_match": exact_match(answer, reference),
        "f1": f1(answer, reference),
        "chrf": sacrebleu.sentence_chrf(answer, [reference]).score / 100,
        **{f"rouge_{name[5:].lower()}": score.fmeasure for name, score in rouge.items()},
    }


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """BLEU over all records, from 0 to 1; with sacrebleu's zh tokenizer where a reference is Chinese, else 13a."""
    sacrebleu, _, _ = _libraries()
    tokenize = "zh" if any(language_of(reference) == "zh" for reference in references) else "13a"
    return float(sacrebleu.corpus_bleu(list(answers), [list(references)], tokenize=tokenize).score) / 100


class _SacrebleuWords:
    """sacrebleu's tokenizer for Chinese in the form that rouge-score asks for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def tokenize(self, text: str) -> list[str]:
        return str(self._tokenizer(text.lower())).split()
