"""Tool calls: read in every form, written by the template's own branches, and learned without their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onecard.data.built_in_templates import FOLDER, built_in_name, first_version, without_bos
from onecard.data.chat_template import load_template
from onecard.data.dataset import encode_dataset
from onecard.data.encode import IGNORE_INDEX, DroppedSample, EncodeSettings, encode_prompt, encode_sample
from onecard.data.formats import HERMES_SYSTEM, TOOLS_CALLED, TOOLS_IN_SYSTEM, to_sample
from onecard.data.jinja_chat import render_chat
from onecard.data.messages import Conversation, ToolCall, Turn, tools_of
from onecard.data.questions import to_question
from onecard.data.values import UnusableRecord
from tests.data.template_logics import TEMPLATES
from tests.data.tokenizer_kinds import KINDS
from tests.data.tool_template_logics import TOOL_TEMPLATES

ADD = {"name": "add", "description": "Adds <两> numbers.", "parameters": {"type": "object", "properties": {"x": {}}}}
TOOLS = [{"type": "function", "function": ADD}]
ROOMY = EncodeSettings(10_000)
USER, DONE = {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "Three."}
NEXT, LAST = {"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "You are welcome."}


def call(call_id: str = "", text: bool = False, **arguments: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": json.dumps(arguments, ensure_ascii=False) if text else arguments}
    return {**({"id": call_id} if call_id else {}), "type": "function", "function": function}


def calling(*calls: dict[str, Any], content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content: str, call_id: str = "") -> dict[str, Any]:
    return {"role": "tool", "content": content, **({"tool_call_id": call_id} if call_id else {})}


ONE = [USER, calling(call("abcdefgh1", x=1)), result("3", "abcdefgh1"), DONE, NEXT, LAST]
TWO = [USER, calling(call("abcdefgh1", x=1), call("abcdefgh2", x=[2.5, "二"])), result("3", "abcdefgh1"),
       result('{"y": 4}', "abcdefgh2"), DONE]  # fmt: skip
IN_STEPS = [USER, calling(call("abcdefgh1", x=1)), result("3", "abcdefgh1"), calling(call("abcdefgh2", x=2)),
            result("5", "abcdefgh2"), DONE]  # fmt: skip
ONLY_A_CALL = [USER, calling(call("abcdefgh1", x=1))]
CONVERSATIONS = {"one": ONE, "two": TWO, "in-steps": IN_STEPS, "only-a-call": ONLY_A_CALL, "none": [USER, DONE]}

REFUSED = {
    ("llama-3.1", "two"): "single tool-calls at once",
    ("gpt-oss", "two"): "does not write tool calls down",  # it writes the first one
    ("deepseek-r1", "in-steps"): "behind another prompt than it asks with",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = KINDS["llama3"](tmp_path_factory.mktemp("llama3"))
    tokenizer.add_tokens(["<|call|>"], special_tokens=True)
    return tokenizer


def sample_of(record: dict[str, Any]) -> Conversation:
    sample = to_sample(record, "x:1").sample
    assert isinstance(sample, Conversation)
    return sample


def learned_texts(tokenizer: Any, sample: Any) -> list[str]:
    """The learned texts of one sample, in order."""
    runs: list[list[int]] = [[]]
    for token_id, label in zip(sample.input_ids, sample.labels, strict=True):
        if label != IGNORE_INDEX:
            runs[-1].append(token_id)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_all_forms_mean_the_same():
    wanted = sample_of({"messages": ONE, "tools": TOOLS}).turns
    without_ids = tuple(
        Turn(turn.role, turn.content, tool_calls=tuple(ToolCall(c.name, c.arguments) for c in turn.tool_calls))
        for turn in wanted
    )
    assert [turn.role for turn in wanted[:3]] == ["tool_list", "user", "assistant"]
    assert wanted[2].tool_calls == (ToolCall("add", '{"x": 1}', "abcdefgh1"),)
    as_text = [USER, calling(call("abcdefgh1", text=True, x=1)) | {"content": None}, *ONE[2:]]
    assert sample_of({"messages": as_text, "tools": json.dumps([ADD])}).turns == wanted
    earlier = [USER, {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"x":1}'}},
               {"role": "function", "content": "3"}, *ONE[3:]]  # fmt: skip
    assert sample_of({"messages": earlier, "functions": [ADD]}).turns == without_ids
    names = {"user": "human", "assistant": "gpt"}
    spoken = [{"from": names.get(m["role"]), "value": m["content"]} for m in ONE]
    spoken[1] = {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'}
    spoken[2] = {"from": "observation", "value": "3"}
    assert sample_of({"conversations": spoken, "tools": json.dumps([ADD])}).turns == without_ids
    spoken[1] = {"from": "gpt", "value": "<tool_call>\n{'name': 'add', 'arguments': {'x': 1}}\n</tool_call>"}
    spoken[2] = {"from": "tool", "value": "<tool_response>\n3\n</tool_response>"}
    assert sample_of({"conversations": spoken, "tools": json.dumps([ADD])}).turns == without_ids
    system = f"You are a function calling AI model. <tools> {json.dumps([ADD])} </tools> Use <tool_call></tool_call>"
    shaped = to_sample({"conversations": [{"from": "system", "value": system}, *spoken]}, "x:1")
    assert (shaped.sample.turns, shaped.notes) == (without_ids, [HERMES_SYSTEM, TOOLS_CALLED])


def test_a_system_text_that_lists_the_tools_itself_stays():
    spoken = [{"role": "system", "content": "Use <tools>add</tools>, or say <tool_call>{}</tool_call>."}, USER,
              {"role": "assistant", "content": '<tool_call>{"name": "add"}</tool_call>'}]  # fmt: skip
    shaped = to_sample({"messages": spoken, "tools": TOOLS}, "x:1")
    assert [turn.content for turn in shaped.sample.turns] == [message["content"] for message in spoken]
    assert shaped.notes == [TOOLS_IN_SYSTEM]
    # Without tools a text is a text.
    assert sample_of({"messages": spoken[1:]}).turns[1].tool_calls == ()


@pytest.mark.parametrize("name", [*TOOL_TEMPLATES, "chatml"])
@pytest.mark.parametrize("which", CONVERSATIONS)
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_ids_are_those_of_apply_chat_template_and_calls_are_learned(tokenizer, name, which, system):
    tokenizer.chat_template = TOOL_TEMPLATES.get(name) or (FOLDER / "chatml.jinja").read_text(encoding="utf-8")
    template = load_template("auto", tokenizer)
    tools = None if name == "deepseek-r1" else TOOLS  # it writes no tools down
    messages = [*([{"role": "system", "content": system}] if system and name != "hermes" else []),
                *CONVERSATIONS[which]]  # fmt: skip
    sample = sample_of({"messages": messages, "tools": tools})
    coded = encode_sample(sample, template, tokenizer, ROOMY)
    if reason := REFUSED.get((name, which)):
        assert isinstance(coded, DroppedSample)
        assert reason in coded.reason
        return
    assert isinstance(coded, list)
    theirs = messages
    if name == "deepseek-r1":
        theirs = [
            m | {"tool_calls": [call(text=True, **c["function"]["arguments"]) for c in m["tool_calls"]]}
            if "tool_calls" in m else m
            for m in messages
        ]  # fmt: skip
    found = [text for one in coded for text in learned_texts(tokenizer, one)]
    n_answers = 0
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue

        def rendered(upto: int, prompt: bool) -> str:
            text = tokenizer.apply_chat_template(theirs[:upto], tools, tokenize=False, add_generation_prompt=prompt)
            assert isinstance(text, str)
            return text

        asked = rendered(k, True)
        before = sample.turns[: k + (tools is not None)]
        prompt = encode_prompt(before, template, tokenizer)
        adds = not asked.startswith("<s>")
        assert prompt == tokenizer(asked, add_special_tokens=adds)["input_ids"]
        (trained, *_) = [one for one in coded if one.input_ids[: len(prompt)] == prompt]
        text = found[n_answers]
        closed = text.removesuffix("<|return|>") if name == "gpt-oss" else text
        whole = rendered(k + 1, False).rstrip("\n")
        if "<think>\n" not in asked and trained is coded[-1] and k == len(messages) - 1:
            ids = tokenizer(whole, add_special_tokens=adds)["input_ids"]
            assert trained.input_ids == ids
        assert closed.strip() and closed in tokenizer.decode(trained.input_ids)
        for function in (c["function"] for c in message.get("tool_calls", ())):
            assert "add" in text and json.dumps(function["arguments"], ensure_ascii=False) in text
        if "tool_calls" not in message:
            assert message["content"] in text
            assert "add" not in text and "tool_call" not in text
        assert "result" not in text and "1 + 2" not in text and "think>" not in text
        n_answers += 1
    assert len(found) == n_answers


def test_calls_that_a_template_ends_with_a_token_of_their_own(tokenizer):
    tokenizer.chat_template = TOOL_TEMPLATES["gpt-oss"]
    coded = encode_sample(
        sample_of({"messages": ONLY_A_CALL, "tools": TOOLS}), load_template("auto", tokenizer), tokenizer, ROOMY
    )
    (text,) = learned_texts(tokenizer, coded[0])
    assert text.endswith('{"x": 1}<|call|>')


@pytest.mark.parametrize(("ids", "written"), [(("", ""), "call00000"), (("call_0123456789", "call_0123456789"), None)])
def test_ids_that_mistral_wants_are_made_where_the_data_have_others(tokenizer, ids, written):
    tokenizer.chat_template = TOOL_TEMPLATES["mistral"]
    messages = [USER, calling(call(ids[0], x=1)), result("3", ids[1]), DONE]
    (coded,) = encode_sample(
        sample_of({"messages": messages, "tools": TOOLS}), load_template("auto", tokenizer), tokenizer, ROOMY
    )
    text = tokenizer.decode(coded.input_ids)
    in_call, in_result = text.split('"id": "')[1][:9], text.split('"call_id": "')[1][:9]
    assert in_call == in_result
    assert in_call.isalnum()
    assert written in (None, in_call)


@pytest.mark.parametrize("jinja", [TEMPLATES["llama-3"], TEMPLATES["vicuna"], "alpaca", "llama-3"])
def test_a_template_without_tools_is_refused_with_the_name_of_one_that_has_them(tokenizer, jinja):
    tokenizer.chat_template = jinja
    template = load_template("auto" if "{" in jinja else jinja, tokenizer)
    for record in ({"messages": ONE, "tools": TOOLS}, {"messages": ONE}, {"messages": [USER, DONE], "tools": TOOLS}):
        dropped = encode_sample(sample_of(record), template, tokenizer, ROOMY)
        assert isinstance(dropped, DroppedSample)
        assert dropped.bad
        assert "--prompt_type chatml" in dropped.reason


def test_a_text_beside_a_call_is_not_lost(tokenizer):
    record = {"messages": [USER, calling(call(x=1), content="Let me see."), result("3"), DONE], "tools": TOOLS}
    tokenizer.chat_template = TOOL_TEMPLATES["qwen-2.5"]
    (coded,) = encode_sample(sample_of(record), load_template("auto", tokenizer), tokenizer, ROOMY)
    assert learned_texts(tokenizer, coded)[0].startswith("Let me see.\n<tool_call>")
    tokenizer.chat_template = TOOL_TEMPLATES["llama-3.1"]
    dropped = encode_sample(sample_of(record), load_template("auto", tokenizer), tokenizer, ROOMY)
    assert isinstance(dropped, DroppedSample)
    assert "beside tool calls" in dropped.reason


def test_tools_stay_where_a_long_conversation_is_cut(tokenizer):
    tokenizer.chat_template = TOOL_TEMPLATES["qwen-2.5"]
    template = load_template("auto", tokenizer)
    record = {"messages": [{"role": "system", "content": "Be brief."}, *ONE, *[NEXT, LAST] * 30], "tools": TOOLS}
    (coded,) = encode_sample(sample_of(record), template, tokenizer, EncodeSettings(300))
    text = tokenizer.decode(coded.input_ids)
    assert coded.cut
    assert "Be brief." in text and '"name": "add"' in text and "1 + 2?" not in text


def test_control_tokens_in_calls_are_refused(tokenizer):
    tokenizer.chat_template = TOOL_TEMPLATES["qwen-2.5"]
    record = {"messages": [USER, calling(call(x=["<|eot_id|>"]))], "tools": TOOLS}
    dropped = encode_sample(sample_of(record), load_template("auto", tokenizer), tokenizer, ROOMY)
    assert isinstance(dropped, DroppedSample)
    assert "<|eot_id|>" in dropped.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tools": "[{"}, '"tools" is no JSON'),
        ({"tools": [{"type": "function"}]}, '"tools", tool 1, is not {"name"'),
        ({"tools": 3}, '"tools" is the number 3, a list of tools is expected'),
        ({"messages": [USER, calling({"name": "add", "arguments": "{"})]}, "turn 2.*arguments of \"add\", is no JSON"),
        ({"messages": [USER, calling({"name": "add", "arguments": "[1]"})]}, "are a list, an object is expected"),
        ({"messages": [{**USER, "tool_calls": [call(x=1)]}, DONE]}, "turn 1 calls tools, which only an answer can"),
        ({"messages": [USER, DONE, result("3"), DONE]}, "where no tool was called"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "add(1)"}]},
         "turn 2 is no JSON"),
    ],
)  # fmt: skip
def test_what_is_no_tool_or_call_is_named(change, reason):
    record = change if "conversations" in change else {"messages": [USER, DONE], **change}
    with pytest.raises(UnusableRecord, match=reason):
        to_sample(record, "x:1")


def glaive(n: int) -> dict[str, Any]:
    """A record in the shape of LLaMA-Factory's glaive_toolcall files."""
    turns = [{"from": "human", "value": f"Hi {n}"}, {"from": "gpt", "value": "Hello."}]
    if n % 3:
        turns += [{"from": "human", "value": "Add."},
                  {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"x": n}})},
                  {"from": "observation", "value": json.dumps({"sum": n})}]  # fmt: skip
        turns += [{"from": "function_call", "value": json.dumps([{"name": "add", "arguments": {}}] * 2)},
                  {"from": "observation", "value": "[1, 2]"}] if n % 3 == 2 else []  # fmt: skip
        turns += [{"from": "gpt", "value": f"It is {n}."}]
    return {"conversations": turns, "tools": json.dumps([ADD] if n % 5 else [], ensure_ascii=False)}


def test_files_in_the_shape_of_glaive_toolcall_load_whole(tokenizer, tmp_path: Path):
    file = tmp_path / "glaive_toolcall_en_demo.json"
    file.write_text(json.dumps([glaive(n) for n in range(60)]), encoding="utf-8")
    dataset = encode_dataset(str(file), load_template("chatml", tokenizer), tokenizer, ROOMY, tmp_path / "cache")
    assert (len(dataset), dataset.report.read.n_good, dataset.report.read.n_bad) == (60, 60, 0)
    assert dataset.report.read.notes == {TOOLS_CALLED: [40, "glaive_toolcall_en_demo.json:1#2"]}
    assert not dataset.report.read.ignored_fields


def test_questions_keep_their_tools():
    for messages in (ONE, ONE[:-1], ONE[:3]):
        turns = to_question({"messages": messages, "tools": TOOLS}, "x:1").sample.turns
        assert tools_of(turns) == TOOLS
        assert turns[-1].role == ("tool" if len(messages) == 3 else "user")


def test_chatml_is_what_it_was_but_for_tools():
    now, then = ((FOLDER / name).read_text(encoding="utf-8") for name in ("chatml.jinja", "earlier/chatml.jinja"))
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, DONE, USER]
    for stop in range(1, 5):
        for prompt in (False, True):
            texts = {render_chat(jinja, messages[:stop], {"bos_token": "<s>"}, prompt) for jinja in (now, then)}
            assert len(texts) == 1
    assert first_version(now) == then == first_version(then)
    assert first_version(without_bos(now)) == without_bos(then)
    assert built_in_name(then) == built_in_name(without_bos(then)) == built_in_name(now) == "chatml"
