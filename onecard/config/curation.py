"""Options of making data: cleaned, split, converted, written by a model. A field's docstring is its help text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onecard.config.data import ReadingOptions
from onecard.config.parsing import missing
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
        found += _similarity_problems(self.near_duplicates)
        if self.max_chars < 0 or 0 < self.max_chars < self.min_chars:
            found.append(("--max_chars", f"{self.max_chars} leaves no record; use 0, or more than --min_chars"))
        if self.ngram < 5:
            found.append(("--ngram", f"{self.ngram} words in a row stand in any text; use 5 or more"))
        return found


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
        found += _similarity_problems(self.near_duplicates)
        if self.validation_size <= 0 or (self.validation_size >= 1 and self.validation_size % 1):
            found.append(("--validation_size", f"{self.validation_size:g} is neither a share (0.05) nor a count (200)"))
        return found


def _similarity_problems(similarity: float) -> list[Problem]:
    is_usable = not similarity or 0.3 <= similarity <= 1
    return [] if is_usable else [("--near_duplicates", f"{similarity} is neither 0 nor between 0.3 and 1")]


@dataclass
class MakeOptions(ReadingOptions):
    """Write new rows with a model: make self-instruct, make qa-from-documents, make think."""

    data_path: str | list[str] = ""
    """Data: files, folders of these, or Hub data sets; one or several."""
    output_path: str = ""
    """Folder for data.jsonl, and for journal.jsonl, by which the same command goes on where it was cut off."""
    base_url: str = "http://127.0.0.1:8000/v1"
    """Address of an OpenAI-compatible endpoint, such as that of onecard serve; it ends before /chat/completions."""
    model: str = ""
    """Name of the model there."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; without one in it none is sent."""
    prompt_language: Literal["en", "zh"] = "en"
    """Language of the prompts, and of what is made."""
    temperature: float = 0.7
    """Temperature of sampling."""
    max_tokens: int = 2048
    """Most tokens of an answer."""
    timeout_s: float = 300.0
    """Seconds until an answer must be whole."""
    max_attempts: int = 6
    """Times that a request is tried where the endpoint is busy, broken or slow."""
    price_prompt: float = 0.0
    """Price of a million tokens of prompts, for the cost."""
    price_completion: float = 0.0
    """Price of a million tokens of answers, for the cost."""

    def problems(self) -> list[Problem]:
        found = super().problems() + missing(self, "data_path", "output_path", "model")
        found += too_small(self, max_tokens=1, max_attempts=1, price_prompt=0, price_completion=0, temperature=0)
        if self.timeout_s <= 0:
            found.append(("--timeout_s", f"{self.timeout_s} leaves no time; use some minutes"))
        return found


@dataclass
class SelfInstructOptions(MakeOptions):
    """Write new instructions after the example of seed tasks."""

    n_rows: int = 100
    """Rows to make, those of earlier starts included."""
    n_per_request: int = 8
    """Tasks that one request asks for."""
    novelty: float = 0.7
    """An instruction stays if its ROUGE-L with every earlier one is below this."""
    seed: int = 42
    """Which examples are shown."""

    def problems(self) -> list[Problem]:
        found = super().problems() + too_small(self, n_rows=1, n_per_request=1)
        if not 0 < self.novelty <= 1:
            found.append(("--novelty", f"{self.novelty} is not between 0 and 1"))
        return found


@dataclass
class QaFromDocumentsOptions(MakeOptions):
    """Write questions with answers out of documents."""

    n_per_passage: int = 5
    """Questions that each passage is asked for."""
    passage_chars: int = 3000
    """Most characters of a passage; documents are cut between paragraphs."""

    def problems(self) -> list[Problem]:
        found = super().problems() + too_small(self, n_per_passage=1)
        if self.passage_chars < 200:
            found.append(("--passage_chars", f"{self.passage_chars} is too short to ask about; use 200 or more"))
        return found


@dataclass
class ThinkOptions(MakeOptions):
    """Write thoughts for rows without; a thought stays where its answer agrees with the row's."""

    n_tries: int = 2
    """Times that a row is asked for until an answer agrees."""

    def problems(self) -> list[Problem]:
        return super().problems() + too_small(self, n_tries=1)


@dataclass
class ConvertOptions:
    """What is read, and where the rows go."""

    data_path: str | list[str] = ""
    """Files, or folders of these; one or several."""
    output_path: str = ""
    """New jsonl file."""
    overwrite: bool = False
    """Replace what is at output_path."""

    def problems(self) -> list[Problem]:
        return missing(self, "data_path", "output_path")

    @property
    def paths(self) -> list[Path]:
        """What is read."""
        return [Path(path) for path in ([self.data_path] if isinstance(self.data_path, str) else self.data_path)]


@dataclass
class DocumentsOptions(ConvertOptions):
    """Turn pdf, docx, html, epub and markdown into texts, one row a document."""


@dataclass
class CotOptions(ConvertOptions):
    """Turn TSV files of question, answer and rationale into instructions in many wordings."""

    seed: int = 42
    """Which wording a row gets."""
    as_thought: bool = False
    """Put the rationale into <think>, and leave the question as it is."""


@dataclass
class ExtractionOptions(ConvertOptions):
    """Turn labelled texts (InstructIE, IEPile) into instructions of information extraction, or back."""

    types: str = ""
    """For InstructIE: the relations of the schema, with commas between; empty: those that a row has."""
    types_per_row: int = 0
    """Types that one instruction asks for; 0: 6 kinds of entities, 4 relations or events, as IEPile has them."""
    back: bool = False
    """Turn instructions and their answers into labelled texts."""

    def problems(self) -> list[Problem]:
        return super().problems() + too_small(self, types_per_row=0)
