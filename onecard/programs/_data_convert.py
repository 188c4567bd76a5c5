"""The verbs of `onecard data` that make training data of other files: documents, cot and extraction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onecard.config.parsing import comma_list, missing
from onecard.config.problems import Problem, too_small


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


def convert_data(options: ConvertOptions) -> None:
    """Convert as the options say."""
    from onecard.curation.convert import convert_cot, convert_documents, convert_extraction
    from onecard.data.sources import Source

    target, paths = Path(options.output_path), options.paths()
    if isinstance(options, CotOptions):
        convert_cot(paths, target, options.seed, as_thought=options.as_thought, overwrite=options.overwrite)
    elif isinstance(options, ExtractionOptions):
        source, types = Source(tuple(map(str, paths))), tuple(comma_list(options.types))
        convert_extraction(source, target, types, options.types_per_row, back=options.back, overwrite=options.overwrite)
    else:
        convert_documents(paths, target, overwrite=options.overwrite)
