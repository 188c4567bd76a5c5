"""Chats are saved whole and come back equal; whatever else a file holds is refused in words, or noted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.config.inference import SamplingOptions
from onecard.data.messages import Turn
from onecard.errors import DataError
from onecard.inference.chat_file import MAX_BYTES, MAX_MESSAGES, SavedChat, load_chat, read_chat, save_chat, to_json
from onecard.inference.history import ChatHistory

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "你好 👋"}]
TURNS = (Turn("user", "Hi"), Turn("assistant", "你好 👋"))

texts = st.text(max_size=30)
sessions = st.builds(
    lambda system, contents: ChatHistory(
        system, tuple(Turn("assistant" if k % 2 else "user", text) for k, text in enumerate(contents))
    ),
    texts,
    st.lists(texts, max_size=7),
)
samplings = st.none() | st.builds(
    SamplingOptions,
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 1000),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3),
    seed=st.integers(0, 2**40),
)
chats = st.builds(
    SavedChat, sessions, samplings, adapter=texts, prompt_type=st.sampled_from(["", "auto", "chatml"]), title=texts,
    created=st.just("2025-01-31T12:00:00+00:00"),
)  # fmt: skip


@given(chats)
def test_what_is_saved_comes_back(chat: SavedChat) -> None:
    assert read_chat(to_json(chat)) == (chat, ())
    assert read_chat(to_json(chat).encode("utf-8")) == (chat, ())


def test_the_file_is_readable_and_says_what_it_is(tmp_path: Path) -> None:
    sampling = SamplingOptions(temperature=0.7)
    save_chat(SavedChat(ChatHistory("Be kind.", TURNS), sampling, adapter="my-run", title="Hi"), tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "你好 👋" in text, "characters, not escapes"
    content = json.loads(text)
    assert content.pop("created")[:2] == "20"
    assert content.pop("sampling")["temperature"] == 0.7
    assert content == {
        "onecard_chat": 1, "title": "Hi", "adapter": "my-run", "system": "Be kind.", "messages": HELLO,
    }  # fmt: skip
    assert load_chat(tmp_path / "a.json").chat.session == ChatHistory("Be kind.", TURNS)


def test_half_a_character_does_not_stop_the_saving(tmp_path: Path) -> None:
    save_chat(
        SavedChat(ChatHistory("", (Turn("user", "a\ud83d!"), Turn("assistant", "\ud83d\ude00")))), tmp_path / "a.json"
    )
    loaded = load_chat(tmp_path / "a.json").chat.session
    assert [turn.content for turn in loaded.turns] == ["a\ufffd!", "😀"]


def test_a_template_out_of_a_file_is_not_named() -> None:
    assert "prompt_type" not in json.loads(to_json(SavedChat(prompt_type="/data/me/my.jinja")))


def test_saving_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(DataError, match=r"a\.json: the chat cannot be written there \(No space left"):
            save_chat(SavedChat(), path)
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"], "no half file stays"
    save_chat(SavedChat(), path)
    assert json.loads(path.read_text(encoding="utf-8"))["messages"] == []


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "a.json")
    save_chat(SavedChat(), tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real" / "a.json").is_file()


@pytest.mark.parametrize("path", ["missing/a.json", ""])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        save_chat(SavedChat(), tmp_path / path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["missing.json", ""])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_chat(tmp_path / path)


@pytest.mark.parametrize(
    "content",
    [
        HELLO,
        {"messages": HELLO},
        {"onecard_chat": 1, "messages": HELLO},
        [
            HELLO[0],
            {"role": "assistant", "content": [{"type": "text", "text": "你好"}, {"type": "text", "text": " 👋"}]},
        ],
    ],
)
def test_other_programs_messages_are_read(content) -> None:
    assert read_chat(json.dumps(content)) == (SavedChat(ChatHistory("", TURNS)), ())


@pytest.mark.parametrize("encode", [lambda t: t, lambda t: t.encode(), lambda t: b"\xef\xbb\xbf" + t.encode()])
def test_text_bytes_and_a_byte_order_mark(encode) -> None:
    assert read_chat(encode(json.dumps(HELLO, ensure_ascii=False))).chat.session.turns == TURNS


def test_the_system_prompt_may_be_the_first_message() -> None:
    system = {"role": "system", "content": "Be kind."}
    assert read_chat(json.dumps([system, *HELLO])).chat.session == ChatHistory("Be kind.", TURNS)
    same = {"system": "Be kind.", "messages": [system, *HELLO]}
    assert read_chat(json.dumps(same)).chat.session == ChatHistory("Be kind.", TURNS)
    with pytest.raises(DataError, match="two system prompts"):
        read_chat(json.dumps({**same, "system": "Be short."}))


def test_a_question_without_an_answer_and_an_alpaca_input_come_back() -> None:
    session = ChatHistory("", (Turn("user", "Translate", "cat"),))
    assert read_chat(to_json(SavedChat(session))).chat.session == session


def test_unknown_keys_are_noted_once_and_a_strange_prompt_type_is_not_taken() -> None:
    content = {
        "messages": [{**message, "name": "me"} for message in HELLO],
        "sytem": "x", "sampling": {"temprature": 1, "top_k": 5}, "prompt_type": "/etc/passwd",
    }  # fmt: skip
    chat, notes = read_chat(json.dumps(content))
    assert chat == SavedChat(ChatHistory("", TURNS), SamplingOptions(top_k=5))
    assert len(notes) == 4
    text = "\n".join(notes)
    assert "'sytem' is not known here and was left out (did you mean system?)" in text
    assert "did you mean temperature?" in text
    assert "a message: 'name'" in text
    assert "'/etc/passwd' is not built in" in text


def test_nothing_that_a_chat_names_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    named = {"adapter": "/etc/passwd", "prompt_type": "/etc/hostname", "title": "../../x", "messages": HELLO}
    path.write_text(json.dumps(named), encoding="utf-8")
    opened = []
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **kw: (opened.append(self), real_open(self, *args, **kw))[1])
    monkeypatch.setattr("builtins.open", lambda *args, **kw: pytest.fail(f"opened {args[0]}"))
    assert load_chat(path).chat.adapter == "/etc/passwd", "a name to look up, which no list of adapters holds"
    assert opened == [path]


def messages(*pairs: tuple) -> str:
    return json.dumps([{"role": role, "content": content} for role, content in pairs])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("", r"not JSON \(line 1, column 1"),
        ("{", "not JSON"),
        ('[\n{"role": "user",}]', "not JSON .line 2"),
        (b"\xff\xfe[\x00]\x00", r"not UTF-8 text \(byte 1\)"),
        ("[]".encode("utf-16"), "not UTF-8"),
        ('["\ud800"]', "not UTF-8"),
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
        ("1" * 5000, "not usable JSON"),
        ("12", "holds a number"),
        ("null", "holds null"),
        ('"text"', "holds a text"),
        ("{}", "no `messages`"),
        ('{"onecard_chat": 2, "messages": []}', "version 2, and this program reads version 1"),
        ('{"onecard_chat": true, "messages": []}', "version true or false"),
        ('{"onecard_chat": "1", "messages": []}', "version '1'"),
        ('{"onecard_chat": [[1]], "messages": []}', "version a list"),
        ('{"messages": {}}', "`messages` is an object"),
        ('{"messages": [], "system": 1}', "`system` is a number"),
        ('{"messages": [], "adapter": ["a"]}', "`adapter` is a list"),
        ('{"messages": [], "title": null}', "`title` is null"),
        (json.dumps({"messages": [], "title": "x" * 301}), "`title` has 301 characters; 300"),
        ('["Hi"]', "message 1 is a text"),
        ('[{"content": "Hi"}]', "message 1: the role is null"),
        ('[{"role": {"a": 1}, "content": "Hi"}]', "message 1: the role is an object"),
        ('[{"role": "user"}]', "message 1 has no content"),
        (messages(("user", None)), "message 1: `content` is null"),
        (messages(("user", 5)), "message 1: `content` is a number"),
        (messages(("user", [{"type": "image_url"}])), "message 1: .*images"),
        (messages(("user", [{"type": "text", "text": 1}])), "message 1: `text` is a number"),
        (messages(("user", "a"), ("tool\x1b[31m", "b")), r"message 2: the role is 'tool\\x1b\[31m'"),
        (messages(("user", "a"), ("user", "b")), "message 2 has the role user; assistant must stand there"),
        (messages(("assistant", "a")), "message 1 has the role assistant"),
        (messages(("user", "a"), ("system", "b")), "message 2: the role is system, which only the first"),
        (r'[{"role": "user", "content": "\ud83d"}]', "message 1: `content` holds half a character"),
        ('{"messages": [], "sampling": 1}', "`sampling` is a number"),
        ('{"messages": [], "sampling": {"temperature": "hot"}}', "temperature is 'hot'; a number"),
        ('{"messages": [], "sampling": {"temperature": -1}}', "sampling: temperature: -1.0 is not between"),
        ('{"messages": [], "sampling": {"temperature": NaN}}', "sampling: temperature: nan"),
        ('{"messages": [], "sampling": {"top_k": 1.5}}', "top_k is 1.5; a whole number"),
        ('{"messages": [], "sampling": {"top_k": true}}', "top_k is true or false; a whole number"),
        ('{"messages": [], "sampling": {"stop": "x"}}', "stop is a text; a list of texts"),
        ('{"messages": [], "sampling": {"stop": [""]}}', "sampling: stop: is empty"),
        ('{"messages": [], "sampling": {"seed": 1' + "0" * 400 + "}}", "seed is larger than"),
        ('{"messages": [], "sampling": {"temperature": -1' + "0" * 400 + "}}", "temperature is larger than"),
        (json.dumps([HELLO[0]] * (MAX_MESSAGES + 1)), "holds 10001 messages, and a chat may have 10000"),
        (b" " * (MAX_BYTES + 1), "larger than 10 MB"),
        ("字" * (MAX_BYTES // 3 + 1), "larger than 10 MB"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused_in_words(data, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_chat(data, "my.json")
    assert str(caught.value).startswith("my.json: ")
    assert len(str(caught.value)) < 300
    assert "\x1b" not in str(caught.value)


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "big.json").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(DataError, match="larger than 10 MB"):
        load_chat(tmp_path / "big.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "system"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "messages", "sampling", "system", "stop", "seed"]), inner),
    max_leaves=12,
)  # fmt: skip


@given(json_values)
def test_any_json_is_a_chat_or_refused(value) -> None:
    try:
        chat, _ = read_chat(json.dumps(value))
    except DataError:
        return
    assert read_chat(to_json(chat)).chat.session == chat.session


@given(st.binary(max_size=60))
def test_any_bytes_are_a_chat_or_refused(data: bytes) -> None:
    try:
        read_chat(data)
    except DataError as reason:
        assert str(reason).startswith("the chat: ")
