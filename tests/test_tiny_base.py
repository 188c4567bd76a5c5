"""The embedded base model: its corpus, its split, its tokenizer and its directory."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tools.tiny_corpus import build
from tools.tiny_corpus.core import is_held_out

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "sample" / "tiny-llama"
ALPACA_WORDINGS = ("### Instruction", "### Response", "### Input", "Below is an instruction")


def read_rows(name: str) -> list[dict[str, str]]:
    return json.loads((ROOT / "sample" / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [f"{text} {answer}".strip() for text, answer in itertools.islice(build.documents(seed=1), 20_000)]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def test_same_seed_same_corpus_in_another_process(documents: list[str]) -> None:
    code = (
        "import itertools, json; from tools.tiny_corpus import build; "
        "print(json.dumps([' '.join(d).strip() for d in itertools.islice(build.documents(seed=1), 500)]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == documents[:500]
    assert next(build.documents(seed=2)) != next(build.documents(seed=1))


def test_sample_files_are_what_the_tool_writes() -> None:
    assert read_rows("merge_sample.json") == build.merge_sample()
    assert read_rows("held_out.json") == build.held_out()


def test_sample_files_are_alpaca_rows_in_both_languages() -> None:
    for name, least in (("merge_sample.json", 400), ("held_out.json", 100)):
        rows = read_rows(name)
        assert len(rows) >= least
        assert all(set(row) == {"instruction", "input", "output"} for row in rows)
        assert all(row["instruction"].strip() and row["output"].strip() for row in rows)
        chinese = sum(any("\u4e00" <= letter <= "\u9fff" for letter in row["instruction"]) for row in rows)
        assert len(rows) * 0.3 < chinese < len(rows) * 0.7


def test_no_held_out_question_is_trained_on() -> None:
    trained = {(row["instruction"], row["input"]) for row in read_rows("merge_sample.json")}
    held_out = [(row["instruction"], row["input"]) for row in read_rows("held_out.json")]
    assert len(set(held_out)) == len(held_out) >= 100
    assert not trained & set(held_out)


def test_no_held_out_thing_is_trained_on_in_other_words() -> None:
    """The split goes by the thing asked about, so another wording of the same question is no way around it."""
    rng = random.Random(0)
    n_keys = 0
    trained = {(row["instruction"], row["input"]) for row in read_rows("merge_sample.json")}
    for task in build.all_tasks():
        if not task.asked:
            continue
        for example in (task.draw(rng) for _ in range(300)):
            if is_held_out(task, example):
                wordings = {(build.polish(instruction), build.polish(given)) for instruction, given in example.rows}
                assert not wordings & trained, (task.name, example.key)
                n_keys += 1
    assert n_keys > 1000


def test_no_held_out_question_is_in_the_corpus(documents: list[str]) -> None:
    computed = build.held_out_inputs()
    held_out = read_rows("held_out.json")
    assert len(computed) >= 20
    text = "\n\n".join(documents)
    for row in held_out:
        assert row["instruction"] not in text
    for given in computed:
        assert given not in text


def test_held_out_facts_are_told_but_never_asked(documents: list[str]) -> None:
    germany = [text for text in documents if "Germany" in text]
    assert any("Berlin is the capital of Germany." in text for text in germany)
    assert not any("capital of Germany?" in text for text in germany)
    assert any("capital of France?" in text for text in documents)


def test_corpus_never_shows_the_prompt_template(documents: list[str]) -> None:
    assert not [text for text in documents if any(words in text for words in ALPACA_WORDINGS)]


def test_chinese_text_has_chinese_punctuation() -> None:
    assert build.polish("你好,世界!对吗?") == "你好\uff0c世界\uff01对吗\uff1f"
    assert build.polish("一( )书") == "一\uff08 \uff09书"
    assert build.polish("1, 2 (three)?") == "1, 2 (three)?"


def test_directory_is_small_and_complete() -> None:
    files = [file for file in BASE.rglob("*") if file.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.model", "tokenizer.json", "README.md"} <= {
        file.name for file in files
    }
    assert sum(file.stat().st_size for file in files) <= 12_000_000


def test_tokenizer_round_trips_any_text(tokenizer) -> None:
    rng = random.Random(5)
    ranges = ((0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0x20, 0x7E), (0xA0, 0x2FF), (0x20000, 0x2A6DF))
    for _ in range(300):
        letters = "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 30)))
        text = "x" + letters + "\n"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_tokenizer_agrees_with_sentencepiece(tokenizer, documents: list[str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(str(BASE / "tokenizer.model"))
    assert model.is_byte(3) and model.is_byte(258) and not model.is_byte(259)
    assert (model.unk_id(), model.bos_id(), model.eos_id()) == (0, 1, 2)
    texts = [*documents[:500], "鲸鱼 \U0001f433 é\n\t# x", "### Instruction:\nName it.\n\n### Response:\n"]
    for text in texts:
        assert tokenizer(text, add_special_tokens=False).input_ids == model.encode(text)
        assert tokenizer(text).input_ids == [1, *model.encode(text)]


def test_model_is_a_llama_whose_layers_fit_4_bit_blocks(tokenizer) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.vocab_size == len(tokenizer)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 4 * 7 + 1
    assert all(module.in_features % 64 == 0 and module.out_features % 64 == 0 for module in linear)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_base_knows_its_facts(tokenizer) -> None:
    """A real base model: it goes on where a sentence stops, and it was told Berlin only in statements."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE).float()
    for prompt, rest in (("The capital of Germany is", "Berlin."), ("apple in Chinese is", "苹果.")):
        batch = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
        assert tokenizer.decode(ids[batch["input_ids"].shape[1] :]).strip().startswith(rest)


@pytest.mark.slow
def test_tool_makes_the_whole_directory(tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "make_tiny_base.py")]
    subprocess.run([*tool, "--output_path", str(tmp_path / "base"), "--steps", "2"], cwd=tmp_path, check=True)
    # The shipped tokenizer is of an earlier state of the corpus; what is made anew is of the same kind.
    made = {file.name for file in (tmp_path / "base").iterdir()}
    assert {file.name for file in BASE.iterdir()} - made == {"README.md"}
    assert (tmp_path / "base" / "config.json").read_bytes() == (BASE / "config.json").read_bytes()
    for name in ("merge_sample.json", "held_out.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / "sample" / name).read_bytes(), name
    help_text = subprocess.run([*tool, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--steps" in help_text and "--seed" in help_text
