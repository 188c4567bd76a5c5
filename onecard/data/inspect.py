"""What training would learn from a data set: samples with their loss mask, lengths, what is cut and what is skipped.

Knows encoded data sets. Does not know terminals or colours (onecard/programs/inspect.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from onecard.data.arrow_cache import DatasetReport
from onecard.data.dataset import EncodedDataset
from onecard.data.encode import IGNORE_INDEX, LabelledSample
from onecard.data.formats import ANSWERS_THINK, TOOLS_CALLED

NO_LIMIT = 2**31 - 1


class MaskedText(NamedTuple):
    """Text of neighbouring tokens that are all learned, or all not."""

    text: str
    learned: bool


class LengthBin(NamedTuple):
    """Samples of `low` to `high` tokens, both included."""

    low: int
    high: int
    n_samples: int


@dataclass(frozen=True)
class Inspection:
    """Counts are of samples as they are before the limit, except n_samples and n_cut, which are what training sees.

    n_thinking, n_calling: records whose answers hold thoughts, or call tools.
    """

    cutoff_len: int
    n_records: int
    n_samples: int
    n_tokens: int
    n_learned: int
    n_cut: int
    n_dropped: int
    n_bad: int
    n_thinking: int
    n_calling: int
    longest: int
    median: int
    bars: list[LengthBin]
    dropped: list[tuple[str, str]]
    bad: list[tuple[str, str]]

    def share(self, count: int) -> float:
        """`count` as a share of all samples that could be learned without the limit."""
        return count / max(1, self.n_samples + self.n_dropped)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        plain["bars"] = [bar._asdict() for bar in self.bars]
        return {**plain, "share_cut": self.share(self.n_cut), "share_dropped": self.share(self.n_dropped)}


def inspect(limited: EncodedDataset, whole: EncodedDataset, cutoff_len: int) -> Inspection:
    """Compare a data set encoded with `cutoff_len` with the same one encoded with NO_LIMIT."""
    report = limited.report
    bad = [(item.place, item.reason) for item in report.read.bad]
    return Inspection(
        cutoff_len=cutoff_len,
        n_records=report.read.n_seen,
        n_samples=len(limited),
        n_tokens=report.n_tokens,
        n_learned=report.n_supervised,
        n_cut=report.n_cut,
        n_dropped=sum(report.dropped.values()),
        n_bad=report.read.n_bad,
        n_thinking=_noted(report, ANSWERS_THINK),
        n_calling=_noted(report, TOOLS_CALLED),
        longest=int(whole.lengths.max()),
        median=int(np.median(whole.lengths)),
        bars=bars(whole.lengths, cutoff_len),
        dropped=report.dropped_records,
        bad=bad,
    )


def _noted(report: DatasetReport, note: str) -> int:
    return int(report.read.notes.get(note, (0,))[0])


def bars(lengths: np.ndarray, cutoff_len: int, n_bars: int = 12) -> list[LengthBin]:
    """A histogram whose borders include the limit, so that what is over it is seen.

    lengths [3, 5, 9], cutoff_len 8, 4 bars -> (1-2: 0) (3-4: 1) (5-6: 1) (7-8: 0) (9-10: 1)
    """
    width = (
        max(1, -(-cutoff_len // n_bars)) if int(lengths.max()) > cutoff_len else max(1, int(lengths.max()) // n_bars)
    )
    longest = int(lengths.max())
    edges = list(range(0, min(cutoff_len, longest), width))
    if longest <= cutoff_len:
        edges.append(longest)
    else:
        edges.append(cutoff_len)
        step = width
        while edges[-1] < longest:
            # Beyond the limit the bars grow, so that one very long sample does not make a thousand lines.
            edges.append(edges[-1] + step)
            step *= 2
    counts, _ = np.histogram(lengths, bins=[edge + 0.5 for edge in edges])
    return [LengthBin(low + 1, high, int(count)) for low, high, count in zip(edges, edges[1:], counts, strict=False)]


def pieces(sample: LabelledSample, tokenizer: Any) -> list[MaskedText]:
    """The text of a sample, cut where learning begins and ends.

    ids of "<s>Hi</s>" with labels [-100, 7, 2] -> Piece("<s>", False), Piece("Hi</s>", True)
    """
    learned = [label != IGNORE_INDEX for label in sample.labels]
    borders = [i for i in range(1, len(learned)) if learned[i] != learned[i - 1]]
    found = []
    for start, stop in zip([0, *borders], [*borders, len(learned)], strict=True):
        text = tokenizer.decode(
            sample.input_ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        found.append(MaskedText(text, learned[start]))
    return found
