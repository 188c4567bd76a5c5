"""llama.cpp itself reads our GGUF files: the same token ids as transformers, the same logits, the same greedy answers.

Needs llama-cpp-python, which is compiled while it installs (some minutes):
`pip install llama-cpp-python`, then `pytest -m slow tests/export/test_llama_cpp.py`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import onecard.programs.gguf as tool
from onecard.data.chat_template import load_template
from onecard.data.messages import Turn
from onecard.data.tokenization import segment_tokenizer
from tests.export import gguf_models

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it compiles for some minutes")
pytestmark = pytest.mark.slow
TINY = Path(__file__).resolve().parents[2] / "sample" / "tiny-llama"
PROMPTS = [
    "The capital of France is", "Once upon a time", "中国的首都", "把下面的句子翻译成英文：你好，世界。", "1 + 2 =",
    "### Instruction:\nWhat is the past tense of walk?\n\n### Response:\n",
]  # fmt: skip
PIECES = [
    "The", "quick", " brown", "fox", " ", "  ", "\n", "\n\n", "\t", "北京", "你好，", "世界。", "🚀", "👩‍👩‍👧", "é",
    "ü", "123", " 3.14", "I'm", " WE'LL", "###", " Instruction:", "{", "}", "%$", "\r\n", "한국", "नमस्ते", "�", "\u3000",
    "<0x0A>", "a", "###  x", "Ω≈ç√", "'s", "''", "...", "——", "٣", "½",
]  # fmt: skip
SPECIAL = ["<s>", "</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<plain added>"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(model directory, GGUF file) of a family and kind; each is made once."""
    folder = tmp_path_factory.mktemp("gguf")

    def get(family: str, kind: str, prompt_type: str = "auto") -> tuple[Path, Path]:
        model = TINY if family == "tiny-llama" else folder / family
        if not model.exists():
            gguf_models.save_model(model, family)
        output = folder / f"{family}-{kind}-{prompt_type}"
        if not output.exists():
            tool.main(["--model_path", str(model), "--output_path", str(output), "--gguf_type", kind,
                       "--prompt_type", prompt_type])  # fmt: skip
        return model, output / f"model-{kind}.gguf"

    return get


@contextmanager
def opened(file: Path, **settings: Any) -> Iterator[Any]:
    """llama.cpp with an fp32 cache: what is compared is the file, not how its cache rounds."""
    llama = llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, verbose=False, type_k=0, type_v=0, **settings)
    try:
        yield llama
    finally:
        llama.close()


def reference(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def greedy(llama: Any, ids: list[int], n: int) -> list[int]:
    return [
        token for token, _ in zip(llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0), range(n), strict=False)
    ]


def texts(pieces: list[str], n: int) -> list[str]:
    pick = random.Random(0)
    return ["".join(pick.choices(pieces, k=pick.randint(1, 9))) for _ in range(n)]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_same_greedy_tokens_as_transformers(prompt: str, exported: Any) -> None:
    """The trained base, f16, 32 tokens, end tokens among them."""
    model, file = exported("tiny-llama", "f16")
    ids = AutoTokenizer.from_pretrained(model)(prompt)["input_ids"]
    wanted = reference(model).generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False, eos_token_id=None)
    with opened(file) as llama:
        assert llama.tokenize(prompt.encode(), special=True) == ids
        assert greedy(llama, ids, 32) == wanted[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", gguf_models.FAMILIES)
def test_same_logits_of_every_family(family: str, exported: Any) -> None:
    """Random weights, 200 positions, far past the old context of scaled ropes: f32 to 1e-4 of the logits' spread, f16
    to 3 % (llama.cpp rounds what it multiplies to f16 too), and the same best token wherever the two best are apart.
    """
    model, _ = exported(family, "f32")
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = reference(model)
    for kind, tolerance in (("f32", 1e-4), ("f16", 3e-2)):
        with opened(exported(family, kind)[1], logits_all=True) as llama:
            compared = 0
            for text in ("The quick brown fox. ", "中国的首都是北京。", "0 1 2 + 3 = User: Assistant:"):
                ids = (tokenizer(text * 100)["input_ids"])[:200]
                assert len(ids) == 200
                llama.reset()
                llama.eval(ids)
                found = np.array(llama.scores[:200])
                with torch.no_grad():
                    wanted = network(torch.tensor([ids])).logits[0].numpy()
                assert np.abs(found - wanted).max() < tolerance * wanted.std()
                best = np.sort(wanted, axis=-1)
                clear = best[:, -1] - best[:, -2] > 2 * tolerance * wanted.std()
                assert (found.argmax(-1) == wanted.argmax(-1))[clear].all()
                compared += int(clear.sum())
            assert compared > 300


@pytest.mark.parametrize("family", gguf_models.FAMILIES)
def test_same_greedy_tokens_of_every_family(family: str, exported: Any) -> None:
    """32 tokens in f32; in f16 up to the first near-tie, after which, with random weights, either answer is right."""
    model, _ = exported(family, "f32")
    tokenizer, network = AutoTokenizer.from_pretrained(model), reference(model)
    compared = {"f32": 0, "f16": 0}
    for kind, tie in (("f32", 1e-4), ("f16", 2e-2)):
        with opened(exported(family, kind)[1]) as llama:
            for prompt in PROMPTS[:4]:
                ids = tokenizer(prompt)["input_ids"]
                answer = network.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False, eos_token_id=None)[0]
                with torch.no_grad():
                    logits = network(answer[None]).logits[0, len(ids) - 1 : -1]
                best = logits.topk(2).values
                sure = (best[:, 0] - best[:, 1]) > tie * logits.std()
                n = 32 if sure.all() else int(sure.int().argmin())
                assert greedy(llama, ids, n) == answer[len(ids) : len(ids) + n].tolist()
                compared[kind] += n
    assert compared["f32"] == 4 * 32
    assert compared["f16"] >= 20


@pytest.mark.parametrize("family", ["llama-3", "qwen2", "qwen3"])
def test_byte_level_tokens_are_the_same(family: str, exported: Any) -> None:
    model, file = exported(family, "f16")
    tokenizer = AutoTokenizer.from_pretrained(model)
    with opened(file, vocab_only=True) as llama:
        for text in texts(PIECES + SPECIAL, 500):
            assert llama.tokenize(text.encode(), special=True) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("family", ["tiny-llama", "llama", "llama-biases", "mistral"])
def test_sentencepiece_tokens_are_the_same(family: str, exported: Any) -> None:
    """Equal to transformers but for two habits of llama.cpp: a text's own first space is kept beside the one that is
    added, and a text after a control token is tokenised like one that stands alone.
    """
    model, file = exported(family, "f16")
    tokenizer = AutoTokenizer.from_pretrained(model)
    marks = re.compile("(" + "|".join(map(re.escape, ["<s>", "</s>", *tokenizer.get_added_vocab()])) + ")")
    bos = tokenizer("")["input_ids"]
    swallows = tokenizer("a")["input_ids"] == tokenizer(" a")["input_ids"]

    def ids_of(piece: str) -> list[int]:
        if marks.fullmatch(piece):
            return [tokenizer.convert_tokens_to_ids(piece)]
        doubled = " " + piece if swallows and piece.startswith(" ") else piece
        return tokenizer(doubled, add_special_tokens=False)["input_ids"] if piece else []

    as_it_is = 0
    with opened(file, vocab_only=True) as llama:
        for text in texts(PIECES + SPECIAL, 500):
            found = llama.tokenize(text.encode(), special=True)
            assert found == bos + [i for piece in marks.split(text) for i in ids_of(piece)], text
            as_it_is += found == tokenizer(text)["input_ids"]
    assert as_it_is > 250


@pytest.mark.parametrize(("family", "prompt_type"), [
    ("tiny-llama", "alpaca"), ("tiny-llama", "vicuna-chat"), ("tiny-llama", "llama-2"), ("tiny-llama", "chatml"),
    ("llama-3", "llama-3"), ("qwen2", "chatml"),
])  # fmt: skip
def test_what_a_run_was_taught_is_what_llama_cpp_reads(family: str, prompt_type: str, exported: Any) -> None:
    """The rendered prompt through llama.cpp's tokenizer: the ids that generation feeds the model here.

    An earlier answer and what follows it are tokenised alone here, and SentencePiece writes a space before each;
    llama.cpp reads the whole text. So dialogues with history are compared for byte-level tokenizers only.
    """
    model, file = exported(family, "f16", prompt_type)
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = load_template(prompt_type, tokenizer)
    words = segment_tokenizer(template, tokenizer)
    question, answer = Turn("user", "What is 你好?"), Turn("assistant", "Hello.")
    dialogues = [[question], [Turn("system", "Be brief."), question]]
    dialogues += [[question, answer, question]] if family != "tiny-llama" else []
    with opened(file, vocab_only=True) as llama:
        stored = llama.metadata["tokenizer.chat_template"]
        formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
            template=stored, eos_token=tokenizer.eos_token, bos_token=llama._model.token_get_text(llama.token_bos())
        )
        for turns in dialogues:
            prompt = formatter(messages=[{"role": turn.role, "content": turn.content} for turn in turns]).prompt
            # llama.cpp's server drops a BOS that the template wrote and adds its own; here it is only not added twice.
            assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == words.prompt_ids(turns)
        end = words.end_id if words.end_id is not None else tokenizer.eos_token_id
        assert llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(llama.model), end)


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4"])
def test_other_kinds_load_and_talk(kind: str, exported: Any) -> None:
    """The next token after prompts of the trained base: mostly the one of fp32, less so with fewer bits."""
    model, file = exported("tiny-llama", kind)
    tokenizer, network = AutoTokenizer.from_pretrained(model), reference(model)
    agreed = total = 0
    with opened(file, logits_all=True) as llama:
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            answer = network.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False, eos_token_id=None)[0]
            llama.reset()
            llama.eval(answer.tolist())
            found = np.array(llama.scores[len(ids) - 1 : len(answer) - 1]).argmax(-1)
            agreed, total = agreed + int((found == answer[len(ids) :].numpy()).sum()), total + 32
            assert len(greedy(llama, ids, 16)) == 16
    bar = {"bf16": 0.9, "q8_0": 0.9}.get(kind, 0.6)
    assert agreed / total > bar, f"{agreed} of {total}"
