"""Compiles the simulated card once and keeps it in a cache folder, by the hash of its sources and torch.

The folder is $ONECARD_SIMCARD_CACHE, else ~/.cache/onecard-simcard. Nothing here imports torch: the library must be
loaded before torch asks, once, at its own import, whether there is CUDA.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
MODULE = "onecard_simcard"
FLAGS = ("-O1", "-shared", "-fPIC", "-std=c++20", "-w")
LIBRARIES = ("torch", "torch_cpu", "c10", "torch_python")


class Unavailable(Exception):
    """Why there can be no simulated card here."""


def torch_folder() -> Path:
    """Where torch is installed, without importing it. Raises Unavailable for a torch that has CUDA of its own."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("torch is not installed")
    folder = Path(spec.origin).parent
    if list((folder / "lib").glob("libtorch_cuda*")):
        raise Unavailable("this torch is built for CUDA, which the simulated card would collide with")
    return folder


def compiler() -> str:
    """The C++ compiler: $CXX, else g++, c++ or clang++. Raises Unavailable."""
    if not sys.platform.startswith("linux"):
        raise Unavailable(f"the simulated card is built on Linux only, and this is {sys.platform}")
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise Unavailable("no C++ compiler (g++, c++ or clang++) is installed, which builds the simulated card")


def cache_folder() -> Path:
    """The folder of built libraries; the system's temporary one if the home cannot be written to."""
    chosen = os.environ.get("ONECARD_SIMCARD_CACHE")
    for folder in (Path(chosen) if chosen else Path.home() / ".cache" / "onecard-simcard", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise Unavailable("there is no folder in which the built simulated card could be kept")


def key() -> str:
    """Changes with the sources, with Python, and with torch and where it lies: the library is linked to that place."""
    digest = hashlib.sha256(" ".join([version("torch"), str(torch_folder()), sys.version, *FLAGS]).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def build(timeout_s: float = 600) -> Path:
    """The compiled library, made if it is not in the cache. Raises Unavailable with the compiler's own words."""
    torch = torch_folder()
    library = cache_folder() / f"{MODULE}-{key()}" / f"{MODULE}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}.partial")  # two processes may build at once
    command = [
        compiler(), *FLAGS, f"-DTORCH_EXTENSION_NAME={MODULE}",
        f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}", f"-I{sysconfig.get_path('include')}",
        str(SOURCES / "simcard.cpp"), "-o", str(partial),
        f"-L{torch / 'lib'}", *(f"-l{name}" for name in LIBRARIES), f"-Wl,-rpath,{torch / 'lib'}",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=timeout_s)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise Unavailable("the simulated card does not compile: " + " / ".join(lines[:3]))
        partial.replace(library)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"the simulated card did not compile in {timeout_s:.0f} s") from error
    finally:
        partial.unlink(missing_ok=True)
    return library
