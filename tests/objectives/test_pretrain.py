"""Continued pretraining: texts are learned whole, in blocks that lose and repeat no token; perplexities are true."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onecard.config.parsing import problems_of
from onecard.config.training import FinetuneConfig
from onecard.data.arrow_cache import DatasetReport, write_cache
from onecard.data.chat_template import load_template
from onecard.data.dataset import EncodedDataset, encode_dataset
from onecard.data.encode import IGNORE_INDEX, EncodedSample, EncodeSettings
from onecard.data.joined import JoinedDataset
from onecard.data.mixture import MixturePart
from onecard.data.sources import Source
from onecard.errors import DataError
from onecard.objectives.pretrain import BlockView, WholeTextEncoder
from onecard.recipes import finetune
from onecard.train.trackers import read_log
from tests import tiny

TEXTS = [" ".join(tiny.CORPUS[: 1 + number % 7]) for number in range(40)]
OPTIONS = {"objective": "pretrain", "cutoff_len": 64, "test_size": 4, "eval_steps": 4, "save_steps": 2, "max_steps": 4,
           "num_epoch": 9, "total_batch": 4, "learning_rate": 1e-3}  # fmt: skip
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    return path


def dataset_of(texts: list[list[int]], n_in_front: int, path: Path) -> EncodedDataset:
    """Documents of these ids, of which the first ones are what a tokenizer puts in front."""
    rows = [(EncodedSample(ids, [n_in_front, len(ids)], n_characters=2 * len(ids)), f"{path.stem}:{number}", number)
            for number, ids in enumerate(texts)]  # fmt: skip
    report = DatasetReport()
    return EncodedDataset(path, report, write_cache(path, "key", report, [rows]))


def datasets(folder: Path, n_in_front: int) -> list[EncodedDataset]:
    """A source, and two joined ones, of documents of few and of many tokens; every token has an id of its own."""
    rng = np.random.RandomState(n_in_front)
    sources, number = [], 0
    for name in ("a", "b"):
        texts = []
        for length in rng.randint(n_in_front + 2, 40, 20).tolist():
            texts.append(list(range(number, number + length)))
            number += length
        sources.append(dataset_of(texts, n_in_front, folder / f"{name}{n_in_front}.arrow"))
    return [sources[0], JoinedDataset([MixturePart(name, Source((name,))) for name in ("a", "b")], sources)]


def test_blocks_of_200_random_corpora_have_each_token_once(tmp_path: Path) -> None:
    rng, n_partial = np.random.RandomState(7), 0
    made = {n_in_front: datasets(tmp_path, n_in_front) for n_in_front in range(3)}
    for number in range(200):
        n_in_front, length, flows = int(rng.randint(3)), int(rng.randint(8, 48)), bool(rng.randint(3))
        apart = bool(rng.randint(2)) or not flows
        dataset = made[n_in_front][rng.randint(2)]
        chosen = np.flatnonzero(rng.rand(len(dataset)) < rng.rand())
        view = BlockView(dataset, chosen, length, flows=flows, apart=apart)
        blocks = [view[position] for position in range(len(view))]
        wanted = Counter(int(token) for row in chosen for token in dataset.ids(int(row)))
        assert Counter(token for block in blocks for token in block.input_ids) == wanted, number
        assert [len(block.input_ids) for block in blocks] == view.lengths.tolist()
        assert [sum(label >= 0 for label in block.labels) for block in blocks] == view.units.tolist()
        short = view.lengths < length
        n_partial += short.sum()
        n_sources = 1 if dataset.parts is None else len(set(dataset.parts[chosen].tolist()))
        assert not flows or short.sum() <= n_sources, "only the last block of a source may be short"
        begins = {int(dataset.ids(int(row))[0]) for row in chosen}
        for block in blocks:
            check_labels(block, begins, n_in_front, apart=apart, flows=flows)
    assert n_partial > 100


def check_labels(block: Any, begins: set[int], n_in_front: int, *, apart: bool, flows: bool) -> None:
    """All is learned but what a tokenizer puts in front of a text, and what follows nothing that may be seen."""
    places = [place for place, token in enumerate(block.input_ids) if token in begins]
    assert block.starts == ([place for place in places if place] if apart and flows else [])
    unlearned = {first + nth for first in begins for nth in range(max(n_in_front, apart))}
    for place, (token, label) in enumerate(zip(block.input_ids, block.labels, strict=True)):
        assert label == (IGNORE_INDEX if token in unlearned or place == 0 else token)


def test_a_text_is_one_row_with_its_end(corpus: Path, sp_tokenizer: Any, tmp_path: Path) -> None:
    template = load_template("alpaca", sp_tokenizer)
    found = encode_dataset(str(corpus), template, sp_tokenizer, EncodeSettings(0), tmp_path, encoder=WholeTextEncoder)
    assert len(found) == len(TEXTS) and found.characters.tolist() == [len(text) for text in TEXTS]
    for number, text in enumerate(TEXTS):
        assert found[number].input_ids == [*sp_tokenizer(text)["input_ids"], EOS], "longer ones are not cut"
        assert found[number].labels == [IGNORE_INDEX, *found[number].input_ids[1:]]
    assert any("blank lines separate" in line for line in found.summary_lines())


def test_conversations_are_refused_by_name_or_learned_whole(sp_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"text": "The quick brown fox."}, {"instruction": "Count to 2", "output": "1 2"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    template, encoder = load_template("alpaca", sp_tokenizer), WholeTextEncoder
    found = encode_dataset(str(path), template, sp_tokenizer, EncodeSettings(0), tmp_path / "c", encoder=encoder)
    assert len(found) == 1
    assert any("data.jsonl:2: the record is a conversation, and pretraining learns texts" in line
               for line in found.summary_lines())  # fmt: skip
    with pytest.raises(DataError, match=r"data.jsonl:2: the record is a conversation.*--strict"):
        encode_dataset(str(path), template, sp_tokenizer, EncodeSettings(0, strict=True), tmp_path / "c",
                       encoder=encoder)  # fmt: skip
    settings = EncodeSettings(0, train_on="everything")
    found = encode_dataset(str(path), template, sp_tokenizer, settings, tmp_path / "c", encoder=encoder)
    whole = sp_tokenizer.decode(found[1].input_ids)
    assert len(found) == 2 and "Count to 2" in whole and whole.endswith("1 2</s>") and whole.count("</s>") == 1
    assert found.supervised[1] == found.lengths[1] - 1


def test_every_kind_of_file_is_read(sp_tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n{"text": "five"}', encoding="utf-8")
    pq.write_table(pa.table({"text": ["six", "seven", "eight"]}), tmp_path / "c.parquet")
    (tmp_path / "d.md").write_text("# nine\n\nten", encoding="utf-8")
    template, counts = load_template("none", sp_tokenizer), {}
    for path, split in [("a.txt", "auto"), ("a.txt", "line"), ("a.txt", "file"), ("b.jsonl", "auto"),
                        ("c.parquet", "auto"), ("d.md", "auto")]:  # fmt: skip
        source = Source((str(tmp_path / path),), txt_split=split)
        found = encode_dataset(source, template, sp_tokenizer, EncodeSettings(0), tmp_path / "cache",
                               encoder=WholeTextEncoder)  # fmt: skip
        counts[path, split] = len(found)
        assert [int(found.ids(row)[-1]) for row in range(len(found))] == [EOS] * len(found)
    assert [*counts.values()] == [2, 3, 1, 2, 3, 1]


def test_a_run_resumes_bitwise_and_tells_true_perplexities(
    tiny_base: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = finetune(tiny.config_for(tiny_base, corpus, tmp_path / "whole", **OPTIONS))
    printed = capsys.readouterr().out
    assert "36 documents flow through blocks of 64 tokens; attention over the whole block" in printed
    changes = {**OPTIONS, "resume_from_checkpoint": str(whole / "checkpoint-2")}
    again = finetune(tiny.config_for(tiny_base, corpus, tmp_path / "again", **changes))
    assert tiny.largest_difference(*(tiny.tensors_of(run / "adapter_model.safetensors") for run in (whole, again))) == 0
    row = next(row for row in read_log(whole) if "perplexity" in row)
    assert row["perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
    shown = f"perplexity per token and per character {row['perplexity']:.4g} and {row['perplexity_per_character']:.4g}"
    assert shown in printed


def test_the_perplexity_per_character_is_that_of_the_text(tiny_base: Path, corpus: Path, tmp_path: Path) -> None:
    """Of documents by themselves, so that transformers can say the same without blocks."""
    options = {**OPTIONS, "packing": False, "cutoff_len": 512, "learning_rate": 1e-12}
    run = finetune(tiny.config_for(tiny_base, corpus, tmp_path / "run", **options))
    row = next(row for row in read_log(run) if "perplexity" in row)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    losses = {text: nats_of(model, [*tokenizer(text)["input_ids"], EOS]) for text in set(TEXTS)}
    held_out = held_out_texts(run)
    assert len(held_out) == 4
    nats, n_tokens = np.array([losses[text] for text in held_out]).sum(axis=0)
    assert row["perplexity"] == pytest.approx(math.exp(nats / n_tokens), rel=1e-5)
    assert row["perplexity_per_character"] == pytest.approx(math.exp(nats / sum(map(len, held_out))), rel=1e-5)


def nats_of(model: Any, ids: list[int]) -> tuple[float, int]:
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    return float(loss) * (len(ids) - 1), len(ids) - 1


def held_out_texts(run: Path) -> list[str]:
    from onecard.data.batches import split

    options = FinetuneConfig()
    return [TEXTS[row] for row in split(np.arange(len(TEXTS)), 4, options.train.seed)[1]]


@pytest.mark.parametrize(("options", "flag", "words"), [
    ({"train_on": "last"}, "--train_on", "learns texts whole"),
    ({"packing": False, "pack_attention": "document"}, "--pack_attention", "give --packing with it"),
    ({"objective": "sft", "pack_attention": "block"}, "--pack_attention", "give --packing with it"),
    ({"objective": "sft", "packing": True, "pack_attention": "block"}, "--pack_attention", "see the one before it"),
    ({"objective": "dpo", "packing": True}, "--packing", "does not go with --objective dpo"),
    ({"objective": "orpo", "packing": True}, "--packing", "does not go with --objective orpo"),
])  # fmt: skip
def test_what_contradicts_is_refused_by_its_flag(options: dict[str, Any], flag: str, words: str) -> None:
    config = tiny.config_for(Path("base"), Path("data"), Path("out"), **{"objective": "pretrain", **options})
    found = problems_of(config)
    assert [name for name, _ in found] == [flag] and words in found[0][1]


def test_another_length_of_blocks_is_another_run(tiny_base: Path, corpus: Path, tmp_path: Path) -> None:
    from onecard.errors import CheckpointError

    finetune(tiny.config_for(tiny_base, corpus, tmp_path / "run", **{**OPTIONS, "max_steps": 2}))
    for change in ({"cutoff_len": 48}, {"packing": False}, {"pack_attention": "document"}):
        with pytest.raises(CheckpointError, match=f"--{next(iter(change))} "):
            finetune(tiny.config_for(tiny_base, corpus, tmp_path / "run", **{**OPTIONS, "max_steps": 3, **change}))
