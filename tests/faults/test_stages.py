"""A chain of stages, killed at random disk operations: the same command goes on and ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from onecard.installation import SHIPPED as REPOSITORY
from onecard.train.checkpoint import verify
from tests import tiny
from tests.faults.conftest import newest
from tests.faults.fork_server import ForkServer, Start
from tests.launching import finish, torchrun
from tests.train.test_trained_tokens import WORDS, enlarged

SEED = int(os.environ.get("ONECARD_KILL_SEED", "20261129"))
COMMON = {
    "bits": 32, "device": "cpu", "gradient_checkpointing": False, "test_size": 0, "total_batch": 8, "micro_batch": 4,
    "learning_rate": 1e-2, "log_steps": 1, "save_steps": 1, "num_epoch": 1, "prompt_type": "alpaca",
    "lora_dropout": 0.1, "rehearsal": False,
}  # fmt: skip
STAGES = [  # of an enlarged base: the second goes on with the first one's adapter, the third with a merged base
    {"name": "rows", "train_new_tokens": "only"},
    {"name": "both", "train_new_tokens": True, "num_epoch": 0.7},
    {"name": "answers", "lora_r": 4},
]


@dataclass
class Chain:
    """Starts of one stages file."""

    server: ForkServer
    folder: Path
    base: Path

    def write(self, name: str, stages: list[dict[str, Any]] = STAGES, **common: Any) -> Path:
        file = self.folder / f"{name}.yaml"
        data, cache = str(self.folder / "data.json"), str(self.folder / "cache")
        every = {"model_path": str(self.base), "data_path": data, "cache_path": cache, **COMMON, **common}
        file.write_text(yaml.safe_dump({**every, "stages": stages}), encoding="utf-8")
        return file

    def start(self, file: Path, output: Path, *words: str, kill_at: int = 0) -> Start:
        words = ("--stages", str(file), "--output_path", str(output), *words)
        return self.server.start_tool("finetune", list(words), watched=output, kill_at=kill_at)

    def run(self, file: Path, output: Path, *words: str, expect: int = 0) -> str:
        start = self.start(file, output, *words)
        code = start.wait()
        assert code == expect, f"exit code {code}, not {expect}:\n{start.output()}"
        return start.output()


@pytest.fixture(scope="module")
def chain(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    rows = [
        {"instruction": f"Name {i}", "input": "", "output": " ".join([WORDS[i % 9]] * (1 + i % 3))} for i in range(24)
    ]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return Chain(fork_server, folder, enlarged(folder / "base"))


@pytest.fixture(scope="module")
def straight(chain: Chain) -> tuple[Path, int]:
    """A chain that nothing disturbed, and its number of disk operations."""
    output = chain.folder / "straight"
    printed = chain.run(chain.write("straight"), output)
    return output, int(printed.split()[-2])


def weights_of(output: Path) -> dict[str, bytes]:
    """The bytes of all that was learned, by place; the name of a merged base counts from the directory."""
    runs = [output, *(output / f"{number}-{stage['name']}" for number, stage in enumerate(STAGES, 1))]
    files = [run / "adapter_model.safetensors" for run in runs]
    files += [file for run in runs[1:] for file in newest(run).iterdir() if file.name != "manifest.json"]
    files.append(runs[2] / "merged" / "model.safetensors")
    return {file.relative_to(output).as_posix(): file.read_bytes().replace(str(output).encode(), b"") for file in files}


@pytest.mark.parametrize("n_kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_bits(chain, straight, tmp_path, n_kills) -> None:
    undisturbed, n_operations = straight
    moments = random.Random(SEED + n_kills)
    n_killed = n_whole = 0
    while n_killed < n_kills:
        output, most = tmp_path / f"run-{n_whole}", n_operations
        while True:
            kill_at = moments.randint(1, most) if n_killed < n_kills else 0
            start = chain.start(chain.write("straight"), output, kill_at=kill_at)
            code = start.wait()
            assert code in (0, -9), f"seed {SEED}, kill {n_killed} at {kill_at}: {code}\n{start.output()}"
            if code == 0:
                break
            n_killed += 1
            print(f"seed {SEED}, kill {n_killed}: at operation {kill_at} of {most}")
            most = max(1, most - kill_at // 2)
        n_whole += 1
        assert weights_of(output) == weights_of(undisturbed)
        assert verify(output) == []
        assert [path.name for path in output.rglob("*.broken*")] == []
        hidden = [p.name for p in output.rglob(".*") if p.name not in (".run.lock",)]
        assert hidden == [], "left behind"


def test_each_stage_begins_from_the_one_before(chain, straight) -> None:
    output, _ = straight
    rows, both, answers = (tiny.tensors_of(output / name / "adapter_model.safetensors")
                           for name in ("1-rows", "2-both", "3-answers"))  # fmt: skip
    assert not any(rows[name].any() for name in rows if "lora_B" in name)
    assert all(both[name].any() for name in both if "lora_B" in name)
    (new_rows,) = ({name for name in rows if "embed_tokens" in name},)
    assert all(0 < (rows[name] - both[name]).abs().max() < 0.1 for name in new_rows)
    assert all("lora_" in name for name in answers)
    config = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 4 and Path(config["base_model_name_or_path"]) == output / "2-both" / "merged"
    losses = [tiny.losses_of(output / name) for name in ("1-rows", "2-both", "3-answers")]
    assert losses[0][0][1] > losses[1][0][1] > losses[2][0][1], "a stage began anew"


@pytest.mark.slow
def test_a_stage_that_trained_all_weights_is_the_next_ones_base(chain, tmp_path) -> None:
    stages = [{"name": "whole", "peft_method": "full", "lora_dropout": 0}, {"name": "answers", "max_steps": 1}]
    chain.run(chain.write("whole", stages, learning_rate=1e-3), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text(encoding="utf-8"))
    assert Path(config["base_model_name_or_path"]) == tmp_path / "run" / "1-whole"
    whole, answers = (tiny.losses_of(tmp_path / "run" / name) for name in ("1-whole", "2-answers"))
    assert answers[0][1] < whole[0][1], "a stage began anew"


def test_a_finished_chain_given_again_trains_nothing(chain, straight) -> None:
    output, _ = straight
    before = weights_of(output)
    printed = chain.run(chain.write("straight"), output, "--vram", "3")
    assert "step 1/" not in printed and len(re.findall(r"stage \d, \w+, is done", printed)) == 3
    assert weights_of(output) == before


EDITED = {
    "rate": (
        [{**STAGES[0], "learning_rate": 0.02}, *STAGES[1:]],
        "stage rows is done.*\n.*--learning_rate 0.01 -> 0.02",
    ),
    "names": ([STAGES[1], STAGES[0], STAGES[2]], "holds the stage 1-rows, but the file has 1-both, 2-rows"),
    "removed": (STAGES[:2], "holds the stage 3-answers"),
}


@pytest.mark.parametrize("edit", list(EDITED))
def test_what_was_edited_of_a_finished_stage_is_refused(chain, straight, edit) -> None:
    stages, expected = EDITED[edit]
    printed = chain.run(chain.write("edited", stages), straight[0], expect=1)
    assert re.search(expected, printed), printed


@pytest.mark.slow
def test_a_stage_run_again_is_not_mixed_with_those_after_it(chain, straight, tmp_path) -> None:
    output = Path(shutil.copytree(straight[0], tmp_path / "again"))
    shutil.rmtree(output / "2-both")
    stages = [STAGES[0], {**STAGES[1], "learning_rate": 0.02}, STAGES[2]]
    printed = chain.run(chain.write("again", stages), output, expect=1)
    assert "3-answers began from another result of the stage before it" in printed
    shutil.rmtree(output / "3-answers")
    chain.run(chain.write("again", stages), output)
    assert weights_of(output)["adapter_model.safetensors"] != weights_of(straight[0])["adapter_model.safetensors"]


def test_a_directory_with_a_run_of_its_own_is_left_alone(chain, tmp_path) -> None:
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    assert "holds a run that had no stages" in chain.run(chain.write("own"), tmp_path / "run", expect=1)


def test_a_later_stage_is_checked_before_the_first_trains(chain, tmp_path) -> None:
    stages = [*STAGES[:2], {"name": "answers", "data": "no-such-name", "data_path": str(chain.folder)}]
    printed = chain.run(chain.write("later", stages), tmp_path / "run", expect=2)
    assert "stage answers: " in printed and "no-such-name" in printed and not (tmp_path / "run" / "1-rows").exists()


@pytest.mark.slow
def test_two_processes_run_the_chain(chain, tmp_path) -> None:
    file = chain.write("two", lora_dropout=0)
    words = [str(REPOSITORY / "finetune.py"), "--stages", str(file), "--output_path", str(tmp_path / "run")]
    started = subprocess.Popen(
        [sys.executable, "-m", *torchrun(2), *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, text=True, start_new_session=True,
    )  # fmt: skip
    finish(started)
    chain.run(file, tmp_path / "one")
    one, two = (tiny.tensors_of(tmp_path / name / "adapter_model.safetensors") for name in ("one", "run"))
    assert tiny.largest_difference(one, two) < 1e-4
