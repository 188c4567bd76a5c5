"""Adapters that are added and taken away while the server runs, in vLLM's form, out of one folder and on request only.

Knows the folder that --adapters_path names. It does not know how an adapter is loaded (`inference/engine.py`).
https://docs.vllm.ai/en/latest/features/lora.html (dynamically serving LoRA adapters)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from onecard.errors import ConfigError
from onecard.inference.engine import InferenceEngine
from onecard.inference.run_files import adapters_in
from onecard.serve.http_error import ApiError, bad_request


class LoadAdapter(BaseModel):
    """A name for the adapter, and its folder: a path inside --adapters_path, or its name there."""

    model_config = ConfigDict(extra="forbid")
    lora_name: str = Field(min_length=1, max_length=200)
    lora_path: str = Field(min_length=1, max_length=4000)


class UnloadAdapter(BaseModel):
    """The name of an adapter that was loaded."""

    model_config = ConfigDict(extra="forbid")
    lora_name: str = Field(min_length=1, max_length=200)
    lora_int_id: int | None = None  # vLLM's clients send it; the name says all


async def load_adapter(request: Request, body: LoadAdapter) -> Response:
    """Let an adapter of the folder answer by a name."""
    app: Any = request.app
    return PlainTextResponse(await run_in_threadpool(load, app.engine, app.adapters_path, body))


async def unload_adapter(request: Request, body: UnloadAdapter) -> Response:
    """Forget an adapter."""
    app: Any = request.app
    told = await run_in_threadpool(unload, app.engine, app.adapters_path, body)
    app.forget_texts(body.lora_name)
    return PlainTextResponse(told)


def load(engine: InferenceEngine, folder: str | None, body: LoadAdapter) -> str:
    """Let a folder of the adapters' answer by a name. Raises ApiError, and ModelError where it does not load."""
    known = adapters_in(check_allowed(folder))
    wanted = Path(folder or "", body.lora_path).expanduser().resolve()
    path = known.get(body.lora_path) or next((p for p in known.values() if Path(p).resolve() == wanted), None)
    if path is None:
        message = f"{body.lora_path} is no adapter of the folder that the server was given; it holds {', '.join(known)}"
        raise bad_request(message, "lora_path")
    if body.lora_name in engine.names:
        raise bad_request(f"{body.lora_name!r} is the name of a model already; unload it first", "lora_name")
    engine.add_adapter(body.lora_name, path)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


def unload(engine: InferenceEngine, folder: str | None, body: UnloadAdapter) -> str:
    """Forget an adapter. Raises ApiError for one that is not there, or is answering."""
    check_allowed(folder)
    if body.lora_name not in engine.names:
        raise ApiError(404, f"no adapter is called {body.lora_name!r}", param="lora_name", code="model_not_found")
    try:
        engine.remove_adapter(body.lora_name)
    except ConfigError as reason:
        raise bad_request(str(reason), "lora_name") from None
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def check_allowed(folder: str | None) -> str:
    """The folder. Raises ApiError where the server was not started for this."""
    if folder is None:
        raise ApiError(404, "adapters are fixed here: start the server with --allow_adapter_loading", code="not_found")
    return folder
