"""Is this server the run's model, with its template and its stops? What is asked, and what the answers mean.

Three questions are kept apart by what is compared. The model: raw prompts of the right ids, against what the run
stored. The template: the server's chat against its own raw prompts, so that rounding plays no part; where it differs,
each usual cause is asked as a raw prompt until one answers as the chat does. The stop: where stored answers ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from onecard.data.chat_template import Template
from onecard.serve.verify.causes import prompt_causes
from onecard.serve.verify.check_file import N_TOLD, ServerCheck
from onecard.serve.verify.client import NotOffered, ServerClient
from onecard.serve.verify.reading import AnswerReading, distance, same_text, words_of

SAME_KL = 0.01  # nats per token: what other kernels and 16 bits make of the same weights, and some room
DIFFERENT_KL = 1.0  # beyond it no rounding is to blame: 2-bit kinds of llama.cpp have about half of it
NEARER = 1 / 3  # the base is meant where it is so much nearer than the result
SPARE_TOKENS = 8
REMEDY = "give the server chat_template.jinja of the run"
YES, NO, UNKNOWN = "yes", "no", "unknown"


@dataclass
class ServerFinding:
    """The answer to one question. cause: its short name where the answer is no; words: how it is known, what to do."""

    same: str
    words: str
    cause: str = ""


@dataclass
class ServerReport:
    """What was found, and the numbers behind it: divergences in nats per token, None where nothing could be asked."""

    model: ServerFinding
    template: ServerFinding
    stop: ServerFinding
    kl: float | None = None
    kl_to_base: float | None = None
    kl_chat_to_raw: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> str:
        """The answer to all three; a stop that no stored answer shows does not count."""
        answers = {self.model.same, self.template.same}
        if NO in answers | {self.stop.same}:
            return NO
        return YES if answers == {YES} else UNKNOWN

    def to_json(self) -> dict[str, Any]:
        return {"same": self.same, **asdict(self)}


class ServerComparison:
    """A server and what a run stored; `report` asks it."""

    def __init__(self, client: ServerClient, check: ServerCheck, template: Template, tokenizer: Any,
                 max_kl: float) -> None:  # fmt: skip
        self.client, self.check, self.template, self.tokenizer = client, check, template, tokenizer
        self.max_kl = max_kl
        self.raw_form = "ids"  # how raw prompts are sent: ids, text, or text without the BOS that the server adds

    def report(self) -> ServerReport:
        """Ask, and judge. Raises ServerUnusable."""
        prompts = self.check.prompts
        answers = [one.answer for one in prompts]
        raw = self._raw_of_right_prompts()
        chat = self._chat()
        seen = raw if raw is not None else chat
        if seen is None:
            nothing = ServerFinding(UNKNOWN, "the server offers neither /v1/chat/completions nor /v1/completions")
            return ServerReport(nothing, nothing, nothing)
        kl, own = distance(answers, seen), None if raw is None or chat is None else _worst(raw, chat)
        base = [one.base for one in prompts if one.base is not None]
        kl_base = distance(base, seen) if len(base) == len(prompts) else None
        apart = distance(answers, base) if kl_base is not None else None
        model = _model_finding(kl, kl_base, apart, self.max_kl)
        template = self._template_finding(raw, chat, own, model)
        if raw is None and NO in (model.same, template.same) and not model.cause.startswith("adapter"):
            # Only chats were seen: which of the two is to blame, they do not tell.
            words = f"chats differ from the run's (KL {kl:.3g}); without /v1/completions it shows not why"
            model = ServerFinding(UNKNOWN if template.same == NO else NO, words, "model or template")
        stop = self._stop_finding(chat if model.same != NO else None, exact=kl <= SAME_KL)
        notes = [] if all(one.tops for one in seen) else ["the server tells no log-probabilities: texts were compared"]
        return ServerReport(model, template, stop, kl, kl_base, own, notes)

    def _chat(self) -> list[AnswerReading] | None:
        try:
            return [self.client.chat(one.messages, _wanted(one.answer)) for one in self.check.prompts]
        except NotOffered:
            return None

    def _raw_of_right_prompts(self) -> list[AnswerReading] | None:
        """The answers to the right prompts without a template, in the first form that the server reads them right."""
        first = self.check.prompts[0]
        bos = self.tokenizer.bos_token_id
        forms = ["ids", *(["text without BOS"] if bos is not None and first.ids[:1] == [bos] else []), "text"]
        for form in forms:
            self.raw_form = form
            try:
                asked = self._raw([first.ids])[0]
                if asked.n_prompt in (0, len(first.ids)):
                    return [asked, *self._raw([one.ids for one in self.check.prompts[1:]])]
            except NotOffered:
                continue
        return None

    def _raw(self, prompts: Sequence[list[int]]) -> list[AnswerReading]:
        found = []
        for ids in prompts:
            prompt: list[int] | str = ids
            if self.raw_form != "ids":
                kept = ids[1:] if self.raw_form == "text without BOS" and ids[0] == self.tokenizer.bos_token_id else ids
                prompt = str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            found.append(self.client.complete(prompt, N_TOLD))
        return found

    def _template_finding(
        self, raw: list[AnswerReading] | None, chat: list[AnswerReading] | None, own: float | None,
        model: ServerFinding,
    ) -> ServerFinding:  # fmt: skip
        """Whether conversations become the right prompts, told by /tokenize or seen in the answers."""
        prompts = self.check.prompts
        server_ids = [self.client.prompt_ids(one.messages) for one in prompts]
        if all(server_ids):
            if server_ids == [one.ids for one in prompts]:
                return ServerFinding(YES, f"/tokenize gives the run's ids for {len(prompts)} conversations")
            for cause in self._causes():
                if server_ids == cause.ids:
                    return ServerFinding(NO, f"{cause.words} (/tokenize gives just these ids)", cause.name)
            k = next(k for k, one in enumerate(prompts) if server_ids[k] != one.ids)
            begins = self.tokenizer.decode(server_ids[k] or [], skip_special_tokens=False)[:120]
            words = f"the server feeds its model another prompt, which begins {begins!r}"
            return ServerFinding(NO, f"{words}; {REMEDY}", "wrong template")
        if chat is None:
            return ServerFinding(UNKNOWN, "the server has no /v1/chat/completions")
        if raw is None or own is None:
            words = (
                "chats are answered as the run does" if model.same == YES else "without /v1/completions it shows not"
            )
            return ServerFinding(YES if model.same == YES else UNKNOWN, words)
        counted = all(one.n_prompt for one in raw)
        lengths = [one.n_prompt for one in chat] if counted and all(one.n_prompt for one in chat) else None
        if own <= SAME_KL and lengths in (None, [len(one.ids) for one in prompts]):
            return ServerFinding(YES, f"chats are answered as raw prompts of the run's ids are (KL {own:.3g})")
        for cause in self._causes():
            if lengths in (None, [len(ids) for ids in cause.ids]) and self._is_proven(cause.ids, chat):
                return ServerFinding(NO, f"{cause.words} (such prompts are answered as its chats are)", cause.name)
        more = f"; prompts have {sum(lengths) - sum(len(one.ids) for one in prompts):+d} tokens" if lengths else ""
        words = (
            f"chats are answered otherwise than the run's prompts (KL {own:.3g}){more}, and no usual cause explains it"
        )
        return ServerFinding(NO, f"{words}; {REMEDY}", "wrong template")

    def _causes(self) -> list[Any]:
        pairs = [(one.turns, one.ids) for one in self.check.prompts]
        return prompt_causes(pairs, self.template, self.tokenizer, str(self.check.about.get("base", "")))

    def _is_proven(self, ids: list[list[int]], chat: list[AnswerReading]) -> bool:
        """Whether the server answers these raw prompts as it answers its chats."""
        try:
            return all(_worst(self._raw([one]), [seen]) <= SAME_KL for one, seen in zip(ids, chat, strict=True))
        except NotOffered:
            return False

    def _stop_finding(self, chat: list[AnswerReading] | None, *, exact: bool) -> ServerFinding:
        """Whether answers end where the run's do. A model that is not exactly the run's may write on by itself."""
        stops = self.check.about.get("stop", [""])
        n_ended = 0
        for one, seen in zip(self.check.prompts, chat or [], strict=False):
            wanted, found = words_of(one.answer.text), words_of(seen.text)
            if one.answer.finish == "stop" and found.startswith(wanted):
                if found == wanted and seen.finish != "length":
                    n_ended += 1
                elif exact or found[len(wanted) :].startswith(tuple(words_of(stop) for stop in stops)):
                    words = f"the server writes on behind the end of an answer: {stops[0]!r} is no stop there"
                    return ServerFinding(NO, words, "stop missing")
            elif (
                one.answer.finish == "length"
                and seen.finish != "length"
                and wanted != found
                and same_text(AnswerReading(seen.text, "length"), one.answer)
            ):
                return ServerFinding(
                    NO, f"the server ends an answer early, after {seen.text[-40:]!r}", "stop too early"
                )
        if n_ended:
            return ServerFinding(YES, f"{n_ended} answers end where the run's do")
        return ServerFinding(UNKNOWN, "no stored answer that the server gives too came to its end")


def _wanted(answer: AnswerReading) -> int:
    """Tokens to ask for: so many as are stored, and some behind an end."""
    return len(answer.tokens) + (SPARE_TOKENS if answer.finish == "stop" else 0)


def _worst(one: Sequence[AnswerReading], other: Sequence[AnswerReading]) -> float:
    """The largest distance of a prompt's two answers: a cause may touch one prompt only."""
    return max(distance([a], [b]) for a, b in zip(one, other, strict=True))


def _model_finding(kl: float, kl_base: float | None, apart: float | None, max_kl: float) -> ServerFinding:
    """Which model it is, by how far it is from the run's result, and from the run's base."""
    if kl_base is not None and kl > SAME_KL and kl_base < NEARER * kl:
        words = f"the answers are the base's (KL {kl_base:.3g}; {kl:.3g} to the run's)"
        return ServerFinding(NO, f"{words}: load the adapter there, and name it as the model", "adapter not applied")
    if kl <= max_kl and apart is not None and apart <= SAME_KL:
        return ServerFinding(UNKNOWN, "base and result answer these prompts alike: whether the adapter is on shows not")
    if kl <= SAME_KL:
        return ServerFinding(YES, f"KL {kl:.3g} nats per token to the run's answers")
    if kl <= max_kl:
        return ServerFinding(YES, f"with quantisation noise of KL {kl:.3g} nats per token")
    if kl <= DIFFERENT_KL and (kl_base is None or kl < kl_base):
        words = f"quantisation noise of KL {kl:.3g} nats per token, more than --max_kl {max_kl:g}"
        return ServerFinding(NO, f"{words}: serve it in more bits", "quantisation noise")
    return ServerFinding(NO, f"KL {kl:.3g} nats per token: these are other weights", "different model")
