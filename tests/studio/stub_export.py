"""Stands in for the programs of exports, `MODULE VERB ... --output_path DIR ...`; the name of DIR says what happens."""

from __future__ import annotations

import sys
import time
from pathlib import Path


def main(words: list[str]) -> int:
    target = Path(words[words.index("--output_path") + 1])
    print(f"step: 1 of 2, of {words[1]}", flush=True)
    if target.name == "fails":
        print("error: no room; make some\nlast words", flush=True)
        return 1
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir()
    while target.name == "waits":
        time.sleep(0.05)
    (partial / "model").write_bytes(b"12345")
    partial.rename(target)
    print("written", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
