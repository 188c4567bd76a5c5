"""The scripts for Slurm and SkyPilot, with local processes for machines: two of them end as one does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from onecard.config.parsing import to_yaml
from onecard.installation import SHIPPED as REPOSITORY
from onecard.recipes import finetune
from tests import tiny
from tests.launching import free_port

SHARED = {"bits": 32, "num_epoch": 1, "total_batch": 4, "test_size": 4, "learning_rate": 1e-3, "lora_dropout": 0.0}
# Words stand for the machines: each runs what it is given with its own number, all at once.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
for number in 0 1; do SLURM_NODEID=$number "$@" & jobs+=("$!"); done
for job in "${jobs[@]}"; do wait "$job" || exit 1; done
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames localhost,other" ] || exit 1
printf 'localhost\\nother\\n'
"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")]


@pytest.fixture
def one_machine(tiny_base: Path, instructions: Path, tmp_path: Path) -> Path:
    return finetune(tiny.config_for(tiny_base, instructions, tmp_path / "one", **SHARED))


@pytest.fixture
def environment(tiny_base: Path, instructions: Path, tmp_path: Path) -> dict[str, str]:
    settings = tmp_path / "settings.yaml"
    settings.write_text(to_yaml(tiny.config_for(tiny_base, instructions, tmp_path / "run", **SHARED)), encoding="utf-8")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MODEL_PATH": str(tiny_base), "N_GPUS": "1",
        "DATA_PATH": str(instructions), "OUTPUT_PATH": str(tmp_path / "run"),
        "WORDS": f"--config {settings} --bits 32 --shard true",
    }  # fmt: skip


def assert_ended_as_one(one: Path, run: Path, output: str) -> None:
    assert "lie over 2 processes" in output, output[-2000:]
    pairs = [*zip(tiny.losses_of(one), tiny.losses_of(run), strict=True)]
    assert len(pairs) == 5
    assert max(abs(a - b) for (_, a), (_, b) in pairs) < 1e-5


def test_slurm(environment: dict[str, str], one_machine: Path, tmp_path: Path) -> None:
    spooled = shutil.copy(REPOSITORY / "scripts" / "finetune_slurm.sh", tmp_path / "slurm_script")  # as Slurm does
    slurm = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_NODELIST": "localhost,other", "SLURM_JOB_NUM_NODES": "2",
             "SLURM_JOB_ID": "7", "MASTER_PORT": str(free_port())}  # fmt: skip
    command = ["bash", spooled, *environment["WORDS"].split()]
    done = subprocess.run(command, env=environment | slurm, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert_ended_as_one(one_machine, tmp_path / "run", done.stdout)
    done = subprocess.run(command, env=environment | slurm | {"SLURM_SUBMIT_DIR": str(tmp_path)}, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 1
    assert "submit this from the repository's folder" in done.stderr


def test_skypilot(environment: dict[str, str], one_machine: Path, tmp_path: Path) -> None:
    task = yaml.safe_load((REPOSITORY / "scripts" / "finetune_skypilot.yaml").read_text(encoding="utf-8"))
    assert set(task["envs"]) <= set(environment)
    run = task["run"].replace("8008", str(free_port()))
    sky = {"SKYPILOT_NUM_GPUS_PER_NODE": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2"}
    machines = [
        subprocess.Popen(
            ["bash", "-c", run], env=environment | sky | {"SKYPILOT_NODE_RANK": str(rank)}, cwd=REPOSITORY,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert_ended_as_one(one_machine, tmp_path / "run", "".join(outputs))
