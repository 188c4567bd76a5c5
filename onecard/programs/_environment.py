"""The environments of a clone, .venv and the layers over it: made with the standard library alone, on any system."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from onecard.console import say
from onecard.errors import OneCardError
from onecard.installation import SHIPPED
from onecard.storage import write_whole

VENV = SHIPPED / ".venv"
FOR_TESTS = ("requirements.txt", "requirements-data.txt", "requirements-documents.txt", "requirements-dev.txt")
FIRST_PYTHON, AFTER_LAST_PYTHON = (3, 10), (3, 14)
_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"


def python_of(venv: Path) -> Path:
    """The Python inside an environment, wherever this system puts it."""
    windows = venv / "Scripts" / "python.exe"
    return windows if windows.is_file() else venv / "bin" / "python"


def script_of(venv: Path, name: str) -> Path:
    """A program that a package has put into an environment."""
    return python_of(venv).with_name(f"{name}.exe" if os.name == "nt" else name)


def call(words: Sequence[str | Path], **environment: str) -> int:
    """Run a program in the repository's folder; its exit code. What it prints is shown as it comes."""
    sys.stdout.flush()
    try:
        done = subprocess.run([*map(str, words)], cwd=SHIPPED, env={**os.environ, **environment}, check=False)
    except OSError:
        return 127  # as a shell tells of a program that is not there
    return done.returncode


def prepare_venv(*files: str, venv: Path = VENV) -> Path:
    """The Python of an environment with the last of these requirement files, which includes the others.

    It is made where it is not there, and a change of any of the files installs anew.

    The stamps are written after the install, so one that was interrupted is done again. Raises OneCardError.
    """
    stamp, wanted = venv / f".installed-{files[-1]}", _stamp_of(files)
    if _read(stamp) == wanted and _works(python_of(venv), "pass"):
        return python_of(venv)
    if not _works(python_of(venv), "import pip"):
        _make_venv(venv)
    say(f"== installing {files[-1]} into {venv.name} (with torch some gigabytes on a machine with a GPU; later starts "
        "reuse them)")  # fmt: skip
    _install(python_of(venv), ["-m", "pip", "install"], SHIPPED / files[-1])
    write_whole(stamp, wanted)
    if len(files) > 1:
        write_whole(venv / f".installed-{files[0]}", _stamp_of(files[:1]))
    return python_of(venv)


def prepare_layer(name: str) -> Path:
    """The Python of .venv-NAME, which is .venv and requirements-NAME.txt on top. Raises OneCardError.

    gptq is apart because peft imports gptqmodel wherever it finds it: every start of every program would take some
    seconds longer and print its banner. trl is apart so that nothing of the product can come to need it.
    """
    layer, file = VENV.with_name(f"{VENV.name}-{name}"), f"requirements-{name}.txt"
    wanted = _stamp_of((*FOR_TESTS, file))
    if _read(layer / ".installed") != wanted:
        shutil.rmtree(layer, ignore_errors=True)
        if call([python_of(VENV), "-m", "venv", "--without-pip", layer]):
            raise OneCardError(f"{layer} cannot be made; see above")
        below, here = (Path(_asked(python_of(venv), _PACKAGES)) for venv in (VENV, layer))
        write_whole(here / "onecard.pth", f"{below}\n")
        say(f"== installing {file} into {layer.name}")
        _install(python_of(VENV), ["-m", "pip", "--python", str(python_of(layer)), "install"], SHIPPED / file)
        write_whole(layer / ".installed", wanted)
    return python_of(layer)


def _make_venv(venv: Path) -> None:
    """A new environment with the Python that runs this. Raises OneCardError for one that is not supported."""
    version = ".".join(map(str, sys.version_info[:3]))
    if not FIRST_PYTHON <= sys.version_info[:2] < AFTER_LAST_PYTHON:
        raise OneCardError(f"Python {version} is not supported; start this with Python 3.10 to 3.13")
    python = Path(sys.executable)
    if venv in python.parents:  # one without pip cannot be replaced by its own Python
        name = Path("python.exe") if os.name == "nt" else Path("bin", "python{}.{}".format(*sys.version_info))
        python = Path(sys.base_prefix) / name
    say(f"== making {venv.name} with Python {version}")
    if call([python, "-m", "venv", "--clear", venv]):
        raise OneCardError("the venv module does not work here (on Debian and Ubuntu: apt install python3-venv)")


def _install(python: Path, pip: Sequence[str], file: Path) -> None:
    quiet = ("--quiet", "--progress-bar", "off") if os.environ.get("CI") == "true" else ()
    if call([python, *pip, "--disable-pip-version-check", "--no-input", *quiet, "-r", file]):
        raise OneCardError("the install failed; see above")


def _stamp_of(files: Sequence[str]) -> str:
    """Another one when any requirement file changes; line ends do not count."""
    texts = [(SHIPPED / file).read_text(encoding="utf-8") for file in files]
    return hashlib.sha256("".join(texts).encode("utf-8")).hexdigest() + "\n"


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _works(python: Path, program: str) -> bool:
    return python.is_file() and call([python, "-c", program]) == 0


def _asked(python: Path, program: str) -> str:
    done = subprocess.run([str(python), "-c", program], capture_output=True, encoding="utf-8", check=True)
    return done.stdout.strip()
