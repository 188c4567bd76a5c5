"""prove_gpu.py over made-up steps: what each file says of a step that ends well, fails, hangs or has no time left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import proof_steps, prove_gpu
from benchmarks.proof_steps import MODELS, STEPS, NotHere, Setting, Step, result_file
from benchmarks.prove_gpu import Ended, Launch, ProofOptions, prove
from onecard.config.parsing import parse
from onecard.errors import ConfigError, ModelError
from scripts import write_benchmarks

FACTS = {"device": "cuda", "gpu": "NVIDIA GeForce RTX 2080 Ti", "gpu_gib": 10.75, "free_gib": 10.4, "ram_gib": 32.0,
         "is_simulated": False, "driver": "570.1", "cores": 8, "packages": {"torch": "2.13.0"}, "date": "2026-11-29",
         "matrix_product_flops_per_s": 4.5e13}  # fmt: skip
SCHEMA = {
    "step": str, "title": str, "status": str, "reason": str, "command": list, "limit_seconds": (int, float, type(None)),
    "seconds": (int, float, type(None)), "numbers": (dict, type(None)), "last_lines": list, "machine": dict,
    "git_revision": str, "minutes": (int, float), "rehearsal": bool, "pretend_turing": bool,
}  # fmt: skip
STATUSES = (prove_gpu.DONE, prove_gpu.FAILED, prove_gpu.NO_MEMORY, prove_gpu.KILLED, prove_gpu.NOT_RUN)


def check(entry: dict[str, Any]) -> None:
    """One file is as every file is."""
    assert entry.keys() == SCHEMA.keys()
    for name, kind in SCHEMA.items():
        assert isinstance(entry[name], kind), f"{entry['step']}: {name} is {entry[name]!r}"
    assert entry["status"] in STATUSES
    assert (entry["status"] == prove_gpu.DONE) == (entry["reason"] == "")
    assert entry["status"] in prove_gpu.BAD or not entry["last_lines"]
    assert entry["numbers"] is not None or entry["status"] != prove_gpu.DONE
    assert entry["machine"]["gpu"] and str(Path.home()) + "/" not in json.dumps(entry)


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file of a run by its step, in order; the machine's own aside."""
    files = sorted(folder.glob("*.json"))
    found = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
    for entry in found.values():
        check(entry)
    assert next(iter(found)) == "00-machine.json"
    return {entry["step"]: entry for entry in list(found.values())[1:]}


def program(text: str, least: float = 1.0, weight: float = 1.0, name: str = "") -> Step:
    """A step whose program is `text`; {result} in it is the file that it writes."""
    return Step(name, name, weight, least, lambda setting: ["-c", text.replace("{result}", repr(str(setting.result)))],
                result_file)  # fmt: skip


def writing(numbers: dict[str, Any]) -> str:
    return f"import json; json.dump({numbers!r}, open({{result}}, 'w'))\n"


OUT_OF_MEMORY = """
class OutOfMemoryError(RuntimeError): pass
raise OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
"""


@pytest.fixture(autouse=True)
def _a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove_gpu, "MACHINE", machine(FACTS))


def machine(facts: dict[str, Any]) -> Step:
    return program("import json; json.dump(" + repr(facts) + ", open({result}, 'w'))", name="machine")


def test_a_step_that_fails_leaves_the_others_standing(tmp_path: Path) -> None:
    def not_here(setting: Setting) -> list[str]:
        raise NotHere("gptqmodel is not installed")

    steps = [
        program(writing({"rows": [1], "machine": {}}), name="good"),
        program(writing({"rows": [1]}) + "raise ValueError('a bad layer')", name="raises"),
        program(writing({"rows": [1]}) + OUT_OF_MEMORY, name="large"),
        program("raise SystemExit(7)", name="silent"),
        program("print('all went well')", name="empty"),
        Step("absent", "absent", 1, 1, not_here, result_file),
        program(writing({"rows": [2]}), name="last"),
    ]
    found = entries(prove(ProofOptions(minutes=30, output_path=str(tmp_path)), steps=steps))
    assert {name: entry["status"] for name, entry in found.items()} == {
        "good": "done", "raises": "failed", "large": "out of memory", "silent": "failed", "empty": "failed",
        "absent": "not run", "last": "done",
    }  # fmt: skip
    assert found["good"]["numbers"] == {"rows": [1]}  # the machine stands in each file once
    assert found["raises"]["reason"] == "ValueError: a bad layer" and found["raises"]["numbers"] == {"rows": [1]}
    assert any("Traceback" in line for line in found["raises"]["last_lines"])
    assert "Tried to allocate 2.00 GiB" in found["large"]["reason"] and found["large"]["numbers"] == {"rows": [1]}
    assert found["absent"]["reason"] == "gptqmodel is not installed"
    assert found["silent"]["reason"] == "it ended with 7 and said nothing"
    assert found["empty"]["reason"] == "no result: FileNotFoundError" and found["empty"]["last_lines"]


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    names = tmp_path / "pids"
    child = "import time; time.sleep(600)"
    text = (
        f"import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(names)!r}, 'w').write(str(child.pid)); print('so far', flush=True); time.sleep(600)"
    )
    ended = prove_gpu.run_program([sys.executable, "-c", text], 1, tmp_path / "hangs")
    assert ended.code is None
    if names.exists():  # else the machine was too busy to start it at all
        assert ended.out.strip() == "so far" and not psutil.pid_exists(int(names.read_text()))


class FakeTime:
    """A clock that launches move on."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


def taking(clock: FakeTime, seconds: dict[str, float]) -> Launch:
    """Programs that take so long and write one row; those that take longer than their limit are killed at it."""

    def launch(command: Sequence[str], limit: float, prefix: Path) -> Ended:
        numbers = FACTS if prefix.name == "machine" else {"rows": [1]}
        (prefix.parent / f"{prefix.name}.json").write_text(json.dumps(numbers))
        wanted = seconds.get(prefix.name, 1.0)
        clock.seconds += min(wanted, limit)
        return Ended(0 if wanted <= limit else None, "printed", "", min(wanted, limit))

    return launch


def test_it_stops_at_its_time_and_says_what_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime()
    monkeypatch.setattr(prove_gpu, "time", clock)
    steps = [program("", least, weight, name) for name, least, weight in
             [("quick", 10, 1), ("hangs", 20, 2), ("long", 40, 2), ("short", 5, 1)]]  # fmt: skip
    launch = taking(clock, {"machine": 6, "quick": 4, "hangs": 9999, "long": 9999, "short": 3})
    found = entries(prove(ProofOptions(minutes=1, output_path=str(tmp_path)), launch, steps))
    assert {name: entry["status"] for name, entry in found.items()} == {
        "quick": "done", "hangs": "killed", "long": "not run", "short": "done",
    }  # fmt: skip
    assert found["hangs"]["limit_seconds"] == 20  # two fifths of what 60 - 6 - 4 leave
    assert found["hangs"]["numbers"] == {"rows": [1]} and "20 s" in found["hangs"]["reason"]
    assert found["long"]["reason"] == "30 s left, 40 s needed"
    assert clock.seconds <= 60


def test_time_that_a_step_leaves_goes_to_the_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime()
    monkeypatch.setattr(prove_gpu, "time", clock)
    steps = [program("", 1, 1, name) for name in ("first", "second", "third")]
    found = entries(prove(ProofOptions(minutes=1, output_path=str(tmp_path)), taking(clock, {"machine": 0}), steps))
    assert [entry["limit_seconds"] for entry in found.values()] == [20, 29.5, 58]


def test_where_there_is_no_card_it_says_so_and_measures_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(prove_gpu, "MACHINE", machine({**FACTS, "device": "cpu"}))
    with pytest.raises(ModelError, match="no card"):
        prove(ProofOptions(output_path=str(tmp_path / "new")), steps=[program("", name="never")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "words", [["--minutes", "0"], ["--steps", "plan,speeed"], ["--simcard", "sm75:11GiB"]], ids=lambda words: words[0]
)
def test_what_cannot_be_is_refused_before_anything_runs(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=words[0]):
        parse(ProofOptions, words)


def test_tests_that_ran_before_a_kill_are_counted() -> None:
    printed = (
        "tests/gpu/test_card.py::test_one PASSED [ 33%]\ntests/gpu/test_fit.py::test_two[a b-4] FAILED [ 66%]\n"
        "tests/gpu/test_fit.py::test_three "
    )
    found = proof_steps.test_outcomes(Setting(False, False, "", "auto", Path()), printed)
    assert found == {"passed": 1, "failed": 1, "error": 0, "skipped": 0, "notes": []}
    with pytest.raises(ValueError):
        proof_steps.test_outcomes(Setting(False, False, "", "auto", Path()), "collected 0 items")


@pytest.mark.parametrize("facts", [
    {"free_gib": 10.4, "matrix_product_flops_per_s": 4.5e13}, {"free_gib": 138.0, "matrix_product_flops_per_s": 6e14},
    {"free_gib": 3.6, "matrix_product_flops_per_s": 1e13},
])  # fmt: skip
def test_sizes_follow_the_card_and_the_time(facts: dict[str, float], tmp_path: Path) -> None:
    def chosen(step: str, seconds: float) -> float:
        setting = Setting(True, False, "", "auto", tmp_path, facts, seconds, tmp_path / "result.json")
        words = next(each for each in STEPS if each.name == step).words(setting)
        name = words[words.index("--model_path") + 1]
        return next(n_weights for model, n_weights, _ in MODELS if model == name)

    for step in ("ladder", "speed", "serving"):
        sizes = [chosen(step, seconds) for seconds in (1, 60, 10_000)]
        assert sizes == sorted(sizes), step
    fits = {name: n_weights for name, n_weights, gib in MODELS if gib + 3 <= facts["free_gib"]}
    assert chosen("ladder", 10_000) == max(fits.values())
    assert chosen("speed", 10_000) <= chosen("serving", 10_000)  # two bases at once


def test_the_models_of_the_steps_have_the_sizes_that_are_said() -> None:
    known = json.loads((write_benchmarks.ROOT / "onecard" / "model" / "memory" / "known_models.json").read_text())
    for name, n_weights, gib in MODELS:
        config = known["models"][name]["config"]
        width, heads = config["hidden_size"], config["num_attention_heads"]
        keys = config["num_key_value_heads"] * config.get("head_dim", width // heads)
        attention = 2 * width * width + 2 * width * keys
        n_linear = config["num_hidden_layers"] * (attention + 3 * width * config["intermediate_size"])
        n_tables = (1 if config.get("tie_word_embeddings") else 2) * width * config["vocab_size"]
        assert 0.85 * n_weights <= n_linear <= n_weights, name
        assert 0.85 * gib <= (0.516 * n_linear + 2 * n_tables) / 2**30 <= gib, name  # NF4, double quantisation


def run_of(folder: Path, numbers: dict[str, Any], **changes: Any) -> Path:
    """A folder as a run leaves it, with these numbers of its steps."""
    folder.mkdir(parents=True)
    facts = FACTS | {name: value for name, value in changes.items() if name in FACTS}
    shared = {"machine": facts, "git_revision": "0123456789abcdef", "minutes": 10.0, "pretend_turing": False,
              "rehearsal": changes.get("rehearsal", False)}  # fmt: skip
    for step, found in numbers.items():
        entry = {"step": step, "status": "done", "reason": "", "seconds": 12.5, "numbers": found} | shared
        (folder / f"01-{step}.json").write_text(json.dumps(entry), encoding="utf-8")
    return folder


def test_the_documents_are_as_the_files_of_the_cards_say() -> None:
    script = [sys.executable, str(write_benchmarks.ROOT / "scripts" / "write_benchmarks.py"), "--check"]
    assert subprocess.run(script, check=False).returncode == 0, "run python scripts/write_benchmarks.py"


def test_tables_say_what_was_not_run(tmp_path: Path) -> None:
    row = {"model": "qwen3-0.6b", "setup": {"bits": 4, "rows": 2, "length": 1024}}
    plan = {"asked": 12, "constants": {"context_bytes": 2**29, "slack_share_mean": 0.04}, "rows": [
        row | {"planned_bytes": 2**30, "training_bytes": 2**30, "ratio": 1.0, "reserved_bytes": 2**31,
               "reserved_ratio": 0.98},
        row | {"not_run": "planned to take more than is free"}, row | {"failed": "RuntimeError: no kernel"},
    ]}  # fmt: skip
    serving = {"options": {"model_path": "Llama-3.2-3B", "bits": 4}, "rows": [
        {"clients": 1, "tokens_per_s": 30.5, "first_token_median": 0.2, "first_token_worst": 0.3},
        {"clients": 16, "not_run": "4 s left, about 20 needed"},
    ]}  # fmt: skip
    run_of(tmp_path / "a", {"plan": plan, "serving": serving})
    text = write_benchmarks.tables(tmp_path)
    assert "### NVIDIA GeForce RTX 2080 Ti, 2026-11-29" in text and "revision 0123456789" in text
    for line in (
        "| the longest context of cards of 8 to 24 GiB | **not run** |  |",
        "| the API with 1, 4, 8 and 16 clients | **done** | 12.5 |",
        "| 16 |  |  |  | 4 s left, about 20 needed |",
        "| qwen3-0.6b | 4 | 2 x 1,024 | 1.00 | 1.00 | 1.0 | 2.00 | 0.98 |  |",
        "| 9 more |  |  |  |  |  |  |  | the time was used up |",
    ):
        assert line in text
    assert "RuntimeError: no kernel" in text and "CUDA context 0.50 GiB" in text


@pytest.mark.parametrize("changes", [{"is_simulated": True}, {"rehearsal": True}], ids=str)
def test_what_measures_nothing_comes_into_no_table(changes: dict[str, Any], tmp_path: Path) -> None:
    run_of(tmp_path / "a", {"gptq": {"kernels": "torch"}}, **changes)
    assert write_benchmarks.tables(tmp_path).startswith("No card has run it yet.")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_hands_its_words_on(tmp_path: Path) -> None:
    script = prove_gpu.ROOT / "scripts" / "prove_gpu.sh"
    command = ["bash", str(script), "--minutes", "3", "--pretend_turing", "--print_config"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"minutes: 3.0", "pretend_turing: true", "steps: all"} <= set(done.stdout.splitlines())


def test_a_second_run_of_a_day_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove_gpu, "RESULTS", tmp_path)
    first = prove_gpu.fresh_folder(FACTS)
    assert first == tmp_path / "nvidia-geforce-rtx-2080-ti-2026-11-29"
    first.mkdir()
    assert prove_gpu.fresh_folder(FACTS) == tmp_path / "nvidia-geforce-rtx-2080-ti-2026-11-29-2"


def test_every_limit_of_the_steps_fits_ten_minutes() -> None:
    assert sum(step.least_seconds for step in STEPS) <= 600
