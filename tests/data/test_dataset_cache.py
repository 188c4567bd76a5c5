"""The encoded data on disk: made once, never stale, never half, never trusted when damaged."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from onecard.data import arrow_cache
from onecard.data import dataset as dataset_module
from onecard.data.chat_template import load_template
from onecard.data.dataset import EncodedDataset, cache_key, encode_dataset
from onecard.data.encode import IGNORE_INDEX, EncodeSettings, encode_sample
from onecard.data.sources import ReadReport, read
from onecard.errors import DataError, OneCardError
from tests import tiny
from tests.data.plain_tokenizer import PlainTokenizer

SETTINGS = EncodeSettings(cutoff_len=500)
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path) -> Path:
    return tiny.write_instructions(tmp_path / "data.json", 60)


@pytest.fixture
def build(sp_tokenizer, data, tmp_path):
    def make(settings: EncodeSettings = SETTINGS, cache: Path = tmp_path / "cache") -> EncodedDataset:
        return encode_dataset(str(data), load_template("alpaca", sp_tokenizer), sp_tokenizer, settings, cache)

    return make


@pytest.fixture
def n_encoded(monkeypatch) -> list[int]:
    """How often data was really encoded."""
    calls: list[int] = []
    original = dataset_module._encoded

    def counted(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(dataset_module, "_encoded", counted)
    return calls


def all_of(dataset: EncodedDataset) -> list:
    return [dataset[i] for i in range(len(dataset))]


@pytest.mark.parametrize("batch_records", [1, 7, 2048])
def test_a_dataset_is_its_samples_in_order(build, data, sp_tokenizer, monkeypatch, batch_records):
    monkeypatch.setattr(dataset_module, "BATCH_RECORDS", batch_records)
    dataset = build()
    template = load_template("alpaca", sp_tokenizer)
    expected = [
        sample
        for group, conversation in enumerate(read(str(data), report=ReadReport()))
        for sample in encode_sample(conversation, template, sp_tokenizer, SETTINGS, group=group)
    ]
    assert all_of(dataset) == expected
    assert len(dataset) == 60
    assert dataset.lengths.dtype == dataset.supervised.dtype == np.int32
    assert dataset.lengths.tolist() == [len(sample.input_ids) for sample in expected]
    assert dataset.supervised.tolist() == [sum(x != IGNORE_INDEX for x in sample.labels) for sample in expected]
    assert dataset.groups.tolist() == list(range(60))
    assert dataset.report.n_tokens == dataset.lengths.sum()
    assert dataset.report.n_supervised == dataset.supervised.sum()
    with pytest.raises(IndexError):
        dataset[60]
    assert dataset[np.int64(59)] == expected[59]


def test_the_fingerprint_is_of_the_samples_whatever_the_batches(build, tmp_path, monkeypatch):
    fingerprint = build().fingerprint
    monkeypatch.setattr(dataset_module, "BATCH_RECORDS", 7)
    assert build(cache=tmp_path / "other").fingerprint == fingerprint
    assert build(EncodeSettings(500, "everything"), cache=tmp_path / "other").fingerprint != fingerprint


def test_the_second_time_nothing_is_encoded(build, n_encoded):
    first, second = build(), build()
    assert len(n_encoded) == 1
    assert all_of(first) == all_of(second)
    assert first.summary_lines() == second.summary_lines()
    assert first.fingerprint == second.fingerprint


def test_samples_of_several_answers_share_a_group(tmp_path, bytelevel_tokenizer, with_template):
    from tests.data.conftest import REWRITES_HISTORY

    tokenizer = with_template(bytelevel_tokenizer, REWRITES_HISTORY)
    file = tmp_path / "chat.jsonl"
    turns = [("user", "a"), ("assistant", "<think>x</think>b"), ("user", "c"), ("assistant", "d")]
    messages = {"messages": [{"role": role, "content": content} for role, content in turns]}
    file.write_text("\n".join(json.dumps(messages) for _ in range(3)), encoding="utf-8")
    dataset = encode_dataset(str(file), load_template("auto", tokenizer), tokenizer, SETTINGS, tmp_path / "cache")
    assert dataset.groups.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_key_changes_with_each_ingredient(data, tmp_path, sp_tokenizer, sp_legacy_tokenizer, monkeypatch):
    template = load_template("alpaca", sp_tokenizer)
    changed_template = load_template("vicuna-chat", sp_tokenizer)
    more_tokens = copy.deepcopy(sp_tokenizer)
    more_tokens.add_tokens(["fox"])
    other_data = tiny.write_instructions(tmp_path / "other.json", 61)
    copied = tmp_path / "copy" / "data.json"
    copied.parent.mkdir()
    copied.write_bytes(data.read_bytes())
    key = cache_key(str(data), template, sp_tokenizer, SETTINGS)
    assert key == cache_key(str(data), template, copy.deepcopy(sp_tokenizer), EncodeSettings(500))
    assert key == cache_key(str(copied), template, sp_tokenizer, SETTINGS)
    keys = [
        cache_key(str(other_data), template, sp_tokenizer, SETTINGS),
        cache_key(str(data), changed_template, sp_tokenizer, SETTINGS),
        cache_key(str(data), template, sp_legacy_tokenizer, SETTINGS),
        cache_key(str(data), template, more_tokens, SETTINGS),
        cache_key(str(data), template, sp_tokenizer, EncodeSettings(499)),
        cache_key(str(data), template, sp_tokenizer, EncodeSettings(500, "last")),
        cache_key(str(data), template, sp_tokenizer, EncodeSettings(500, strict=True)),
    ]
    monkeypatch.setattr(dataset_module, "_code_fingerprint", lambda encoder: "new code")
    keys.append(cache_key(str(data), template, sp_tokenizer, SETTINGS))
    assert len({key, *keys}) == 9


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def zero_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_short, zero_tail, flip_a_bit, empty, Path.unlink])
@pytest.mark.parametrize("suffix", [".arrow", ".json"])
def test_a_damaged_cache_is_made_anew(build, n_encoded, capsys, damage, suffix):
    first = build()
    expected, path = all_of(first), first.path.with_suffix(suffix)
    before = path.read_bytes()
    del first
    damage(path)
    assert all_of(build()) == expected
    if suffix == ".json" and damage is flip_a_bit:
        return  # a bit of the report; the data is vouched for by its own hash
    assert len(n_encoded) == 2
    assert path.read_bytes() == before
    if damage is not Path.unlink:
        assert "damaged" in capsys.readouterr().err


def test_a_cache_of_another_key_is_not_taken(build, n_encoded):
    first = build()
    manifest_file = first.path.with_suffix(".json")
    manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    manifest_file.write_text(json.dumps(manifest | {"key": "0" * 64}), encoding="utf-8")
    build()
    assert len(n_encoded) == 2


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from onecard.data import arrow_cache
from onecard.data import dataset
from onecard.data.encode import EncodeSettings
from onecard.data.chat_template import load_template
from tests.data.plain_tokenizer import PlainTokenizer
assert "transformers" not in sys.modules and "torch" not in sys.modules
dataset.BATCH_RECORDS = 2
at = {at!r}
if at == "batch":
    original = arrow_cache._record_batch
    calls = []
    def stop(*args):
        calls.append(1)
        if len(calls) == 9:
            print("now", flush=True); time.sleep(60)
        return original(*args)
    arrow_cache._record_batch = stop
else:
    def stop(*args):
        print("now", flush=True); time.sleep(60)
    arrow_cache.write_whole = stop
tokenizer = PlainTokenizer()
template = load_template("alpaca", tokenizer)
dataset.encode_dataset({data!r}, template, tokenizer, EncodeSettings(1000), Path({cache!r}))
"""


@pytest.mark.parametrize("at", ["batch", "before the manifest"])
def test_a_kill_half_way_leaves_nothing_that_is_taken_for_whole(n_encoded, data, tmp_path, at):
    cache = tmp_path / "cache"
    script = KILLED.format(root=str(REPOSITORY), at=at, data=str(data), cache=str(cache))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(list(cache.glob("*.partial"))) == (at == "batch")
    assert not list(cache.glob("*.json"))

    tokenizer = PlainTokenizer()
    template = load_template("alpaca", tokenizer)
    settings = EncodeSettings(1000)
    assert len(encode_dataset(str(data), template, tokenizer, settings, cache)) == 60
    assert len(n_encoded) == 1
    assert len(encode_dataset(str(data), template, tokenizer, settings, cache)) == 60
    assert len(n_encoded) == 1
    # What the killed run left is removed when it is surely nobody's.
    for partial in cache.glob("*.partial"):
        os.utime(partial, (0, time.time() - 2 * 24 * 3600))
    encode_dataset(str(data), template, tokenizer, EncodeSettings(900), cache)
    assert not list(cache.glob("*.partial"))


@pytest.mark.parametrize("blocked", ["a file in its place", "read-only"])
def test_a_cache_that_cannot_be_written_is_said_and_done_without(build, tmp_path, capsys, monkeypatch, blocked):
    cache = tmp_path / "blocked"
    if blocked == "read-only":

        def refuse(*args, **kwargs):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(arrow_cache.tempfile, "TemporaryFile", refuse)
    else:
        cache.write_text("a file", encoding="utf-8")
    dataset = build(cache=cache)
    assert len(all_of(dataset)) == 60
    assert "cannot be written" in capsys.readouterr().err
    elsewhere = dataset.path.parent
    assert elsewhere.is_dir()
    del dataset
    assert not elsewhere.exists()


def test_a_read_only_cache_that_holds_the_data_is_used(build, n_encoded, monkeypatch):
    build()
    monkeypatch.setattr(dataset_module, "can_write", lambda folder: False)
    assert len(build()) == 60
    assert len(n_encoded) == 1


def test_a_full_disk_is_said_and_leaves_nothing(build, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arrow_cache, "sync_file", full)
    with pytest.raises(OneCardError, match=r"--cache_path .*No space left on device"):
        build()
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_skipped_is_named_and_counted(tmp_path, sp_tokenizer, capsys):
    file = tmp_path / "mixed.jsonl"
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": "b</s>c"},
        {"instruction": "long " * 300, "output": "b"},
        {"instruction": "a", "output": "c " * 300},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n{broken\n", encoding="utf-8")
    template = load_template("alpaca", sp_tokenizer)
    dataset = encode_dataset(str(file), template, sp_tokenizer, EncodeSettings(256), tmp_path / "cache")
    assert [dataset[i].record for i in range(len(dataset))] == ["mixed.jsonl:1", "mixed.jsonl:4"]
    assert dataset.groups.tolist() == [0, 3]
    assert dataset.report.read.n_bad == 2
    assert [(bad.line, "'</s>'" in bad.reason) for bad in sorted(dataset.report.read.bad)] == [(2, True), (5, False)]
    assert dataset.report.n_cut == 1
    assert dict(dataset.report.dropped) == {
        "the question alone takes all 256 tokens of a sample (finetune --cutoff_len)": 1
    }
    lines = "\n".join(dataset.summary_lines())
    assert "1 dropped: the question alone takes all 256 tokens of a sample (finetune --cutoff_len)" in lines
    assert "mixed.jsonl:2" in lines
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: holds the text '</s>'"):
        encode_dataset(str(file), template, sp_tokenizer, EncodeSettings(256, strict=True), tmp_path / "cache")


def test_nothing_to_learn_is_an_error_that_says_why(tmp_path, sp_tokenizer):
    file = tmp_path / "long.json"
    file.write_text(json.dumps([{"instruction": "long " * 300, "output": "b"}]), encoding="utf-8")
    template = load_template("alpaca", sp_tokenizer)
    with pytest.raises(DataError, match="the question alone takes all 32 tokens"):
        encode_dataset(str(file), template, sp_tokenizer, EncodeSettings(32), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_file_is_memory_mapped(build):
    dataset = build()
    before = pa.total_allocated_bytes()
    assert len(all_of(dataset)) == 60
    assert pa.total_allocated_bytes() == before
