"""What the facts about a machine mean for training on it: fine, worth knowing, or broken, each with its remedy.

Pure functions from facts to findings, so that any machine can be judged on any other. `facts.py` gathers the
facts. Nothing here imports torch: the doctor must be able to say that it is missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onecard.installation import command, install_command, requirements_name
from onecard.model.nvidia_driver import GET_TORCH, OK, OLD_TORCH, PROBLEM, WARNING, Finding, TorchBuild, why_no_card

TURING, AMPERE, PASCAL = (7, 5), (8, 0), (6, 0)
GIB = 2**30


@dataclass(frozen=True)
class Package:
    """A pinned package: the version asked for, and the one installed (None: not there)."""

    name: str
    pinned: str
    installed: str | None
    fits: bool


@dataclass(frozen=True)
class CardFacts:
    """One GPU. `others` are (process id, bytes) of other processes on it; errors are empty where a test ran well."""

    index: int
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    bf16_native: bool
    matmul_error: str = ""
    flash_error: str = ""
    others: Sequence[tuple[int, int]] = ()


def judge_system(system: str, python: tuple[int, int, int], is_64_bit: bool) -> list[Finding]:
    """The operating system and Python."""
    version = ".".join(map(str, python))
    found = [Finding("system", OK, system)]
    if python < (3, 10):
        return [*found, Finding("python", PROBLEM, version, "install Python 3.10 or newer")]
    if not is_64_bit:
        remedy = "install a 64-bit Python; torch has no other"
        return [*found, Finding("python", PROBLEM, f"{version}, 32 bits", remedy)]
    return [*found, Finding("python", OK, version)]


def judge_memory(total_bytes: int, available_bytes: int) -> list[Finding]:
    """RAM: a base model passes through it on its way to the card."""
    value = f"{total_bytes / GIB:.1f} GiB, {available_bytes / GIB:.1f} GiB available"
    if available_bytes < 4 * GIB:
        return [Finding("RAM", WARNING, value, "close other programs; loading a 7B model takes some GiB for a moment")]
    return [Finding("RAM", OK, value)]


def judge_disk(name: str, path: str, free_bytes: int) -> list[Finding]:
    """Free room on the disk that holds `path`."""
    value = f"{free_bytes / GIB:.1f} GiB free in {path}"
    if free_bytes < GIB:
        return [Finding(name, PROBLEM, value, "make room: not even a checkpoint of an adapter is safe here")]
    if free_bytes < 20 * GIB:
        return [Finding(name, WARNING, value, "a 7B model in 16 bits takes 14 GB; make room, or set HF_HOME elsewhere")]
    return [Finding(name, OK, value)]


def judge_packages(packages: Sequence[Package], extra: str = "") -> list[Finding]:
    """Installed versions against the pins of the program, or of one of its extras."""
    remedy = install_command(extra)
    missing = [package for package in packages if package.installed is None]
    other = [package for package in packages if package.installed is not None and not package.fits]
    found = [Finding(one.name, PROBLEM, f"not installed ({one.pinned} is pinned)", remedy) for one in missing]
    found += [Finding(one.name, WARNING, f"{one.installed}, tested with {one.pinned}", remedy) for one in other]
    n_good = len(packages) - len(missing) - len(other)
    return [*found, Finding(requirements_name(extra), OK, f"{n_good} of {len(packages)} packages as pinned")]


def judge_pairs(installed: Mapping[str, str | None]) -> list[Finding]:
    """Optional packages, and pairs that break one another."""
    found = []
    if installed.get("gptqmodel") and not installed.get("optimum"):
        what = f"{installed['gptqmodel']} without optimum: then peft refuses every adapter"
        remedy = f"{install_command('gptq')}, or pip uninstall gptqmodel"
        found.append(Finding("gptqmodel", PROBLEM, what, remedy))
    if installed.get("auto-gptq"):
        what = f"{installed['auto-gptq']} does not work with today's transformers"
        remedy = f"pip uninstall auto-gptq; its successor is in {requirements_name('gptq')}"
        found.append(Finding("auto-gptq", WARNING, what, remedy))
    there = [f"{name} {version}" for name, version in installed.items() if version]
    return [*found, Finding("optional packages", OK, ", ".join(there) or "none")]


def judge_torch(torch: TorchBuild, names_of_cards: Sequence[str]) -> list[Finding]:
    """Whether torch can use the cards that the driver sees."""
    if torch.error:
        return [Finding("torch", PROBLEM, f"cannot be imported: {torch.error}", install_command())]
    build = f"CUDA {torch.cuda_build}" if torch.cuda_build else "CPU only"
    found = [Finding("torch", OK, f"{torch.version}, built for {build}")]
    if torch.driver:
        runs = f", runs CUDA up to {torch.driver_cuda[0]}.{torch.driver_cuda[1]}" if torch.driver_cuda else ""
        found.append(Finding("driver", OK, f"{torch.driver}{runs}"))
    if torch.is_available:
        return found
    remedy = "train on a machine with one; here the small sample model trains"
    nothing = Finding("card", WARNING, "no NVIDIA card is seen; the CPU computes, slowly", remedy)
    return [*found, why_no_card(torch, names_of_cards) or nothing]


def judge_card(card: CardFacts) -> list[Finding]:
    """One GPU: what it computes natively, what really ran, and who else is on it."""
    name = f"card {card.index}"
    major, minor = card.capability
    memory = f"{card.free_bytes / GIB:.1f} of {card.total_bytes / GIB:.1f} GiB free"
    found = [Finding(name, OK, f"{card.name}, compute capability {major}.{minor}, {memory}")]
    if card.matmul_error:
        remedy = f"torch may be built without this card's generation: {GET_TORCH}"
        if card.capability < TURING:
            remedy = f"this torch may be built without the card's generation; older than Turing: {OLD_TORCH}"
        found.append(Finding(f"{name} fp16", PROBLEM, f"a matrix product fails: {card.matmul_error}", remedy))
    else:
        found.append(Finding(f"{name} fp16", OK, "a matrix product ran, and is right"))
    found.append(Finding(f"{name} bf16", OK, "native" if card.bf16_native else "emulated only; fp16 is used instead"))
    why = "it needs Ampere" if card.capability < AMPERE else card.flash_error
    flash = f"not here ({why}); slower kernels are used"
    found.append(Finding(f"{name} flash attention", OK, flash if card.flash_error else "ran"))
    if card.capability < PASCAL:
        found.append(Finding(f"{name} age", PROBLEM, "too old for 4-bit kernels", "use a card of 2016 or newer"))
    elif card.capability < TURING:
        remedy = f"use --bits 4 or 16 in {command('finetune')} and {command('generate')}"
        found.append(Finding(f"{name} age", WARNING, "too old for 8-bit kernels (Turing)", remedy))
    if card.others:
        who = ", ".join(f"process {pid} ({n_bytes / GIB:.1f} GiB)" for pid, n_bytes in card.others)
        found.append(Finding(f"{name} others", WARNING, f"shared with {who}", "end these, or expect less memory"))
    elif card.free_bytes < card.total_bytes // 2:
        found.append(Finding(f"{name} others", WARNING, memory, "something else holds its memory; nvidia-smi names it"))
    return found


def judge_kernel(name: str, device: str, error: str, *, needed: bool = True, remedy: str) -> list[Finding]:
    """Something that was really run on a device: `error` is empty where it ran and was right."""
    if not error:
        return [Finding(name, OK, f"ran on {device}")]
    return [Finding(name, PROBLEM if needed else WARNING, f"fails on {device}: {error}", remedy)]


def judge_settings(environment: Mapping[str, str]) -> list[Finding]:
    """Variables that change what is downloaded and which card is seen; secrets are only said to be there."""
    found = []
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if environment.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            found.append(Finding(name, WARNING, "set: nothing is downloaded", f"unset {name} to download models"))
    endpoint = environment.get("HF_ENDPOINT", "")
    if endpoint and not re.match("https?://", endpoint):
        remedy = "write it like https://hf-mirror.com"
        found.append(Finding("HF_ENDPOINT", WARNING, f"{endpoint} is no address", remedy))
    shown = [f"{name}={_without_login(environment[name])}" for name in SHOWN if environment.get(name)]
    hidden = [f"{name} is set" for name in SECRET if environment.get(name)]
    return [*found, Finding("settings", OK, ", ".join(shown + hidden) or "none that matter")]


SHOWN = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF",
         "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS")  # fmt: skip
SECRET = ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")


def _without_login(text: str) -> str:
    return re.sub(r"//[^/@]*@", "//", text)


def scrubbed(text: str, home: str, user: str, host: str) -> str:
    """The text without a person's name: home as ~, user and host names and tokens blotted out."""
    text = text.replace(home, "~") if len(home) > 1 else text
    text = re.sub(r"((?:/home|/Users|[\\/]Users)[\\/]+)[^\\/\s\"',:]+", r"\1<user>", text)
    text = re.sub(r"\bhf_[A-Za-z0-9_]{4,}", "<token>", text)
    for name, instead in ((user, "<user>"), (host, "<host>")):
        if len(name) > 2 and name not in ("root", "localhost"):
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", instead, text)
    return text
