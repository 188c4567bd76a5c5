#!/usr/bin/env python
"""What clients of other people get from `onecard serve`: each call is made for real, and what came of it is kept.

    python benchmarks/clients.py --litellm VENV/bin/python --lm_eval VENV/bin/python --node FOLDER

The clients of OpenAI and LangChain are in requirements-dev.txt; litellm and lm-evaluation-harness have environments of
their own (`pip install litellm`, `pip install "lm-eval[api]"`), the `openai` client for Node a folder (`npm install
openai`). Those that are not given are left out. The server is the sample model with a batch of four. Exits with 1 where
a call gave something else than expected. Writes benchmarks/results/clients.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, say_table, write_result  # noqa: E402
from onecard.config.base_model import DEFAULT_BASE  # noqa: E402
from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main  # noqa: E402
from onecard.errors import ModelError  # noqa: E402

SCRIPTS = Path(__file__).resolve().parent / "clients"
SECONDS = 200
DOCUMENTS = [{"q": f"{a} + {b} =", "right": str(a + b), "wrong": str(a + b + 1)} for a, b in ((1, 1), (2, 3), (4, 4))]
TASK = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["{{{{right}}}}", "{{{{wrong}}}}"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@dataclass
class ClientOptions:
    """Which clients ask."""

    litellm: str = ""
    """A Python that has litellm."""
    lm_eval: str = ""
    """A Python that has lm-evaluation-harness."""
    node: str = ""
    """A folder in which the openai package of npm is installed."""
    output: str = str(RESULTS / "clients.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(ClientOptions, argv, description=__doc__ or "")
    found: dict[str, Any] = {}
    with started() as (url, model):
        for client, python in {
            "openai": sys.executable,
            "langchain": sys.executable,
            "litellm": options.litellm,
        }.items():
            if python:
                found[client] = answer_of([python, str(SCRIPTS / "python_calls.py"), client, url, model])
        if options.node:
            node = shutil.which("node") or "node"
            found["openai for Node"] = answer_of([node, str(SCRIPTS / "openai_calls.mjs"), url, model, options.node])
        if options.lm_eval:
            found["lm-evaluation-harness"] = evaluated(options.lm_eval, url, model)
    rows = [
        [client, each["version"], name, said] for client, each in found.items() for name, said in each["calls"].items()
    ]
    say_table(["client", "version", "call", "what came of it"], rows)
    write_result(options.output, {"clients": found, "machine": machine("cpu")})
    if failed := [f"{client}: {name}" for client, _, name, said in rows if not said.startswith("ok")]:
        raise ModelError(f"these calls gave something else than expected: {', '.join(failed)}")


@contextmanager
def started() -> Iterator[tuple[str, str]]:
    """The address of a server of its own, and the name of its model. Raises ModelError where it does not start."""
    words = ["-m", "onecard", "serve", "--model_path", DEFAULT_BASE, "--bits", "32", "--device", "cpu", "--prompt_type",
             "chatml", "--max_parallel", "4", "--model_name", "tiny", "--port", "0"]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert process.stdout is not None
            address = next(
                (one[0] for line in process.stdout if (one := re.search(r"http://127\.0\.0\.1:\d+", line))), ""
            )
            if not address:
                errors.seek(0)
                raise ModelError(f"the server did not start: {errors.read()[-500:]}")
            yield address, "tiny"
        finally:
            process.kill()
            process.wait()


def answer_of(command: list[str]) -> dict[str, Any]:
    """The JSON that a script prints last. Raises ModelError where there is none."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, encoding="utf-8", check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise ModelError(f"{Path(command[1]).name} ended with {done.returncode}: {done.stderr[-500:]}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def evaluated(python: str, url: str, model: str) -> dict[str, Any]:
    """A task of three questions by `local-completions`: whether each was scored."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "sums.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS), encoding="utf-8")
        (folder / "sums.yaml").write_text(TASK.format(file=json.dumps(str(file))), encoding="utf-8")
        served = (
            f"model={model},base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={ROOT / DEFAULT_BASE}"
        )
        command = [
            python, "-m", "lm_eval", "--model", "local-completions", "--model_args", served + ",num_concurrent=2",
            "--tasks", "sums", "--include_path", name, "--output_path", name, "--log_samples",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, encoding="utf-8", check=False)
        results = next(iter(folder.rglob("results_*.json")), None)
        if done.returncode or results is None:
            return {
                "version": "",
                "calls": {"local-completions": f"ended with {done.returncode}: {done.stderr[-300:]}"},
            }
        told = json.loads(results.read_text(encoding="utf-8"))
        samples = [json.loads(line) for line in next(folder.rglob("samples_*.jsonl")).read_text("utf-8").splitlines()]
        scored = [float(score) for one in samples for (score, _), *_ in one["resps"]]
        is_right = len(scored) == 2 * len(DOCUMENTS) and all(score < 0 for score in scored)
        said = f"ok: {len(scored)} choices scored, acc {told['results']['sums']['acc,none']:.2f}"
        calls = {"local-completions": said if is_right else f"scores {scored}"}
        return {"version": told.get("lm_eval_version", ""), "calls": calls}


if __name__ == "__main__":
    sys.exit(run_main(main))
