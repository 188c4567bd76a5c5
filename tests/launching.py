"""Runs of `finetune.py` in several real processes (gloo on CPU), started as a user starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onecard.config.parsing import to_yaml
from onecard.config.training import FinetuneConfig
from onecard.installation import SHIPPED as REPOSITORY

TROUBLE = Path(__file__).parent / "invariants" / "finetune_with_trouble.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(n_processes: int) -> list[str]:
    return ["torch.distributed.run", "--nproc_per_node", str(n_processes), "--master_port", str(free_port())]


def launch(
    launcher: list[str], config: FinetuneConfig, directory: Path, *, trouble: str = "", at_step: int = 0
) -> subprocess.Popen[str]:
    """Start `finetune.py` under a launcher with exactly `config`, in a session of its own.

    `trouble` happens around step `at_step`; see `invariants/finetune_with_trouble.py`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    settings = directory / "config.yaml"
    settings.write_text(to_yaml(config), encoding="utf-8")
    script = TROUBLE if trouble else REPOSITORY / "finetune.py"
    command = [sys.executable, "-m", *launcher, str(script), "--config", str(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if trouble:
        environment |= {"TROUBLE": trouble, "TROUBLE_STEP": str(at_step), "PYTHONPATH": python_path()}
    return subprocess.Popen(
        command, env=environment, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def python_path() -> str:
    """The present PYTHONPATH with the repository in it: a script finds only its own folder."""
    return os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])


def finish(*processes: subprocess.Popen[str]) -> None:
    """Wait for runs that must succeed."""
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-4000:]


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The process, which a test that fails does not leave behind: the launcher passes the signal on."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate()


def fail(process: subprocess.Popen[str]) -> str:
    """Wait for a run that must not succeed; returns what it printed. Its pipe closes when all its processes ended."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0, output[-4000:]
    return output


def checkpoints(run: Path) -> list[str]:
    """All that looks like a checkpoint in a run directory: whole, partial, broken or set aside."""
    return sorted(path.name for path in run.iterdir() if "checkpoint" in path.name)
