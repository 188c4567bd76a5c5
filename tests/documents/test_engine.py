"""Answers out of documents: what the model is shown, what stands below its answer, and the same over the API."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from onecard.config.base_model import ModelOptions
from onecard.config.inference import DOCUMENTS_MODEL, InferenceOptions, LimitOptions, SamplingOptions
from onecard.console import run_main
from onecard.data.messages import Turn
from onecard.documents.chunks import TextChunk
from onecard.documents.engine import DocumentsEngine, open_search
from onecard.documents.index import DocumentIndex, StoredChunk
from onecard.documents.reading import Block
from onecard.documents.sources import (
    checked_quotes,
    cited_numbers,
    listing,
    source_fields,
    unfounded_numbers,
    without_listing,
)
from onecard.documents.summary import DocumentSummary
from onecard.errors import ConfigError, DataError
from onecard.inference.call import Chunk
from onecard.inference.engine import GenerationRequest, InferenceEngine, LimitExceeded, open_engine
from onecard.inference.history import ChatHistory, PromptTooLong, prompt_budget
from onecard.programs import documents
from onecard.serve.terminal.chat import TerminalChat
from onecard.serve.terminal.screen import Screen
from tests.serve.api.serving import Running, client_of, events_of, long_context_base, serving

PASSAGES = [
    StoredChunk(1, "manual.pdf", 3, "", "The pump moves 120 litres\na second."),
    StoredChunk(2, "guide.md", 0, "Guide > Setup", "Open the valve first."),
]
GREEDY = SamplingOptions(max_new_tokens=16)


@pytest.fixture(scope="module")
def index_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    index = DocumentIndex(folder, create=True)
    text = (
        "The Karvel pump moves 120 litres of water a second. It stands behind the old mill, is painted dark green, and "
    )
    index.put("/a", "manual.pdf", "1", [TextChunk(text + "was greased last by the engineer in charge.", 3, ())])
    index.put("/a", "guide.md", "2", [TextChunk("Open the valve of the Karvel pump slowly.", 0, ("Guide", "Setup"))])
    index.put("/a", "手册.md", "3", [TextChunk("松岭泵站每运行900小时需要保养一次。", 0, ("保养",))])
    index.close()
    return folder


@pytest.fixture(scope="module")
def engine(index_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DocumentsEngine]:
    base = long_context_base(tmp_path_factory.mktemp("base"))
    model = ModelOptions(model_path=str(base), bits=32, device="cpu", gradient_checkpointing=False)
    kind = partial(DocumentsEngine, open_search(index_folder))
    found = open_engine(model, InferenceOptions(prompt_type="alpaca"), LimitOptions(), model_name="tiny", kind=kind)
    assert isinstance(found, DocumentsEngine)
    yield found
    found.close()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[GenerationRequest]]:
    """Let every engine say this; returns the requests that it gets."""
    requests: list[GenerationRequest] = []

    def script(text: str) -> list[GenerationRequest]:
        def stream(self: Any, request: GenerationRequest, cancel: Any = None) -> Iterator[list[Chunk]]:
            requests.append(request)
            yield [Chunk(text[:3])] * request.n
            yield [Chunk(text, finish_reason="stop")] * request.n

        monkeypatch.setattr(InferenceEngine, "stream", stream)
        return requests

    return script


def asked(*texts: str, **more: Any) -> GenerationRequest:
    """A question behind others and their answers."""
    turns = tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))
    return GenerationRequest(turns, sampling=GREEDY, adapter=DOCUMENTS_MODEL, **more)


def test_the_model_reads_the_passages_and_its_answer_has_their_places(engine: Any, scripted: Any) -> None:
    requests = scripted('It moves "120 litres of water" [1].')
    chunks = [chunk for (chunk,) in engine.stream(asked("How many litres does the Karvel pump move?"))]
    prompt = requests[0].turns[-1].content
    assert (
        "[1] manual.pdf, page 3\nThe Karvel pump moves 120 litres" in prompt and "[2] guide.md, Guide > Setup" in prompt
    )
    assert prompt.endswith("Question: How many litres does the Karvel pump move?")
    assert engine.adapter_of(requests[0].adapter) == engine.adapter_of("") == engine.names[0]
    assert chunks[0].text == "It " and not chunks[0].sources
    assert chunks[-1].text == 'It moves "120 litres of water" [1].\n\nSources:\n\n- [1] manual.pdf, page 3'
    first = dict(chunks[-1].sources[0])
    assert (first["file"], first["page"], first["is_cited"]) == ("manual.pdf", 3, True)
    assert first["quotes"] == [{"text": "120 litres of water", "is_found": True}]
    assert not chunks[-1].sources[1]["is_cited"] and chunks[-1].sources[1]["page"] is None


def test_a_question_in_chinese_is_prompted_and_cited_in_chinese(engine: Any, scripted: Any) -> None:
    requests = scripted("每900小时一次 [1]。")
    *_, (last,) = engine.stream(asked("松岭泵站运行多少小时要保养？"))
    assert "问题：松岭泵站" in requests[0].turns[-1].content
    assert last.text.endswith("来源:\n\n- [1] 手册.md, 保养")


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("Who painted the Sistine Chapel?", "That is not in the documents."),
        ("蜘蛛有几条腿？", "文档里没有这方面的内容。"),
    ],
)
def test_what_is_not_in_the_documents_is_said_without_the_model(
    engine: Any, scripted: Any, question: str, says: str
) -> None:
    requests = scripted("I know it all the same.")
    assert [[c.text for c in chunks] for chunks in engine.stream(asked(question, n=2))] == [[says, says]]
    assert requests == []
    with pytest.raises(LimitExceeded, match="--n"):
        list(engine.stream(asked(question, n=99)))


def test_a_follow_up_leans_on_the_question_before_and_lists_of_sources_are_not_shown_again(
    engine: Any, scripted: Any
) -> None:
    requests = scripted("900 [1]")
    first = "120.\n\nSources:\n\n- [1] manual.pdf, page 3"
    *_, (last,) = engine.stream(asked("How many litres does the Karvel pump move?", first, "And its valve?"))
    assert [turn.content for turn in requests[0].turns[:-1]] == ["How many litres does the Karvel pump move?", "120."]
    assert {source["file"] for source in last.sources} >= {"guide.md", "manual.pdf"}


def test_other_models_raw_prompts_and_held_answers_are_left_as_they_are(engine: Any, scripted: Any) -> None:
    requests = scripted("{}")
    question = asked("How many litres does the Karvel pump move?")
    list(engine.stream(replace(question, adapter="tiny")))
    list(engine.stream(replace(question, turns=(), prompt_ids=(5, 6))))
    assert requests[0] == replace(question, adapter="tiny")
    assert requests[1].prompt_ids == (5, 6)
    *_, (last,) = engine.stream(replace(question, grammar=object()))  # type: ignore[arg-type]
    assert last.text == "{}" and len(last.sources) == 2
    *_, (last,) = engine.stream(
        replace(question, turns=(Turn("tool_list", "[]"), *question.turns), prompt_type="chatml")
    )
    assert last.text == "{}"


def test_passages_and_history_make_room_for_each_other(engine: Any, scripted: Any, monkeypatch: Any) -> None:
    requests = scripted("Yes.")
    old = [text for k in range(100) for text in (f"Old question number {k}?", "An old answer. " * 20)]
    list(engine.stream(asked(*old, "How many litres does the Karvel pump move?")))
    assert 2 < len(requests[0].turns) < 201 and "[2]" in requests[0].turns[-1].content
    list(engine.stream(asked("Karvel pump litres?")))
    for _ in range(2):  # one token less than the prompt before takes: one passage fits, then a part of one
        limit = engine.count_tokens(requests[-1].turns) + GREEDY.max_new_tokens - 1
        monkeypatch.setattr(DocumentsEngine, "context_limit", limit)
        list(engine.stream(asked("Karvel pump litres?")))
        prompt = requests[-1].turns[-1].content
        assert "[1]" in prompt and "[2] " not in prompt
        assert engine.count_tokens(requests[-1].turns) <= prompt_budget(limit, 16)
    monkeypatch.setattr(DocumentsEngine, "context_limit", 100)
    with pytest.raises(PromptTooLong):
        list(engine.stream(asked("Karvel pump litres?")))


def test_an_adapter_of_the_same_name_is_refused(engine: Any) -> None:
    with pytest.raises(ConfigError, match="choose another name"):
        engine.add_adapter(DOCUMENTS_MODEL, "x")
    adapters = type("Adapters", (), {"names": ("base", DOCUMENTS_MODEL)})()
    with pytest.raises(ConfigError, match="--documents: an adapter is called documents"):
        DocumentsEngine(engine._search, adapters, LimitOptions())


def test_quotes_are_looked_up_in_the_passage_that_they_name() -> None:
    answer = (
        'It "moves 120 litres a second." [1], “open the Valve” [2], and "moves 120 litres" as [2] says; "far away" [9]'
    )
    assert [(quote.number, quote.is_found) for quote in checked_quotes(answer, PASSAGES)] == [
        (1, True), (2, True), (2, False), (9, False),
    ]  # fmt: skip
    assert 'not in [9] word for word: "far away"' in listing(answer, PASSAGES, "en")
    assert [source["quotes"] for source in source_fields("No quote.", PASSAGES)] == [[], []]


def test_a_number_that_stands_in_no_passage_is_named() -> None:
    assert unfounded_numbers("It moves 120 litres [1], not 1,200; see [12]. 3 steps, 4.5 bar.", PASSAGES) == [
        "1,200",
        "4.5",
    ]
    thousand = [PASSAGES[0]._replace(text="1200 litres")]
    assert unfounded_numbers("1,200 litres", thousand) == []
    assert listing("47 litres [1].", PASSAGES, "en").endswith("\n- numbers of the answer that stand in no passage: 47")
    assert listing("47 升 [1]。", PASSAGES, "zh").endswith("\n- 回答里有而所有段落都没有的数字：47")
    answer = "47 litres [1]."
    assert without_listing(answer + listing(answer, PASSAGES, "en")) == answer


def test_cited_passages_are_listed_and_all_where_none_is() -> None:
    assert cited_numbers("A [2]. B [1][9][2]. list[0]", 2) == [2, 1]
    assert listing("Yes [2].", PASSAGES, "en") == "\n\nSources:\n\n- [2] guide.md, Guide > Setup"
    shown = listing("Yes.", PASSAGES, "zh")
    assert shown == "\n\n给模型看过的段落:\n\n- [1] manual.pdf, 第 3 页\n- [2] guide.md, Guide > Setup"
    assert listing("That is not in the documents.", PASSAGES, "en") == ""
    for language in ("en", "zh"):
        assert without_listing("Yes [2]." + listing("Yes [2].", PASSAGES, language)) == "Yes [2]."
    assert without_listing("Sources:\n\n- mine") == "Sources:\n\n- mine"


@pytest.fixture(scope="module")
def server(engine: DocumentsEngine) -> Iterator[Running]:
    with serving(engine, LimitOptions()) as running:
        yield running


QUESTION = "How many litres of water does the Karvel pump move?"


def test_the_api_has_a_model_of_that_name_and_a_field_of_sources(server: Running) -> None:
    assert [model.id for model in client_of(server).models.list()] == ["tiny", DOCUMENTS_MODEL]
    body = server.chat(QUESTION, model=DOCUMENTS_MODEL).json()
    assert [source["file"] for source in body["onecard"]["sources"]] == ["manual.pdf", "guide.md"]
    text = body["choices"][0]["message"]["content"]
    assert "- [1] manual.pdf, page 3" in text
    events = events_of(server.chat(QUESTION, model=DOCUMENTS_MODEL, stream=True).text)
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events if event != "[DONE]"]
    assert "".join(pieces) == text
    assert [event for event in events if event != "[DONE]" and "onecard" in event][-1]["onecard"] == body["onecard"]
    assert "onecard" not in server.chat(QUESTION).json()
    answer = server.post("/v1/responses", {"model": DOCUMENTS_MODEL, "input": QUESTION, "max_output_tokens": 8}).json()
    assert len(answer["onecard"]["sources"]) == 2


def test_the_other_paths_know_the_model_too(server: Running) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 2}),
        ("/v1/completions", {"prompt": "Hi", "echo": True, "logprobs": 1, "max_tokens": 1}),
        ("/v1/embeddings", {"input": "Hi"}),
        ("/tokenize", {"prompt": "Hi"}),
    ]
    for path, body in cases:
        assert server.post(path, {"model": DOCUMENTS_MODEL, **body}).status_code == 200, path
    refused = server.chat("蜘蛛有几条腿？", model=DOCUMENTS_MODEL).json()
    assert refused["choices"][0]["message"]["content"] == "文档里没有这方面的内容。" and "onecard" not in refused


def example(name: str, url: str) -> Any:
    """The example of docs/en/documents.md for a library, with this server's address; returns what it printed last."""
    text = (Path(__file__).parents[2] / "docs/en/documents.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"```python\n((?:(?!```).)*\b{name}\b.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8000", url), names)
    return names["answer"]


def test_langchain_asks_as_in_the_documentation(server: Running) -> None:
    pytest.importorskip("langchain_openai")
    assert "not in the documents" in str(example("langchain_openai", server.url).content)


# Seen with llama-index-llms-openai-like 0.8.1 and llama-index-core 0.14.25, which bring 20 packages and openai below 3.
NEEDS_LLAMA_INDEX = "llama-index-llms-openai-like is not installed; it needs an environment of its own (openai below 3)"


def test_llama_index_asks_as_in_the_documentation(server: Running) -> None:
    pytest.importorskip("llama_index.llms.openai_like", reason=NEEDS_LLAMA_INDEX)
    assert "not in the documents" in str(example("llama_index", server.url))


def test_llama_index_streams_the_same_answer_with_its_sources(server: Running) -> None:
    openai_like = pytest.importorskip("llama_index.llms.openai_like", reason=NEEDS_LLAMA_INDEX)
    from llama_index.core.llms import ChatMessage

    llm = openai_like.OpenAILike(
        api_base=f"{server.url}/v1",
        api_key="none",
        model=DOCUMENTS_MODEL,
        is_chat_model=True,
        temperature=0,
        max_tokens=8,
    )
    turns = [ChatMessage(role="user", content=QUESTION)]
    whole = llm.chat(turns)
    assert "- [1] manual.pdf, page 3" in whole.message.content
    assert whole.raw.onecard["sources"][0]["file"] == "manual.pdf"
    assert "".join(piece.delta or "" for piece in llm.stream_chat(turns)) == whole.message.content


def test_the_terminal_has_a_command_for_it(engine: Any, scripted: Any, capsys: Any) -> None:
    scripted("It moves 120 litres [1].")
    chat = TerminalChat(engine, ChatHistory(), GREEDY, Screen(quiet=True))
    chat.stops_on_ctrl_c = False
    chat.do_documents("on")
    chat.ask("How many litres does the Karvel pump move?")
    assert "- [1] manual.pdf, page 3" in capsys.readouterr().out
    chat.do_documents("off")
    assert chat.adapter == ""
    with pytest.raises(DataError, match="on or off"):
        chat.do_documents("maybe")


def test_without_an_index_the_command_says_how_to_get_one() -> None:
    from tests.serve.terminal.fake_terminal import FakeEngine

    chat = TerminalChat(FakeEngine(), ChatHistory(), GREEDY, Screen(quiet=True))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="start with --documents and the folder of an index"):
        chat.do_documents("on")


def test_one_question_in_the_terminal_prints_the_answer_alone(
    index_folder: Path, tiny_base: Path, scripted: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    scripted("Nobody is asked.")
    words = ["--index", str(index_folder), "--model_path", str(tiny_base), "--device", "cpu", "--bits", "32"]
    assert run_main(lambda: documents.main(["ask", "Who", "painted", "the chapel?", *words])) == 0
    assert capsys.readouterr().out == "That is not in the documents.\n"
    monkeypatch.setattr("onecard.inference.engine.open_engine", lambda *words, **more: pytest.fail("a model is loaded"))
    assert run_main(lambda: documents.main(["ask", "x", *words[2:], "--index", str(index_folder / "none")])) == 1
    assert "holds no index; make one" in capsys.readouterr().err


def blocks_of(n: int) -> list[Block]:
    return [
        Block(" ".join(f"Fact {k} of part {part}." for k in range(40)), headings=(f"P{part}",)) for part in range(n)
    ]


def test_a_long_document_is_summarised_in_parts_that_fit(engine: Any, scripted: Any) -> None:
    requests = scripted("A short summary.")
    summary = DocumentSummary(engine, SamplingOptions(max_new_tokens=64))
    assert [chunk.text for chunk in summary.of(blocks_of(60))][-1] == "A short summary."
    assert summary.n_asked == len(requests) > 4
    texts = [request.turns[0].content for request in requests]
    assert all(sum(f"part {part}." in text for text in texts[:-1]) >= 1 for part in range(60)), "every part is read"
    assert texts[-1].startswith("These are summaries") and "A short summary.\n\nA short summary." in texts[-1]
    assert all(engine.count_tokens(request.turns) <= prompt_budget(8192, 64) for request in requests)


def test_a_short_document_is_asked_for_once_and_a_context_that_is_too_small_is_named(
    engine: Any, scripted: Any, monkeypatch: Any
) -> None:
    requests = scripted("摘要。")
    summary = DocumentSummary(engine, GREEDY)
    assert list(summary.of([Block("一个短文档。")]))[-1].text == "摘要。"
    assert len(requests) == 1 and requests[0].turns[0].content.startswith("用几句话概括")
    monkeypatch.setattr(DocumentsEngine, "context_limit", 150)
    with pytest.raises(DataError, match="the context of 150 tokens is too short"):
        list(DocumentSummary(engine, GREEDY).of(blocks_of(2)))


def test_summaries_that_do_not_get_shorter_end_it(engine: Any, scripted: Any) -> None:
    scripted("word " * 1500)
    with pytest.raises(DataError, match="do not become fewer"):
        list(DocumentSummary(engine, GREEDY).of(blocks_of(60)))


def test_a_file_that_cannot_be_summarised_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.md").write_text("", encoding="utf-8")
    for name, says in {"empty.md": "it holds no text", "none.md": "No such file"}.items():
        assert run_main(lambda name=name: documents.main(["summarize", str(tmp_path / name), "--bits", "32"])) == 1
        assert f"{name}: {says}" in capsys.readouterr().err
