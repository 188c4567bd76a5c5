"""Multiple choice, asked of a model: by the likelihood of the letters, a constrained choice, or a free answer.

A prompt is plain text, as for base models, or a conversation in the model's chat template; examples (few shots) stand
in front of either. Plain prompts have the form of lm-evaluation-harness, so that figures can be compared.

Knows prompts and scores. Does not know files (suites.py, submissions.py) or how answers are stored (run.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from onecard.config.inference import SamplingOptions
from onecard.data.encode import DroppedSample, Encoder, EncodeSettings, prompt_for
from onecard.data.messages import Conversation, Turn
from onecard.data.special_tokens import beginning_ids
from onecard.errors import ConfigError
from onecard.evaluate.letters import letters_in
from onecard.evaluate.likelihood import option_log_probs, shared_length
from onecard.evaluate.measures import Measure, share
from onecard.evaluate.questions import ChoiceQuestion, ChoiceSuite
from onecard.evaluate.submissions import submissions
from onecard.inference.batch.run import answer_safely
from onecard.inference.call import ModelBundle, PromptRow
from onecard.inference.generate import longest_sequence

Method = Literal["likelihood", "choice", "free"]
UNLIMITED = 2**20  # tokens, where the model's config sets no limit
_TOO_LONG = "the question is longer than the model can read"

_HEADERS = {
    "ceval": "以下是中国关于{title}的单项选择题，请选出其中的正确答案。",
    "cmmlu": "以下是关于{title}的单项选择题，请直接给出正确答案的选项。",
    "mmlu": "The following are multiple choice questions (with answers) about {title}.",
    "mmcu": "下面是选择题，请选出所有正确的选项。",
    "gaokao": "下面是高考题，请选出每一小题所有正确的选项。",
}
_CUES = {"zh": ("答案：", "解析："), "en": ("Answer:", "Explanation:")}
_PART = {"zh": "第 {0} 小题（共 {1} 小题）的", "en": "Part {0} of {1}. "}
_ASKS = {
    "zh": ("请只写出正确选项的字母。", "请先一步一步分析，最后另起一行写出“答案：”和正确选项的字母。"),
    "en": ("Answer with the letter only.", 'Think step by step, then write "Answer:" and the letter on a last line.'),
}


@dataclass(frozen=True)
class ChoiceSettings:
    """How questions are asked. is_chat: in the chat template, else as plain text. shots: examples in front."""

    method: Method = "likelihood"
    is_chat: bool = False
    shots: int = 0
    cot: bool = False
    max_new_tokens: int = 0  # 0: 16, and 512 with a chain of thought
    seed: int = 42

    @property
    def answer_tokens(self) -> int:
        """Tokens that an answer may take."""
        return (self.max_new_tokens or (512 if self.cot else 16)) if self.method == "free" else 8


class ChoiceTask:
    """A benchmark and how it is asked; `work` answers some of its questions, `report` sums up all answers."""

    kind = "choice"

    def __init__(self, suite: ChoiceSuite, settings: ChoiceSettings) -> None:
        self.suite, self.settings = suite, settings
        self.name = f"{suite.kind}/{suite.split}"
        self.items = suite.questions
        self._examples = dict(suite.examples)
        if settings.shots and not any(suite.examples.values()):
            self._take_examples(settings.shots)
        self.questions = {question.key: question for question in self.items}
        if settings.cot and settings.shots and not all(q.explanation for qs in self._examples.values() for q in qs):
            raise ConfigError(
                "--shots", f"the examples of {suite.path} have no explanation that --cot could show; use 0"
            )

    def _take_examples(self, shots: int) -> None:
        """Without a split of examples: some questions of each subject, drawn by the seed, are shown and not asked."""
        by_subject: dict[str, list[ChoiceQuestion]] = {}
        for question in self.items:
            if question.answer and question.part[1] == 1:
                by_subject.setdefault(question.subject, []).append(question)
        for subject, questions in by_subject.items():
            drawn = random.Random(f"{self.settings.seed} {subject}").sample(questions, min(shots, len(questions) - 1))
            self._examples[subject] = tuple(drawn)
        shown = {question.key for questions in self._examples.values() for question in questions}
        self.items = tuple(question for question in self.items if question.key not in shown)

    def depends_on(self) -> dict[str, Any]:
        """What the answers depend on, besides the model."""
        return {"digest": self.suite.digest, "split": self.suite.split, **vars(self.settings)}

    def work(self, bundle: ModelBundle, questions: Sequence[ChoiceQuestion]) -> list[dict[str, Any]]:
        """One row for each question, in order."""
        prompts = ChoicePrompts(self.suite, self.settings, self._examples, bundle)
        if self.settings.method == "free":
            return self._free(bundle, prompts, questions)
        asked = [prompts.options(question) for question in questions]
        known = [one for one in asked if one is not None]
        scored = option_log_probs(bundle.model, [one.ids for one in known], [one.n_prompt for one in known])
        rows, values = [], iter(scored)
        for question, one in zip(questions, asked, strict=True):
            if one is None:
                rows.append(self._row(question, "", 0, problem=_TOO_LONG))
                continue
            each = next(values)
            sums = {name: sum(tokens) for name, tokens in zip(one.names, each, strict=True)}
            if self.settings.method == "choice":
                got = constrained_choice(one, each)
            else:
                got = max(one.names, key=sums.__getitem__)
            rows.append(self._row(question, got, one.shots, log_probs=sums))
        return rows

    def _free(
        self, bundle: ModelBundle, prompts: ChoicePrompts, questions: Sequence[ChoiceQuestion]
    ) -> list[dict[str, Any]]:
        stop = [] if self.settings.is_chat else ["\n\n"] if self.settings.cot else ["\n"]
        sampling = SamplingOptions(max_new_tokens=self.settings.answer_tokens, stop=stop)
        asked = [prompts.row(question, number) for number, question in enumerate(questions)]
        answers = iter(answer_safely(bundle, [row for row, _ in asked if row is not None], sampling))
        rows = []
        for question, (row, shots) in zip(questions, asked, strict=True):
            if row is None:
                rows.append(self._row(question, "", 0, problem=_TOO_LONG))
                continue
            text = next(answers).text
            got = letters_in(text, question.letters, question.options, is_multiple=question.is_multiple)
            rows.append(self._row(question, got, shots, answer=text))
        return rows

    def _row(self, question: ChoiceQuestion, got: str, shots: int, **more: Any) -> dict[str, Any]:
        log_probs = more.get("log_probs")
        row = {"key": question.key, "got": got, "score": self._score(question, got), "shots": shots, **more}
        if log_probs and question.answer:
            others = [value for name, value in log_probs.items() if name != question.answer]
            row["margin"] = log_probs[question.answer] - max(others)
        return row

    def _score(self, question: ChoiceQuestion, got: str) -> float | None:
        """1 or 0; GAOKAO gives half for a part of several right letters with no wrong one; None: nobody told."""
        if not question.answer:
            return None
        is_part = self.suite.kind == "gaokao" and got and set(got) < set(question.answer)
        return 0.5 if is_part else float(got == question.answer)

    def report(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Accuracy in total, by category and by subject; what could not be read; the worst questions first."""
        scored = [row for row in rows if row["score"] is not None]
        measures = [self._measure("total", "", scored)]
        categories: dict[str, list[dict[str, Any]]] = {}
        subjects: dict[str, list[dict[str, Any]]] = {}
        for row in scored:
            subject = self.questions[row["key"]].subject
            subjects.setdefault(subject, []).append(row)
            for category in self.suite.categories.get(subject, ()):
                categories.setdefault(category, []).append(row)
        measures += [self._measure("category", name, some) for name, some in categories.items()]
        measures += [self._measure("subject", name, some) for name, some in subjects.items()]
        if subjects:
            each = [sum(row["score"] == 1 for row in some) / len(some) for some in subjects.values()]
            measures[0].values["mean_of_subjects"] = sum(each) / len(each)
        return {
            "settings": self._settings(rows),
            "measures": [measure.plain() for measure in measures],
            "worst": [self._shown(row) for row in sorted(scored, key=_badness) if row["score"] < 1],
            "notes": self._notes(rows),
        }

    def _measure(self, group: str, name: str, rows: Sequence[dict[str, Any]]) -> Measure:
        values: dict[str, Any] = {"accuracy": share(sum(row["score"] == 1 for row in rows), len(rows))}
        values["unparsed"] = sum(not row["got"] for row in rows)
        if self.suite.kind == "gaokao":
            points = [self.questions[row["key"]].points for row in rows]
            got = sum(row["score"] * worth for row, worth in zip(rows, points, strict=True))
            values["points_share"] = got / sum(points) if rows else 0.0
        return Measure(group, name, len(rows), values)

    def _settings(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        shots = sorted({row["shots"] for row in rows})
        return {
            "path": self.suite.path.name,
            "split": self.suite.split,
            "method": "free_cot" if self.settings.cot else self.settings.method,
            "prompt": "chat_template" if self.settings.is_chat else "base_prompt",
            "shots": ", ".join(map(str, shots)),
            "digest": self.suite.digest[:16],
        }

    def _notes(self, rows: Sequence[dict[str, Any]]) -> dict[str, int]:
        return {
            "untold": sum(row["score"] is None for row in rows),
            "fewer_shots": sum(row["shots"] < self.settings.shots for row in rows),
            "too_long": sum("problem" in row for row in rows),
        }

    def _shown(self, row: dict[str, Any]) -> dict[str, Any]:
        question = self.questions[row["key"]]
        got = row["got"] or row.get("answer") or row.get("problem") or ""
        return {"key": row["key"], "question": question.text, "expected": question.answer, "got": got}

    def submissions(self, rows: Sequence[dict[str, Any]], model: str) -> dict[str, str]:
        """The files that the benchmark's authors ask for, by name."""
        return submissions(self.suite, self.name, rows, model)


def _badness(row: dict[str, Any]) -> tuple[float, float, str]:
    return row["score"], row.get("margin", 0.0), row["key"]


@dataclass(frozen=True)
class OptionTexts:
    """The options of a question as token ids, prompt included, and what each of them stands for."""

    names: tuple[str, ...]
    ids: tuple[list[int], ...]
    n_prompt: int
    shots: int = 0


class ChoicePrompts:
    """Prompts of a benchmark for one model."""

    def __init__(
        self,
        suite: ChoiceSuite,
        settings: ChoiceSettings,
        examples: dict[str, tuple[ChoiceQuestion, ...]],
        bundle: ModelBundle,
    ) -> None:
        self._suite, self._settings, self._examples, self._bundle = suite, settings, examples, bundle
        self._limit = longest_sequence(bundle.model) or UNLIMITED
        self._beginning = beginning_ids(bundle.tokenizer)
        self._encoder = Encoder(bundle.template, bundle.tokenizer, EncodeSettings(UNLIMITED, train_on="last"))

    def options(self, question: ChoiceQuestion) -> OptionTexts | None:
        """What is scored, with as many examples as fit; None where not even the question fits."""
        names = option_names(question)
        for shots in self._shots(question):
            if self._settings.is_chat:
                prompt, *ids = self._chat_options(question, shots, names)
            else:
                text, end = self.plain(question, shots), "\n" if question.is_multiple else ""
                prompt, *ids = self._ids([text, *(f"{text} {name}{end}" for name in names)])
            if max(map(len, ids)) <= self._limit:
                ids = ids if question.is_multiple else without_shared_end(ids)
                return OptionTexts(names, tuple(ids), shared_length([[*prompt, -1], *ids]), len(shots))
        return None

    def row(self, question: ChoiceQuestion, number: int) -> tuple[PromptRow | None, int]:
        """The row for a free answer, with as many examples as fit, and how many these are."""
        for shots in self._shots(question):
            if self._settings.is_chat:
                prompt = prompt_for(self.turns(question, shots), self._bundle.template, self._bundle.tokenizer)
                row = PromptRow(prompt.ids, self._settings.answer_tokens, number, prompt.continues, prompt.lead)
            else:
                row = PromptRow(self._ids([self.plain(question, shots)])[0], self._settings.answer_tokens, number, True)
            if len(row.ids) + row.max_new_tokens <= self._limit:
                return row, len(shots)
        return None, 0

    def plain(self, question: ChoiceQuestion, shots: Sequence[ChoiceQuestion]) -> str:
        """Header, examples and question with blank lines between them; it ends with the cue of the answer."""
        cue, thought_cue = _CUES[self._suite.language]
        parts = [_HEADERS[self._suite.kind].format(title=self._suite.title(question.subject))]
        for example in shots:
            thought = f"\n{thought_cue}{example.explanation.strip()}" if self._settings.cot else ""
            parts.append(f"{example.text}{thought}\n{self._part(example)}{cue} {example.answer}")
        parts.append(f"{question.text}\n{self._part(question)}{thought_cue if self._settings.cot else cue}")
        return "\n\n".join(parts)

    def turns(self, question: ChoiceQuestion, shots: Sequence[ChoiceQuestion]) -> tuple[Turn, ...]:
        """The same as a conversation: each example is a question and its answer."""
        cue = _CUES[self._suite.language][0]
        header = _HEADERS[self._suite.kind].format(title=self._suite.title(question.subject))
        ask = _ASKS[self._suite.language][self._settings.cot]
        turns: list[Turn] = []
        for example in (*shots, question):
            part = f"\n{self._part(example)}{cue.rstrip(':：')}" if example.part[1] > 1 else ""
            turns.append(Turn("user", f"{'' if turns else header + chr(10) * 2}{example.text}{part}\n\n{ask}"))
            if example is not question:
                thought = f"{example.explanation.strip()}\n{cue}" if self._settings.cot else ""
                turns.append(Turn("assistant", f"{thought}{example.answer}"))
        return tuple(turns)

    def _shots(self, question: ChoiceQuestion) -> Iterator[Sequence[ChoiceQuestion]]:
        """The examples, and then always one fewer."""
        examples = self._examples.get(question.subject, ())[: self._settings.shots]
        return (examples[:n] for n in range(len(examples), -1, -1))

    def _part(self, question: ChoiceQuestion) -> str:
        return _PART[self._suite.language].format(*question.part) if question.part[1] > 1 else ""

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found = self._bundle.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[*self._beginning, *ids] for ids in found]

    def _chat_options(
        self, question: ChoiceQuestion, shots: Sequence[ChoiceQuestion], names: Sequence[str]
    ) -> list[list[int]]:
        """What generation is fed, and each option as the answer that training would learn, with its end."""
        turns = self.turns(question, shots)
        samples = [Conversation((*turns, Turn("assistant", name)), question.key) for name in names]
        found = [prompt_for(turns, self._bundle.template, self._bundle.tokenizer).ids]
        for encoded in self._encoder.encode_many(samples):
            if isinstance(encoded, DroppedSample):
                raise ConfigError("--suite", f"{question.key} cannot be asked in this template: {encoded.reason}")
            found.append(encoded[-1].ids)
        return found


def option_names(question: ChoiceQuestion) -> tuple[str, ...]:
    """The letters; where several may be right, every choice of letters: A, B, AB for two."""
    if not question.is_multiple:
        return tuple(question.letters)
    sizes = range(1, len(question.letters) + 1)
    return tuple("".join(some) for size in sizes for some in combinations(question.letters, size))


def without_shared_end(options: Sequence[list[int]]) -> list[list[int]]:
    """The options without the tokens with which all of them end; at least one behind their common beginning stays."""
    least = shared_length(options) + 1
    most = min(len(ids) - least for ids in options)
    n_end = next((k for k in range(most) if len({ids[-1 - k] for ids in options}) > 1), most)
    return [ids[: len(ids) - n_end] for ids in options]


def constrained_choice(options: OptionTexts, log_probs: Sequence[Sequence[float]]) -> str:
    """What greedy decoding writes that may only write one of the options: token by token, the likeliest allowed one."""
    start = shared_length(options.ids)
    left = list(range(len(options.names)))
    while len(left) > 1:
        ended = [k for k in left if len(options.ids[k]) == start]
        if ended:  # an option that is the beginning of others: nothing tells whether the model would stop
            return options.names[ended[0]]
        best = max(left, key=lambda k: log_probs[k][start - options.n_prompt])
        left = [k for k in left if options.ids[k][start] == options.ids[best][start]]
        start += 1
    return options.names[left[0]]
