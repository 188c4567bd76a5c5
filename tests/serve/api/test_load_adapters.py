"""Adapters come and go while the server runs, out of one folder, and only where that is allowed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, ParallelOptions, ServeOptions
from onecard.inference.engine import open_engine
from tests.serve.api.serving import Running, serving

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module", params=[1, 4])
def folder_server(request, lively_base: Path, adapters_folder: Path, tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("loading") / "adapters"
    shutil.copytree(adapters_folder, folder)
    model = ModelOptions(model_path=str(lively_base), bits=32, device="cpu", gradient_checkpointing=False)
    limits, parallel = LimitOptions(), ParallelOptions(max_parallel=request.param)
    engine = open_engine(model, InferenceOptions(prompt_type="alpaca"), limits, str(folder), parallel=parallel)
    options = ServeOptions(adapters_path=str(folder), allow_adapter_loading=True)
    with serving(engine, limits, options) as running:
        running.folder = folder
        yield running
    engine.close()


def test_an_adapter_comes_and_goes(folder_server: Running) -> None:
    folder = folder_server.folder
    shutil.copytree(folder / "second", folder / "third")
    for path, same in (("third", "second"), (str(folder / "third"), "second"), ("first", "first")):
        expected = folder_server.chat(model=same).json()["choices"]
        reply = folder_server.post(LOAD, {"lora_name": "mine", "lora_path": path})
        assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
        assert folder_server.chat(model="mine").json()["choices"] == expected
        assert folder_server.post(LOAD, {"lora_name": "mine", "lora_path": path}).status_code == 400
        reply = folder_server.post(UNLOAD, {"lora_name": "mine"})
        assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
        assert folder_server.chat(model="mine").status_code == 404
    shutil.rmtree(folder / "third")


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (LOAD, {"lora_name": "x", "lora_path": "../.."}, 400, "lora_path"),
        (LOAD, {"lora_name": "x", "lora_path": "/etc"}, 400, "lora_path"),
        (LOAD, {"lora_name": "x", "lora_path": "notes"}, 400, "lora_path"),
        (LOAD, {"lora_name": "x"}, 400, "lora_path"),
        (LOAD, {"lora_name": "x", "lora_path": "first", "load_inplace": True}, 400, "load_inplace"),
        (UNLOAD, {"lora_name": "x"}, 404, "lora_name"),
        (UNLOAD, {"lora_name": "first"}, 400, "lora_name"),  # the default
    ],
)
def test_what_cannot_be_is_refused_by_name(folder_server: Running, path: str, body, status: int, param: str) -> None:
    reply = folder_server.post(path, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
    assert folder_server.chat(model="first").status_code == 200


def test_a_damaged_one_is_told_and_not_kept(folder_server: Running) -> None:
    broken = folder_server.folder / "broken"
    shutil.copytree(folder_server.folder / "first", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"damaged")
    assert folder_server.post(LOAD, {"lora_name": "b", "lora_path": "broken"}).status_code >= 400
    assert folder_server.chat(model="b").status_code == 404
    shutil.rmtree(broken)


def test_it_has_to_be_allowed(server: Running) -> None:
    for path in (LOAD, UNLOAD):
        reply = server.post(path, {"lora_name": "x", "lora_path": "first"} if path == LOAD else {"lora_name": "x"})
        assert reply.status_code == 404 and "--allow_adapter_loading" in reply.json()["error"]["message"]
    problems = ServeOptions(allow_adapter_loading=True).problems()
    assert [flag for flag, _ in problems] == ["--allow_adapter_loading"]
