"""A run's adapter alone, with the words it is asked in, as a folder to give away.

Runs as a job, `python -m onecard.studio.adapter_copy RUN TARGET`. The files are plain PEFT; each copy is
compared with what it was made of.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from onecard.console import run_main, say
from onecard.errors import ModelError
from onecard.export.io.output import new_directory
from onecard.inference.run_files import TEMPLATE_NAME, TOKENIZER_NAMES, run_directory
from onecard.storage import sha256_of

ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors")
WORD_NAMES = (*TOKENIZER_NAMES, "special_tokens_map.json", "added_tokens.json", "merges.txt", TEMPLATE_NAME)


def copy_adapter(source: Path, target: Path) -> None:
    """Copy the adapter of a run or checkpoint; tokenizer and template are the run's. Raises OneCardError."""
    missing = [name for name in ADAPTER_NAMES if not (source / name).is_file()]
    if missing:
        raise ModelError(f"{source} holds no {missing[0]}; give a run or a checkpoint with an adapter")
    words = run_directory(str(source)) or source
    files = [*(source / name for name in ADAPTER_NAMES), *(words / name for name in WORD_NAMES)]
    files = [file for file in files if file.is_file()]
    needed = sum(file.stat().st_size for file in files)
    with new_directory(target, inputs=[source], needed_bytes=needed) as partial:
        for file in files:
            copy = partial / file.name
            shutil.copyfile(file, copy)
            if sha256_of(copy) != sha256_of(file):
                raise ModelError(f"{copy} is not what {file} holds: the disk has lost something; try another one")
    say(f"{target}: {len(files)} files, {needed / 2**20:.1f} MiB, each compared with the run's")


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: copy_adapter(Path(sys.argv[1]), Path(sys.argv[2]))))
