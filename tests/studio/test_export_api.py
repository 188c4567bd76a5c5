"""Exports as jobs: which words are started, what is refused, what is told of them; a merge and a GGUF for real."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from onecard.config.given_paths import paths_in
from onecard.config.parsing import parse
from onecard.programs.merge import MergeConfig
from onecard.studio.context import StudioContext
from onecard.studio.export_api import ExportApi
from onecard.studio.export_kinds import KINDS
from tests.inference.conftest import lively_base, run_dir
from tests.studio.conftest import Client, eventually

__all__ = ["lively_base", "run_dir"]

STUB = Path(__file__).with_name("stub_use.py")


@pytest.fixture
def run(context: StudioContext) -> Path:
    """What looks like a run: an adapter by its files' names."""
    folder = context.output_root / "my-run"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}', encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    context.jobs.program = (sys.executable, str(STUB), "onecard")
    return folder


def ended(ask: Client, job_id: str) -> dict[str, Any]:
    def look() -> Any:
        job = next(one for one in ask("GET", "/api/export")[1]["jobs"] if one["id"] == job_id)
        return job["state"] not in ("starting", "running") and job

    return eventually(look, job_id)


def export(ask: Client, **body: Any) -> tuple[int, Any]:
    return ask("POST", "/api/export", {"kind": "merge", "source": "my-run", "name": "made", **body})


def test_a_job_is_started_told_and_listed_with_its_size(ask: Client, context: StudioContext, run: Path) -> None:
    status, job = export(ask, options={"dtype": "fp16"})
    assert status == 201 and job["state"] in ("starting", "running", "done")
    job = ended(ask, job["id"])
    assert (job["state"], job["line"], job["bytes"]) == ("done", "written", 5)
    assert job["path"] == str(context.output_root / "made")
    target = str(context.output_root / "made")
    assert job["command"][3:] == [
        "merge", "--lora_path", str(run), "--output_path", target, "--dtype", "fp16", "--format", "hf",
    ]  # fmt: skip
    status, refused = export(ask)
    assert status == 409 and refused["error"]["code"] == "exists", "nothing is overwritten"


def test_a_run_whose_name_holds_a_comma_is_one_adapter(ask: Client, context: StudioContext, run: Path) -> None:
    named = run.rename(run.with_name("one, two"))
    status, job = export(ask, source=named.name)
    assert status == 201 and job["command"][4:6] == ["--lora_path", str(named)]
    assert ended(ask, job["id"])["state"] == "done"
    config = parse(MergeConfig, job["command"][4:])
    assert paths_in(config.merge.lora_path) == [str(named)]


def test_a_failure_says_why_and_a_cancelled_one_leaves_nothing(ask: Client, context: StudioContext, run: Path) -> None:
    job = ended(ask, export(ask, name="fails")[1]["id"])
    assert (job["state"], job["error"], job["path"]) == ("failed", "no room; make some", "")
    job = export(ask, name="waits")[1]
    partial = context.output_root / ".waits.partial"
    eventually(partial.is_dir, "it has begun to write")
    status, refused = export(ask, name="second")
    assert status == 409 and "waits is being made" in refused["error"]["message"]
    assert ask("POST", f"/api/jobs/{job['id']}/cancel", {})[0] == 200
    assert ended(ask, job["id"])["state"] == "cancelled"
    assert not partial.exists() and not (context.output_root / "waits").exists()


def test_of_two_that_come_at_once_one_is_started(
    ask: Client, context: StudioContext, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse, both = ExportApi.refuse_a_second, threading.Barrier(2)

    def refuse_together(self: ExportApi) -> None:
        refuse(self)
        with suppress(threading.BrokenBarrierError):
            both.wait(1)

    monkeypatch.setattr(ExportApi, "refuse_a_second", refuse_together)
    with ThreadPoolExecutor(2) as pool:
        found = dict(pool.map(lambda name: export(ask, name=name), ("waits", "waits")))
    assert sorted(found) == [201, 409]
    eventually((context.output_root / ".waits.partial").is_dir, "it has begun to write")
    assert ask("POST", f"/api/jobs/{found[201]['id']}/cancel", {})[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"kind": "rm"}, 400, "kind is one of"),
        ({"kind": ["merge"]}, 400, "kind is one of"),
        ({"source": "../../etc"}, 403, "lies outside"),
        ({"source": "/etc"}, 403, "lies outside"),
        ({"source": "."}, 404, "no adapter"),
        ({"source": "none"}, 404, "no adapter"),
        ({"source": 5}, 400, "no path"),
        ({"name": "../made"}, 400, "name is that of a new folder"),
        ({"name": ".hidden"}, 400, "name is that of a new folder"),
        ({"name": "--debug"}, 400, "name is that of a new folder"),
        ({"name": "a/b"}, 400, "name is that of a new folder"),
        ({"name": "NUL"}, 400, "name is that of a new folder"),
        ({"name": "my-run"}, 409, "exists already"),
        ({"name": ""}, 400, "name is a text"),
        ({"options": {"dtype": "int1"}}, 400, "dtype is one of"),
        ({"options": {"overwrite": "true"}}, 400, "no option 'overwrite'"),
        ({"options": {"dtype": ["fp16"]}}, 400, "dtype is one of"),
        ({"options": []}, 400, "options is an object"),
        ({"kind": "verify-server", "url": "ftp://127.0.0.1/v1"}, 400, "address of a server"),
        ({"kind": "verify-server", "url": "http://user:word@host/"}, 400, "address of a server"),
        ({"kind": "verify-server"}, 400, "address of a server"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_started(
    ask: Client, context: StudioContext, run: Path, body: dict[str, Any], status: int, words: str
) -> None:
    found, told = export(ask, **body)
    assert (found, words in told["error"]["message"]) == (status, True), told
    assert context.jobs.all() == []


def test_what_is_not_installed_is_one_clear_line(ask: Client, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, told = export(ask, kind="quantize-gptq")
    assert status == 409 and "gptqmodel" in told["error"]["message"] and "requirements-gptq" in told["error"]["message"]
    told = ask("GET", "/api/export", headers={"x-language": "zh"})[1]
    assert told["kinds"]["quantize-gptq"]["missing"].startswith("需要 gptqmodel：pip install")


def test_a_training_keeps_the_card_unless_the_user_says_so(ask: Client, context: StudioContext, run: Path) -> None:
    from onecard.train.run_lock import RunLock

    with RunLock(context.output_root / "training"):
        (context.output_root / "training" / "onecard.yaml").write_text("{}", encoding="utf-8")
        status, told = export(ask, kind="quantize-bnb")
        assert (status, told["error"]["code"]) == (409, "card_in_use") and "training" in told["error"]["message"]
        assert export(ask, name="on-the-cpu")[0] == 201, "a merge computes nothing on the card"
        ended(ask, context.jobs.all()[0]["id"])
        assert export(ask, kind="quantize-bnb", name="anyway", anyway=True)[0] == 201


def test_a_whole_model_has_no_adapter_to_merge(ask: Client, context: StudioContext) -> None:
    folder = context.output_root / "whole"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"")
    assert [one["kind"] for one in ask("GET", "/api/export")[1]["sources"]] == ["model"]
    status, told = export(ask, source="whole")
    assert status == 400 and "takes an adapter" in told["error"]["message"]


def test_options_are_those_of_the_programs() -> None:
    from onecard.programs import gguf, handover, merge, quantize_bnb, quantize_gptq

    hints = {
        ("merge", "dtype"): merge.MergeSettings, ("merge", "format"): merge.MergeOptions,
        ("gguf", "gguf_type"): gguf.ExportOptions, ("quantize-gptq", "bits"): quantize_gptq.GptqOptions,
        ("quantize-bnb", "bits"): quantize_bnb.BnbOptions, ("handover", "engine"): handover.HandoverOptions,
    }  # fmt: skip
    for (kind, option), options in hints.items():
        known = set(map(str, get_args(get_type_hints(options)[option])))
        assert set(KINDS[kind].options[option]) == known, (kind, option)
    assert set(KINDS["gguf-adapter"].options["gguf_type"]) <= set(KINDS["gguf"].options["gguf_type"])
    assert len(hints) + 1 == sum(len(kind.options) for kind in KINDS.values()), "an option is not compared"


@pytest.mark.parametrize(
    "kind", [pytest.param("merge", marks=pytest.mark.slow), pytest.param("gguf", marks=pytest.mark.slow), "adapter"]
)
def test_real_exports(kind: str, ask: Client, context: StudioContext, run_dir: Path) -> None:
    """By the kit's own programs, on a tiny run; the files are read again."""
    context.jobs.program = (sys.executable, "-m", "onecard")
    shutil.copytree(run_dir, context.output_root / "my-run")
    status, job = export(ask, kind=kind)
    assert status == 201, job
    job = ended(ask, job["id"])
    assert job["state"] == "done", context.jobs.log(job["id"])["text"]
    made = Path(job["path"])
    names = {path.name for path in made.iterdir()}
    if kind == "merge":
        from transformers import AutoModelForCausalLM

        assert AutoModelForCausalLM.from_pretrained(made).config.model_type == "llama"
        assert {"path": "made", "kind": "model", "base": ""} in ask("GET", "/api/export")[1]["sources"]
    elif kind == "gguf":
        import gguf

        assert len(gguf.GGUFReader(made / "model-f16.gguf").tensors) > 10
    else:
        assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} <= names
        assert (made / "adapter_model.safetensors").read_bytes() == (run_dir / "adapter_model.safetensors").read_bytes()
        assert json.loads((made / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "LORA"
