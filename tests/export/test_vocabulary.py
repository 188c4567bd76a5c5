"""tools/expand_vocab.py: old ids stay, texts survive, the files agree, new rows are means, bad input is one line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onecard.console import run_main
from onecard.data.sources import Source
from onecard.export.vocabulary import bpe_growth as vocabulary_growth
from onecard.export.vocabulary import corpus as vocabulary
from onecard.export.vocabulary import train as vocabulary_train
from onecard.export.vocabulary.corpus import decode, encode
from onecard.programs import expand_vocab
from tests import tiny

SAMPLE = Path(__file__).parents[2] / "sample"
CORPUS, HELD_OUT, BASE = SAMPLE / "merge_sample.json", SAMPLE / "held_out.json", SAMPLE / "tiny-llama"
KINDS = ("llama", "padded", "qwen", "llama3")
WORDS_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def run(*words: object) -> int:
    """The exit code of the tool with these words."""
    return run_main(lambda: expand_vocab.main([str(word) for word in words]), debug=False)


def told(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the tool says when it refuses: one line."""
    capsys.readouterr()
    assert run(*words) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "not foreseen" not in lines[0]
    return lines[0]


def save_bytelevel(directory: Path, *, qwen: bool) -> Path:
    """A byte-level tokenizer of English alone, in the layout of Qwen 2 or of LLaMA 3: added tokens after the rest."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(ignore_merges=not qwen))
    cut = pre_tokenizers.Split(Regex(WORDS_CUT), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            cut,
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    if qwen:
        core.normalizer = normalizers.NFC()
    english = [line for line in vocabulary.texts_of(str(CORPUS), vocabulary.ReadReport()) if line.isascii()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        english, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens([AddedToken(f"<|special_{i}|>", special=True) for i in range(4)])
    core.add_tokens([AddedToken("<tool_call>", special=False)])
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|special_0|>").save_pretrained(directory)
    if qwen:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "Qwen2Tokenizer"
        (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        (directory / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
        (directory / "merges.txt").write_text("\n".join(map(" ".join, model["merges"])), encoding="utf-8")
    return directory


def save_padded(directory: Path) -> Path:
    """LLaMA with tokens added behind its pieces: a pad token, one that is a word, and a hole in the ids."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["蔬菜沙拉"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    shutil.copy(BASE / "tokenizer.model", directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For each kind: the directories of the old and of the grown tokenizer, made with the tool itself."""
    root = tmp_path_factory.mktemp("vocabulary")
    old = {
        "llama": tiny.save_sentencepiece_tokenizer(root / "llama"),
        "padded": save_padded(root / "padded"),
        "qwen": save_bytelevel(root / "qwen", qwen=True),
        "llama3": save_bytelevel(root / "llama3", qwen=False),
    }
    common = ("--data_path", CORPUS, "--character_coverage", 1.0)
    assert run("train", *common, "--vocab_size", 1100, "--output_path", root / "sp") == 0
    bytelevel = ("--kind", "bytelevel", "--vocab_size", 1200, "--tokenizer_path", old["qwen"])
    assert run("train", *common, *bytelevel, "--output_path", root / "bl") == 0
    made = {}
    for kind, directory in old.items():
        pieces = root / ("bl" if kind in ("qwen", "llama3") else "sp")
        target = root / f"{kind}-grown"
        words = ("--tokenizer_path", directory, "--new_path", pieces, "--eval_path", HELD_OUT)
        assert run("merge", *words, "--output_path", target) == 0
        made[kind] = (directory, target)
    return made


def pair(grown: dict[str, tuple[Path, Path]], kind: str) -> tuple[Any, Any]:
    old, new = grown[kind]
    return AutoTokenizer.from_pretrained(old), AutoTokenizer.from_pretrained(new)


@cache
def mixed_strings(n: int, seed: int = 5) -> list[str]:
    """Random texts of words, Chinese from the corpus and beyond, emoji, spaces, line breaks and control characters."""
    generator = random.Random(seed)
    lines = list(vocabulary.lines_of(vocabulary.texts_of(str(CORPUS), vocabulary.ReadReport())))
    words = sorted({word for line in lines for word in line.split(" ")})
    odd = [
        *("🙂", "👨‍👩‍👧", "é", "e\u0301", "ß", "\t", "\n", "\r\n", "  ", "    ", "\x01", "\x7f", "\u200b", "\u3000"),
        *("𠮷", "ا", "한", "カ", "<s>x", "▁", "_", "0", "42", "<0x0A>", "<unk", "\ufeff", "\ufffd"),
    ]
    strings = []
    for _ in range(n):
        parts = []
        for _ in range(generator.randint(1, 8)):
            kind = generator.random()
            if kind < 0.5:
                parts.append(generator.choice(words))
            elif kind < 0.65:
                parts.append("".join(chr(generator.randint(0x4E00, 0x9FA5)) for _ in range(generator.randint(1, 5))))
            elif kind < 0.75:
                parts.append(generator.choice(lines)[: generator.randint(1, 40)])
            else:
                parts.append(generator.choice(odd))
            parts.append(generator.choice(["", "", " "]))
        strings.append("".join(parts))
    return strings


def batches(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_stay_and_new_ones_come_after_all_of_them(kind, grown):
    old, new = pair(grown, kind)
    old_vocab, vocab = old.get_vocab(), new.get_vocab()
    assert {piece: vocab.get(piece) for piece in old_vocab} == old_vocab
    new_ids = sorted(i for piece, i in vocab.items() if piece not in old_vocab)
    assert len(new_ids) > 100
    assert new_ids == list(range(max(old_vocab.values()) + 1, max(old_vocab.values()) + 1 + len(new_ids)))
    assert {i: str(t) for i, t in new.added_tokens_decoder.items()} == {
        i: str(t) for i, t in old.added_tokens_decoder.items()
    }
    assert old.special_tokens_map == new.special_tokens_map


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mixed_strings_come_back_unchanged(kind, grown):
    old, new = pair(grown, kind)
    n = 10_000 if kind in ("padded", "qwen") else 1_000
    texts = mixed_strings(n)
    before = [decode(old, ids) for ids in batches(old, texts)]
    after = [decode(new, ids) for ids in batches(new, texts)]
    unchanged = sum(text == back for text, back in zip(texts, after, strict=True))
    # What the old one does not give back (a first space that LLaMA takes for its own, "e\u0301" that Qwen composes,
    # a control token in the text) the new one must give back in the same way.
    assert after == before
    assert unchanged > 0.8 * n


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_cut_as_before_and_then_joined_further(kind, grown):
    """New tokens replaced by the old ones that write them give the old ids, so what a model knows is not disturbed."""
    old, new = pair(grown, kind)
    old_ids = set(old.get_vocab().values())
    pieces = {i: piece for piece, i in new.get_vocab().items() if i not in old_ids}
    model = old.backend_tokenizer.model
    spelled = {i: [t.id for t in model.tokenize(piece)] for i, piece in pieces.items()}
    texts = mixed_strings(2_000, seed=6)
    used = set()
    for before, after in zip(batches(old, texts), batches(new, texts), strict=True):
        assert tiny.flatten(spelled.get(i, [i]) for i in after) == before
        used |= pieces.keys() & set(after)
    assert len(used) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_every_new_token_is_met(kind, grown):
    old, new = pair(grown, kind)
    pieces = sorted(new.get_vocab().keys() - old.get_vocab().keys())
    model = new.backend_tokenizer.model
    met = [piece for piece in pieces if [t.value for t in model.tokenize(piece)] == [piece]]
    assert len(met) == len(pieces) > 100


@pytest.mark.parametrize("kind", ["llama", "padded"])
def test_sentencepiece_and_both_files_give_the_same_ids(kind, grown, tmp_path):
    old, new = pair(grown, kind)
    directory = grown[kind][1]
    raw_old = sentencepiece.SentencePieceProcessor(model_file=str(grown[kind][0] / "tokenizer.model"))
    raw = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    # AutoTokenizer reads tokenizer.json where there is one; without it, it converts tokenizer.model.
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(directory / name, tmp_path / name)
    converted = AutoTokenizer.from_pretrained(tmp_path)
    new_ids = set(new.get_vocab().values()) - set(old.get_vocab().values())
    n_compared, n_with_new = 0, 0
    for text in mixed_strings(1_500, seed=7):
        if raw_old.encode(text) != encode(old, text):
            continue  # "<s>" and a first space are read differently from the start
        ids = encode(new, text)
        assert raw.encode(text) == ids == encode(converted, text)
        n_compared += 1
        n_with_new += not new_ids.isdisjoint(ids)
    assert n_compared > 1_000
    assert n_with_new > 500
    assert raw.vocab_size() == len(new)


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_held_out_chinese_takes_fewer_tokens(kind, grown):
    old, new = pair(grown, kind)
    new_ids = set(new.get_vocab().values()) - set(old.get_vocab().values())
    texts = list(vocabulary.texts_of(str(HELD_OUT), vocabulary.ReadReport()))
    comparison = vocabulary.compare(old, new, texts, new_ids)
    rows = {row.script: row for row in comparison.rows}
    assert rows["Chinese"].n_characters > 500
    assert rows["Chinese"].n_after < 0.8 * rows["Chinese"].n_before
    assert rows["Latin"].n_after <= rows["Latin"].n_before
    assert rows["all"].n_characters == sum(row.n_characters for row in comparison.rows[:-1])
    assert comparison.used <= new_ids
    assert len(comparison.used) > 20


def test_the_table_has_scripts_apart(grown, capsys, tmp_path):
    old, _ = grown["llama"]
    pieces = old.parent / "sp"
    words = ("--tokenizer_path", old, "--new_path", pieces, "--eval_path", HELD_OUT, "--max_new", 50)
    assert run("merge", *words, "--output_path", tmp_path / "few") == 0
    said = capsys.readouterr().out
    assert "50 new tokens with the ids 420 to 469" in said
    assert [line.split()[0] for line in said.splitlines() if line.endswith("%")] == ["Latin", "Chinese", "all"]
    assert "no room below --max_new" in said
    assert len(AutoTokenizer.from_pretrained(tmp_path / "few")) == 470


def test_unigram_pieces_get_the_halves_they_lack(grown, capsys, tmp_path):
    old, _ = grown["llama"]
    words = ("--data_path", CORPUS, "--model_type", "unigram", "--vocab_size", 800, "--output_path", tmp_path / "uni")
    assert run("train", *words, "--character_coverage", 1.0) == 0
    capsys.readouterr()
    words = ("--tokenizer_path", old, "--new_path", tmp_path / "uni", "--output_path", tmp_path / "grown")
    assert run("merge", *words) == 0
    first = next(line for line in capsys.readouterr().out.splitlines() if "missing halves" in line)
    assert int(first.split(";")[1].split()[0]) > 0, first
    new = AutoTokenizer.from_pretrained(tmp_path / "grown")
    pieces = sorted(new.get_vocab().keys() - AutoTokenizer.from_pretrained(old).get_vocab().keys())
    model = new.backend_tokenizer.model
    assert all([t.value for t in model.tokenize(piece)] == [piece] for piece in pieces)
    assert len(pieces) > 100


def test_held_out_text_is_never_learned_from(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n\n".join(f"text number {i % 150}" for i in range(300)), encoding="utf-8")
    corpus = vocabulary.Corpus(Source((str(file),)), held_out_share=0.2)
    learned = set(corpus.lines())
    assert learned
    assert corpus.held_out
    assert learned.isdisjoint(corpus.held_out)
    assert len(learned | set(corpus.held_out)) == 150


def test_lines_are_drawn_evenly_and_no_more_than_asked_for():
    chosen = vocabulary_train.draw(map(str, range(10_000)), 500)
    assert len(set(chosen)) == 500
    assert 4_000 < sum(map(int, chosen)) / 500 < 6_000


def test_a_piece_that_old_joins_come_before_is_left_out_or_given_its_halves():
    # b+c is joined first, so "ab" never forms inside "abc", and "abcd" must be reached from a, bc, d.
    rules = vocabulary_growth.PieceRules({"bc": 0})
    growth = vocabulary_growth.grow(["abcd", "ab"], rules, {"a", "b", "c", "d", "bc"})
    assert growth.pieces == ["abc", "abcd", "ab"]
    assert growth.n_halves == 1
    assert vocabulary_growth.segment(list("abcd"), rules) == ["abcd"]
    merges = vocabulary_growth.MergeRules({("b", "c"): 0})
    growth = vocabulary_growth.grow(["abcdefgh", "bc", "xa"], merges, {*"abcdefgh", "bc"})
    assert growth.pieces == []
    assert sum(growth.left_out.values()) == 3
    assert merges.order == {("b", "c"): 0}


def grow_model(model: Path, tokenizer: Path, output: Path, *words: object) -> dict[str, Any]:
    assert run("apply", "--model_path", model, "--tokenizer_path", tokenizer, "--output_path", output, *words) == 0
    return json.loads((output / "new_tokens.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_old_text_stay_the_same_bits_and_new_rows_are_means(tied, grown, tmp_path):
    old_path, new_path = grown["llama"]
    # 448 rows for 420 tokens: padding that the first new tokens take over.
    model = tiny.save_tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(old_path / "tokenizer.model"))
    told_ids = grow_model(model, new_path, tmp_path / "grown", "--max_shard_size", "60KB")
    old_tokenizer, tokenizer = (
        AutoTokenizer.from_pretrained(old_path),
        AutoTokenizer.from_pretrained(tmp_path / "grown"),
    )
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float32)
    n_old, n_new = len(old_tokenizer), len(tokenizer)
    assert after.config.vocab_size == -(-n_new // 64) * 64
    assert len(list((tmp_path / "grown").glob("model-*.safetensors"))) > 2

    n_compared = 0
    for text in ("The quick brown fox", "what is 1 + 2 ? ;", "### Input: a b c"):
        ids = torch.tensor([old_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            assert torch.equal(before(ids).logits[..., :n_old], after(ids).logits[..., :n_old])
        n_compared += 1
    assert n_compared == 3

    assert told_ids["format"] == 1
    assert told_ids["new_ids"] == list(range(n_old, n_new))
    assert told_ids["first_new_id"] == n_old
    assert tokenizer.convert_tokens_to_ids(told_ids["pieces"]) == told_ids["new_ids"]
    tables = [(before.get_input_embeddings(), after.get_input_embeddings())]
    tables += [(before.get_output_embeddings(), after.get_output_embeddings())]
    for old_table, new_table in tables:
        old_rows, new_rows = old_table.weight.detach().numpy(), new_table.weight.detach().numpy()
        assert (new_rows[:n_old] == old_rows[:n_old]).all()
        for i, piece in zip(told_ids["new_ids"], told_ids["pieces"], strict=True):
            # SentencePiece itself writes the piece; its own space in front is taken off where the piece has none.
            wanted = old_rows[raw_ids(raw, piece)].mean(axis=0, dtype="float64")
            assert abs(new_rows[i] - wanted).max() < 1e-7

    answer = after.generate(**tokenizer("The quick", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > 3


def raw_ids(raw: Any, piece: str) -> list[int]:
    # Behind a line break, which no piece joins with, the space that LLaMA puts in front of a text is far away.
    ids = raw.encode("\n" + piece.replace("\u2581", " "))
    newline = raw.encode("\n")
    assert ids[: len(newline)] == newline
    return ids[len(newline) :]


def test_a_trained_half_precision_model_keeps_every_other_bit(grown, capsys, tmp_path):
    save_padded(tmp_path / "model")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(BASE / name, tmp_path / "model" / name)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (tmp_path / "model" / "manifest.json").write_text("{}", encoding="utf-8")
    settings = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    # The pad token and the added word had no rows yet, as after add_tokens without a resize.
    assert "mismatched vocabulary" in told(
        capsys, *("apply", "--model_path", tmp_path / "model", "--tokenizer_path", grown["padded"][1]),
        "--output_path", tmp_path / "no",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(settings["vocab_size"] + 2, mean_resizing=False)
    model.save_pretrained(tmp_path / "model")
    grow_model(tmp_path / "model", grown["padded"][1], tmp_path / "grown", "--pad_to_multiple_of", 1)
    one = tiny.tensors_of(tmp_path / "model" / "model.safetensors")
    other = tiny.tensors_of(tmp_path / "grown" / "model.safetensors")
    embeddings = one.pop("model.embed_tokens.weight"), other.pop("model.embed_tokens.weight")
    assert tiny.same_tensors(one, other)
    assert embeddings[1].dtype == torch.float16
    assert torch.equal(embeddings[1][: len(embeddings[0])], embeddings[0])
    names = {file.name for file in (tmp_path / "grown").iterdir()}
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.model", "tokenizer.json"} <= names
    assert "manifest.json" not in names
    loaded = AutoTokenizer.from_pretrained(tmp_path / "grown")
    assert len(loaded) == len(AutoTokenizer.from_pretrained(grown["padded"][1])) == len(embeddings[1])
    assert loaded.chat_template == "{{ messages }}"


def test_a_byte_level_model_grows(grown, tmp_path):
    old_path, new_path = grown["qwen"]
    shutil.copytree(old_path, tmp_path / "model")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    listed = grow_model(tmp_path / "model", new_path, tmp_path / "grown")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    old, new = pair(grown, "qwen")
    assert listed["first_new_id"] == len(old)
    rows = model.get_input_embeddings().weight.detach()
    old_rows = AutoModelForCausalLM.from_pretrained(tmp_path / "model").get_input_embeddings().weight.detach()
    n_whole = 0
    for i in listed["new_ids"]:
        text = new.decode([i])
        if "\ufffd" in text:  # part of a character; it has no text of its own
            continue
        assert torch.allclose(rows[i], old_rows[encode(old, text)].mean(dim=0), atol=1e-7)
        n_whole += 1
    assert n_whole > 100


def write(file: Path, content: bytes | str) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("", "empty.txt", "no usable record"),
        (bytes(range(256)) * 20, "binary.txt", "no usable record"),
        ("a few words only\n\nand a few more\n\n" * 3, "small.txt", "--vocab_size: 500 is more than"),
        ("".join(chr(i) for i in range(0x4E00, 0x5200)), "wide.txt", "--vocab_size: 500 is less than"),
        ('{"foo": 5}', "number.jsonl", "no usable record"),
        ("x", "odd.xlsx", "no known format"),
        ("x", "odd.docx", "no usable record"),
    ],
)
def test_bad_corpora(content, name, words, capsys, tmp_path):
    file = write(tmp_path / name, content)
    options = (
        "train",
        "--data_path",
        file,
        "--vocab_size",
        500,
        "--held_out_share",
        0,
        "--output_path",
        tmp_path / "o",
    )
    capsys.readouterr()
    assert run(*options, "--character_coverage", 1) != 0
    assert words in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == [name]


def test_the_largest_possible_size_is_the_right_one(capsys, tmp_path, grown):
    file = write(tmp_path / "small.txt", "a few words only\n\nand a few more\n\n" * 3)
    n_tried = 0
    for extra in ((), ("--model_type", "unigram"), ("--kind", "bytelevel", "--tokenizer_path", grown["qwen"][0])):
        words = ("train", "--data_path", file, "--held_out_share", 0, "--output_path", tmp_path / str(n_tried), *extra)
        line = told(capsys, *words, "--vocab_size", 5000)
        most = int(line.rsplit(" ", 1)[1])
        assert run(*words, "--vocab_size", most) == 0, line
        told(capsys, *words, "--vocab_size", most + 1, "--overwrite")
        n_tried += 1
    assert n_tried == 3


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (("train",), ("--data_path", "--output_path")),
        (("train", "--kind", "bytelevel", "--data_path", "x", "--output_path", "y"), ("--tokenizer_path",)),
        (("merge", "--max_new", "-1"), ("--tokenizer_path", "--new_path", "--output_path", "--max_new")),
        (("apply", "--max_shard_size", "much"), ("--model_path", "--tokenizer_path", "--max_shard_size")),
        (("aply",), ("apply",)),
    ],
)
def test_bad_options_are_named(words, flags, capsys):
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert all(flag in said for flag in flags), said


def test_merge_refuses_what_does_not_fit(grown, capsys, tmp_path):
    old, new = grown["llama"]
    pieces, bytelevel = old.parent / "sp", old.parent / "bl"
    out = ("--output_path", tmp_path / "o")
    empty = tmp_path / "empty"
    empty.mkdir()

    def refuses(tokenizer: Path, new_path: Path, words: str) -> None:
        assert words in told(capsys, "merge", "--tokenizer_path", tokenizer, "--new_path", new_path, *out)
        assert not (tmp_path / "o").exists()

    refuses(old, bytelevel, "--kind sentencepiece")
    refuses(grown["qwen"][0], pieces, "--kind bytelevel")
    refuses(empty, pieces, "holds no tokenizer")
    refuses(tmp_path / "nowhere", pieces, "nowhere")
    refuses(old, empty, "holds no tokenizer")
    refuses(new, pieces, "no piece that is new")
    broken = shutil.copytree(pieces, tmp_path / "broken")
    write(broken / "tokenizer.model", (pieces / "tokenizer.model").read_bytes()[:-7])
    refuses(old, broken, "damaged")
    refuses(broken, pieces, "damaged")
    other = shutil.copytree(old, tmp_path / "other")
    shutil.copy(BASE / "tokenizer.json", other / "tokenizer.json")
    refuses(other, pieces, "disagree")
    unigram = shutil.copytree(bytelevel, tmp_path / "word")
    write(unigram / "tokenizer.json", '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}')
    refuses(grown["qwen"][0], unigram, "no BPE vocabulary")
    write(unigram / "tokenizer.json", '{"model": ')
    refuses(grown["qwen"][0], unigram, "cannot be read as JSON")
    (tmp_path / "o").mkdir()
    write(tmp_path / "o" / "mine", "mine")
    line = told(capsys, "merge", "--tokenizer_path", old, "--new_path", pieces, *out)
    assert "--overwrite" in line
    assert (tmp_path / "o" / "mine").read_text() == "mine"


def change_config(model: Path, **changes: Any) -> None:
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    write(model / "config.json", json.dumps(settings | changes))


def cut_weights(model: Path) -> None:
    write(model / "model.safetensors", (model / "model.safetensors").read_bytes()[:-100])


def spoil(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import save_file

    tensors = tiny.tensors_of(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def put_code(model: Path) -> None:
    (model / "model.safetensors").unlink()
    # A pickle that would make a file named `ran` if anything in it were run.
    write(model / "pytorch_model.bin", f"cposix\nsystem\n(S'touch {model.as_posix()}/ran'\ntR.".encode())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: (m / "config.json").unlink(), "config.json is missing"),
        (lambda m: change_config(m, model_type="lama"), "transformers can build"),
        (lambda m: change_config(m, model_type="bert"), ""),
        (lambda m: change_config(m, vocab_size=400), "belongs to another model"),
        (lambda m: change_config(m, hidden_size=32), "belongs to another model"),
        (lambda m: change_config(m, quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
        (cut_weights, "damaged"),
        (put_code, "refused"),
        (lambda m: (m / "model.safetensors").unlink(), "holds no weights"),
        (lambda m: (m / "tokenizer.model").unlink(), "holds no tokenizer"),
        (lambda m: spoil(m, lambda t: t.pop("model.embed_tokens.weight")), "lacks 1 tensors"),
        (lambda m: spoil(m, lambda t: t["lm_head.weight"].fill_(float("nan"))), "NaN"),
        (lambda m: shutil.copy(BASE / "tokenizer.model", m / "tokenizer.model"), "mismatched vocabulary"),
    ],
)
def test_apply_refuses_a_model_that_is_wrong(damage, words, grown, tiny_base, capsys, tmp_path):
    model = shutil.copytree(tiny_base, tmp_path / "model")
    damage(model)
    options = ("--model_path", model, "--tokenizer_path", grown["llama"][1], "--output_path", tmp_path / "o")
    assert words in told(capsys, "apply", *options)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert not (model / "ran").exists()


def test_apply_refuses_a_tokenizer_of_another_model_or_without_news(grown, tiny_base, capsys, tmp_path):
    out = ("--model_path", tiny_base, "--output_path", tmp_path / "o")
    line = told(capsys, "apply", *out, "--tokenizer_path", grown["padded"][1])
    assert "mismatched vocabulary" in line
    assert "has no token that" in told(capsys, "apply", *out, "--tokenizer_path", grown["llama"][0])
    assert "is or holds what is read here" in told(
        capsys, "apply", *out[:2], "--output_path", tiny_base, "--tokenizer_path", grown["llama"][1], "--overwrite"
    )
