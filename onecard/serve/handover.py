"""What another engine needs to serve a run: model or adapter, template, stops, context, how it is started and checked.

Written from the engines' own documentation; the addresses stand at each of them. None of them was run here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from onecard.config.base_model import ModelOptions, rope_scaling_of
from onecard.config.given_paths import is_tuned_model
from onecard.console import say
from onecard.errors import ModelError
from onecard.export.gguf.export import export_gguf
from onecard.export.gguf.options import ExportOptions, GgufType, OllamaOptions
from onecard.export.io import output
from onecard.export.merge.merge import merge_into
from onecard.inference.load import base_path, load_tokenizer_and_template
from onecard.inference.run_files import run_directory, stored_options
from onecard.model.files import locate, read_json
from onecard.model.lora.formats import adapter_scaling, read_config
from onecard.model.model_config import read_model_config
from onecard.model.rope_scaling import context_limit, scale_rope

MOST_CONTEXT = 8192  # tokens, where none is given: more takes memory at every start
PORTS = {"vllm": 8000, "sglang": 30000, "llama.cpp": 8080, "ollama": 11434, "ray-serve": 8000}
# https://docs.vllm.ai/en/latest/api/vllm/config/lora/ (max_lora_rank)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
TEMPLATE, START, NOTES, MODEL = "chat_template.jinja", "start.sh", "HANDOVER.md", "model"


@dataclass(frozen=True)
class HandoverRun:
    """A run as another engine sees it. adapter: where its LoRA is; None: `model` is the whole model.

    merges: why the adapter cannot be given as it is; empty where it can, or where there is none.
    """

    name: str
    model: str
    adapter: Path | None
    rank: int
    merges: str
    jinja: str
    stops: list[str]
    stop_ids: list[int]
    context: int
    positions: Mapping[str, Any] = field(default_factory=dict)
    """What of the base's configuration is other under the --rope_scaling of an adapter, by key."""


@dataclass
class StartPlan:
    """How an engine is started: its words, environment for them, further files by name, and the model's name there."""

    words: list[str]
    model_name: str
    files: dict[str, str] = field(default_factory=dict)


def hand_over(engine: str, run: Path, target: Path, *, model_path: str = "auto", context: int = 0,
              gguf_type: GgufType = "q8_0", overwrite: bool = False) -> None:  # fmt: skip
    """Write the directory for one engine and say what is next. Raises OneCardError."""
    found, tokenizer = read_run(run, model_path, context)
    base, needs_merge = found.model, found.adapter is not None and (engine not in ("vllm", "sglang") or found.merges)
    if engine in ("llama.cpp", "ollama"):
        options = ExportOptions(
            model_path=base, output_path=str(target), gguf_type=gguf_type, overwrite=overwrite,
            lora_path=str(run) if needs_merge else "",
        )  # fmt: skip
        modelfile = OllamaOptions(modelfile=engine == "ollama", num_ctx=found.context)
        found = replace(found, model=f"model-{gguf_type}.gguf", adapter=None)
        plan = _PLANS[engine](found, target.absolute())
        export_gguf(options, modelfile, also=lambda partial: _write(engine, found, plan, partial, run))
    else:
        if needs_merge:
            found = replace(found, model=str(target.absolute() / MODEL), adapter=None)
        plan = _PLANS[engine](found, target.absolute())
        with output.new_directory(target, overwrite=overwrite, inputs=[run]) as partial:
            if needs_merge:
                (partial / MODEL).mkdir()
                merge_into(partial / MODEL, base, [str(run)])
            (partial / TEMPLATE).write_text(found.jinja, encoding="utf-8", newline="")
            generation = {"eos_token_id": found.stop_ids, "bos_token_id": tokenizer.bos_token_id}
            (partial / "generation_config.json").write_text(json.dumps(generation, indent=1), encoding="utf-8")
            _write(engine, found, plan, partial, run)
    say(f"{target} holds what {engine} needs (not run here); {NOTES} in it says how it is started")
    say(f"then: {verify_line(engine, plan, run)}")


def verify_line(engine: str, plan: StartPlan, run: Path) -> str:
    """The command that compares the started server with the run."""
    url = f"http://127.0.0.1:{PORTS[engine]}/v1"
    return shlex.join(["onecard", "verify-server", url, "--run", str(run.absolute()), "--model", plan.model_name])


def read_run(run: Path, model_path: str = "auto", context: int = 0) -> tuple[HandoverRun, Any]:
    """(the run, its tokenizer). Raises ModelError and ConfigError."""
    directory = run_directory(str(run)) or run
    is_whole = is_tuned_model(run)
    stored = stored_options(str(run))
    named = str(stored.get("model_path", "auto")) if model_path == "auto" else model_path
    base = str(run.absolute()) if is_whole else base_path(named, str(run))
    tokenizer, template = load_tokenizer_and_template(ModelOptions(model_path=base), str(run), "auto")
    raw = read_json(locate(base) / "config.json")
    limit, positions = _positions(raw, base, adapter_scaling(run))
    if context > limit:
        raise ModelError(f"--context {context} is more than the {limit} positions of the model; give at most these")
    adapter = {} if is_whole else read_config(directory)
    ranks = [int(adapter.get("r") or 0), *map(int, (adapter.get("rank_pattern") or {}).values())]
    stops = list(dict.fromkeys([template.end_text(tokenizer), *template.stop]))
    found = HandoverRun(
        name=directory.absolute().name, model=str(Path(base).absolute()) if Path(base).is_dir() else base,
        adapter=None if is_whole else directory.absolute(), rank=max(ranks), merges=_why_merged(adapter, max(ranks)),
        jinja=template.jinja, stops=stops, stop_ids=template.stop_ids(tokenizer),
        context=context or min(limit, MOST_CONTEXT), positions=positions,
    )  # fmt: skip
    return found, tokenizer


def _positions(raw: dict[str, Any], base: str, rope_scaling: str) -> tuple[int, dict[str, Any]]:
    """(the tokens that the model reads, its rotary positions where --rope_scaling made them others)."""
    if rope_scaling_of(rope_scaling) is None:
        return int(raw.get("text_config", raw).get("max_position_embeddings") or MOST_CONTEXT), {}
    config = read_model_config(raw, base)
    scale_rope(config, rope_scaling)
    positions = {"rope_parameters": config.get_text_config().rope_parameters}
    inside = {"text_config": positions} if "text_config" in raw else positions
    return context_limit(config) or MOST_CONTEXT, inside


def _why_merged(config: Mapping[str, Any], rank: int) -> str:
    """What of an adapter vLLM and SGLang do not load: https://docs.vllm.ai/en/latest/features/lora.html"""
    kind = str(config.get("peft_type") or "LORA").upper()
    reasons = {
        f"it is a {kind} adapter": kind != "LORA",
        "it is a DoRA adapter": config.get("use_dora"),
        "it holds whole layers (modules_to_save)": config.get("modules_to_save"),
        "it holds rows of new tokens": config.get("trainable_token_indices"),
        "it trains parameters outside of linear layers": config.get("target_parameters"),
        "it trains biases": config.get("bias") not in (None, "none") or config.get("lora_bias"),
        "its layers have ranks or alphas of their own": config.get("rank_pattern") or config.get("alpha_pattern"),
        f"its rank {rank} is above {VLLM_RANKS[-1]}": rank > VLLM_RANKS[-1],
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _vllm(run: HandoverRun, target: Path) -> StartPlan:
    """https://docs.vllm.ai/en/latest/cli/serve.html, .../features/lora.html, .../deployment/docker.html

    https://docs.vllm.ai/en/stable/features/context_extension/ (rope_parameters)
    """
    overrides = ["--hf-overrides", json.dumps(run.positions)] if run.positions and run.adapter else []

    def words(model: str, adapter: str, here: str) -> list[str]:
        lora = ["--enable-lora", "--lora-modules", f"{run.name}={adapter}", "--max-lora-rank",
                str(next((rank for rank in VLLM_RANKS if rank >= run.rank), VLLM_RANKS[-1]))]  # fmt: skip
        return [
            model, "--served-model-name", "base" if run.adapter else run.name, *(lora if run.adapter else []),
            "--chat-template", f"{here}/{TEMPLATE}", "--generation-config", here, "--max-model-len", str(run.context),
            "--port", str(PORTS["vllm"]), *overrides,
        ]  # fmt: skip

    start = ["vllm", "serve", *words(run.model, str(run.adapter), str(target))]
    compose = _compose("vllm/vllm-openai:latest", words, run, target, PORTS["vllm"], {"ipc": "host"})
    return StartPlan(start, run.name, {"compose.yaml": compose})


def _sglang(run: HandoverRun, target: Path) -> StartPlan:
    """https://docs.sglang.io/advanced_features/server_arguments.html, .../advanced_features/lora.html"""

    overrides = {"eos_token_id": run.stop_ids, **(run.positions if run.adapter else {})}

    def words(model: str, adapter: str, here: str) -> list[str]:
        lora = ["--enable-lora", "--lora-paths", f"{run.name}={adapter}", "--max-lora-rank", str(run.rank)]
        return [
            "--model-path", model, "--served-model-name", "base" if run.adapter else run.name,
            *(lora if run.adapter else []), "--chat-template", f"{here}/{TEMPLATE}", "--context-length",
            str(run.context), "--json-model-override-args", json.dumps(overrides), "--port", str(PORTS["sglang"]),
        ]  # fmt: skip

    launch = ["python3", "-m", "sglang.launch_server"]

    def in_container(model: str, adapter: str, here: str) -> list[str]:
        return [*launch, *words(model, adapter, here), "--host", "0.0.0.0"]

    start = [*launch, *words(run.model, str(run.adapter), str(target))]
    compose = _compose("lmsysorg/sglang:latest", in_container, run, target, PORTS["sglang"], {"ipc": "host"})
    # An adapter is asked for as BASE:ADAPTER in OpenAI's API.
    return StartPlan(start, f"base:{run.name}" if run.adapter else run.name, {"compose.yaml": compose})


def _llama_cpp(run: HandoverRun, target: Path) -> StartPlan:
    """https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md, .../docs/docker.md"""

    def words(model: str, adapter: str, here: str) -> list[str]:
        return ["--model", f"{here}/{run.model}", "--alias", run.name, "--jinja", "--ctx-size", str(run.context),
                "--port", str(PORTS["llama.cpp"])]  # fmt: skip

    def in_container(model: str, adapter: str, here: str) -> list[str]:
        return [*words(model, adapter, here), "--host", "0.0.0.0"]

    compose = _compose(
        "ghcr.io/ggml-org/llama.cpp:server", in_container, run, target, PORTS["llama.cpp"], {}, gpu=False
    )
    return StartPlan(["llama-server", *words("", "", str(target))], run.name, {"compose.yaml": compose})


def _ollama(run: HandoverRun, target: Path) -> StartPlan:
    """https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx, .../docs/api/openai-compatibility.mdx"""
    name = run.name.lower()
    return StartPlan(["ollama", "create", name, "-f", str(target / "Modelfile")], name)


def _ray_serve(run: HandoverRun, target: Path) -> StartPlan:
    """https://docs.ray.io/en/latest/serve/llm/user-guides/configuration.html, .../serve/production-guide/config.html

    Adapters are loaded from cloud storage only (lora_config), so the model is a merged one.
    """
    config = {
        "model_loading_config": {"model_id": run.name, "model_source": run.model},
        "engine_kwargs": {"max_model_len": run.context, "generation_config": str(target)},
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    }
    application = {"name": run.name, "route_prefix": "/", "import_path": "ray.serve.llm:build_openai_app",
                   "args": {"llm_configs": [config]}}  # fmt: skip
    text = yaml.safe_dump({"applications": [application]}, sort_keys=False)
    return StartPlan(["serve", "run", str(target / "serve_config.yaml")], run.name, {"serve_config.yaml": text})


_PLANS: Mapping[str, Any] = {
    "vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp, "ollama": _ollama, "ray-serve": _ray_serve,
}  # fmt: skip


def _compose(image: str, words: Any, run: HandoverRun, target: Path, port: int, more: Mapping[str, Any], *,
             gpu: bool = True) -> str:  # fmt: skip
    """A compose file: directories of this machine are mounted read-only, a model of the Hub comes through its cache.

    https://docs.docker.com/reference/compose-file/services/
    """
    is_local = Path(run.model).is_dir() or target in Path(run.model).parents
    mounted = {str(target): "/handover"}
    if run.adapter is not None:
        mounted[str(run.adapter)] = "/adapter"
    model = run.model
    if is_local and target in Path(run.model).parents:
        model = f"/handover/{Path(run.model).name}"
    elif is_local:
        mounted[run.model] = model = "/base"
    volumes = [{"type": "bind", "source": source, "target": place, "read_only": True}
               for source, place in mounted.items()]  # fmt: skip
    service: dict[str, Any] = {
        "image": image, "command": words(model, "/adapter", "/handover"), "ports": [f"127.0.0.1:{port}:{port}"],
        "volumes": [*volumes, *([] if is_local or not gpu else ["~/.cache/huggingface:/root/.cache/huggingface"])],
        **more,
    }  # fmt: skip
    if gpu:
        devices = [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
        service["deploy"] = {"resources": {"reservations": {"devices": devices}}}
    return yaml.safe_dump({"services": {"model": service}}, sort_keys=False)


def _write(engine: str, run: HandoverRun, plan: StartPlan, directory: Path, source: Path) -> None:
    """The start script, the plan's files, stops for requests, and notes that say what is what."""
    start = shlex.join(plan.words)
    (directory / START).write_text(f"#!/bin/sh\nexec {start}\n", encoding="utf-8", newline="\n")
    for name, text in plan.files.items():
        (directory / name).write_text(text, encoding="utf-8", newline="\n")
    stops = {"stop": run.stops, "stop_token_ids": run.stop_ids}
    (directory / "stop.json").write_text(json.dumps(stops, ensure_ascii=False, indent=1), encoding="utf-8")
    how = f"adapter {run.adapter} (rank {run.rank}) on {run.model}" if run.adapter else run.model
    lines = [
        f"# {run.name} for {engine}", "",
        f"- model: {how}",
        *([f"- merged, because {run.merges}"] if run.merges and not run.adapter else []),
        f"- context: {run.context} tokens", f"- answers end at: {', '.join(map(repr, run.stops))} (stop.json)",
        "- a stop of several tokens is sent with each request (`stop`), where the server has no place for it",
        "", "Start (not run here):", "", f"    {start}", "",
        *(["or: docker compose up", ""] if "compose.yaml" in plan.files else []),
        "Then compare it with the run:", "", f"    {verify_line(engine, plan, source)}", "",
    ]  # fmt: skip
    (directory / NOTES).write_text("\n".join(lines), encoding="utf-8")
