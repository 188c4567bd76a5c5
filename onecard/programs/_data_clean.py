"""The verb `onecard data clean`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onecard.config.data import ReadingOptions, column_names
from onecard.config.parsing import comma_list, missing
from onecard.config.problems import Problem, too_small


@dataclass
class CleanOptions(ReadingOptions):
    """Leave out duplicates, foreign languages, broken texts and questions of evaluations; the source stays as it is."""

    data_path: str | list[str] = ""
    """Data: files (json, jsonl, csv, parquet, txt), folders of these, or Hub data sets; one or several."""
    output_path: str = ""
    """New directory for data.jsonl, and for report/ with what went and why."""
    fix_encoding: bool = True
    """Repair texts that were decoded wrongly (Ã© -> é), and leave out those with lost characters."""
    languages: str = ""
    """Languages that stay, by code with commas between: zh,en. Empty: all; what is not clearly another stays."""
    min_chars: int = 1
    """Fewest characters of a record, question and answer together."""
    max_chars: int = 0
    """Most characters of a record; 0: no limit."""
    near_duplicates: float = 0.7
    """Jaccard similarity of runs of 5 words from which two records are one; 0: only equal texts are."""
    compare: Literal["whole", "question"] = "whole"
    """What makes two records duplicates: all of their text, or their questions alone."""
    evaluation_path: str | list[str] = ""
    """Evaluation data whose questions must not be learned: files or folders in any form that is read here."""
    ngram: int = 13
    """Words in a row that make an overlap with an evaluation; a Chinese character is a word."""
    overwrite: bool = False
    """Replace what is at output_path."""

    def problems(self) -> list[Problem]:
        found = super().problems() + missing(self, "data_path", "output_path") + too_small(self, min_chars=0)
        if self.near_duplicates and not 0.3 <= self.near_duplicates <= 1:
            found.append(("--near_duplicates", f"{self.near_duplicates} is neither 0 nor between 0.3 and 1"))
        if self.max_chars < 0 or 0 < self.max_chars < self.min_chars:
            found.append(("--max_chars", f"{self.max_chars} leaves no record; use 0, or more than --min_chars"))
        if self.ngram < 5:
            found.append(("--ngram", f"{self.ngram} words in a row stand in any text; use 5 or more"))
        return found


def clean_data(options: CleanOptions) -> None:
    """Clean as the options say."""
    from onecard.console import say
    from onecard.curation.clean.run import DATA_FILE, CleanSettings, clean
    from onecard.data.sources import Source, source_of

    evaluation = None
    if options.evaluation_path:
        paths = options.evaluation_path
        evaluation = Source(tuple([paths] if isinstance(paths, str) else paths), column_names(options.columns) or ())
    settings = CleanSettings(
        source_of(options),
        options.fix_encoding,
        tuple(comma_list(options.languages)),
        options.min_chars,
        options.max_chars,
        options.near_duplicates,
        options.compare,
        evaluation,
        options.ngram,
    )
    clean(settings, Path(options.output_path), overwrite=options.overwrite)
    say(f"the records that stay: {Path(options.output_path) / DATA_FILE}")
