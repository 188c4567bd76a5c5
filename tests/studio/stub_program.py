"""Stands in for `onecard`: `say TEXT CODE`, `wait FILE` (until the file is there), `finetune --output_path DIR ...`."""

from __future__ import annotations

import sys
import time
from pathlib import Path


def main(words: list[str]) -> int:
    verb = words[0]
    if verb == "say":
        print(words[1])
        return int(words[2])
    if verb == "wait":
        print("waiting", flush=True)
        while not Path(words[1]).exists():
            time.sleep(0.02)
        return 0
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
