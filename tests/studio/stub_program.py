"""Stands in for `onecard`: `say TEXT CODE`, `wait FILE` (until the file is there), `finetune --output_path DIR ...`."""

from __future__ import annotations

import json
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
    if verb == "finetune":
        return finetune(dict(word[2:].split("=", 1) for word in words[1:]))
    return 3


def finetune(options: dict[str, str]) -> int:
    """Note each start in starts.txt; `seed` is the exit code, `log_steps` how many tenths of a second it takes.

    With `wandb_project` wait it goes on until there is a file `go` in its folder.
    """
    run = Path(options["output_path"])
    with (run / "starts.txt").open("a") as starts:
        starts.write("started\n")
    for step in range(1, int(options.get("log_steps", 1)) + 1):
        with (run / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
        print(f"step {step}", flush=True)
        time.sleep(0.1)
    while options.get("wandb_project") == "wait" and not (run / "go").exists():
        time.sleep(0.02)
    code = int(options.get("seed", 0))
    if code:
        print("error: --data_path: there is no usable row; give another file", file=sys.stderr)
    else:
        (run / "manifest.json").write_text("{}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
