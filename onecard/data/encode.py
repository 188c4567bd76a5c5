"""Samples to token ids and labels: what is learned, what is cut, what is dropped and why.

Knows masks and truncation. Does not know files, caches (dataset.py), batches or models.

The rule that everything here serves: the ids of a training sample up to an answer are the ids that generation feeds
the model before that answer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

from onecard.data.chat_template import Segment, Template
from onecard.data.columns import Columns
from onecard.data.formats import ParsedRecord, to_sample
from onecard.data.messages import Conversation, Document, Turn
from onecard.data.thoughts import empty_thought, split_thought
from onecard.data.tokenization import any_of, control_tokens, segment_tokenizer
from onecard.errors import DataError

IGNORE_INDEX = -100
NO_THOUGHT = "none of its answers that are to be learned has a thought (--thinking keep)"
TrainOn = Literal["all", "last", "everything"]
Thinking = Literal["auto", "keep", "drop"]
Sample = Conversation | Document


@dataclass(slots=True)
class LabelledSample:
    """One training sample: input_ids (seq,), labels (seq,) with IGNORE_INDEX where nothing is learned.

    group: the number of the conversation it came from; samples of a group go to the same side of a split.
    cut: whether turns or the end of an answer were cut off to fit.
    starts: where further texts begin that must not see the ones before them; empty where there is one.
    weights: (seq,), what the loss of each token is multiplied by; empty where all weigh 1.
    fields: JSON of what else an encoder keeps of the record (prompts.py).
    """

    input_ids: list[int]
    labels: list[int]
    record: str
    group: int
    cut: bool = False
    weights: list[float] = field(default_factory=list)
    fields: str = ""
    starts: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DroppedSample:
    """A sample that teaches nothing. `bad`: the record itself is at fault, not the length limit."""

    reason: str
    bad: bool = False


@dataclass(frozen=True)
class EncodeSettings:
    """cutoff_len: longest sample in tokens. strict: a bad record ends the run. thinking: which thoughts are learned."""

    cutoff_len: int
    train_on: TrainOn = "all"
    strict: bool = False
    thinking: Thinking = "auto"


class EncodedSample(NamedTuple):
    """ids with the half-open ranges [start, end) that are learned, flat: [s0, e0, s1, e1, ...].

    weights: one for each range; empty where all are 1. n_characters: of a text that is learned whole, else 0.
    """

    ids: list[int]
    spans: list[int]
    cut: bool = False
    weights: Sequence[float] = ()
    fields: str = ""
    n_characters: int = 0


class SamplePlan(NamedTuple):
    """A sample before tokenisation. learn_last: only the last answer is learned, the others are its history."""

    turns: tuple[Turn, ...]
    segments: list[Segment]
    learn_last: bool
    fields: str = ""


class Prompt(NamedTuple):
    """What generation feeds the model, and how the text of the answer begins behind it.

    continues: a space that the answer begins with is its own, and no habit of the tokenizer's at the beginning of a
    text. lead: what the template writes before an answer; the model writes it too, and it is not shown.
    """

    ids: list[int]
    continues: bool = False
    lead: str = ""


def encode_prompt(turns: Sequence[Turn], template: Template, tokenizer: Any) -> list[int]:
    """What generation feeds the model for the next answer; ends with the template's generation prompt."""
    return segment_tokenizer(template, tokenizer).prompt_ids(tuple(turns))


def prompt_for(turns: Sequence[Turn], template: Template, tokenizer: Any) -> Prompt:
    """`encode_prompt`, with what reading the answer takes."""
    return read_prompt(encode_prompt(turns, template, tokenizer), template, tokenizer)


def read_prompt(ids: list[int], template: Template, tokenizer: Any) -> Prompt:
    """A prompt of these ids, with what reading the answer takes."""
    tokens = segment_tokenizer(template, tokenizer)
    lead = tokens.writer.lead
    lead = lead.removeprefix(empty_thought(lead))  # the model may well have a thought where the template has none
    control = any_of(control_tokens(template, tokenizer)) if lead else None
    return Prompt(ids, tokens.continues(ids), control.sub("", lead) if control else lead)


def encode_sample(
    sample: Sample,
    template: Template,
    tokenizer: Any,
    settings: EncodeSettings,
    *,
    group: int = 0,
    encoder: type[Encoder] | None = None,
) -> list[LabelledSample] | DroppedSample:
    """The training samples one record gives: one, or several for long documents and templates that rewrite history.

    chatml, [user "Hi", assistant "Hello"], with <|im_start|>=1, <|im_end|>=2:
        input_ids  1 user \\n Hi 2 \\n 1 assistant \\n Hello 2
        labels     -  -    -  -  - -  -  -         -  Hello 2        (- is IGNORE_INDEX)

    Raises DataError for a bad record when settings.strict.
    """
    result = (encoder or Encoder)(template, tokenizer, settings).encode_many([sample])[0]
    if isinstance(result, DroppedSample):
        if result.bad and settings.strict:
            raise DataError(f"{sample.record}: {result.reason}")
        return result
    return [to_encoded(coded, sample.record, group) for coded in result]


def to_encoded(coded: EncodedSample, record: str, group: int) -> LabelledSample:
    """Spans to labels: ids [5, 6, 7, 8], spans [2, 4] -> labels [-100, -100, 7, 8]; their weights to tokens."""
    labels = [IGNORE_INDEX] * len(coded.ids)
    spans = list(zip(coded.spans[::2], coded.spans[1::2], strict=True))
    for start, end in spans:
        labels[start:end] = coded.ids[start:end]
    weights = [1.0] * len(coded.ids) if coded.weights else []
    for (start, end), weight in zip(spans, coded.weights, strict=bool(coded.weights)):
        weights[start:end] = [weight] * (end - start)
    return LabelledSample(coded.ids, labels, record, group, coded.cut, weights, coded.fields)


class Encoder:
    """Encodes many samples with one tokenizer call; bound to template, tokenizer and settings."""

    untrue_notes: ClassVar[frozenset[str]] = frozenset()
    """What readers note of records and does not hold for what this encoder learns of them."""
    cuts: ClassVar[bool] = True
    """Whether rows are kept within cutoff_len."""

    def __init__(self, template: Template, tokenizer: Any, settings: EncodeSettings) -> None:
        self.tokens = segment_tokenizer(template, tokenizer)
        self.writer = self.tokens.writer
        self.settings = settings
        self._control = any_of(control_tokens(template, tokenizer))
        self._stops = any_of(template.stop_strings(tokenizer))

    @staticmethod
    def reads(value: Any, record: str, columns: Columns = ()) -> ParsedRecord:
        """What a record means. Raises UnusableRecord."""
        return to_sample(value, record, columns)

    def encode_many(self, samples: Sequence[Sample]) -> list[list[EncodedSample] | DroppedSample]:
        """One result per sample, in order: a list of coded samples, or why there is none."""
        return self.code([self.plan(sample) for sample in samples])

    def plan(self, sample: Sample) -> list[SamplePlan] | DroppedSample:
        """How a sample will be written, or why it cannot be used. No tokenising yet."""
        if isinstance(sample, Document):
            bad = self._fault(sample.text, self._control)
            text = Segment(sample.text, is_answer=True)
            return DroppedSample(bad, bad=True) if bad else [SamplePlan((), [text], learn_last=False)]
        if bad := self._fault_of(sample.turns):
            return DroppedSample(bad, bad=True)
        if not sample.turns or sample.turns[-1].role != "assistant":
            return DroppedSample("the conversation does not end with an answer", bad=True)
        all_turns = turns = self._with_thinking(sample.turns)
        while turns and not _is_to_learn(turns[-1]):
            turns = turns[:-1]
        if not turns:
            is_marked = not any(map(_is_to_learn, sample.turns))
            return DroppedSample("the record marks all its answers as not to be learned" if is_marked else NO_THOUGHT)
        try:
            # What follows the last answer to learn would only take room.
            return self._drafts(all_turns if self.settings.train_on == "everything" else turns)
        except DataError as reason:
            return DroppedSample(str(reason), bad=True)

    def _with_thinking(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """The turns as they are (auto), without thoughts (drop), or with only answers learned that have one (keep)."""
        if self.settings.thinking == "auto":
            return turns
        opened = self.writer.opened_thought
        found = []
        for turn in turns:
            thought, answer = split_thought(turn.content, opened)
            if turn.role != "assistant":
                pass
            elif self.settings.thinking == "drop":
                turn = replace(turn, content=answer, thought="")
            elif not (thought or turn.thought):
                turn = replace(turn, learn=False)
            found.append(turn)
        return tuple(found)

    def code(self, plans: Sequence[list[SamplePlan] | DroppedSample]) -> list[list[EncodedSample] | DroppedSample]:
        """Tokenise all planned segments in one call and put the samples together."""
        return self.assemble(plans, self.tokens.ids(segments_of(plans)))

    def assemble(
        self, plans: Sequence[list[SamplePlan] | DroppedSample], ids_of_drafts: Sequence[list[list[int]]]
    ) -> list[list[EncodedSample] | DroppedSample]:
        """The samples of each plan, out of the ids of `segments_of(plans)`; too long ones are shortened."""
        ids = iter(ids_of_drafts)
        return [plan if isinstance(plan, DroppedSample) else self._assemble(plan, ids) for plan in plans]

    def _assemble(self, plan: list[SamplePlan], ids: Iterator[list[list[int]]]) -> list[EncodedSample] | DroppedSample:
        coded: list[EncodedSample] = []
        reason = DroppedSample("nothing to learn")
        for draft in plan:
            fitted = self._fit(draft, next(ids))
            if isinstance(fitted, DroppedSample):
                reason = fitted
            else:
                coded += fitted
        return coded or reason

    def _drafts(self, turns: tuple[Turn, ...]) -> list[SamplePlan]:
        if self.settings.train_on == "last":
            return [self._draft(turns)]
        if whole := self._whole(turns):
            return [whole]
        return [self._draft(turns[: k + 1]) for k, turn in enumerate(turns) if _is_to_learn(turn)]

    def _draft(self, turns: tuple[Turn, ...]) -> SamplePlan:
        """The turns with their last answer to learn."""
        return SamplePlan(turns, _marked(self.writer.prompt_and_answer(turns), turns), learn_last=True)

    def _whole(self, turns: tuple[Turn, ...]) -> SamplePlan | None:
        """The turns with all their answers to learn; None where the template rewrites history."""
        whole = self.writer.cut(turns)
        return None if whole is None else SamplePlan(turns, _marked(_without_tail(whole), turns), learn_last=False)

    def _fit(self, draft: SamplePlan, ids: list[list[int]]) -> list[EncodedSample] | DroppedSample:
        """The sample, shortened where it is longer than cutoff_len."""
        if not draft.turns:
            return self._chunks(ids[0])
        coded = self._join(draft, ids)
        if len(coded.ids) > self.settings.cutoff_len:
            return self._shorten(draft)
        return [coded] if coded.spans else DroppedSample("nothing to learn")

    def _join(self, draft: SamplePlan, ids: Sequence[list[int]], *, cut: bool = False) -> EncodedSample:
        """Segments [prompt, answer] with ids [[5, 6], [7, 8]] and BOS 1 -> ids [1, 5, 6, 7, 8], spans [3, 5]."""
        joined = list(self.tokens.beginning_of(draft.segments[0].text))
        learn_all = self.settings.train_on == "everything"
        spans = [0, len(joined)] if learn_all and joined else []
        weights = [1.0] * (len(spans) // 2)
        for number, (segment, piece) in enumerate(zip(draft.segments, ids, strict=True), start=1):
            is_wanted = learn_all or (segment.is_answer and (not draft.learn_last or number == len(ids)))
            if is_wanted and segment.learn and piece:
                if learn_all and spans[-1:] == [len(joined)] and weights[-1] == segment.weight:
                    spans[-1] += len(piece)
                else:
                    spans += [len(joined), len(joined) + len(piece)]
                    weights.append(segment.weight)
            joined += piece
        spans = _learnable(spans)
        # One range fewer where nothing but the first token was in it.
        weights = weights[len(weights) - len(spans) // 2 :]
        return EncodedSample(joined, spans, cut, weights if any(weight != 1 for weight in weights) else ())

    def _shorten(self, draft: SamplePlan) -> list[EncodedSample] | DroppedSample:
        """Whole oldest exchanges go first, the system turn stays; then the end of the last answer goes."""
        head, starts = exchanges(draft.turns)

        @cache
        def beginning_at(start: int) -> EncodedSample:
            turns = (*head, *draft.turns[start:])
            shorter = (None if draft.learn_last else self._whole(turns)) or self._draft(turns)
            return self._join(shorter, self.tokens.ids([shorter.segments])[0], cut=True)

        # The shorter the history the shorter the sample.
        limit = self.settings.cutoff_len
        at = bisect_left(starts, True, lo=1, key=lambda start: len(beginning_at(start).ids) <= limit)
        return [beginning_at(starts[at])] if at < len(starts) else self._cut_answer(draft)

    def last_exchange(self, draft: SamplePlan) -> tuple[EncodedSample, list[int]]:
        """The last exchange alone, without an end token, and the ids of its answer."""
        head, starts = exchanges(draft.turns)
        last = self._draft((*head, *draft.turns[starts[-1] :]))
        open_ended = last._replace(segments=[*last.segments[:-1], last.segments[-1]._replace(end="")])
        ids = self.tokens.ids([open_ended.segments])[0]
        return self._join(open_ended, ids, cut=True), ids[-1]

    def _cut_answer(self, draft: SamplePlan) -> list[EncodedSample] | DroppedSample:
        """The last answer cut to what fits, without an end token: the model must not learn to stop there."""
        limit = self.settings.cutoff_len
        coded, answer = self.last_exchange(draft)
        if len(coded.ids) - len(answer) >= limit:
            # Kept in the cache, which programs read that were started otherwise: so no whole command.
            return DroppedSample(f"the question alone takes all {limit} tokens of a sample (finetune --cutoff_len)")
        spans = [min(place, limit) for place in coded.spans]
        return [coded._replace(ids=coded.ids[:limit], spans=spans)] if spans else DroppedSample("nothing to learn")

    def _chunks(self, ids: list[int]) -> list[EncodedSample] | DroppedSample:
        """A document, in pieces of cutoff_len tokens that each begin as `tokenizer(text)` does; the last ends with eos.

        ids [5, 6, 7, 8, 9], BOS 1, eos 2, cutoff_len 4 -> [1, 5, 6, 7], [1, 8, 9, 2]
        """
        chunk_len = self.settings.cutoff_len - len(self.tokens.beginning)
        if not ids:
            return DroppedSample("the text is empty")
        pieces = [ids[start : start + chunk_len] for start in range(0, len(ids), chunk_len)]
        if self.tokens.eos_id is not None and len(pieces[-1]) < chunk_len:
            # Where eos would stand alone in a piece it is left out: that would teach to stop before beginning.
            pieces[-1] = [*pieces[-1], self.tokens.eos_id]
        begun = [[*self.tokens.beginning, *piece] for piece in pieces]
        coded = [EncodedSample(piece, _learnable([0, len(piece)])) for piece in begun]
        return [piece for piece in coded if piece.spans] or DroppedSample("nothing to learn")

    def _fault_of(self, turns: Sequence[Turn]) -> str:
        """What in the turns would end or steer an answer; empty where nothing does."""
        for turn in turns:
            searched = [(text, self._control) for text in turn.all_texts()]
            searched += [(turn.content, self._stops)] if turn.role == "assistant" else []
            if bad := next(filter(None, (self._fault(*each) for each in searched)), ""):
                return bad
        return ""

    def _fault(self, text: str, pattern: Any) -> str:
        found = pattern.search(text) if pattern is not None else None
        if found is None:
            return ""
        return f"holds the text {found.group()!r}, which ends or steers an answer; learning it would teach a false stop"


def segments_of(plans: Sequence[list[SamplePlan] | DroppedSample]) -> list[list[Segment]]:
    """The segments of every draft of the plans, in order."""
    return [draft.segments for plan in plans if not isinstance(plan, DroppedSample) for draft in plan]


def exchanges(turns: tuple[Turn, ...]) -> tuple[list[Turn], list[int]]:
    """The turns that stand before all exchanges, and where each exchange begins."""
    head = [turn for turn in turns[:2] if turn.role in ("system", "tool_list")]
    return head, [k for k, turn in enumerate(turns) if turn.role == "user"] or [len(head)]


def _is_to_learn(turn: Turn) -> bool:
    return turn.role == "assistant" and turn.learn


def _marked(segments: list[Segment], turns: Sequence[Turn]) -> list[Segment]:
    """The segments of these turns; answers that the data mark so are not learned, or weigh more or less."""
    if all(turn.learn and turn.weight == 1 for turn in turns):
        return segments
    marks: list[dict[str, Any]] = [
        {"learn": turn.learn, "weight": turn.weight} for turn in turns if turn.role == "assistant"
    ]
    if len(marks) != sum(segment.is_answer for segment in segments):
        # A history that cannot be cut at its answers, and one of them is in it.
        return [*(segment._replace(learn=False) for segment in segments[:-1]), segments[-1]._replace(**marks[-1])]
    each = iter(marks)
    return [segment._replace(**next(each)) if segment.is_answer else segment for segment in segments]


def _without_tail(segments: list[Segment]) -> list[Segment]:
    """What follows the last answer's end (a newline) belongs to a next prompt; here there is none."""
    return segments[:-1] if not segments[-1].is_answer else segments


def _learnable(spans: list[int]) -> list[int]:
    """The first token is predicted from nothing, so it is never learned: [0, 3] -> [1, 3]; [0, 1] -> []."""
    if spans[:1] != [0]:
        return spans
    return [1, *spans[1:]] if spans[1] > 1 else spans[2:]
