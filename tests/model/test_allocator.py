"""Segments that grow are asked for where the system has them, and what the user asked for stays."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from onecard.config.training import FinetuneConfig
from onecard.model import allocator
from onecard.model.allocator import EXPANDABLE, VARIABLES, has_expandable_segments, prefer_expandable_segments
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.plan import CardSpec, make_plan
from onecard.model.memory.report import plan_lines

LINUX, WSL, WINDOWS = ("Linux", "6.8.0-45-generic"), ("Linux", "5.15.153.1-microsoft-standard-WSL2"), ("Windows", "11")


def on(monkeypatch: pytest.MonkeyPatch, system: tuple[str, str], **asked: str) -> None:
    """This system, and these variables alone."""
    name, release = system
    monkeypatch.setattr(allocator, "platform", SimpleNamespace(system=lambda: name, release=lambda: release))
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in asked.items():
        monkeypatch.setenv(variable, value)


@pytest.mark.parametrize(("system", "grow"), [(LINUX, True), (WSL, False), (WINDOWS, False)])
def test_segments_grow_where_the_system_has_them(
    monkeypatch: pytest.MonkeyPatch, system: tuple[str, str], grow: bool
) -> None:
    on(monkeypatch, system)
    assert not has_expandable_segments()
    prefer_expandable_segments()
    assert has_expandable_segments() == grow
    assert [os.environ.get(variable) for variable in VARIABLES] == [EXPANDABLE if grow else None, None]


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize(
    ("value", "grow"),
    [
        ("max_split_size_mb:128", False),
        ("expandable_segments:False", False),
        (f"max_split_size_mb:64, {EXPANDABLE}", True),
    ],
)
def test_what_the_user_asked_for_stays(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, grow: bool) -> None:
    on(monkeypatch, LINUX, **{variable: value})
    prefer_expandable_segments()
    assert {name: os.environ[name] for name in VARIABLES if name in os.environ} == {variable: value}
    assert has_expandable_segments() == grow


def test_without_them_more_is_planned_and_the_plan_says_why() -> None:
    model, notes, peaks = architecture_of("Llama-3.1-8B"), [], []
    for grow in (True, False):
        found = make_plan(model, FinetuneConfig(), CardSpec("a card", 11 << 30, 64 << 30, expandable_segments=grow))
        notes.append("without expandable segments" in " ".join(plan_lines(found)))
        peaks.append(found.account.card_bytes - found.account.tensor_bytes)
    assert notes == [False, True] and peaks[0] < peaks[1]


HEAP = """
import sys
import psutil, torch
from onecard.model.allocator import give_back_freed_ram
if sys.argv[1] == "bounded" and not give_back_freed_ram():
    sys.exit(3)
warm = torch.empty(31 * 2**20, dtype=torch.uint8)
del warm  # after which glibc would take blocks of this size from its heap
before = psutil.Process().memory_info().rss
blocks = [torch.ones(2**21, dtype=torch.uint8) for _ in range(100)]
last = blocks.pop()
del blocks
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_freed_ram_goes_back_to_the_system() -> None:
    """A heap keeps what lies below a block that is still held; mapped blocks leave none behind."""
    kept = {}
    for mode in ("plain", "bounded"):
        words = [sys.executable, "-c", HEAP, mode]
        kept[mode] = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert kept["plain"] > 150 * 2**20 and kept["bounded"] < 10 * 2**20, kept
