"""The likelihood of options by this kit and by lm-evaluation-harness: its own MMLU task, over questions made here."""

from __future__ import annotations

import csv
import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import yaml

from onecard.data.special_tokens import beginning_ids
from onecard.evaluate.choice import ChoiceSettings, ChoiceTask
from onecard.evaluate.suites import load_choice_suite
from onecard.inference.call import ModelBundle
from onecard.programs import evaluate
from tests.evaluate import layouts

SUBJECT, TASK = "anatomy", "onecard_mmlu"


def exact(bundle: ModelBundle, folder: Path, *, n: int, shots: int) -> tuple[list[float], list[float]]:
    """Of each option of `n` questions: by `ChoiceTask`, and by the harness, from one model in fp64, which stays so."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    questions = layouts.mmlu(folder / "mmlu", n, subjects=(SUBJECT,))
    bundle.model.double()
    task = ChoiceTask(load_choice_suite("mmlu", questions), ChoiceSettings(shots=shots))
    ours = [value for row in task.work(bundle, task.items) for value in row["log_probs"].values()]
    begins = bool(beginning_ids(bundle.tokenizer))
    model = HFLM(pretrained=bundle.model, tokenizer=bundle.tokenizer, batch_size=1, add_bos_token=begins)
    manager = TaskManager(include_path=str(_task(folder, questions)))
    found = simple_evaluate(model, tasks=[TASK], task_manager=manager, num_fewshot=shots, log_samples=True)
    assert found is not None
    return ours, _in_order(found["samples"][TASK])


def typed(base: Path, folder: Path, *, adapter: Path | None = None, url: str = "") -> tuple[list[float], list[float]]:
    """Of each option of 10 questions, in fp32: by `onecard evaluate`, and by `onecard evaluate lm-eval`.

    adapter: over the base; url: of a server whose model the harness then asks.
    """
    questions = layouts.mmlu(folder / "mmlu", 10, subjects=(SUBJECT,))
    common = ["--model_path", str(base), "--bits", "32", "--device", "cpu", "--batch_size", "1"]
    common += ["--lora_path", str(adapter)] if adapter else []
    served = ["--base_url", f"{url}/v1", "--served_model", "tiny"] if url else []
    evaluate.main(["--suite", f"mmlu:{questions}", "--prompt", "base", "--shots", "2", *common,
                   "--output_path", str(folder / "ours")])  # fmt: skip
    evaluate.main(["lm-eval", "--tasks", TASK, "--include_path", str(_task(folder, questions)), *common, *served,
                   "--num_fewshot", "2", "--output_path", str(folder / "theirs")])  # fmt: skip
    ours = [value for row in _rows(folder / "ours" / "answers.jsonl") for value in row["log_probs"].values()]
    (samples,) = (folder / "theirs").rglob(f"samples_{TASK}_*.jsonl")
    return ours, _in_order(_rows(samples))


def in_this_process(command: list[str], **_: object) -> SimpleNamespace:
    """As subprocess.run, without the seconds that another import of torch and of the harness takes."""
    assert command[:3] == [sys.executable, "-m", "lm_eval"]
    with mock.patch.object(sys, "argv", command[2:]):
        runpy.run_module("lm_eval", run_name="__main__")
    return SimpleNamespace(returncode=0)


def _in_order(rows: list[dict]) -> list[float]:
    return [float(answer[0][0]) for row in sorted(rows, key=lambda row: row["doc_id"]) for answer in row["resps"]]


def say_largest(what: str, ours: list[float], theirs: list[float]) -> None:
    """Print by how much they differ."""
    largest = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    print(f"{what}: {len(ours)} log-probabilities differ by at most {largest:.2g}")


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _task(folder: Path, questions: Path) -> Path:
    """A folder with the harness's definition of MMLU, over the same questions as jsonl."""
    tasks = folder / "tasks"
    tasks.mkdir()
    for split in ("dev", "test"):
        with (questions / "data" / split / f"{SUBJECT}_{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = [
                {"question": text, "choices": choices, "answer": "ABCD".index(answer)}
                for text, *choices, answer in csv.reader(file)
            ]
        (tasks / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    template = Path(spec.submodule_search_locations[0]) / "tasks" / "mmlu" / "default" / "_default_template_yaml"
    settings = yaml.safe_load(template.read_text(encoding="utf-8")) | {
        "task": TASK,
        "description": f"The following are multiple choice questions (with answers) about {SUBJECT}.\n\n",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(tasks / f"{split}.jsonl") for split in ("dev", "test")}},
    }
    (tasks / f"{TASK}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tasks
