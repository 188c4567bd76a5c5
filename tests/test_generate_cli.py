"""generate.py as a person types it: one question, a loop, a file; a run alone is enough; killed, it goes on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import generate
from onecard.console import run_main
from onecard.installation import SHIPPED as REPOSITORY
from onecard.serve.terminal.screen import printable
from tests.inference.conftest import lively_base, run_dir  # noqa: F401  (fixtures)
from tests.serve.terminal.test_ask import keyboard


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs generate.py in this process; returns exit code, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *words])
        capsys.readouterr()
        code = run_main(generate.main)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_one_instruction_to_a_run(command, run_dir) -> None:  # noqa: F811
    words = ["--lora_path", str(run_dir), "--instruction", "Hi", "--max_new_tokens", "5", "--device", "cpu"]
    code, first, _ = command(*words)
    assert code == 0
    assert first.strip()
    assert command(*words)[1] == first
    assert command(*words, "--input", "more")[1] != first
    assert command(*words, "--system", "Be brief.")[1] != first
    assert command(*words[2:], "--model_path", str(run_dir / "nowhere"))[0] != 0


def test_a_checkpoint_answers_as_its_run(command, run_dir) -> None:  # noqa: F811
    words = ["--instruction", "Hi", "--max_new_tokens", "5", "--device", "cpu", "--lora_path"]
    assert command(*words, str(run_dir))[1] == command(*words, str(run_dir / "checkpoint-3"))[1]


def test_the_runs_options_stand_below_what_is_typed(command, run_dir, lively_base, monkeypatch) -> None:  # noqa: F811
    configs = []
    monkeypatch.setattr("onecard.recipes.generate", configs.append)
    for words in ([], ["--bits", "4"], ["--model_path", "other"]):
        assert command("--lora_path", str(run_dir / "checkpoint-3"), *words)[0] == 0
    assert [config.model.bits for config in configs] == [32, 4, 32]
    assert [config.model.model_path for config in configs] == [str(lively_base), str(lively_base), "other"]
    for config in configs:  # nothing of the training's own, and never leave to run foreign code
        assert (config.ask.data_path, config.ask.output_path, config.inference.prompt_type) == (None, None, "auto")
        assert (config.model.trust_remote_code, config.model.device, config.sampling.seed) == (False, "auto", 42)


def test_the_base_alone_answers_too(command, lively_base) -> None:  # noqa: F811
    words = ["--model_path", str(lively_base), "--bits", "32", "--instruction", "Hi", "--max_new_tokens", "3"]
    code, said, _ = command(*words)
    assert code == 0
    assert said.strip()


def test_the_loop_ends_with_code_0(command, run_dir, monkeypatch) -> None:  # noqa: F811
    for way_out in ("", EOFError, KeyboardInterrupt):
        monkeypatch.setattr("builtins.input", keyboard("Hi", way_out))
        code, said, _ = command("--lora_path", str(run_dir), "--max_new_tokens", "4", "--device", "cpu")
        assert (code, said.count("tokens/s")) == (0, 1)


def test_a_file_in_and_a_file_out(command, run_dir, tmp_path: Path) -> None:  # noqa: F811
    data, output = tmp_path / "questions.csv", tmp_path / "answers.jsonl"
    data.write_text("id,instruction\n1,Hi\n2,Bye\n3,What is the capital of France?\n", encoding="utf-8")
    words = ["--lora_path", str(run_dir), "--data_path", str(data), "--output_path", str(output), "--device", "cpu",
             "--max_new_tokens", "4"]  # fmt: skip
    code, said, _ = command(*words)
    assert code == 0
    assert "3 answers" in said
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["1", "2", "3"]
    assert [row["instruction"] for row in rows] == ["Hi", "Bye", "What is the capital of France?"]
    assert all(row["output"] for row in rows)
    alone = command(*words[:2], "--instruction", "Bye", *words[6:])[1]
    # The file has the answer as it is; what is printed may reach a terminal, so control characters are made visible.
    assert printable(rows[1]["output"]) == alone.removesuffix("\n")

    before = output.read_bytes()
    assert command(*words)[0] == 0
    assert output.read_bytes() == before
    code, _, error = command(*words, "--temperature", "0.5")
    assert code == 2
    assert "temperature: then 0.0, now 0.5" in error
    data.write_text("instruction\nHi\n", encoding="utf-8")
    code, _, error = command(*words)
    assert code == 2
    assert "questions: then" in error
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--instruct", "x"], "did you mean --instruction"),
        (["--data_path", "q.jsonl"], "--output_path"),
        (["--input", "x"], "--input"),
        (["--top_p", "2", "--num_beams", "0"], "2 settings cannot work"),
        (["--instruction", "x", "--lora_path", "no/such/run"], "no/such/run"),
        (["--data_path", "missing.jsonl", "--output_path", "a.jsonl"], "missing.jsonl"),
    ],
)
def test_what_cannot_work_is_said_in_one_message(command, words, expected, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = command(*words)
    assert code in (1, 2)
    assert expected in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_help_and_wrong_flags_load_nothing_heavy() -> None:
    script = (
        "import sys, generate\n"
        "sys.argv = ['generate.py', '--help']\n"
        "try: generate.main()\n"
        "except SystemExit as done: assert done.code == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--instruction" in result.stdout


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_answers(run_dir, tmp_path: Path) -> None:  # noqa: F811
    seed = 11
    moments = random.Random(seed)
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"Count to {n}"}) + "\n" for n in range(400)), encoding="utf-8")

    def start(output: Path) -> subprocess.Popen[bytes]:
        words = ["--lora_path", str(run_dir), "--data_path", str(data), "--output_path", str(output), "--device", "cpu",
                 "--max_new_tokens", "8", "--batch_size", "2", "--temperature", "1"]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "generate.py", *words], cwd=REPOSITORY, env=environment)

    assert start(tmp_path / "undisturbed.jsonl").wait() == 0
    output = tmp_path / "answers.jsonl"
    n_kills = 0
    for _ in range(30):
        process = start(output)
        while process.poll() is None and not (output.exists() and output.stat().st_size):
            time.sleep(0.05)
        time.sleep(moments.uniform(0.0, 0.6))
        if process.poll() is None:
            process.kill()
            n_kills += 1
        if process.wait() == 0:
            break
    assert n_kills >= 1, f"seed {seed}: never killed in the middle"
    assert start(output).wait() == 0
    assert output.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes(), f"seed {seed}"
