"""A damaged checkpoint is never loaded: the one before it is, and the message names the file and the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from tests import tiny
from tests.faults.conftest import Bench, assert_as_undisturbed, newest, step_of


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-10])
    return "bytes"


def zero_tail(path: Path) -> str:
    content = path.read_bytes()
    path.write_bytes(content[:-100] + bytes(100))
    return "SHA-256 differs"


def flip_bit(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))
    return "SHA-256 differs"


def remove(path: Path) -> str:
    path.unlink()
    return "missing"


DAMAGES = (truncate, zero_tail, flip_bit, remove)
FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "trainer_state.json",
    "manifest.json",
)
# In the ordinary checks each file meets one kind of damage; the slow ones try every pair.
QUICK = {(name, DAMAGES[n % len(DAMAGES)]) for n, name in enumerate(FILES)}
CASES = [
    pytest.param(
        name, damage, marks=() if (name, damage) in QUICK else pytest.mark.slow, id=f"{name}-{damage.__name__}"
    )
    for name, damage in product(FILES, DAMAGES)
]


def test_every_file_of_a_checkpoint_is_tried(half_done: Path) -> None:
    assert sorted(path.name for path in newest(half_done).iterdir()) == sorted(FILES)
    assert len(CASES) == 20
    assert {name for name, _ in QUICK} == set(FILES)


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_damaged_newest_checkpoint_is_passed_over(
    bench: Bench, half: Path, undisturbed: Path, name: str, damage: Callable[[Path], str]
) -> None:
    broken = newest(half)
    reason = damage(broken / name)
    printed = bench.run(half)
    assert f"{broken.name}.broken was set aside: {name}" in printed
    assert "damaged" in printed if name == "manifest.json" and damage is not remove else reason in printed
    assert f"checkpoint-{step_of(broken) - 1}\n" in printed.split("going on from")[1]
    assert_as_undisturbed(half, undisturbed)


def test_all_damaged_is_an_error_and_no_start_from_zero(bench: Bench, half: Path) -> None:
    checkpoints = sorted(half.glob("checkpoint-*"))
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints:
        flip_bit(checkpoint / "optimizer.pt")
    for _ in range(2):
        printed = bench.run(half, expect=1)
        for checkpoint in checkpoints:
            assert f"{checkpoint.name}: optimizer.pt has changed" in printed
        assert "step 1/" not in printed
        assert "Traceback" not in printed
    assert sorted(half.glob("checkpoint-*")) == checkpoints


def test_a_damaged_checkpoint_given_by_name_is_refused(bench: Bench, half: Path) -> None:
    broken = newest(half)
    flip_bit(broken / "adapter_model.safetensors")
    printed = bench.run(half, expect=1, resume_from_checkpoint=str(broken))
    assert f"{broken} is broken: adapter_model.safetensors has changed" in printed
    assert broken.is_dir()


def test_the_step_before_given_by_name_ends_alike(bench: Bench, half: Path, undisturbed: Path) -> None:
    last = newest(half)
    before = half / f"checkpoint-{step_of(last) - 1}"
    printed = bench.run(half, resume_from_checkpoint=str(before))
    assert f"{last.name}.abandoned" in printed
    assert_as_undisturbed(half, undisturbed)


def test_data_edited_between_runs_is_refused_unless_asked_for(bench: Bench, half: Path, tmp_path: Path) -> None:
    edited = Path(shutil.copy(bench.data, tmp_path / "edited.json"))
    rows = json.loads(edited.read_text(encoding="utf-8"))
    rows[7]["output"] += " and more"
    edited.write_text(json.dumps(rows), encoding="utf-8")
    before = newest(half)
    printed = bench.run(half, data=edited, expect=1)
    assert f"data: --data_path {bench.data} -> {edited}" in printed
    assert "--accept_changes data" in printed
    assert newest(half) == before
    printed = bench.run(half, data=edited, accept_changes="data")
    assert "data differs" in printed


def test_another_base_is_refused(bench: Bench, half: Path, tmp_path: Path) -> None:
    other = tiny.save_tiny_llama(tmp_path / "other", seed=1, rms_norm_eps=1e-5)
    assert f"base: --model_path {bench.base} -> {other}" in bench.run(half, base=other, expect=1)
