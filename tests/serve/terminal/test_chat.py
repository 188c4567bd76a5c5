"""The chat in the terminal: commands on a made-up model, typing and Ctrl-C on a real pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from onecard.config.inference import SamplingOptions
from onecard.data.messages import Turn
from onecard.errors import DataError, ModelError, OneCardError
from onecard.inference.call import Chunk, Usage
from onecard.inference.engine import ContextTooLong, LimitExceeded, OutOfMemory, QueueFull
from onecard.inference.history import ChatHistory
from onecard.serve.terminal.chat import TerminalChat, chat_in_terminal
from onecard.serve.terminal.commands import COMMANDS, help_text
from onecard.serve.terminal.input import PipedInput
from onecard.serve.terminal.screen import Screen
from onecard.translation import use_language
from tests.faults.fork_server import ForkServer
from tests.serve.terminal.fake_terminal import (
    SEQUENCE,
    FakeEngine,
    Paper,
    Terminal,
    growing,
    in_terminal,
    terminal,
    terminal_of,
)

SAMPLING = SamplingOptions(max_new_tokens=50)
READY, MORE = ">\b  ", ".\b  "  # an empty line has the keys: it is drawn as prompt_toolkit draws it
NASTY = "a\x1b[2J\x1b]0;title\x07\x9b31m [red]b[/red] \x1b[31m:smile:\rc\x7f\x00"


def play(engine: FakeEngine, *lines: str, session: ChatHistory | None = None) -> TerminalChat:
    """A chat in which these lines were typed."""
    chat = TerminalChat(engine, session or ChatHistory(), SAMPLING, Screen())  # type: ignore[arg-type]
    chat.keyboard = PipedInput("\n".join(lines))
    chat.run()
    return chat


def contents(chat: TerminalChat) -> list[str]:
    return [turn.content for turn in chat.session.turns]


class TestCommands:
    def test_questions_are_answered_in_one_conversation(self, capsys) -> None:
        engine = FakeEngine()
        chat = play(engine, "first", "", "  ", " second ")
        assert contents(chat) == ["first", "first!", " second ", " second !"]
        assert [len(request.turns) for request in engine.requests] == [1, 3]
        assert capsys.readouterr().out == "first!\n second !\n"
        assert engine.n_closed == 2

    def test_regenerate_draws_other_numbers_and_replaces_the_answer(self) -> None:
        engine = FakeEngine(lambda request: iter([f"answer {request.number}"]))
        chat = play(engine, "first", "/regenerate", "/r", "second", "/R")
        assert [request.number for request in engine.requests] == [0, 1, 2, 0, 1]
        assert contents(chat) == ["first", "answer 2", "second", "answer 1"]

    def test_undo_says_what_was_taken_back(self, capsys) -> None:
        chat = play(FakeEngine(), "first", "second", "/undo")
        assert contents(chat) == ["first", "first!"]
        assert "taken back: second\n" in capsys.readouterr().out

    def test_edit_asks_an_earlier_question_anew(self) -> None:
        chat = play(FakeEngine(), "first", "second", "/edit 1 other")
        assert contents(chat) == ["other", "other!"]

    def test_edit_of_an_answer_lets_it_stand(self) -> None:
        engine = FakeEngine()
        chat = play(engine, "first", '/edit 2 """', "better", 'by far"""', "second")
        assert contents(chat) == ["first", "better\nby far", "second", "second!"]
        assert len(engine.requests) == 2

    def test_clear_and_system(self, capsys) -> None:
        engine = FakeEngine()
        chat = play(engine, "/system Be kind.", "first", "/clear", "second", '/system ""', "third", "/system")
        assert [request.turns[0] for request in engine.requests] == [
            Turn("system", "Be kind."), Turn("system", "Be kind."), Turn("user", "second"),
        ]  # fmt: skip
        assert contents(chat) == ["second", "second!", "third", "third!"]
        assert "system prompt: (none)" in capsys.readouterr().out

    def test_history_numbers_the_messages(self, capsys) -> None:
        play(FakeEngine(), "/history", "/system Be kind.", "first", "/history")
        assert "system: Be kind.\n1 user: first\n2 assistant: first!\n" in capsys.readouterr().out

    def test_what_was_said_is_shown_in_its_own_words(self, capsys) -> None:
        said = "hello\nthe answer is empty\nok"  # the second line and the third are messages of ours, too
        session = ChatHistory().ask(said).answer("yes").ask(said)
        use_language("zh")
        try:
            play(FakeEngine(), "/system ok", "/system", "/history", "/undo", session=session)
        finally:
            use_language("auto")
        assert capsys.readouterr().out == (
            "系统提示： ok\n系统提示： ok\n"
            f"system: ok\n1 user: {said}\n2 assistant: yes\n3 user: {said}\n已撤回： {said}\n"
        )

    def test_parameters_are_set_shown_and_set_back(self, capsys) -> None:
        engine = FakeEngine()
        lines = (
            "/set temperature 0.7",
            "/set top_k 5",
            '/set stop ["a", "b\\n"]',
            "first",
            "/show",
            "/reset",
            "second",
        )
        play(engine, *lines, "/set stop ###", "third", "/set stop", "fourth")
        expected = replace(SAMPLING, temperature=0.7, top_k=5, stop=["a", "b\n"])
        stops = [replace(SAMPLING, stop=["###"]), SAMPLING]
        assert [request.sampling for request in engine.requests] == [expected, SAMPLING, *stops]
        shown = capsys.readouterr().out
        assert "temperature            0.7   (at the start 0.0)" in shown
        assert "max_new_tokens         50\n" in shown
        assert "adapter                base" in shown

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("/set temprature 1", "no parameter temprature (did you mean temperature?)"),
            ("/set temperature hot", "temperature takes a number, and hot is none"),
            ("/set temperature", "temperature takes a number, and nothing is none"),
            ("/set temperature -1", "temperature: -1.0 is not between 0"),
            ("/set temperature nan", "temperature: nan is not between 0"),
            ("/set top_k 1.5", "top_k takes a whole number, and 1.5 is none"),
            ("/set top_p 0", "top_p: 0.0 is not a probability"),
            ("/set min_new_tokens 51", "min_new_tokens: 51"),
            ('/set stop [""]', "stop: is empty"),
            ("/set", "/set takes a parameter"),
            ("/undoo", "no command /undoo (did you mean /undo?)"),
            ("/xyz", "no command /xyz; /help"),
            ("/undo", "nothing to undo"),
            ("/r", "no answer to make anew"),
            ("/edit", "/edit takes a message's number"),
            ("/edit x y", "/edit takes a message's number"),
            ("/edit 1 y", "there is no message 1; this chat has 0"),
            ("/adapter poem", "no adapter is called poem (did you mean poet?)"),
            ("/prompt_type chatm", "no template is called chatm (did you mean chatml?)"),
            ("/beams maybe", "on or off"),
            ("/load", "/load takes a file's name"),
            ("/load missing.json", "missing.json: cannot be read"),
            ("/save", "/save takes a file's name"),
            ("/save missing/a.json", "missing/a.json: the chat cannot be written"),
        ],
    )
    def test_what_cannot_be_done_is_said_in_one_line_and_changes_nothing(self, line: str, words: str, capsys) -> None:
        engine = FakeEngine()
        chat = play(engine, line)
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
        assert (chat.session, chat.sampling, chat.adapter, engine.requests) == (ChatHistory(), SAMPLING, "", [])

    def test_edit_without_a_text_does_not_empty_the_message(self, capsys) -> None:
        chat = play(FakeEngine(), "first", "/edit 2")
        assert contents(chat) == ["first", "first!"]
        assert "needs the new text" in capsys.readouterr().err

    def test_adapter_prompt_type_and_beams_go_into_the_request(self, capsys) -> None:
        engine = FakeEngine()
        play(
            engine, "/adapter poet", "/prompt_type chatml", "/beams on", "first", "/prompt_type auto", "/beams off", "x"
        )
        first, second = engine.requests
        assert (first.adapter, first.prompt_type, first.show_beams) == ("poet", "chatml", True)
        assert (second.adapter, second.prompt_type, second.show_beams) == ("poet", "", False)
        assert "  base\n* poet\n" in capsys.readouterr().out

    def test_exit_leaves_at_once(self) -> None:
        engine = FakeEngine()
        for word in ("/exit", "/quit", "/q", "/EXIT "):
            play(engine, word, "never")
        assert engine.requests == []

    def test_a_slash_can_be_sent(self) -> None:
        chat = play(FakeEngine(), " /undo", "/usr/bin is full", "/* a comment */")
        assert contents(chat)[::2] == ["/undo", "/usr/bin is full", "/* a comment */"]

    def test_help_names_every_command_and_every_command_works(self) -> None:
        listed = help_text()
        for command in COMMANDS:
            assert f"/{command.name}" in listed
            if command.name != "exit":
                assert hasattr(TerminalChat, f"do_{command.name.replace('!', '_anyway')}")
        methods = {name for name in vars(TerminalChat) if name.startswith("do_")}
        assert len(methods) == len(COMMANDS) - 1

    def test_ctrl_c_between_two_steps_loses_nothing(self) -> None:
        class Interrupted(Screen):
            n_notes = 0

            def note(self, text: str) -> None:
                self.n_notes += 1
                if self.n_notes % 3 == 0:
                    raise KeyboardInterrupt

        screen = Interrupted()
        chat = TerminalChat(FakeEngine(), ChatHistory(), SAMPLING, screen)  # type: ignore[arg-type]
        chat.keyboard = PipedInput("first\nsecond\n/clear\nthird")
        chat.run()
        assert contents(chat) == ["third", "third!"]
        assert screen.n_notes > 6


class TestFiles:
    def test_a_chat_is_saved_and_gone_on_with(self, tmp_path: Path, capsys) -> None:
        path = tmp_path / "a.json"
        play(
            FakeEngine(),
            "/system Be kind.",
            "/set top_k 5",
            "/adapter poet",
            "/prompt_type chatml",
            "Hi",
            f"/save {path}",
        )
        saved = json.loads(path.read_text(encoding="utf-8"))
        assert (saved["title"], saved["adapter"], saved["prompt_type"]) == ("Hi", "poet", "chatml")
        engine = FakeEngine()
        chat = play(engine, f"/load {path}", "again", "/save")
        request = engine.requests[0]
        assert [turn.content for turn in request.turns] == ["Be kind.", "Hi", "Hi!", "again"]
        assert (request.adapter, request.prompt_type, request.sampling.top_k) == ("poet", "chatml", 5)
        again = json.loads(path.read_text(encoding="utf-8"))
        assert (again["title"], again["created"]) == ("Hi", saved["created"])
        assert [message["content"] for message in again["messages"]] == contents(chat)

    def test_a_file_of_somebody_else_is_not_replaced_unasked(self, tmp_path: Path, capsys) -> None:
        path = tmp_path / "weights.bin"
        path.write_text("precious", encoding="utf-8")
        play(FakeEngine(), "Hi", f"/save {path}")
        assert path.read_text(encoding="utf-8") == "precious"
        assert f"/save! {path} replaces it" in capsys.readouterr().err
        play(FakeEngine(), "Hi", f"/save! {path}", "more", f"/save {path}")
        assert len(json.loads(path.read_text(encoding="utf-8"))["messages"]) == 4

    def test_a_bad_chat_changes_nothing(self, tmp_path: Path, capsys) -> None:
        (tmp_path / "a.json").write_text('[{"role": "assistant", "content": "x"}]', encoding="utf-8")
        chat = play(FakeEngine(), "Hi", f"/load {tmp_path / 'a.json'}")
        assert contents(chat) == ["Hi", "Hi!"]
        assert "message 1 has the role assistant" in capsys.readouterr().err

    def test_an_adapter_that_is_not_here_is_told(self, tmp_path: Path, capsys) -> None:
        (tmp_path / "a.json").write_text('{"adapter": "../secret", "messages": []}', encoding="utf-8")
        chat = play(FakeEngine(), f"/load {tmp_path / 'a.json'}")
        assert chat.adapter == ""
        assert "the adapter ../secret is not here; going on with base" in capsys.readouterr().err


class TestAnswers:
    @pytest.mark.parametrize(
        "reason",
        [
            QueueFull(3, 7), ContextTooLong(300, 200), OutOfMemory("lower --num_beams\n  or others"),
            LimitExceeded("--num_beams", "9 is too many"), ModelError("broken"), DataError("refused"),
        ],
    )  # fmt: skip
    def test_an_error_is_one_line_and_the_next_question_works(self, reason: OneCardError, capsys) -> None:
        engine = FakeEngine(lambda request: iter([reason if request.turns[-1].content == "bad" else "fine"]))
        chat = play(engine, "good", "bad", "good")
        assert contents(chat) == ["good", "fine", "good", "fine"]
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert str(reason).split("\n")[0] in said
        assert engine.n_closed == 3

    def test_a_question_that_failed_is_asked_again_by_regenerate(self) -> None:
        replies = iter([QueueFull(3, 7), "fine"])
        chat = play(FakeEngine(lambda request: iter([next(replies)])), "first", "/r")
        assert contents(chat) == ["first", "fine"]

    def test_what_was_typed_before_an_error_is_kept(self) -> None:
        chat = play(FakeEngine(lambda request: iter(["Once upon", OutOfMemory("lower it")])), "first")
        assert contents(chat) == ["first", "Once upon"]

    def test_an_empty_answer_is_an_answer(self) -> None:
        chat = play(FakeEngine(lambda request: iter([Chunk("", (), "stop")])), "first", "second")
        assert contents(chat) == ["first", "", "second", ""]

    def test_history_is_cut_with_a_note_and_kept_in_the_session(self, capsys) -> None:
        engine = FakeEngine(lambda request: iter(["y" * 40]))
        chat = play(engine, "a" * 40, "b" * 40, "c" * 40)
        assert [turn.content[0] for turn in engine.requests[-1].turns] == ["b", "y", "c"]
        assert len(chat.session.turns) == 6
        said = capsys.readouterr().err
        assert "the oldest 2 of 5 messages are not sent: 150 of 200 tokens" in said

    def test_a_question_that_is_too_long_is_refused_with_numbers(self, capsys) -> None:
        engine = FakeEngine()
        chat = play(engine, "q" * 151, "short")
        assert "takes 151 tokens, and 150 are free" in capsys.readouterr().err
        assert contents(chat) == ["short", "short!"]
        assert len(engine.requests) == 1


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes, engine: FakeEngine, **options) -> ChatHistory:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    return chat_in_terminal(engine, ChatHistory(), SAMPLING, **options)  # type: ignore[arg-type]


class TestPipes:
    def test_a_pipe_is_one_message_and_the_answer_is_all_that_is_printed(self, monkeypatch, capsys) -> None:
        engine = FakeEngine(lambda request: growing("  An answer.\n", 0))
        piped(monkeypatch, "Erste Zeile\r\n第二行\n".encode(), engine)
        assert capsys.readouterr() == ("  An answer.\n\n", "")
        assert [turn.content for turn in engine.requests[0].turns] == ["Erste Zeile\n第二行"]

    def test_a_script_of_commands_is_read_line_by_line(self, monkeypatch, capsys) -> None:
        engine = FakeEngine()
        piped(monkeypatch, b"/set top_k 3\nfirst\n/nonsense\nsecond\n/exit\nthird\n", engine)
        captured = capsys.readouterr()
        assert captured.out == "first!\nsecond!\n"
        assert "no command /nonsense" in captured.err
        assert engine.requests[1].sampling.top_k == 3

    def test_a_text_that_only_looks_like_a_command_is_a_message(self, monkeypatch) -> None:
        engine = FakeEngine()
        piped(monkeypatch, b"/etc is full\nWhat now?", engine)
        assert engine.requests[0].turns[-1].content == "/etc is full\nWhat now?"

    def test_errors_of_a_pipe_reach_the_caller(self, monkeypatch) -> None:
        with pytest.raises(DataError, match="empty"):
            piped(monkeypatch, b"\n", FakeEngine())
        with pytest.raises(QueueFull):
            piped(monkeypatch, b"Hi", FakeEngine(lambda request: iter([QueueFull(3, 7)])))

    def test_a_cut_answer_is_warned_of(self, monkeypatch, capsys) -> None:
        cut = Chunk("x" * 50, (), "length", Usage(2, 50))
        piped(monkeypatch, b"Hi", FakeEngine(lambda request: iter([cut])))
        assert capsys.readouterr() == (
            "x" * 50 + "\n",
            "warning: the answer was cut at max_new_tokens, after 50 tokens\n",
        )

    def test_a_saved_chat_is_gone_on_with(self, monkeypatch, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]')
        session = piped(monkeypatch, b"c", FakeEngine(), load=str(tmp_path / "a.json"))
        assert [turn.content for turn in session.turns] == ["a", "b", "c", "c!"]
        with pytest.raises(DataError, match="cannot be read"):
            piped(monkeypatch, b"c", FakeEngine(), load=str(tmp_path / "missing.json"))

    def test_bytes_that_are_no_text_do_not_matter(self, monkeypatch, capsys) -> None:
        engine = FakeEngine()
        piped(monkeypatch, b"\xef\xbb\xbfa\xff\x1b[2J", engine)
        assert engine.requests[0].turns[-1].content == "a\ufffd\x1b[2J"
        assert capsys.readouterr().out == "a\ufffd␛[2J!\n"


def chatting(reply=None, sampling: SamplingOptions = SAMPLING, **size):
    engine = FakeEngine(reply)
    return terminal(lambda: chat_in_terminal(engine, ChatHistory(), sampling), **size)  # type: ignore[arg-type]


def endless(request) -> Iterator[str]:
    """Words without end, but a short answer to everything that does not ask for them."""
    yield from growing("word " * 2000) if "endless" in request.turns[-1].content else ["short answer"]


def started(there: Terminal) -> Terminal:
    there.until(READY)
    return there


def paper_of(there: Terminal, output: str) -> Paper:
    paper = Paper(*there.size)
    paper.draw(output)
    return paper


def ctrl_c_at_rest(there: Terminal) -> None:
    """As a person presses it: behind the keys that were typed."""
    time.sleep(0.3)
    there.send("\x03")


needs_line_editor = pytest.mark.skipif(find_spec("prompt_toolkit") is None, reason="prompt_toolkit is not installed")


@needs_line_editor
class TestTerminal:
    def test_an_answer_is_typed_live_and_told_about(self) -> None:
        answer = "One word after another, 你好，世界."
        with chatting(lambda request: growing(answer)) as there:
            started(there).ask("Hi", f"[{len(answer)} tokens, ")
            place = there.until(f" tokens/s, context {len(answer) + 2} of 200]")
            seen = {n for state in there.states for n in range(len(answer)) if state.endswith(answer[: n + 1])}
            assert len(seen) >= 5
            assert f"\n> Hi\n{answer}\n[" in there.paper().text()
            there.until(READY, after=place)
            there.send("\x04")
            assert there.ended() == 0

    def test_ctrl_c_stops_an_answer_and_keeps_it(self) -> None:
        with chatting(endless) as there:
            started(there).ask("endless", "word word")
            begun, after = time.monotonic(), len(there.words)
            there.send("\x03")
            there.until(", stopped]", after=after)
            assert time.monotonic() - begun < 1
            there.ask("Hi", "short answer")
            place = there.ask("/history", "2 assistant: word word")
            there.until("4 assistant: short answer", after=place)
            there.ask("/exit", "")
            assert there.ended() == 0
            assert "Traceback" not in there.output

    def test_a_second_ctrl_c_leaves_even_when_nothing_stops(self) -> None:
        def deaf(request) -> Iterator[Chunk]:
            while True:
                time.sleep(0.02)
                yield Chunk("text", (), None, Usage(1, 1))

        engine = FakeEngine(deaf)
        engine.stream = lambda request, cancel=None: ([chunk] for chunk in deaf(request))  # type: ignore[method-assign]
        with terminal(lambda: chat_in_terminal(engine, ChatHistory(), SAMPLING)) as there:  # type: ignore[arg-type]
            started(there).ask("Hi", "text")
            there.send("\x03")
            time.sleep(0.3)
            there.send("\x03")
            assert there.ended() == 0
            assert "Traceback" not in there.output

    def test_ctrl_c_at_the_prompt_drops_the_line_and_twice_leaves(self) -> None:
        with chatting() as there:
            place = there.until(READY)
            for _ in range(3):
                there.send("half a li")
                there.until("half a li", after=place)
                ctrl_c_at_rest(there)
                place = there.until(READY, after=place)
            place = there.until(READY, after=there.ask("Hi", "tokens/s"))
            ctrl_c_at_rest(there)
            there.until(READY, after=there.until("Ctrl-C again", after=place))
            ctrl_c_at_rest(there)
            assert there.ended() == 0
            assert "half a li!" not in there.output

    @pytest.mark.parametrize("num_beams", [1, 4])
    def test_what_a_model_says_is_not_obeyed(self, num_beams: int) -> None:
        reply = lambda request: growing(NASTY)  # noqa: E731
        with chatting(reply, replace(SAMPLING, num_beams=num_beams)) as there:
            place = started(there).ask("Hi", "tokens/s")
            there.ask("/history", "2 assistant: a")
            there.until(READY, after=place)
            assert "a␛[2J␛]0;title␇\ufffd31m [red]b[/red] ␛[31m:smile:c␡␀" in there.paper().text()
            for sequence in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\x1b[31m", "\x7f", "\x00"):
                assert sequence not in there.output

    @pytest.mark.parametrize("show_beams", [False, True])
    def test_beams_rewrite_themselves_even_beyond_the_screen(self, show_beams: bool) -> None:
        whole = "".join(f"第{n}行：你好，世界 and some words. " for n in range(30))
        others = ("second best\nof all", "third")

        def reply(request) -> Iterator[Chunk]:
            for end in range(5, len(whole), 5):
                text = whole[: end - 5] + ("甲乙" if end % 2 else "another end")
                time.sleep(0.005)
                yield Chunk(text, (text, f"{text} 二", "third") if show_beams else (), None, Usage(2, end))
            yield Chunk(whole, (whole, *others) if show_beams else (), "stop", Usage(2, 99))

        with chatting(reply, replace(SAMPLING, num_beams=3), columns=44, rows=10) as there:
            started(there).ask("Hi", "tokens/s")
            there.until(READY, after=there.words.index("tokens/s"))
            drawn = [state for state in there.states if "another end" in state[-400:] or "甲乙" in state[-400:]]
            assert len(drawn) >= 20
            typing = [state for state in there.states if "tokens/s" not in state]
            ends = [paper_of(there, state).text().replace("\n", "")[-200:] for state in typing[-14:-4]]
            # A state may end in the middle of a picture.
            assert any("another end" in end or "甲乙" in end for end in ends), "the end of the answer is what is drawn"
            unwrapped = there.paper().text().replace("\n", "")
            assert unwrapped.count("第0行") == 1, "what was drawn meanwhile is gone"
            assert unwrapped.replace(" ", "").count(whole.replace(" ", "")) == 1
            assert "another end" not in unwrapped and "甲乙" not in unwrapped
            assert ("beam 2: second best\n        of all" in there.paper().text()) is show_beams
            answer = there.output[: there.output.index("tokens/s")]
            assert answer.rindex("\x1b[?7h") > answer.rindex("\x1b[?7l"), "lines wrap again"
            assert answer.rindex("\x1b[?25h") > answer.rindex("\x1b[?25l"), "the cursor is back"

    def test_a_paste_of_several_lines_is_one_message(self) -> None:
        with chatting(lambda request: iter([json.dumps(request.turns[-1].content)])) as there:
            started(there).send("\x1b[200~one\n\n/two\n\x1b[201~")
            there.until("/two")
            there.ask("", r'"one\n\n/two"')

    def test_prompts_stay_out_of_answers_that_go_to_a_file(self, tmp_path: Path) -> None:
        def main() -> None:
            with (tmp_path / "answers.txt").open("w", encoding="utf-8") as file, redirect_stdout(file):
                chat_in_terminal(FakeEngine(), ChatHistory(), SAMPLING)  # type: ignore[arg-type]

        with terminal(main) as there:
            place = there.until(READY)
            there.send("Hi\r")
            there.until(READY, after=place)
            there.send("\x04")
            assert there.ended() == 0
        assert (tmp_path / "answers.txt").read_text(encoding="utf-8") == "Hi!\n"

    def test_bytes_of_another_encoding_do_not_end_the_chat(self) -> None:
        with chatting(lambda request: iter([f"read {request.turns[-1].content}"])) as there:
            started(there)
            os.write(there.number, "café".encode("latin-1") + b"\r")
            there.until("read caf\ufffd")

    def test_a_terminal_without_sequences_gets_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def main() -> None:
            monkeypatch.setenv("TERM", "dumb")
            chat_in_terminal(FakeEngine(), ChatHistory(), SAMPLING)  # type: ignore[arg-type]

        with terminal(main) as there:
            there.until("> ")
            there.ask("Hi", "Hi!")
            there.ask("/undo", "taken back: Hi")
            there.send("/exit\r")
            assert there.ended() == 0
            assert set(SEQUENCE.findall(there.output)) <= {("?12", "l"), ("?25", "h")}, "only those that begin a prompt"

    def test_lines_can_be_continued(self) -> None:
        with chatting(lambda request: iter([json.dumps(request.turns[-1].content)])) as there:
            started(there).ask("one\\", MORE)
            there.ask("two", r'"one\ntwo"')
            there.ask('"""three', MORE)
            there.ask("four", MORE)
            there.ask('"""', r'"three\nfour"')

    def test_keys_pressed_during_an_answer_wait_for_the_next_line(self) -> None:
        with chatting(lambda request: growing("A slow answer to you.", 0.03)) as there:
            started(there).ask("Hi", "A slow")
            there.send("typed ahead")
            there.until("tokens/s")
            there.until(f"{READY}typed ahead", after=there.words.index("tokens/s"))
            assert "A slow answer to you." in there.output, "the keys did not tear the answer"

    def test_undo_puts_the_question_back_into_the_line(self) -> None:
        with chatting() as there:
            started(there).ask("Hi", "tokens/s")
            place = there.ask("/undo", "> Hi")
            there.send(" there\r")
            there.until("tokens/s", after=place)
            there.ask("once more", "tokens/s")
            assert "> once more\nonce more!\n" in there.paper().text(), "only once"

    def test_waiting_for_ones_turn_is_told(self) -> None:
        places = [Chunk(place=2), Chunk(place=2), Chunk(place=1), Chunk("fine", (), "stop", Usage(2, 4))]
        with chatting(lambda request: iter(places)) as there:
            started(there).ask("Hi", "tokens/s")
            assert "> Hi\n(waiting; 2 in front)\n(waiting; 1 in front)\nfine\n" in there.paper().text()


def chat_with_a_real_model(base: str) -> None:
    """The program of a process of its own, whose standard streams are a terminal."""
    from onecard.config.base_model import ModelOptions
    from onecard.config.inference import InferenceOptions, LimitOptions
    from onecard.inference.engine import open_engine

    engine = open_engine(ModelOptions(model_path=base, bits=32, device="cpu"), InferenceOptions(), LimitOptions())
    sampling = SamplingOptions(max_new_tokens=400, min_new_tokens=400)
    in_terminal(lambda: chat_in_terminal(engine, ChatHistory(), sampling), columns=100, rows=30)


@needs_line_editor
def test_ctrl_c_stops_a_real_model(fork_server: ForkServer, lively_base: Path) -> None:
    """The whole way: a program of its own, generation in its thread, the signal from the terminal."""
    call = partial(fork_server.start_call, f"{__name__}:chat_with_a_real_model", str(lively_base), imports=(__name__,))
    with terminal_of(call, columns=100, rows=30) as there:
        started(there)
        for number, line in enumerate(["/set num_beams 1", "/set num_beams 3"]):
            place = there.ask(line, f"(num_beams = {1 + 2 * number})")
            place = there.until(READY, after=place)
            there.send("Hi\r")
            while len(there.words) < place + 40:
                there.until("", after=place)
                assert there._read(20)
            there.send("\x03")
            there.until(", stopped]", after=place)
        there.send("/exit\r")
        assert there.ended() == 0
        assert "Traceback" not in there.output
