"""The process in which the function of --reward_file runs, so that one that hangs or exits takes nothing with it.

Started by reward_file.py as a script; imports nothing but the standard library. Reads a JSON line with the arguments of
a call, writes one with {"reward": number} or {"error": text}.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(file: str, function: str) -> None:
    """Answer calls until the input ends. What the file prints goes to the terminal's errors, not among the answers."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    calls = os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8")

    def tell(result: dict[str, Any]) -> None:
        answers.write(json.dumps(result) + "\n")
        answers.flush()

    try:
        reward, names = _load(Path(file), function)
    except BaseException as reason:  # a file that exits, too
        tell({"error": _error_text(reason, file)})
        return
    tell({"names": names})
    for line in calls:
        given = json.loads(line)
        try:
            tell(_number(reward(**{name: given[name] for name in names})))
        except BaseException as reason:
            tell({"error": _error_text(reason, file)})


def _load(file: Path, function: str) -> tuple[Callable[..., Any], list[str]]:
    """The function and which of the arguments it takes. Raises TypeError where it asks for others."""
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    reward = getattr(module, function, None)
    if not callable(reward):
        known = ", ".join(name for name, value in vars(module).items() if inspect.isfunction(value)) or "none"
        raise TypeError(f"it has no function {function}; its functions are: {known}")
    offered = ("prompt", "answer", "reference", "row")
    parameters = inspect.signature(reward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return reward, list(offered)
    named = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
    if other := [p.name for p in named if p.name not in offered and p.default is p.empty]:
        raise TypeError(f"{function} asks for {', '.join(other)}; it can have {', '.join(offered)}, by these names")
    return reward, [p.name for p in named if p.name in offered]


def _number(value: Any) -> dict[str, Any]:
    try:
        reward = float(value) if not isinstance(value, (str, bytes)) else math.nan
    except (TypeError, ValueError):
        reward = math.nan
    if math.isfinite(reward):
        return {"reward": reward}
    return {"error": f"returned {value!r:.100} ({type(value).__name__}), and a finite number is expected"}


def _error_text(reason: BaseException, file: str) -> str:
    """The error and the line of the file that it comes from."""
    frames = [frame for frame in traceback.extract_tb(reason.__traceback__) if Path(frame.filename) == Path(file)]
    place = f" in line {frames[-1].lineno}" if frames else ""
    return f"raised {type(reason).__name__}{place}: {reason}"


if __name__ == "__main__":
    main(*sys.argv[1:])
