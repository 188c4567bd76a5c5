"""How this program came here, as a clone of the repository or installed by pip, and what follows from that.

What its commands are called, where the files lie that come with it, and how pip gets the packages it asks for.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
IS_CLONE = not (_PACKAGE / "sample").is_dir()
# The folder of sample/, config-sample/ and docs/: the repository, or the package, into which the wheel puts them.
SHIPPED = _PACKAGE.parent if IS_CLONE else _PACKAGE
# The script of each verb in a clone, in the order in which --help lists the verbs.
SCRIPTS = {
    "finetune": "finetune.py", "finetune-chat": "finetune_chat.py", "chat": "chat.py", "generate": "generate.py",
    "serve": "tools/serve.py", "studio": "tools/studio.py", "inspect": "tools/inspect_data.py",
    "inspect-run": "tools/inspect_run.py", "plan": "tools/plan_memory.py",
    "doctor": "tools/doctor.py", "download": "tools/download.py", "checksums": "tools/checksums.py",
    "score": "tools/score.py", "evaluate": "tools/evaluate.py", "merge": "tools/merge_lora.py",
    "gguf": "tools/export_gguf.py",
    "quantize": "tools/quantize.py",
    "quantize-bnb": "tools/quantize_bnb.py", "quantize-gptq": "tools/quantize_gptq.py",
    "convert-llama": "tools/convert_llama.py", "expand-vocab": "tools/expand_vocab.py",
    "weight-diff": "tools/weight_diff.py",
}  # fmt: skip


@cache
def verbs() -> dict[str, Path]:
    """The module of each verb: those of SCRIPTS first, in its order."""
    files = sorted((_PACKAGE / "programs").glob("[!_]*.py"))
    found = {file.stem.replace("_", "-"): file for file in files}
    return {verb: found[verb] for verb in SCRIPTS} | found


def program_name() -> str:
    """The words before the verb, when this process was started with a verb; else empty."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py" and started.parent.name == "onecard":
        return "python -m onecard"
    return "onecard" if started.stem == "onecard" else ""


def command(verb: str) -> str:
    """What to type for a verb: `onecard merge` where this process was started so, `python tools/merge_lora.py` else."""
    name = program_name()
    if not name and IS_CLONE:
        return f"python {SCRIPTS[verb]}" if verb in SCRIPTS else f"python -m onecard {verb}"
    return f"{name or 'onecard'} {verb}"


def with_commands(text: str) -> str:
    """A text of our own, such as a help text, in which `onecard VERB` becomes what to type."""
    return re.sub(rf"\bonecard ({'|'.join(verbs())})\b(?!-)", lambda found: command(found[1]), text)


def requirements(extra: str = "") -> list[str]:
    """The packages that the program asks for, or that an extra (gptq, deepspeed) adds, as pip writes them."""
    if IS_CLONE:
        lines = (SHIPPED / requirements_name(extra)).read_text(encoding="utf-8").splitlines()
        return [text for line in lines if (text := line.partition("#")[0].strip()) and not text.startswith("-")]
    from importlib import metadata

    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires("onecard") or []]
    if extra:
        wanted = [one for one in wanted if one.marker and not one.marker.evaluate({"extra": ""})]
    fitting = [one for one in wanted if not one.marker or one.marker.evaluate({"extra": extra})]
    return [str(one).partition(";")[0].strip() for one in fitting]


def requirements_name(extra: str = "") -> str:
    """What holds these requirements: a file of a clone, or the installed package."""
    if IS_CLONE:
        return f"requirements-{extra}.txt" if extra else "requirements.txt"
    return f"onecard[{extra}]" if extra else "onecard"


def install_command(extra: str = "") -> str:
    """How pip installs what the program asks for, or what an extra adds."""
    options = "--no-build-isolation " if extra == "deepspeed" else ""
    if IS_CLONE:
        return f"pip install {options}-r {requirements_name(extra)}"
    if not extra:
        return "pip install --force-reinstall, of onecard as it was installed"
    return f"pip install {options}" + " ".join(requirements(extra))
