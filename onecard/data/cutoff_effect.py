"""What any --cutoff_len would do to a data set, for all limits at once, from one encoding without a limit.

A sample above the limit loses its oldest exchanges, then the end of its last answer, and is dropped where the last
question alone takes all of the limit (encode.py). So two numbers of a sample decide its fate: its length, and the
tokens in front of its last answer once older exchanges are gone. Does not know files or pages.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from onecard.data.chat_template import Template
from onecard.data.dataset import EncodedDataset
from onecard.data.encode import DroppedSample, EncodedSample, Encoder, SamplePlan, exchanges
from onecard.data.tokenization import segment_tokenizer

Counts = list[tuple[int, int]]  # (value, how many have it), by value


class QuestionLengthEncoder(Encoder):
    """Keeps, as `fields` of each sample of a conversation, the tokens in front of its last answer."""

    def _fit(self, draft: SamplePlan, ids: list[list[int]]) -> list[EncodedSample] | DroppedSample:
        fitted = super()._fit(draft, ids)
        if isinstance(fitted, DroppedSample) or not draft.turns:
            return fitted
        length = str(self._question_length(draft, ids))
        return [coded._replace(fields=length) for coded in fitted]

    def _question_length(self, draft: SamplePlan, ids: list[list[int]]) -> int:
        """Tokens in front of the last answer once older exchanges are gone: with as many the sample is dropped."""
        head, starts = exchanges(draft.turns)
        if starts == [len(head)] and draft.segments[-1].is_answer:  # one exchange, whose ids are known
            return len(self.tokens.beginning_of(draft.segments[0].text)) + sum(map(len, ids[:-1]))
        coded, answer = self.last_exchange(draft)
        return len(coded.ids) - len(answer)


def cutoff_effect(whole: EncodedDataset, template: Template, tokenizer: Any) -> dict[str, Any]:
    """The counts from which a limit's effect follows, of a data set that `QuestionLengthEncoder` made without a limit.

    lengths, questions: of each sample of a conversation. records: of each conversation, the smallest of its samples'
    questions. documents: tokens of each text, without those that are added (n_bos in front of each piece, eos).

    At a limit c, with questions below the length always:
        dropped records = number of records >= c            samples that are left = lengths - (questions >= c)
        cut samples = (lengths > c) - (questions >= c)      pieces of a document = ceil(tokens / (c - n_bos))
    """
    questions = np.array([int(text) if text else -1 for batch in whole.batches
                          for text in batch.column("fields").to_pylist()], np.int64)  # fmt: skip
    talks = questions >= 0
    tokens = segment_tokenizer(template, tokenizer)
    n_bos, n_eos = len(tokens.beginning), int(tokens.eos_id is not None)
    order = np.argsort(whole.groups[talks], kind="stable")
    groups = whole.groups[talks][order]
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    records = np.minimum.reduceat(questions[talks][order], starts) if len(starts) else questions[:0]
    return {
        "lengths": _counts(whole.lengths[talks]),
        "questions": _counts(questions[talks]),
        "records": _counts(records),
        "documents": _counts(whole.lengths[~talks] - n_bos - n_eos),
        "n_bos": n_bos,
    }


def _counts(values: np.ndarray) -> Counts:
    return sorted(Counter(values.tolist()).items())
