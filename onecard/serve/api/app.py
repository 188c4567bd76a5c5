"""The model behind OpenAI's API, so that clients which exist already can talk to it.

Knows paths and what each of them does; checking, waiting, streaming and guarding are in `requests.py`,
`jobs.py`, `stream.py`, `security.py`. It does not know models or how they answer (`inference/engine.py`).
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from onecard import __version__
from onecard.config.inference import LimitOptions, SamplingOptions, ServeOptions
from onecard.console import nearest
from onecard.errors import OneCardError
from onecard.inference.engine import InferenceEngine
from onecard.serve.api import adapters, answer_schema, schema, tokenize
from onecard.serve.api.errors import as_api_error
from onecard.serve.api.jobs import RequestThread, RequestThreads, Work, stopping
from onecard.serve.api.log import RequestFile, RequestLog, note_of
from onecard.serve.api.logprobs import TokenTexts
from onecard.serve.api.metrics import CONTENT_TYPE_LATEST, ServerMetrics
from onecard.serve.api.prompt_template import for_template
from onecard.serve.api.requests import (
    GenerationParams,
    JsonRoute,
    ServerDefaults,
    chat_ask,
    completion_ask,
    embedding_texts,
)
from onecard.serve.api.requests import validation_error as as_field_error
from onecard.serve.api.response_events import ResponseBuilder, ResponseEvents
from onecard.serve.api.response_request import response_ask
from onecard.serve.api.responses import ChatResponseBuilder, CompletionResponseBuilder, Form, vectors_body
from onecard.serve.api.simple import SimpleAnswer, SimpleRequest, SimpleResponseBuilder, path_question, simple_ask
from onecard.serve.api.stream import EventStream, EventWriter, StreamEventBuilder, events
from onecard.serve.api.work import answer_chat, answer_prompts, embed_texts
from onecard.serve.http_error import ApiError
from onecard.serve.keys import read_keys
from onecard.serve.listen import run_server
from onecard.serve.security import QUERY, READING_METHODS, NetworkRules, Protection

__all__ = ["Api", "build_app", "run_server"]

Result = TypeVar("Result")
Body = TypeVar("Body", bound=schema.ServiceParameters)
CLIENT_LEFT = 499  # nginx's number for an answer that nobody waits for any more; it is only printed
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
REFUSALS = {
    400: "The request cannot work: not JSON, a wrong value, an unsupported parameter, a prompt that is too long.",
    401: "A key is needed, or it is another one.",
    403: "A page of another origin, or a name that this server does not have.",
    404: "No such model.",
    413: "The body is too large.",
    415: "The body is packed in another way than gzip.",
    429: "The queue is full, or this key has sent too many requests; Retry-After says when to try again.",
    500: "Something went wrong here.",
    503: "Out of memory: ask for less. Or the server is stopping.",
}
FOR_READING = (400, 401, 403, 415, 500)
SERVED = ("/chat/completions", "/completions", "/responses", "/embeddings", "/models")  # behind /v1


class Api(FastAPI):
    """The application; `jobs` are the answers that are being written."""

    def __init__(self, engine: InferenceEngine, defaults: ServerDefaults, *, has_key: bool) -> None:
        # The pages of FastAPI's own documentation load scripts from other servers.
        super().__init__(title="OneCard", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
        self.engine, self.defaults, self._has_key = engine, defaults, has_key
        self.jobs = RequestThreads(defaults.limits.max_queue, engine.n_parallel)
        self.began = int(time.time())
        self.metrics = ServerMetrics(
            {
                "requests_running": (
                    "Requests that are being answered, those that wait included.",
                    lambda: len(self.jobs),
                ),
                "requests_waiting": ("Requests that wait for their turn.", lambda: engine.n_waiting),
            },
            engine.paths.counts,
        )
        self.adapters_path: str | None = None  # where adapters may be loaded from while it runs
        self.fingerprint = "fp_" + hashlib.sha256(repr((__version__, engine.names)).encode()).hexdigest()[:12]
        self._token_texts: dict[str, TokenTexts] = {}

    def stop_answers(self) -> None:
        """End all answers and take no more; called when the server stops."""
        self.jobs.cancel_all()

    def forget_texts(self, model: str) -> None:
        """Another model may have this name from now on."""
        self._token_texts.pop(model, None)

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for a name that is none of the engine's."""
        if name not in self.engine.names:
            known = ", ".join(self.engine.names)
            message = f"no model is called {name!r}{nearest(name, self.engine.names)}; known: {known}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def card(self, name: str) -> dict[str, Any]:
        """What is told of a model."""
        return {"id": name, "object": "model", "created": self.began, "owned_by": "onecard"}

    def token_texts(self, model: str) -> TokenTexts:
        """The texts of this model's tokens."""
        if model not in self._token_texts:
            self._token_texts[model] = TokenTexts(self.engine.tokenizer(model))
        return self._token_texts[model]

    def answer_head(self, prefix: str, ask: GenerationParams) -> dict[str, Any]:
        """What stands at the top of every body of one answer, under a fresh id: prefix-0123456789abcdef01234567."""
        answer_id = f"{prefix}-{secrets.token_hex(12)}"
        return {
            "id": answer_id, "created": int(time.time()), "model": ask.model, "system_fingerprint": self.fingerprint
        }  # fmt: skip

    def openapi(self) -> dict[str, Any]:
        """The document at /openapi.json: without FastAPI's own 422, which is never sent; with the key."""
        if not self.openapi_schema:
            document = get_openapi(title=self.title, version=self.version, routes=self.routes)
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            parts = document.setdefault("components", {})
            for name in ("HTTPValidationError", "ValidationError"):
                parts.get("schemas", {}).pop(name, None)
            if self._has_key:
                parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
                document["paths"]["/health"]["get"]["security"] = []
            self.openapi_schema = document
        return self.openapi_schema


def build_app(
    engine: InferenceEngine,
    options: ServeOptions,
    limits: LimitOptions,
    sampling: SamplingOptions | None = None,
    system: str = "",
) -> Api:
    """The whole API around an engine. `sampling` and `system` hold where a request is silent.

    Pages may be mounted on it at / afterwards; they stand behind the same guards.
    """
    defaults = ServerDefaults(sampling or SamplingOptions(max_new_tokens=512, temperature=1.0), limits, system)
    keys = read_keys(options.api_keys) if options.api_keys is not None else {}
    app = Api(engine, defaults, has_key=options.key is not None or bool(keys))
    if options.allow_adapter_loading:
        app.adapters_path = options.adapters_path
    app.include_router(paths(simple=options.simple))
    app.add_exception_handler(HTTPException, send_refusal)
    app.add_exception_handler(RequestValidationError, send_refusal)
    app.add_exception_handler(OneCardError, send_refusal)
    rules = NetworkRules(
        options.host, options.allowed_hosts, options.allowed_origins, options.key, limits.max_body_bytes, keys,
        limits.rate_limit,
    )  # fmt: skip
    app.add_middleware(Protection, rules=rules)
    file = RequestFile(options.request_log) if options.request_log is not None else None
    # The last one added stands outermost.
    app.add_middleware(RequestLog, metrics=app.metrics, with_texts=options.log_prompts, file=file)
    return app


def paths(*, simple: bool = False) -> APIRouter:
    """Every path with its method and what may come back; other methods and other paths under /v1 are refused."""
    router = APIRouter(route_class=JsonRoute, redirect_slashes=False)
    streamed = {"text/event-stream": {"schema": {"type": "string"}}}
    table: list[tuple[str, str, Callable[..., Any], type, dict[str, Any]]] = [
        ("GET", "/health", health, answer_schema.Health, {}),
        ("GET", "/metrics", metrics, str, {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}),
        ("GET", "/v1/models", list_models, answer_schema.ModelList, {}),
        ("GET", "/v1/models/{model_id:path}", show_model, answer_schema.ModelCard, {}),
        ("POST", "/v1/chat/completions", chat_completions, answer_schema.ChatCompletion, streamed),
        ("POST", "/v1/completions", completions, answer_schema.Completion, streamed),
        ("POST", "/v1/responses", responses, answer_schema.ResponseBody, streamed),
        ("POST", "/v1/embeddings", embeddings, answer_schema.EmbeddingList, {}),
        ("POST", "/tokenize", tokenize.tokenize, tokenize.Tokens, {}),
        ("POST", "/detokenize", tokenize.detokenize, tokenize.Detokenized, {}),
        ("POST", "/v1/load_lora_adapter", adapters.load_adapter, str, {}),
        ("POST", "/v1/unload_lora_adapter", adapters.unload_adapter, str, {}),
    ]
    if simple:
        table += [
            ("GET", f"{QUERY}{{text:path}}", query, SimpleAnswer, {}),
            ("POST", "/", ask_simply, SimpleAnswer, {}),
        ]
    for method, path, endpoint, answer_model, more in table:
        answers: dict[int | str, dict[str, Any]] = {200: {"model": answer_model, "content": more}}
        for status, words in REFUSALS.items():
            answering = method == "POST" or path.startswith(QUERY)
            if answering or status in FOR_READING or (status == 404 and "{" in path):
                answers[status] = {"model": answer_schema.ErrorBody, "description": words}
        router.add_api_route(path, endpoint, methods=[method], response_model=None, responses=answers)
        allowed = ("GET", "HEAD", "OPTIONS") if method == "GET" else (method, "OPTIONS")
        if method == "GET":
            router.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)
        # The chat page may be at /, too.
        others = [other for other in METHODS if other not in (*allowed, *(READING_METHODS if path == "/" else ()))]
        router.add_api_route(path, refusing(allowed), methods=others, include_in_schema=False)
        router.add_api_route(path, naming(allowed), methods=["OPTIONS"], include_in_schema=False)
    # Pages that are mounted at / must not answer for the API, nor where a base URL lacks its /v1.
    for path in ("/v1", "/v1/{rest:path}", *SERVED, "/models/{rest:path}"):
        router.add_api_route(path, unknown_path, methods=list(METHODS), include_in_schema=False)
    return router


async def health() -> Response:
    """Whether the server is up; needs no key."""
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Counts of requests and tokens, in Prometheus' text form."""
    return Response(app_of(request).metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


async def list_models(request: Request) -> Response:
    """The names that `model` may have."""
    app = app_of(request)
    return JSONResponse({"object": "list", "data": [app.card(name) for name in app.engine.names]})


async def show_model(request: Request, model_id: str) -> Response:
    """One of these names."""
    app = app_of(request)
    app.check_model(model_id)
    return JSONResponse(app.card(model_id))


async def chat_completions(request: Request, body: schema.ChatRequest) -> Response:
    """Answer a conversation."""
    app, ask = asked(request, body, chat_ask)
    return await answer(request, ChatResponseBuilder(ask, app.answer_head("chatcmpl", ask), app.token_texts(ask.model)))


async def completions(request: Request, body: schema.CompletionRequest) -> Response:
    """Go on from raw prompts, without a template."""
    app, ask = asked(request, body, completion_ask)
    return await answer(
        request, CompletionResponseBuilder(ask, app.answer_head("cmpl", ask), app.token_texts(ask.model))
    )


async def responses(request: Request, body: schema.ResponseRequest) -> Response:
    """Answer a text or a conversation, in the newer form."""
    app, ask = asked(request, body, response_ask)
    form = ResponseBuilder(ask, body, app.token_texts(ask.model), app.engine.tokenizer(ask.model))
    return await answer(request, form)


async def query(request: Request, text: str) -> Response:
    """Answer the text of the path, as the server was started (--simple). text: for the OpenAPI document."""
    return await ask_simply(request, SimpleRequest(text=path_question(request.scope) or None))


async def ask_simply(request: Request, body: SimpleRequest) -> Response:
    """Answer one question (--simple)."""
    body.model = body.model or app_of(request).engine.names[0]
    app, ask = asked(request, body, simple_ask)
    return await answer(request, SimpleResponseBuilder(ask, app.answer_head("simple", ask), app.token_texts(ask.model)))


def asked(
    request: Request, body: Body, read: Callable[[Body, ServerDefaults], GenerationParams]
) -> tuple[Api, GenerationParams]:
    """The application, and what is asked of it. Raises ApiError naming the field that cannot be served."""
    app = app_of(request)
    app.check_model(body.model)
    ask = read(body, app.defaults)
    if not ask.prompts:
        ask = for_template(ask, app.engine.template(body.model))
    note_of(request.scope).add(ask.prompts or ask.turns)
    return app, ask


async def embeddings(request: Request, body: schema.EmbeddingRequest) -> Response:
    """One vector per text: the mean of the last hidden states, of length 1."""
    app, note = app_of(request), note_of(request.scope)
    app.check_model(body.model)
    texts = embedding_texts(body, app.defaults.limits)
    note.add(texts)
    async with job_for(request, lambda cancel: embed_texts(app.engine, body.model, texts, cancel)) as job:
        found = await job.last()
    note.n_prompt_tokens = found.n_tokens
    # Thousands of vectors are long: each is written when its turn has come to be sent, in a thread.
    return StreamingResponse(vectors_body(body, found), media_type="application/json")


async def answer(request: Request, form: Form | ResponseBuilder) -> Response:
    """Answer, whole or in pieces. What can be refused is refused before the first piece."""
    note, engine, ask = note_of(request.scope), app_of(request).engine, form.ask
    answering = answer_prompts if ask.prompts else answer_chat
    async with AsyncExitStack() as stack:
        job = await stack.enter_async_context(job_for(request, lambda cancel: answering(engine, ask, cancel)))
        if ask.stream:
            begun = await job.next()
            assert begun is not None, "without a time limit there is always a snapshot"
            writer: EventWriter
            if isinstance(form, ResponseBuilder):
                writer = ResponseEvents(form)
            else:
                writer = StreamEventBuilder(form, len(begun.chunks))
            return EventStream(events(job, writer, begun, note), stack.pop_all())
        progress = await job.last()
        note.of_answer(progress, ask.n)
        if progress.is_cancelled:
            raise stopping()
    return JSONResponse(form.whole(progress))


@asynccontextmanager
async def job_for(request: Request, work: Work[Result]) -> AsyncIterator[RequestThread[Result]]:
    """A job that ends when this request's client leaves; whatever fails after its cancellation is its end."""
    async with app_of(request).jobs.run(work, request.receive) as job:
        try:
            yield job
        except Exception:
            if job.client_left:
                raise ApiError(CLIENT_LEFT, "the client left", code="client_left") from None
            if job.cancel.is_set():
                raise stopping() from None
            raise


def app_of(request: Request) -> Api:
    """The application that a request came to."""
    app = request.app
    assert isinstance(app, Api)
    return app


def refusing(allowed: Sequence[str]) -> Callable[[], Any]:
    """An endpoint that answers 405 and names the methods that work."""

    async def wrong_method() -> Response:
        headers = {"allow": ", ".join(allowed)}
        raise ApiError(405, f"this path takes {allowed[0]}", code="method_not_allowed", headers=headers)

    return wrong_method


def naming(allowed: Sequence[str]) -> Callable[[], Any]:
    """An endpoint that answers OPTIONS."""

    async def options() -> Response:
        return Response(status_code=204, headers={"allow": ", ".join(allowed)})

    return options


def not_found(path: str) -> ApiError:
    """404 for a path, with what it may have meant: most are made of a base URL without /v1, or with two of them."""
    plain = path.rstrip("/")
    served = next((end for end in SERVED if plain.endswith(end) or f"{end}/" in plain), None)
    hint = "GET /openapi.json lists all of them"
    if served is not None:
        hint = f"here it is /v1{served}, so the base URL that a client is given ends with /v1, once, and no slash"
    elif plain in ("", "/v1"):
        hint = "this is a base URL; clients add to it, such as /v1/chat/completions; GET /openapi.json lists all paths"
    return ApiError(404, f"there is no such path; {hint}", code="not_found")


async def unknown_path(request: Request) -> Response:
    """An endpoint that answers 404."""
    raise not_found(request.url.path)


async def send_refusal(request: Request, reason: Exception) -> Response:
    """Any error that was foreseen, in OpenAI's shape."""
    if isinstance(reason, RequestValidationError):
        error = as_field_error(reason)
    elif isinstance(reason, HTTPException) and not isinstance(reason, ApiError):
        plain = ApiError(reason.status_code, str(reason.detail), headers=reason.headers)
        error = not_found(request.url.path) if reason.status_code == 404 else plain
    else:
        error = as_api_error(reason)
    note_of(request.scope).of_error(error)
    return Response(error.json, error.status_code, headers=error.headers, media_type="application/json")
