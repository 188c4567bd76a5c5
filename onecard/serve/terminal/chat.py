"""A chat in the terminal: questions, answers that are typed live, and commands that begin with a slash.

Knows the session, the engine's requests and what the commands do. It does not know how a line is read
(input.py), how an answer is drawn (screen.py), or models.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType

from onecard.config.inference import DOCUMENTS_MODEL, SamplingOptions
from onecard.console import nearest
from onecard.data.built_in_templates import BUILT_IN
from onecard.data.messages import Turn
from onecard.errors import ConfigError, DataError, OneCardError
from onecard.inference.call import Chunk
from onecard.inference.chat_file import SavedChat, load_chat, save_chat
from onecard.inference.engine import GenerationRequest, InferenceEngine
from onecard.inference.history import ChatHistory, fit_history, prompt_budget
from onecard.serve.terminal.commands import NAMES, check_command, help_text, parameter_value, split_command
from onecard.serve.terminal.input import Keyboard, PipedInput, read_message, read_pipe, silent_keys
from onecard.serve.terminal.screen import Screen
from onecard.translation import translated

WELCOME = "Type a message. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves."
TITLE_CHARS = 60


def chat_in_terminal(
    engine: InferenceEngine,
    session: ChatHistory,
    sampling: SamplingOptions,
    *,
    show_beams: bool = False,
    adapter: str = "",
    prompt_type: str = "",
    load: str | None = None,
) -> ChatHistory:
    """Chat until the person leaves; returns the conversation as it is then.

    `load` is a saved chat to go on with. Where standard input is no terminal, all of it is one message, and the answer
    is all that is printed; if it begins with a command, its lines are read as if they were typed.

    Raises DataError for a chat that cannot be loaded; and, for a message from a pipe, whatever the engine raises.
    """
    typed = sys.stdin.isatty()
    chat = TerminalChat(engine, session, sampling, Screen(quiet=not typed))
    chat.show_beams, chat.adapter, chat.prompt_type = show_beams, adapter, prompt_type
    if load is not None:
        chat.load(Path(load))
    if typed:
        chat.keyboard = Keyboard()
        chat.screen.note(WELCOME)
        return chat.run()
    text = read_pipe()
    command = split_command(text.split("\n")[0])
    if command is not None and command[0] in NAMES:
        chat.keyboard = PipedInput(text)
        return chat.run()
    chat.stops_on_ctrl_c = False
    chat.ask(text)
    return chat.session


class SecondCtrlC(KeyboardInterrupt):
    """Ctrl-C was pressed again while an answer was being stopped: the person wants to leave."""


@dataclass
class AnswerProgress:
    """What came of an answer so far: its last chunk, and when the waiting for its turn was over."""

    last: Chunk = field(default_factory=Chunk)
    begun: float = field(default_factory=time.monotonic)


class TerminalChat:
    """One chat: the session, the parameters, and the commands that change them."""

    def __init__(
        self, engine: InferenceEngine, session: ChatHistory, sampling: SamplingOptions, screen: Screen
    ) -> None:
        self.engine, self.session, self.sampling, self.screen = engine, session, sampling, screen
        self.keyboard: Keyboard | PipedInput = PipedInput("")
        self.adapter = self.prompt_type = ""
        self.show_beams = False
        self.stops_on_ctrl_c = True
        self._first_sampling = sampling
        self._interrupted = False  # by Ctrl-C at an empty line, which a second one makes the wish to leave
        self._attempt = 0  # of the last question: another one draws other random numbers
        self._file: Path | None = None
        self._chat = SavedChat()  # title and time of the chat that was loaded

    def run(self) -> ChatHistory:
        """Read and answer until the person leaves."""
        goes_on = True
        while goes_on:
            try:
                goes_on = self._step()
            except KeyboardInterrupt:  # it came between two steps, where there is nothing to stop
                continue
        return self.session

    def _step(self) -> bool:
        """One message or command; False when the person leaves."""
        try:
            self.screen.note("")
            message = read_message(self.keyboard)
        except EOFError:
            self.screen.note("")
            return False
        except KeyboardInterrupt:
            again, self._interrupted = self._interrupted, not self.keyboard.was_typing
            if again and self._interrupted:
                return False
            self.screen.note("\n(Ctrl-C again, Ctrl-D or /exit leaves)" if self._interrupted else "")
            return True
        self._interrupted = False
        return self._goes_on(message)

    def _goes_on(self, message: str) -> bool:
        """Do what a message or command says; False when it is to leave."""
        command = split_command(message)
        try:
            if command is None:
                if message.strip():
                    self.ask(message.removeprefix(" ") if message.startswith(" /") else message)
                return True
            name, argument = command
            check_command(name)
            if name != "exit":
                getattr(self, f"do_{name.replace('!', '_anyway')}")(argument)
        except OneCardError as reason:
            self.screen.error(reason)
        except SecondCtrlC:
            return False
        return command is None or command[0] != "exit"

    def ask(self, text: str) -> None:
        """Send a new message and show its answer. Raises what the engine raises."""
        if self.session.awaits_answer:
            self.screen.note("(the question before has no answer and is left out)")
        self.session, self._attempt = self.session.ask(text), 0
        self._answer()

    def _answer(self) -> None:
        """Answer the last question; what was typed before a stop or an error is kept."""
        session, seen = self.session, AnswerProgress()
        request = GenerationRequest(
            turns=self._fitting(session),
            sampling=self.sampling,
            adapter=self.adapter,
            prompt_type=self.prompt_type,
            number=self._attempt,
            show_beams=self.show_beams,
        )
        try:
            self._type(request, seen)
        finally:
            if seen.last.text or seen.last.finish_reason in ("stop", "length"):
                self.session = session.answer(seen.last.text)
        self._tell(seen.last, time.monotonic() - seen.begun)

    def _type(self, request: GenerationRequest, seen: AnswerProgress) -> None:
        """Show an answer while it is written; `seen` tells how far it got, also when this is left by an error."""
        cancel = threading.Event()
        with (
            stopped_by_ctrl_c(cancel) if self.stops_on_ctrl_c else nullcontext(),
            silent_keys(),
            closing(self.engine.stream(request, cancel)) as steps,  # type: ignore[type-var]
            self.screen.typing(rewrites=request.sampling.num_beams > 1) as show,
        ):
            for (chunk,) in steps:
                if chunk.place and chunk.place != seen.last.place:
                    self.screen.note(f"(waiting; {chunk.place} in front)")
                if chunk.place:
                    seen.begun = time.monotonic()
                else:
                    show(chunk)
                seen.last = chunk

    def _fitting(self, session: ChatHistory) -> tuple[Turn, ...]:
        """The turns that leave room for the answer, the newest ones."""
        limit = self.engine.context_limit
        budget = prompt_budget(limit, self.sampling.max_new_tokens, self.engine.limits.max_prompt_tokens)
        fitted = fit_history(
            session.prompt, lambda turns: self.engine.count_tokens(turns, self.adapter, self.prompt_type), budget
        )
        if fitted.n_dropped:
            left_out = f"the oldest {fitted.n_dropped} of {len(session.turns)} messages"
            self.screen.remark(f"({left_out} are not sent: {budget} of {limit} tokens are for the conversation)")
        return fitted.turns

    def _tell(self, last: Chunk, seconds: float) -> None:
        """The line below an answer, or a warning for a program where the answer is cut."""
        n_new, n_all = last.usage.n_new_tokens, last.usage.n_prompt_tokens + last.usage.n_new_tokens
        limit = self.engine.context_limit
        parts = [f"{n_new} tokens", f"{n_new / max(seconds, 1e-9):.1f} tokens/s", f"context {n_all} of {limit}"]
        cut = ""
        if last.finish_reason == "length":
            at_most, full = n_new >= self.sampling.max_new_tokens, n_all >= limit
            cut = "cut at max_new_tokens" if at_most else "cut: the context is full" if full else "cut: out of time"
        elif last.finish_reason == "cancelled":
            cut = "stopped" if last.text else "stopped; /r asks again"
        elif not last.text.strip():
            cut = "the answer is empty"
        self.screen.note("[" + ", ".join([*parts, cut] if cut else parts) + "]")
        if self.screen.quiet and last.finish_reason == "length":
            self.screen.warn(f"the answer was {cut}, after {n_new} tokens")

    def do_help(self, argument: str) -> None:
        self.screen.say(help_text())

    def do_regenerate(self, argument: str) -> None:
        self.session = self.session.regenerate()
        self._attempt += 1
        if self.sampling.temperature == 0:
            self.screen.note("(temperature 0: the same answer comes again; try /set temperature 0.7)")
        self._answer()

    def do_undo(self, argument: str) -> None:
        self.session, text = self.session.undo()
        if not self.keyboard.prefill(text):
            self.screen.quote("taken back:", text)

    def do_edit(self, argument: str) -> None:
        number, text = [*argument.split(maxsplit=1), "", ""][:2]
        if not number.isdecimal():
            raise DataError("/edit takes a message's number, as /history shows it, and the new text")
        index = int(number[:9]) - 1
        if not text and 0 <= index < len(self.session.turns):
            if not self.keyboard.prefill(f"/edit {number} {self.session.turns[index].content}"):
                raise DataError(f"/edit {number} needs the new text behind the number")
            return
        self.session, self._attempt = self.session.edit(index, text), 0
        if self.session.awaits_answer:
            self._answer()

    def do_clear(self, argument: str) -> None:
        self.session, self._chat = self.session.clear(), SavedChat()
        self.screen.note("(a new conversation)")

    def do_system(self, argument: str) -> None:
        if argument.strip():
            self.session = self.session.with_system("" if argument.strip() == '""' else argument)
        self.screen.quote("system prompt:", self.session.system or translated("(none)"))

    def do_history(self, argument: str) -> None:
        if self.session.system.strip():
            self.screen.quote("system:", self.session.system)
        for number, turn in enumerate(self.session.turns, 1):
            self.screen.quote(f"{number} {turn.role}:", turn.one_text())
        if not self.session.turns:
            self.screen.note("(nothing was said yet)")

    def do_save_anyway(self, argument: str) -> None:
        self.do_save(argument, replaces=True)

    def do_save(self, argument: str, *, replaces: bool = False) -> None:
        path = Path(argument.strip()).expanduser() if argument.strip() else self._file
        if path is None:
            raise DataError("/save takes a file's name, such as /save chat.json")
        if path.exists() and path != self._file and not replaces:
            raise DataError(f"{path} exists; /save! {path} replaces it")
        first = self.session.turns[0].content if self.session.turns else ""
        chat = replace(
            self._chat,
            session=self.session,
            sampling=self.sampling,
            adapter=self.adapter or self.engine.names[0],
            prompt_type=self.prompt_type,
            title=self._chat.title or " ".join(first.split())[:TITLE_CHARS],
        )
        save_chat(chat, path)
        self._file = path
        self.screen.note(f"(saved {len(self.session.turns)} messages to {path})")

    def do_load(self, argument: str) -> None:
        if not argument.strip():
            raise DataError("/load takes a file's name, such as /load chat.json")
        self.load(Path(argument.strip()))

    def load(self, path: Path) -> None:
        """Go on with a saved chat: its conversation, parameters, adapter and template. Raises DataError."""
        chat, notes = load_chat(path)
        for note in notes:
            self.screen.remark(f"({note})")
        if chat.adapter and not self.engine.has(chat.adapter):
            self.screen.remark(f"(the adapter {chat.adapter} is not here; going on with {self._adapter_name()})")
        elif chat.adapter:
            self.adapter = chat.adapter
        self.prompt_type = chat.prompt_type.replace("auto", "")
        self.session, self.sampling = chat.session, chat.sampling or self.sampling
        self._chat, self._file, self._attempt = chat, path.expanduser(), 0
        self.screen.note(f"(loaded {len(chat.session.turns)} messages; /history shows them)")

    def do_set(self, argument: str) -> None:
        name, _, text = argument.strip().partition(" ")
        if not name:
            raise DataError("/set takes a parameter and its value; /show lists them")
        name = name.lstrip("-")
        value = parameter_value(name, text.strip())
        changed = replace(self.sampling, **{name: value})
        for flag, problem in changed.problems():
            raise ConfigError(flag.lstrip("-"), problem)
        self.sampling = changed
        self.screen.note(f"({name} = {value})")

    def do_reset(self, argument: str) -> None:
        self.sampling = self._first_sampling
        self.screen.note("(all parameters as at the start)")

    def do_show(self, argument: str) -> None:
        for option in fields(self.sampling):
            value, first = getattr(self.sampling, option.name), getattr(self._first_sampling, option.name)
            self.screen.say(f"  {option.name:<22} {value}" + (f"   (at the start {first})" if value != first else ""))
        template = self.engine.template(self.adapter, self.prompt_type).name
        self.screen.quote(f"  {'adapter':<22}", self._adapter_name())
        self.screen.say(f"  {'prompt_type':<22} {template}")
        self.screen.say(f"  {'beams shown':<22} {'on' if self.show_beams else 'off'}")
        self.screen.say(f"  {'context':<22} {self.engine.context_limit} tokens")

    def do_adapter(self, argument: str) -> None:
        name = argument.strip()
        if name and not self.engine.has(name):
            raise DataError(f"no adapter is called {name}{nearest(name, self.engine.names)}; /adapter lists them")
        if name:
            self.adapter = name
        for known in self.engine.names:
            self.screen.quote("*" if known == self._adapter_name() else " ", known)

    def do_documents(self, argument: str) -> None:
        if argument.strip() not in ("", "on", "off"):
            raise DataError("/documents takes on or off")
        if not self.engine.has(DOCUMENTS_MODEL):
            raise DataError("there are no documents; start with --documents and the folder of an index")
        if argument.strip():
            self.adapter = DOCUMENTS_MODEL if argument.strip() == "on" else ""
        self.screen.say(f"answers come out of the {'documents' if self.adapter == DOCUMENTS_MODEL else 'model alone'}")

    def do_prompt_type(self, argument: str) -> None:
        name = argument.strip()
        known = ("auto", *BUILT_IN)
        if name not in ("", *known):
            raise DataError(f"no template is called {name}{nearest(name, known)}; there are {', '.join(known)}")
        if name:
            wanted = "" if name == "auto" else name
            self.engine.template(self.adapter, wanted)  # refuses what does not go with this tokenizer
            self.prompt_type = wanted
        self.screen.say(f"prompt template: {self.engine.template(self.adapter, self.prompt_type).name}")

    def do_beams(self, argument: str) -> None:
        if argument.strip() not in ("", "on", "off"):
            raise DataError("/beams takes on or off")
        if argument.strip():
            self.show_beams = argument.strip() == "on"
        few = "" if self.sampling.num_beams > 1 else "; there is only one, see /set num_beams 4"
        self.screen.say(f"all beams are {'shown' if self.show_beams else 'not shown'}{few}")

    def _adapter_name(self) -> str:
        return self.adapter or self.engine.names[0]


@contextmanager
def stopped_by_ctrl_c(cancel: threading.Event) -> Iterator[None]:
    """The first Ctrl-C sets `cancel`, the second one raises SecondCtrlC. Only the main thread can hear it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if cancel.is_set():
            raise SecondCtrlC
        cancel.set()

    old = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        # None: the old handler was installed by C code, which Python cannot put back.
        signal.signal(signal.SIGINT, signal.SIG_DFL if old is None else old)
