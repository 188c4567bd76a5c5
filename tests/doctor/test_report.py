"""The doctor: each broken world is named with its remedy, nothing makes it crash, and no report tells who asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from onecard import installation
from onecard.console import run_main
from onecard.doctor import facts as doctor_facts
from onecard.doctor import report as doctor
from onecard.doctor.report import CardFacts, Finding, Package, TorchBuild
from onecard.installation import requirements
from onecard.programs import doctor as tool

GIB = 2**30
TURING = CardFacts(0, "RTX 2080 Ti", (7, 5), 11 * GIB, 10 * GIB, False, flash_error="no kernel")
CUDA = TorchBuild("2.13.0+cu126", "12.6", True, "560.35", (12, 6))


def states(findings: Sequence[Finding]) -> list[str]:
    return [finding.state for finding in findings]


def bad(findings: Sequence[Finding]) -> Finding:
    """The one finding that is not fine; it must have a remedy."""
    wrong = [finding for finding in findings if finding.state != "ok"]
    assert len(wrong) == 1, findings
    assert wrong[0].remedy
    return wrong[0]


# --- worlds ----------------------------------------------------------------------------------------------------------


def test_a_good_machine_has_nothing_to_mend() -> None:
    ampere = CardFacts(0, "RTX 3090", (8, 6), 24 * GIB, 23 * GIB, True)
    found = [
        *doctor.judge_system("Linux", (3, 11, 7), True), *doctor.judge_memory(32 * GIB, 20 * GIB),
        *doctor.judge_disk("disk", "~", 100 * GIB), *doctor.judge_torch(CUDA, ["RTX 3090"]), *doctor.judge_card(ampere),
        *doctor.judge_packages([Package("torch", "2.13.0", "2.13.0+cu126", True)]),
        *doctor.judge_pairs({"gptqmodel": "7.6.0", "optimum": "2.3.0"}), *doctor.judge_settings({}),
    ]  # fmt: skip
    assert set(states(found)) == {"ok"}
    assert not [finding for finding in found if finding.remedy]
    assert len(found) >= 13


def test_a_turing_card_is_fine_and_said_to_be_without_bf16() -> None:
    found = {finding.name: finding for finding in doctor.judge_card(TURING)}
    assert set(states(list(found.values()))) == {"ok"}
    assert "7.5, 10.0 of 11.0 GiB free" in found["card 0"].value
    assert found["card 0 bf16"].value == "emulated only; fp16 is used instead"
    assert "it needs Ampere" in found["card 0 flash attention"].value


@pytest.mark.parametrize(
    ("changes", "state", "value", "remedy"),
    [
        ({"matmul_error": "no kernel image"}, "problem", "no kernel image", "pytorch.org"),
        ({"capability": (7, 0)}, "warning", "8-bit", "--bits 4"),
        ({"capability": (5, 2)}, "problem", "4-bit", "newer"),
        ({"others": [(4711, 3 * GIB)]}, "warning", "process 4711 (3.0 GiB)", "end these"),
        ({"free_bytes": GIB}, "warning", "1.0 of 11.0 GiB free", "nvidia-smi"),
    ],
)
def test_a_card_in_trouble(changes: dict, state: str, value: str, remedy: str) -> None:
    found = bad(doctor.judge_card(replace(TURING, **changes)))
    assert found.state == state
    assert value in found.value
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("changes", "cards", "state", "value", "remedy"),
    [
        ({"error": "ModuleNotFoundError: torch"}, [], "problem", "cannot be imported", "pip install -r"),
        ({"cuda_build": None, "is_available": False}, ["RTX 3060"], "problem", "CPU build", "CUDA build"),
        ({"cuda_build": "13.0", "is_available": False}, ["RTX 3060"], "problem", "560.35 is too old", "update the"),
        ({"cuda_build": "13.0", "is_available": False, "hidden_by": ""}, ["RTX 3060"], "problem", "hidden", "unset"),
        ({"is_available": False}, ["RTX 3060"], "problem", "cannot use RTX 3060", "restart"),
        ({"cuda_build": "13.0", "is_available": False}, ["RTX 2080 Ti"], "problem", "too old", "whl/cu126"),
        ({"cuda_build": "13.0", "is_available": False, "driver_cuda": (11, 4)}, ["x"], "problem", "old", "525"),
        ({"cuda_build": "13.0", "is_available": False, "hidden_by": "0"}, ["x"], "problem", "too old", "whl/cu126"),
        ({"is_available": False, "hidden_by": "7"}, ["x"], "problem", "hidden by CUDA_VISIBLE_DEVICES='7'", "unset"),
        ({"cuda_build": None, "is_available": False, "hidden_by": "0"}, [], "problem", "DEVICES=0", "CUDA build"),
        ({"cuda_build": None, "is_available": False, "has_driver": True}, [], "problem", "driver is", "CUDA build"),
        ({"is_available": False, "has_driver": True}, [], "problem", "cannot use an NVIDIA driver", "restart"),
        ({"is_available": False, "driver": None}, [], "warning", "no NVIDIA card", "--gpus all"),
        ({"is_available": False, "cuda_build": None, "driver": None}, [], "warning", "no NVIDIA card", "sample model"),
    ],
)
def test_torch_in_trouble(changes: dict, cards: list[str], state: str, value: str, remedy: str) -> None:
    found = bad(doctor.judge_torch(replace(CUDA, **changes), cards))
    assert found.state == state
    assert value in found.value
    assert remedy in found.remedy


def test_a_card_older_than_turing_is_told_which_torch_has_its_kernels() -> None:
    pascal = replace(TURING, name="GTX 1080 Ti", capability=(6, 1), matmul_error="no kernel image is available")
    found = [finding for finding in doctor.judge_card(pascal) if finding.state == "problem"]
    assert [finding.remedy.endswith(doctor.OLD_TORCH) for finding in found] == [True]
    assert doctor.OLD_TORCH.split()[2] in requirements(), "the build is of the pinned version"


def test_where_nothing_speaks_of_a_card_there_is_no_word_of_one() -> None:
    plain = TorchBuild("2.13.0+cpu", None, False, None, None)
    for hidden_by in (None, "", "-1"):
        assert doctor.why_no_card(replace(plain, hidden_by=hidden_by), []) is None


def test_an_older_driver_of_the_same_major_version_is_fine() -> None:
    assert set(states(doctor.judge_torch(replace(CUDA, cuda_build="12.9"), ["RTX 3060"]))) == {"ok"}


def test_systems_memory_and_disks_in_trouble() -> None:
    assert bad(doctor.judge_system("Linux", (3, 9, 1), True)).state == "problem"
    assert bad(doctor.judge_system("Windows", (3, 11, 0), False)).state == "problem"
    assert bad(doctor.judge_memory(32 * GIB, 2 * GIB)).state == "warning"
    assert bad(doctor.judge_disk("disk", "~", 5 * GIB)).state == "warning"
    assert bad(doctor.judge_disk("disk", "~", 10**8)).state == "problem"


def test_packages_in_trouble() -> None:
    packages = [
        Package("torch", "2.13.0", "2.13.0", True), Package("peft", "0.21.2", None, False),
        Package("gradio", "6.31.0", "5.0.0", False),
    ]  # fmt: skip
    missing, other, summary = doctor.judge_packages(packages)
    assert (missing.name, missing.state, missing.remedy) == ("peft", "problem", "pip install -r requirements.txt")
    assert (other.name, other.state, other.value) == ("gradio", "warning", "5.0.0, tested with 6.31.0")
    assert summary.value == "1 of 3 packages as pinned"
    trap = bad(doctor.judge_pairs({"gptqmodel": "7.6.0", "optimum": None}))
    assert trap.state == "problem"
    assert "refuses every adapter" in trap.value
    assert "requirements-gptq.txt" in trap.remedy
    assert bad(doctor.judge_pairs({"auto-gptq": "0.7"})).remedy.startswith("pip uninstall auto-gptq")


def test_kernels_in_trouble() -> None:
    assert bad(doctor.judge_kernel("bitsandbytes 4-bit", "cuda:0", "RuntimeError: x", remedy="r")).state == "problem"
    assert bad(doctor.judge_kernel("gradio", "cpu", "ImportError: x", needed=False, remedy="r")).state == "warning"


def test_settings_are_shown_and_secrets_are_not() -> None:
    found = doctor.judge_settings(
        {"HF_TOKEN": "hf_abcdef123456", "HTTPS_PROXY": "http://me:secret@proxy", "HF_ENDPOINT": "https://me:pw@mirror",
         "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "0"}
    )  # fmt: skip
    told = " ".join(finding.value for finding in found)
    assert bad(found).name == "HF_HUB_OFFLINE"
    assert "HF_ENDPOINT=https://mirror" in told
    assert "HF_TOKEN is set" in told
    assert not any(secret in told for secret in ("hf_abc", "secret", "me:", "pw"))
    assert bad(doctor.judge_settings({"HF_ENDPOINT": "hf-mirror.com"})).name == "HF_ENDPOINT"


def test_no_report_tells_who_asked() -> None:
    home = "/home" + "/ann"
    text = home + r"/x C:\Users\Ann\y /Users/ann/z /data/ann/w hf_abcDEF0123456789 on annbox, channel"
    clean = doctor.scrubbed(text, home, "ann", "annbox")
    assert clean == r"~/x C:\Users\<user>\y /Users/<user>/z /data/<user>/w <token> on <host>, channel"
    of_root = "/" + "root"
    assert doctor.scrubbed(f"{of_root}/x and /a/root", of_root, "root", "") == "~/x and /a~"


# --- facts -----------------------------------------------------------------------------------------------------------


def test_pins_are_read_with_their_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"torch": "2.13.0+cu126", "numpy": "2.3.0", "new": "1.0", "jsonargparse": "4.0"}
    monkeypatch.setattr(doctor_facts, "installed", here.get)
    monkeypatch.setattr(installation, "SHIPPED", tmp_path)
    (tmp_path / "requirements.txt").write_text(
        "# a comment\n-r other.txt\n\ntorch==2.13.0\nnumpy==2.2.6  # why\nold==1; python_version < '3.0'\n"
        "new==1.0; python_version >= '3.0'\nabsent==3\njsonargparse[signatures]==4.0\n",
        encoding="utf-8",
    )
    found = [(one.name, one.pinned, one.installed, one.fits) for one in doctor_facts.pinned(requirements())]
    assert found == [
        ("torch", "2.13.0", "2.13.0+cu126", True), ("numpy", "2.2.6", "2.3.0", False), ("new", "1.0", "1.0", True),
        ("absent", "3", None, False), ("jsonargparse", "4.0", "4.0", True),
    ]  # fmt: skip


@pytest.mark.parametrize("mishap", [ZeroDivisionError("x"), ImportError("no psutil"), OSError(5, "x"), MemoryError()])
def test_a_check_that_fails_is_a_finding_and_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, mishap: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[Finding]:
        raise mishap

    for name in ("_torch", "_bitsandbytes", "_gradio", "_cards", "_cpu_matmul"):
        monkeypatch.setattr(doctor_facts, name, broken)
    found = doctor_facts.examine()
    failed = [finding for finding in found if type(mishap).__name__ in finding.value]
    assert [finding.name for finding in failed] == ["torch", "cards", "matrix product", "bitsandbytes", "gradio"]
    assert all(finding.state == "problem" and finding.remedy for finding in failed)
    assert {"system", "RAM", "disk here", "requirements.txt", "settings"} <= {finding.name for finding in found}
    assert run_main(lambda: tool.main([]), debug=False) == 1
    out, err = capsys.readouterr()
    assert "5 problems" in out
    assert "not ready to train" in err


def test_a_kernel_that_computes_nonsense_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from onecard.model import quantization

    for wrong in (lambda x: x @ torch.zeros(128, 256), lambda x: x @ torch.full((128, 256), float("nan"))):
        monkeypatch.setattr(quantization, "quantize_linear", lambda *_, wrong=wrong: wrong)
        assert [finding.state for finding in doctor_facts._bitsandbytes()] == ["problem", "problem"]


def test_what_the_driver_prints_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\nprintf 'GPU-a1, 12, 300\\nGPU-b2, 13, 400\\nGPU-a1, 14, [N/A]\\n'\n", encoding="utf-8"
    )
    program.chmod(0o755)
    if os.name == "nt":
        pytest.skip("needs a shell script")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert doctor_facts._others("a1") == [(12, 300 * 2**20)]
    program.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    assert doctor_facts._others("a1") == []


# --- this machine ----------------------------------------------------------------------------------------------------


def test_this_machine_is_examined_for_real(capsys: pytest.CaptureFixture[str]) -> None:
    code = run_main(lambda: tool.main(["--json"]), debug=False)
    out, _ = capsys.readouterr()
    report = json.loads(out)
    names = [finding["name"] for finding in report["findings"]]
    expected = ["system", "python", "RAM", "disk here", "requirements.txt", "torch", "bitsandbytes 4-bit",
                "bitsandbytes 8-bit", "sentencepiece", "gradio", "settings"]  # fmt: skip
    assert [name for name in names if name in expected] == expected
    assert code == (1 if report["problem"] else 0)
    kernels = {finding["name"]: finding for finding in report["findings"]}
    assert kernels["bitsandbytes 4-bit"]["value"].startswith("ran on ")
    assert kernels["bitsandbytes 8-bit"]["value"].startswith("ran on ")
    home = str(Path.home())
    assert home not in out or home == "/"


def test_without_torch_it_says_how_to_get_it(tmp_path: Path) -> None:
    """As on a machine where `pip install` was forgotten: importing torch fails."""
    for name in ("torch", "gradio"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "onecard", "doctor"], env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 1
    assert "cannot be imported: ModuleNotFoundError: No module named torch" in done.stdout
    assert "-> pip install -r requirements.txt" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
