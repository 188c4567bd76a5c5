"""BOS stands where the template writes it or the tokenizer adds it, once, and nowhere else; in every path alike."""

from __future__ import annotations

from typing import Any

import pytest

from onecard.data.built_in_templates import BUILT_IN, built_in_name
from onecard.data.chat_template import load_template
from onecard.data.encode import EncodeSettings, encode_prompt, encode_sample
from onecard.data.messages import Conversation, Document, Turn
from onecard.data.special_tokens import beginning_ids
from onecard.data.tokenization import segment_tokenizer
from onecard.export.quantize.calibration import text_rows
from tests.data.template_logics import TEMPLATES
from tests.data.tokenizer_kinds import KINDS, LLAMA3, byte_level, loaded

TURNS = (Turn("user", "Hi"), Turn("assistant", "Hello"))
ROOMY = EncodeSettings(10_000)
WITHOUT = "{%- for m in messages -%}{{- m['content'] + eos_token -}}{%- endfor -%}"
# How a template begins, and whether it writes BOS.
BEGINNINGS = {
    "": False,
    "{{- bos_token -}}": True,
    "{{- '\\n' -}}{{- bos_token -}}": True,
    "{{- ' \\n\\n' -}}{{- bos_token -}}{{- '\\n' -}}": True,
    "{{- '\\n' -}}": False,
    "{{- 'A chat. ' -}}": False,
}


@pytest.fixture(scope="module", params=["adds", "names", "none"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """It adds BOS to a text; it only has a name for one, as SmolLM2 and Phi-4 do; it has none."""
    bos = None if request.param == "none" else "<s>"
    return loaded(byte_level(LLAMA3), bos=bos, writes_bos=request.param == "adds")


def n_bos(ids: list[int], tokenizer: Any) -> int:
    return ids.count(tokenizer.convert_tokens_to_ids("<s>"))


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_bos_where_template_or_tokenizer_write_it(tokenizer, beginning):
    tokenizer.chat_template = beginning + WITHOUT
    template = load_template("auto", tokenizer)
    prompt = encode_prompt(TURNS[:1], template, tokenizer)
    (sample,) = encode_sample(Conversation(TURNS, "x:1"), template, tokenizer, ROOMY)
    adds = bool(beginning_ids(tokenizer))
    writes = BEGINNINGS[beginning] and tokenizer.bos_token is not None
    assert n_bos(prompt, tokenizer) == n_bos(sample.input_ids, tokenizer) == (adds or writes)
    assert sample.input_ids[: len(prompt)] == prompt
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt == tokenizer(rendered, add_special_tokens=adds and not writes)["input_ids"]


def test_documents_raw_prompts_and_calibration_begin_as_the_tokenizer_begins(tokenizer):
    tokens = segment_tokenizer(load_template("none", tokenizer), tokenizer)
    n_visited = 0
    for text in ("Hello you", "\nHello", " x"):
        whole = tokenizer(text)["input_ids"]
        template = load_template("chatml", tokenizer)
        (sample,) = encode_sample(Document(text, "x:1"), template, tokenizer, ROOMY)
        assert sample.input_ids == [*whole, tokenizer.eos_token_id]
        assert tokens.text_ids(text) == whole
        assert tokens.text_ids(f"<s>{text}") == tokenizer(f"<s>{text}", add_special_tokens=False)["input_ids"]
        assert next(text_rows([text], tokenizer, 100, packed=False)) == whole
        n_visited += 1
    assert n_visited == 3
    pieces = encode_sample(Document("a b c d e f", "x:1"), template, tokenizer, EncodeSettings(8))
    assert all(n_bos(piece.input_ids, tokenizer) == bool(beginning_ids(tokenizer)) for piece in pieces)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_write_bos_where_the_tokenizer_does(tokenizer, name):
    template = load_template(name, tokenizer)
    assert built_in_name(template.jinja) == name
    ids = encode_prompt(TURNS[:1], template, tokenizer)
    assert n_bos(ids, tokenizer) == bool(beginning_ids(tokenizer))
    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        chat_template=template.jinja,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ids == theirs


def test_other_beginnings_than_bos(tmp_path):
    """As GLM: two tokens in front, neither of them called BOS."""
    from tokenizers import processors

    core = byte_level(LLAMA3)
    special = [(text, core.token_to_id(text)) for text in ("<|start|>", "<|channel|>")]
    core.post_processor = processors.TemplateProcessing(single="<|start|> <|channel|> $A </s>", special_tokens=[
        *special, ("</s>", core.token_to_id("</s>"))])  # fmt: skip
    tokenizer = loaded(core, bos=None)
    first = [token_id for _, token_id in special]
    assert beginning_ids(tokenizer) == first
    tokens = segment_tokenizer(load_template("none", tokenizer), tokenizer)
    assert tokens.text_ids("Hi") == tokenizer("Hi")["input_ids"][:-1]  # an EOS that is added is left out
    for head, expected in (("", first), ("<|start|><|channel|>", first)):
        tokenizer.chat_template = head + WITHOUT
        prompt = encode_prompt(TURNS[:1], load_template("auto", tokenizer), tokenizer)
        assert prompt[: len(first)] == expected
        assert prompt.count(first[0]) == 1


def test_a_bos_that_opens_every_turn_is_not_doubled(tmp_path):
    """As SmolLM2, whose BOS is <|im_start|>: ChatML would begin with two of them."""
    tokenizer = loaded(byte_level(LLAMA3), bos="<|im_start|>", eos="<|im_end|>", writes_bos=False)
    ids = encode_prompt(TURNS[:1], load_template("chatml", tokenizer), tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["phi-4", "granite", "gpt-oss", "smollm-2", "zephyr"])
def test_models_that_never_saw_bos_get_none(tmp_path, name):
    tokenizer = KINDS["o200k"](tmp_path)
    tokenizer.chat_template = TEMPLATES[name]
    template = load_template("auto", tokenizer)
    (sample,) = encode_sample(Conversation(TURNS, "x:1"), template, tokenizer, ROOMY)
    assert n_bos(sample.input_ids, tokenizer) == 0
