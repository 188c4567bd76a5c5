"""The catalogue of open collections: what an entry may say, how it is found, and that each is read as it describes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from onecard.config.data import DataOptions
from onecard.data.catalogue import entries as catalogue
from onecard.data.catalogue.entries import entry_named, read_entries, shipped
from onecard.data.catalogue.place import describe
from onecard.data.description import DatasetDescription, as_described
from onecard.data.formats import to_sample
from onecard.data.messages import Conversation, Document, Turn
from onecard.data.mixture import parts_of
from onecard.data.sources import ReadReport, data_fingerprint, read
from onecard.errors import ConfigError, DataError, ModelError
from onecard.programs import data
from tests.export.hub_server import Hub, serving

OWN = """
mine:
  about: letters of our own
  rows: 12
  language: CN/EN
  hf_hub_url: me/letters
  columns: {prompt: ask, response: reply}
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "datasets.yaml"
    monkeypatch.setenv(catalogue.OWN_FILE, str(file))
    return file


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    data.main(words)
    return capsys.readouterr().out


def test_every_collection_of_alpaca_cot_is_there_with_its_tags() -> None:
    of_platform = read_entries(Path(catalogue.__file__).parent / "alpaca_cot.yaml")
    assert len(of_platform) == 35
    assert of_platform["belle"].task == ("TS", "MT") and of_platform["xp3"].rows == 78_883_588
    tagged = [entry for entry in of_platform.values() if entry.generation]
    # The platform itself gives UltraChat and StackLLaMA no tags.
    assert len(tagged) == 33 and all(entry.language for entry in of_platform.values())


def test_the_catalogue_is_listed_without_what_works_on_rows() -> None:
    code = "import sys; from onecard.programs import data; data.main(['list']); print(int('numpy' in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "alpaca" in ended.stdout and ended.stdout.split()[-1] == "0"


def test_list_filters_by_tags_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    names = [line.split()[0] for line in said(["list", "--lang", "ml"], capsys).splitlines()[:-2]]
    assert {"guanaco", "natural-instructions", "xp3"} <= set(names) and "alpaca" not in names
    found = json.loads(said(["list", "--search", "databricks", "--json"], capsys))
    assert [(one["name"], one["rows"]) for one in found] == [("dolly", 15015), ("dolly-15k", 0)]
    with pytest.raises(ConfigError, match="--generation: 'robots' is none of HG, SI, MIX, COL"):
        data.main(["list", "--generation", "robots"])


def test_show_takes_the_name_as_a_word_or_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["show", "belle"], capsys) == said(["show", "--name", "belle"], capsys)
    with pytest.raises(DataError, match=r"no collection is called 'bele' \(did you mean belle\?\); .* data list"):
        data.main(["show", "bele"])
    with pytest.raises(ConfigError, match="--name: is missing"):
        data.main(["show"])


def test_own_entries_stand_beside_the_others_and_win(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own.write_text(OWN + "alpaca:\n  about: another\n  hf_hub_url: me/alpaca\n", encoding="utf-8")
    entry = entry_named("mine")
    assert (
        entry.is_own and entry.language == ("CN", "EN") and entry.data.columns == {"prompt": "ask", "response": "reply"}
    )
    assert entry_named("alpaca").data.hf_hub_url == "me/alpaca" and not entry_named("belle").is_own
    assert shipped()["alpaca"].rows == 52002
    assert "letters of our own" in said(["list"], capsys)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a\n- b\n", "holds no entries"),
        ("a: [", "cannot be read as YAML"),
        ("Big One:\n  hf_hub_url: a/b\n", "the name 'Big One' is not made of small letters"),
        ("a: b\n", '"a": an entry has lines such as hf_hub_url'),
        ("a:\n  about: x\n", '"a": it names neither file_name, hf_hub_url nor ms_hub_url'),
        (
            "a:\n  hf_hub_url: a/b\n  colums: {prompt: x}\n",
            r"'colums' is no key of a description \(did you mean columns",
        ),
        (
            "a:\n  hf_hub_url: a/b\n  columns: {promt: x}\n",
            r"'promt' is no column of a description \(did you mean prompt",
        ),
        ("a:\n  hf_hub_url: a/b\n  language: ZH\n", "language is 'ZH'; known are EN, CN, ML"),
        ("a:\n  hf_hub_url: a/b\n  rows: many\n", "rows is 'many', a number is expected"),
        ("a:\n  script_url: x\n", "code of data sets is never run here"),
    ],
)
def test_what_is_wrong_in_a_file_of_entries_is_named(text: str, problem: str, own: Path) -> None:
    own.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=problem) as caught:
        catalogue.entries()
    assert str(own) in str(caught.value)


# --- reading ---------------------------------------------------------------------------------------------------------

CHAT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
# Rows of our own in each shape, as its files hold them.
ROWS: dict[str, dict[str, Any]] = {
    "instruction/input/output": {"instruction": "Add", "input": "2 3", "output": "5"},
    "instruction/context/response": {"instruction": "Sum up", "context": "A page.", "response": "Short."},
    "prompt/response": {"prompt": "Add 2 and 3", "response": "5"},
    "question/answer": {"question": "2+3?", "answer": "5"},
    "query/response": {"query": "2+3?", "response": "5", "type": "math"},
    "inputs/targets": {"inputs": "2+3?", "targets": "5", "language": "English"},
    "ShareGPT conversations": {"conversations": CHAT, "source": "x"},
    "OpenAI messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "text": {"text": "A page."},
}
# Rows of the collections that have columns of their own.
OWN_ROWS: dict[str, dict[str, Any]] = {
    "stack-exchange-paired": {"qid": 1, "question": "Why?", "response_j": "So.", "response_k": "No."},
    "firefly-1.1m": {"kind": "Poem", "input": "写诗", "target": "床前"},
    "adgen": {"content": "类型#裙", "summary": "好裙子"},
    "webqa-zh": {"id": "1", "input": "谁？", "output": "他"},
    "openorca": {"id": "1", "system_prompt": "Be short.", "question": "2+3?", "response": "5"},
    "mathinstruct": {"source": "x", "output": "5", "instruction": "2+3?"},
    "webinstruct": {"question": "2+3?", "answer": "5", "source": "x"},
    "codefeedback": {"query": "Sort it", "answer": "sorted(it)", "resource": "x", "lang": "python"},
    "lmsys-chat-1m": {"model": "x", "turn": 1, "conversation": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "magpie-ultra": {"instruction": "2+3?", "response": "5", "score": 1.0},
    "glaive-toolcall-en": {"conversations": CHAT, "tools": "[]"},
    "glaive-toolcall-zh": {"conversations": CHAT, "tools": "[]"},
    "cosmopedia": {"prompt": "Write", "text": "A story.", "text_token_length": 3},
    "wikipedia-zh": {"completion": "一页", "source": "x"},
    "fineweb-edu": {"text": "A page.", "url": "x"},
    "skypile": {"text": "一页"},
}  # fmt: skip


def test_there_are_enough_and_no_row_is_left_over() -> None:
    assert len(shipped()) >= 45 and set(OWN_ROWS) == {name for name, entry in shipped().items() if entry.data.columns}
    assert {entry.shape for name, entry in shipped().items() if name not in OWN_ROWS} <= set(ROWS)


@pytest.mark.parametrize("name", shipped())
def test_every_entry_is_read_as_it_describes(name: str) -> None:
    entry = shipped()[name]
    row = OWN_ROWS.get(name) or ROWS[entry.shape]
    record, left_out = as_described(entry.data, row)
    parsed = to_sample(record, "row:1")
    assert parsed.shape == entry.shape, "the shape that the catalogue tells"
    if isinstance(parsed.sample, Document):
        assert parsed.sample.text and not set(left_out) & {*entry.data.columns.values()}
    else:
        asked, answered = parsed.sample.turns[-2:]
        assert (asked.role, answered.role) == ("user", "assistant") and asked.content and answered.content
    assert entry.about and entry.home.startswith("https://") and entry.licence
    assert entry.data.hf_hub_url.count("/") == 1


def test_the_better_answer_and_the_system_prompt_are_taken() -> None:
    better = to_sample(
        as_described(shipped()["stack-exchange-paired"].data, OWN_ROWS["stack-exchange-paired"])[0], "r:1"
    )
    orca = to_sample(as_described(shipped()["openorca"].data, OWN_ROWS["openorca"])[0], "r:1")
    assert isinstance(better.sample, Conversation) and better.sample.turns[-1].content == "So."
    assert isinstance(orca.sample, Conversation) and orca.sample.turns[0] == Turn("system", "Be short.")


# --- data get --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that holds a part of the platform's files."""
    files = {
        "belle_cn/belle.json": json.dumps([ROWS["instruction/input/output"]] * 3).encode(), "README.md": b"# all",
        "alpaca/alpaca.json": b"[]", "belle_cn/notes.md": b"x",
    }  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("onecard.data.catalogue.place.collections_folder", lambda: tmp_path / "collections")
    with serving(Hub(files, repo="datasets/QingyiSi/Alpaca-CoT")) as hub:
        yield hub


def test_get_brings_the_files_of_one_collection_and_its_name_reads_them(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "collections" / "belle"
    assert "2 files" in said(["get", "belle", "--endpoint", hub.address, "--dry_run"], capsys) and not folder.exists()
    assert "--data belle" in said(["get", "belle", "--endpoint", hub.address], capsys)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [
        "README.md", "belle_cn/belle.json", "dataset_info.json",
    ]  # fmt: skip
    with serving(Hub({}, repo="nobody/nothing")):  # nothing is asked for any more
        (part,) = parts_of(DataOptions(data="belle:2"))
        assert len(list(read(part.source, report=ReadReport()))) == 3
    with pytest.raises(ConfigError, match=r"--overwrite: .*belle is there already"):
        data.main(["get", "belle", "--endpoint", hub.address])
    data.main(["get", "belle", "--endpoint", hub.address, "--overwrite"])
    own = tmp_path / "mine"
    out = said(["get", "belle", "--endpoint", hub.address, "--output_path", str(own)], capsys)
    assert f"--data belle --data_path {own}" in out
    (part,) = parts_of(DataOptions(data="belle", data_path=str(own)))
    assert part.source.paths == (str(own / "belle_cn"),)


def test_get_says_what_is_wrong(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"dolly-15k: http://.* has no dataset databricks/databricks-dolly-15k"):
        data.main(["get", "dolly-15k", "--endpoint", hub.address])
    with pytest.raises(ConfigError, match="--hub: dolly-15k is not known to lie on ModelScope"):
        data.main(["get", "dolly-15k", "--hub", "modelscope"])
    with pytest.raises(ConfigError, match="--dry_run: knows the Hugging Face Hub only"):
        data.main(["get", "belle", "--hub", "modelscope", "--dry_run"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE .* is set, so nothing is downloaded"):
        data.main(["get", "belle"])
    assert not (tmp_path / "collections").exists() or not list((tmp_path / "collections").iterdir())


def test_a_collection_that_cannot_be_reached_says_how_to_bring_it(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    (part,) = parts_of(DataOptions(data="belle"))
    told = r"^belle: the collection \(QingyiSi/Alpaca-CoT\) cannot be downloaded: no route to host; try again, or "
    with pytest.raises(
        DataError, match=told + r"bring it here first: .* data get belle --endpoint https://hf-mirror.com$"
    ):
        list(read(part.source, report=ReadReport()))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with pytest.raises(DataError, match=told):
        data_fingerprint(part.source)


def test_modelscope_is_a_second_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package is asked with names that it has; without it one line says what to install."""
    asked: list[Any] = []

    def dataset_snapshot_download(dataset_id: str, **options: Any) -> str:
        asked.append((dataset_id, options))
        if not tmp_path.joinpath("works").exists():
            raise ConnectionError("no route\nto host")
        (Path(options["local_dir"]) / "belle_cn").mkdir()
        rows = json.dumps([ROWS["instruction/input/output"]])
        (Path(options["local_dir"]) / "belle_cn" / "belle.json").write_text(rows, encoding="utf-8")
        return str(options["local_dir"])

    module = ModuleType("modelscope.hub.snapshot_download")
    module.dataset_snapshot_download = dataset_snapshot_download  # type: ignore[attr-defined]
    for name, value in (("modelscope", ModuleType("modelscope")), ("modelscope.hub", ModuleType("modelscope.hub")),
                        (module.__name__, module)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, value)
    with pytest.raises(
        ModelError, match="AI-ModelScope/Alpaca-CoT cannot be downloaded from ModelScope: no route; check"
    ):
        data.main(["get", "belle", "--hub", "modelscope"])
    (tmp_path / "works").touch()
    data.main(["get", "belle", "--hub", "modelscope"])
    dataset_id, options = asked[-1]
    assert dataset_id == "AI-ModelScope/Alpaca-CoT" and "belle_cn/*.json" in options["allow_patterns"]
    (part,) = parts_of(DataOptions(data="belle"))
    assert len(list(read(part.source, report=ReadReport()))) == 1
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    with pytest.raises(
        ModelError, match=r"ModelScope needs its own package: pip install -r requirements-modelscope.txt"
    ):
        data.main(["get", "belle", "--hub", "modelscope", "--output_path", str(tmp_path / "other")])


@pytest.mark.slow
def test_a_split_of_a_collection_here_is_found_by_its_card(tmp_path: Path) -> None:
    folder = tmp_path / "collections" / "split"
    (folder / "data").mkdir(parents=True)
    for split in ("train_sft", "test_sft"):
        row = {"messages": [{"role": "user", "content": split}, {"role": "assistant", "content": "Hello"}]}
        (folder / "data" / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train_sft\n    path: data/train_sft.jsonl\n"
        "  - split: test_sft\n    path: data/test_sft.jsonl\n---\n",
        encoding="utf-8",
    )
    describe(folder, DatasetDescription("split", hf_hub_url="a/b", split="train_sft"))
    (part,) = parts_of(DataOptions(data="split", data_path=str(folder)))
    (sample,) = read(part.source, report=ReadReport())
    assert isinstance(sample, Conversation) and sample.turns[0].content == "train_sft"
