#!/usr/bin/env python
"""How a served model holds up with several clients: tokens per second of all, and each one's time to the first token.

    python benchmarks/serving.py --model_path Llama-3.1-8B --bits 4 --clients 1,4,8,16
    python benchmarks/serving.py --bits 32 --max_parallel 16 --repeats 5 --answers 8    (on a CPU)

The API of `tools/serve.py` runs in this process on a port of its own; each client is a thread with a connection of its
own, which asks for a streamed chat answer that no end token cuts short. All clients of one row begin at once, so the
time to the first token holds the wait for those in front. With --max_parallel a server that answers one after another
and one with a batch take turns, so that what else the machine does falls on both; the speedup is the median of those of
the single turns. A directory with a tokenizer is asked with its own one, anything else with that of the sample.
Writes benchmarks/results/serving.json.
"""

from __future__ import annotations

import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, say_table, write_result  # noqa: E402
from onecard.config.base_model import DEFAULT_BASE, ModelOptions  # noqa: E402
from onecard.config.inference import InferenceOptions, LimitOptions, ParallelOptions, ServeOptions  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main, say  # noqa: E402
from onecard.errors import ModelError  # noqa: E402

NAME, HOST, SECONDS_OF_A_REQUEST = "random", "127.0.0.1", 600
QUESTION = "Number {number}: name the capitals of all countries of Europe and say what each one is known for."


@dataclass
class ServingOptions:
    """What is measured."""

    model_path: str = DEFAULT_BASE
    """A directory, or a known model's name or a config.json (random weights)."""
    bits: int = 4
    """Bits per base weight."""
    clients: str = "1,4,8,16"
    """Clients that ask at the same time, one row each."""
    requests: int = 1
    """Requests of each client, one after the other."""
    answers: int = 1
    """Each client asks so often that all of them together get at least so many answers in a turn."""
    new_tokens: int = 32
    """Length of each answer."""
    max_parallel: int = 1
    """Above 1: compare with a server that computes so many answers at once."""
    repeats: int = 1
    """How often each row is measured; times and tokens are added up, of the speedups the median is told."""
    seconds: float = 0.0
    """A row that would take longer than what is left of so many is not begun; 0: all rows."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    pretend_turing: bool = False
    """fp16 and no FlashAttention, whatever the card."""
    output: str = str(RESULTS / "serving.json")
    """Where the result is written, anew after each row."""
    debug: bool = False
    """Show tracebacks."""


@dataclass(frozen=True)
class Answered:
    """One request: seconds until the first text and until the end, and the tokens that were written."""

    first_token: float
    whole: float
    n_tokens: int


@dataclass(frozen=True)
class Measured:
    """What some clients got, and what it took."""

    answers: list[Answered]
    seconds: float
    cpu_seconds: float

    @property
    def per_cpu_second(self) -> float:
        """Tokens of all answers."""
        return sum(answer.n_tokens for answer in self.answers) / self.cpu_seconds


def main(argv: list[str] | None = None) -> None:
    options = parse(ServingOptions, argv, description=__doc__ or "")

    given = asdict(options) | {name: Path(getattr(options, name)).name for name in ("output", "model_path")}
    end = time.monotonic() + options.seconds if options.seconds else float("inf")
    rows: list[dict[str, Any]] = []
    engines, model, device = open_engines(options)
    forward = partial(forward_alone, model, engines["serial"].tokenizer()(QUESTION)["input_ids"], options.new_tokens)
    with ExitStack() as stack:
        ports = {path: stack.enter_context(serving(engine)) for path, engine in engines.items()}
        for engine in engines.values():
            stack.callback(engine.close)
        for port in ports.values():
            ask(port, 0, 2)  # kernels are chosen and the first memory is taken
        for word in options.clients.split(","):
            rows += rows_of(int(word), rows, ports, options, end - time.monotonic(), forward)
            write_result(options.output, {"options": given, "rows": rows, "machine": machine(device)})
    say_table(
        ["clients", "path", "tokens/s", "of one by one, per CPU second", "first token, s (median)", "worst", "not run"],
        [[row.get(name) for name in COLUMNS] for row in rows],
    )


COLUMNS = ("clients", "path", "tokens_per_s", "speedup_per_cpu_s", "first_token_median", "first_token_worst", "not_run")


def open_engines(options: ServingOptions) -> tuple[dict[str, Any], Any, str]:
    """The engine of `tools/serve.py` around a base in memory, once for each way to answer, the base and its device."""
    import torch

    from benchmarks.random_models import base_model
    from onecard.data.chat_template import load_template
    from onecard.inference.adapters import AdapterManager
    from onecard.inference.call import ModelBundle
    from onecard.inference.engine import InferenceEngine
    from onecard.model.hardware import detect
    from onecard.model.load import load_tokenizer

    bits: Any = options.bits
    hardware = detect(options.device, pretend_turing=options.pretend_turing)
    model = ModelOptions(options.model_path, bits=bits, device=options.device, gradient_checkpointing=False)
    base = base_model(model, hardware)
    own = options.model_path if (Path(options.model_path) / "tokenizer.json").is_file() else DEFAULT_BASE
    tokenizer = load_tokenizer(own)
    with torch.no_grad():  # the most likely token is then one that the sample tokenizer knows
        base.model.get_output_embeddings().weight[len(tokenizer) :] = 0
    bundle = ModelBundle(base.model, tokenizer, load_template("vicuna-chat", tokenizer))
    adapters = AdapterManager(model, InferenceOptions(), {NAME: None}, (bundle, {"base": base.fingerprint}))
    engines = {"serial": InferenceEngine(adapters, LimitOptions())}
    if options.max_parallel > 1:
        engines["batched"] = InferenceEngine(adapters, LimitOptions(), ParallelOptions(options.max_parallel))
    return engines, base.model, str(hardware.device)


@contextmanager
def serving(engine: Any) -> Iterator[int]:
    """The API around the engine, in a thread; gives its port."""
    from onecard.serve.api.app import build_app
    from onecard.serve.listen import Server, open_socket

    app = build_app(engine, ServeOptions(), LimitOptions())
    with open_socket(HOST, 0) as listening:
        server = Server(app, app.stop_answers)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise ModelError("the server ended before it listened")
            time.sleep(0.01)
        try:
            yield int(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(10)


def rows_of(
    n: int,
    rows: list[dict[str, Any]],
    ports: dict[str, int],
    options: ServingOptions,
    left: float,
    forward: Callable[[int], float],
) -> list[dict[str, Any]]:
    """So many clients at once, or why they were not let loose: by the time that the last rows took, one at a time."""
    before = next((row for row in reversed(rows) if "seconds" in row), None)
    expected = before["seconds"] / before["clients"] * n * len(ports) if before else 0.0
    if before and expected > left:
        return [{"clients": n, "not_run": f"{max(0.0, left):.0f} s left, about {expected:.0f} needed"}]
    found: dict[str, list[Measured]] = {path: [] for path in ports}
    alone: list[float] = []
    for _ in range(options.repeats):
        for path, port in ports.items():
            found[path].append(measure(n, port, options))
        if len(ports) > 1:
            alone.append(forward(n))
    new = [row_of(n, path, each) for path, each in found.items()]
    for row, path in zip(new[1:], [*found][1:], strict=True):
        ratios = [
            batch.per_cpu_second / one_by_one.per_cpu_second
            for batch, one_by_one in zip(found[path], next(iter(found.values())), strict=True)
        ]
        row["speedup_per_cpu_s"] = round(statistics.median(ratios), 2)
        row["speedups"] = [round(ratio, 2) for ratio in ratios]
    if alone:
        new.append({"clients": n, "path": "forward", "speedup_per_cpu_s": round(statistics.median(alone), 2),
                    "speedups": [round(ratio, 2) for ratio in alone]})  # fmt: skip
    return new


def forward_alone(model: Any, prompt: list[int], new_tokens: int, n: int) -> float:
    """How many times fewer CPU seconds n answers take as rows of one batch than one by one, without a server."""
    import torch

    def cpu_seconds(n_rows: int) -> float:
        begun = time.process_time()
        with torch.inference_mode():
            ids, cache = torch.tensor([prompt] * n_rows, device=model.device), None
            for _ in range(new_tokens):
                found = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = found.logits[:, -1:].argmax(dim=-1), found.past_key_values
        return time.process_time() - begun

    return n * cpu_seconds(1) / cpu_seconds(n)


def measure(n: int, port: int, options: ServingOptions) -> Measured:
    """Let so many clients loose once."""

    n_requests = max(options.requests, -(-options.answers // n))

    def client(number: int) -> list[Answered]:
        return [ask(port, number * n_requests + k, options.new_tokens) for k in range(n_requests)]

    begun, cpu_begun = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(n) as threads:
        answers = [each for found in threads.map(client, range(n)) for each in found]
    return Measured(answers, time.perf_counter() - begun, time.process_time() - cpu_begun)


def row_of(n: int, path: str, measured: list[Measured]) -> dict[str, Any]:
    """A row of the result. CPU seconds are those of this process, the clients included."""
    answers = [answer for each in measured for answer in each.answers]
    seconds, cpu_seconds = sum(each.seconds for each in measured), sum(each.cpu_seconds for each in measured)
    waits = [each.first_token for each in answers]
    n_tokens = sum(each.n_tokens for each in answers)
    say(f"{n} clients, {path}: {n_tokens} tokens in {seconds:.1f} s, {cpu_seconds:.1f} s of the CPU")
    return {
        "clients": n, "path": path, "requests": len(answers), "tokens": n_tokens, "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3), "tokens_per_s": round(n_tokens / seconds, 1),
        "tokens_per_cpu_s": round(n_tokens / cpu_seconds, 1),
        "first_token_median": round(statistics.median(waits), 3), "first_token_worst": round(max(waits), 3),
        "whole_median": round(statistics.median(each.whole for each in answers), 3),
    }  # fmt: skip


def ask(port: int, number: int, new_tokens: int) -> Answered:
    """One streamed chat answer of `new_tokens`. Raises ModelError for a refusal and for an answer without an end."""
    body = {"model": NAME, "messages": [{"role": "user", "content": QUESTION.format(number=number)}], "temperature": 0,
            "max_tokens": new_tokens, "min_tokens": new_tokens, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    connection = http.client.HTTPConnection(HOST, port, timeout=SECONDS_OF_A_REQUEST)
    begun = time.perf_counter()
    first, n_tokens = None, 0
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ModelError(f"the server refused a request: {response.status} {response.read(500).decode()}")
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            event = json.loads(data) if data.startswith("{") else {}
            if "error" in event:
                raise ModelError(f"the server broke off an answer: {event['error']}")
            if first is None and any(choice["delta"].get("content") for choice in event.get("choices", ())):
                first = time.perf_counter() - begun
            n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
    finally:
        connection.close()
    if not n_tokens:
        raise ModelError("an answer ended without saying how many tokens it has")
    whole = time.perf_counter() - begun
    return Answered(whole if first is None else first, whole, n_tokens)


if __name__ == "__main__":
    sys.exit(run_main(main))
