"""The verb `onecard data split`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onecard.config.data import ReadingOptions
from onecard.config.parsing import missing
from onecard.config.problems import Problem


@dataclass
class SplitOptions(ReadingOptions):
    """Split data into training and validation; near-duplicates stay on one side."""

    data_path: str | list[str] = ""
    """Data: files, folders of these, or Hub data sets; one or several."""
    output_path: str = ""
    """New directory for train.jsonl, validation.jsonl and split.json."""
    validation_size: float = 0.05
    """Rows for validation: a share below 1, or a count."""
    near_duplicates: float = 0.7
    """Jaccard similarity of runs of 5 words from which two rows belong together; 0: only equal texts do."""
    seed: int = 42
    """Another seed makes another split; the same seed always the same."""
    overwrite: bool = False
    """Replace what is at output_path."""

    def problems(self) -> list[Problem]:
        found = super().problems() + missing(self, "data_path", "output_path")
        if self.near_duplicates and not 0.3 <= self.near_duplicates <= 1:
            found.append(("--near_duplicates", f"{self.near_duplicates} is neither 0 nor between 0.3 and 1"))
        if self.validation_size <= 0 or (self.validation_size >= 1 and self.validation_size % 1):
            found.append(("--validation_size", f"{self.validation_size:g} is neither a share (0.05) nor a count (200)"))
        return found


def split_data(options: SplitOptions) -> None:
    """Split as the options say."""
    from onecard.console import say
    from onecard.curation.split import TRAIN_FILE, VALIDATION_FILE, SplitSettings, split
    from onecard.data.sources import source_of

    settings = SplitSettings(source_of(options), options.validation_size, options.near_duplicates, options.seed)
    target = Path(options.output_path)
    split(settings, target, overwrite=options.overwrite)
    say(f"they are in {target / TRAIN_FILE} and {target / VALIDATION_FILE}")
