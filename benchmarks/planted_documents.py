"""200 invented documents, half of them Chinese, and questions whose source is known; others have none.

The same seed gives the same files. Half of the questions are for calibrating, half for measuring.
"""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

N_OF_EACH_KIND = 18
N_OF_EACH_PARAPHRASE = 2
LANGUAGES = ("en", "zh")
ANSWERED = ("questions", "paraphrases")
UNANSWERED = (
    "elsewhere", "elsewhere_later", "unknown_names", "unknown_names_later", "unknown_names_held_out",
    "general_held_out",
)  # fmt: skip


class PlantedQuestion(NamedTuple):
    """A question and the name of the only document that answers it; "" for none."""

    text: str
    source: str


class PlantedSet(NamedTuple):
    """Texts by the name of their file; 100 questions and 20 from elsewhere; as many others to calibrate with.

    unknown_names: what the documents tell of some things, asked of one that is not in them; 6. later: 20 from elsewhere
    and 20 of unknown names more, written once the threshold was decided. held_out: written before the check of unknown
    names (`onecard.documents.search`) was: 40 of these, 20 of the same fields in general, and paraphrases: 100 that the
    documents answer, in other words than all the others.
    """

    files: dict[str, str]
    questions: list[PlantedQuestion]
    elsewhere: list[PlantedQuestion]
    unknown_names: list[PlantedQuestion]
    calibration: list[PlantedQuestion]
    elsewhere_later: list[PlantedQuestion]
    unknown_names_later: list[PlantedQuestion]
    paraphrases: list[PlantedQuestion]
    unknown_names_held_out: list[PlantedQuestion]
    general_held_out: list[PlantedQuestion]


def planted(seed: int = 0) -> PlantedSet:
    """All documents and questions."""
    draw, draw_paraphrases = random.Random(seed), random.Random(f"{seed} paraphrases")
    found = PlantedSet({}, *([] for _ in PlantedSet._fields[1:]))
    text = Path(__file__).with_name("planted_documents.yaml").read_text(encoding="utf-8")
    for language, parts in yaml.safe_load(text).items():
        asked, paraphrased = _generated(draw, language, parts, found.files)
        draw.shuffle(asked)
        for same_words in paraphrased:
            found.paraphrases.extend(draw_paraphrases.sample(same_words, N_OF_EACH_PARAPHRASE))
        for number, (title, body, question) in enumerate(parts["handwritten"]):
            name = f"{language}/handbook-{number}.md"
            found.files[name] = f"# {title}\n\n{body}\n"
            found.questions.append(PlantedQuestion(question, name))
        n = 50 - len(parts["handwritten"])
        found.questions.extend(asked[:n])
        found.calibration.extend(asked[n : n + 50])
        for name in UNANSWERED:
            getattr(found, name).extend(PlantedQuestion(each, "") for each in parts[name])
        found.calibration.extend(PlantedQuestion(each, "") for each in parts["elsewhere_calibration"])
    return found


def write(files: dict[str, str], folder: Path) -> None:
    """Write the documents."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _generated(
    draw: random.Random, language: str, parts: dict[str, Any], files: dict[str, str]
) -> tuple[list[PlantedQuestion], list[list[PlantedQuestion]]]:
    """Documents of each kind into `files`; a question for every fact, and those of each paraphrase."""
    asked, paraphrased = [], []
    names = [a + b for a, b in product(parts["names"], parts["endings"])]
    for kind, about in parts["kinds"].items():
        of_kind: list[list[PlantedQuestion]] = [[] for _ in about["paraphrases"]]
        for number, name in enumerate(draw.sample(names, N_OF_EACH_KIND)):
            entity = about["noun"].format(n=name)
            file = f"{language}/{kind}-{number}.{('md', 'txt')[number % 2]}"
            sentences = []
            for sentence, question, *values in about["facts"]:
                value = _value(draw, values)
                sentences.append(sentence.format(v=value, p=draw.choice(parts["people"])))
                asked.append(PlantedQuestion(question.format(e=entity), file))
            for same_words, question in zip(of_kind, about["paraphrases"], strict=True):
                same_words.append(PlantedQuestion(question.format(e=entity), file))
            sentences += draw.sample(parts["filler"], 2)
            draw.shuffle(sentences)
            title = entity[0].upper() + entity[1:]
            blank = " " if language == "en" else ""
            lead = f"{title}: " if language == "en" else f"{title}："
            body = lead + blank.join(sentences[:4]) + "\n\n" + blank.join(sentences[4:])
            files[file] = f"# {title}\n\n{body}\n" if file.endswith(".md") else f"{body}\n"
        paraphrased += of_kind
    return asked, paraphrased


def _value(draw: random.Random, values: list[Any]) -> Any:
    if isinstance(values[0], int):
        return draw.randint(values[0], values[1])
    return draw.choice(values[0]) if values[0] else ""
