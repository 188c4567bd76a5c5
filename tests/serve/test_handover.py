"""`onecard handover`: what each engine is given is there, is the run's, and reads back in the engine's own form."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer

from onecard.console import run_main
from onecard.programs import handover as program
from onecard.programs import verify_server
from onecard.serve import handover

HandOver = Callable[..., Path]


@pytest.fixture
def handed(run_dir: Path, tmp_path: Path) -> HandOver:
    def make(engine: str, *words: str, run: Path = run_dir) -> Path:
        program.main([engine, str(run), str(tmp_path / "out"), *words])
        return tmp_path / "out"

    return make


def start_of(directory: Path) -> list[str]:
    shebang, line = (directory / "start.sh").read_text(encoding="utf-8").splitlines()
    assert shebang == "#!/bin/sh" and line.startswith("exec ")
    return shlex.split(line.removeprefix("exec "))


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_vllm_gets_adapter_rank_template_and_stops(handed: HandOver, run_dir: Path, lively_base: Path) -> None:
    out = handed("vllm", "--context", "256")
    words = start_of(out)
    assert words[:3] == ["vllm", "serve", str(lively_base)]
    assert option(words, "--lora-modules") == f"my-run={run_dir}" and option(words, "--max-lora-rank") == "8"
    assert option(words, "--max-model-len") == "256" and option(words, "--generation-config") == str(out)
    template = Path(option(words, "--chat-template"))
    assert template.read_bytes() == (run_dir / "chat_template.jinja").read_bytes()
    stops = json.loads((out / "stop.json").read_text(encoding="utf-8"))
    assert stops["stop"][0] == "<|im_end|>"
    tokenizer = AutoTokenizer.from_pretrained(run_dir)
    generation = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == stops["stop_token_ids"] and tokenizer.eos_token_id in stops["stop_token_ids"]
    service = yaml.safe_load((out / "compose.yaml").read_text(encoding="utf-8"))["services"]["model"]
    mounted = {volume["source"]: volume["target"] for volume in service["volumes"]}
    assert mounted == {str(out): "/handover", str(run_dir): "/adapter", str(lively_base): "/base"}
    assert service["command"][0] == "/base" and "my-run=/adapter" in service["command"]
    notes = (out / "HANDOVER.md").read_text(encoding="utf-8")
    line = next(line for line in notes.splitlines() if "verify-server" in line)
    assert shlex.split(line)[1:3] == ["verify-server", "http://127.0.0.1:8000/v1"]


def test_the_line_to_compare_with_is_one_that_works(
    handed: HandOver, monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(verify_server, "verify", seen.append)
    for engine, model in (("vllm", "my-run"), ("sglang", "base:my-run")):
        out = handed(engine, "--overwrite")
        line = next(x for x in (out / "HANDOVER.md").read_text(encoding="utf-8").splitlines() if "verify-server" in x)
        verify_server.main(shlex.split(line)[2:])
        options = seen[-1].verify
        assert (options.model, options.run) == (model, str(run_dir))
        assert options.url.endswith(f":{handover.PORTS[engine]}/v1")


def test_sglang_gets_the_same_in_its_words(handed: HandOver, run_dir: Path, lively_base: Path) -> None:
    words = start_of(handed("sglang"))
    assert words[:3] == ["python3", "-m", "sglang.launch_server"] and option(words, "--model-path") == str(lively_base)
    assert option(words, "--lora-paths") == f"my-run={run_dir}" and option(words, "--max-lora-rank") == "4"
    override = json.loads(option(words, "--json-model-override-args"))
    config = AutoConfig.from_pretrained(lively_base)
    assert config.eos_token_id in override["eos_token_id"]
    assert int(option(words, "--context-length")) == config.max_position_embeddings


def test_what_vllm_does_not_load_is_merged_first(
    handed: HandOver, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_why_merged", lambda config, rank: "it is a DoRA adapter")
    out = handed("vllm")
    words = start_of(out)
    assert words[2] == str(out / "model") and "--enable-lora" not in words
    assert AutoConfig.from_pretrained(out / "model").model_type == "llama"
    assert "merged, because it is a DoRA adapter" in (out / "HANDOVER.md").read_text(encoding="utf-8")
    service = yaml.safe_load((out / "compose.yaml").read_text(encoding="utf-8"))["services"]["model"]
    assert service["command"][0] == "/handover/model"


def test_ray_serve_gets_a_merged_model_and_a_config(handed: HandOver) -> None:
    out = handed("ray-serve")
    (application,) = yaml.safe_load((out / "serve_config.yaml").read_text(encoding="utf-8"))["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    (config,) = application["args"]["llm_configs"]
    source = Path(config["model_loading_config"]["model_source"])
    assert (source / "config.json").is_file() and (source / "chat_template.jinja").is_file()
    assert start_of(out)[:2] == ["serve", "run"]
    schema = pytest.importorskip("ray.serve.schema", reason="ray[serve] is not installed: its schema was not asked")
    schema.ServeDeploySchema(**yaml.safe_load((out / "serve_config.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("engine", ["llama.cpp", "ollama"])
def test_llama_cpp_and_ollama_get_a_gguf_file(engine: str, handed: HandOver) -> None:
    out = handed(engine, "--gguf_type", "f16", "--context", "300")
    words = start_of(out)
    assert (out / "model-f16.gguf").is_file() and (out / "Modelfile").is_file() == (engine == "ollama")
    if engine == "ollama":
        assert words[:3] == ["ollama", "create", "my-run"] and Path(words[-1]) == out / "Modelfile"
        assert "PARAMETER num_ctx 300" in (out / "Modelfile").read_text(encoding="utf-8")
    else:
        assert option(words, "--model") == str(out / "model-f16.gguf") and "--jinja" in words
        assert option(words, "--ctx-size") == "300"


def test_refusals(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, says in (
        (["vllm", "nowhere", str(tmp_path / "o")], 2, "not a directory"),
        (["vlm", str(run_dir), str(tmp_path / "o")], 2, "--engine"),
        (["vllm", str(run_dir)], 2, "--output_path"),
        (["vllm", str(run_dir), str(tmp_path / "o"), "--context", "99999"], 1, "positions"),
        (["vllm", str(run_dir), str(run_dir)], 2, "--output_path"),
    ):
        assert run_main(lambda words=words: program.main(words), debug=False) == code, words  # type: ignore[misc]
        assert says in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    reasons = {
        "": {}, "DoRA": {"use_dora": True}, "LOHA": {"peft_type": "LOHA"}, "whole layers": {"modules_to_save": ["x"]},
        "new tokens": {"trainable_token_indices": [1]}, "biases": {"bias": "all"},
        "of their own": {"rank_pattern": {"a": 1}},
    }  # fmt: skip
    for words_of, config in reasons.items():
        found = handover._why_merged(config, 8)
        assert words_of in found and bool(words_of) == bool(found)
    assert "above 512" in handover._why_merged({}, 600)
