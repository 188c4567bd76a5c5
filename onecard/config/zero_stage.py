"""Which stage of ZeRO the file of --deepspeed asks for, without the checks that `train/deepspeed_config.py` makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

AUTO, AUTO_STAGE = "auto", 2
DIVIDES_BASE = 3


def zero_stage(path: str | None) -> Any:
    """The value of zero_optimization.stage, "auto" filled in; 0 where there is none, or no such file."""
    try:
        section = json.loads(Path(str(path)).expanduser().read_text(encoding="utf-8-sig"))["zero_optimization"]
        stage = section.get("stage", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0
    return AUTO_STAGE if stage == AUTO else stage
