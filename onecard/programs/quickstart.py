"""From nothing to a fine-tuned model that answers: fine-tune the embedded base in 4 bits, and show what it learned.

In a clone it makes .venv first, with the Python that runs this; later starts reuse it, and the finished run. No card is
needed. Words behind the verb go to finetune, such as --max_steps 20. Environment variables: OUTPUT_PATH, the folder of
the run (outputs/quickstart); PYTHON, a Python to use in place of .venv.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from onecard.console import say
from onecard.installation import IS_CLONE, SHIPPED, program_name
from onecard.programs._environment import call, prepare_venv


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line. Raises SystemExit when a part of it fails."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*words}:
        say(f"usage: {program_name() or 'onecard'} quickstart [--OPTION VALUE ...]\n\n{__doc__}")
        raise SystemExit(0)
    python = Path(os.environ.get("PYTHON") or (prepare_venv("requirements.txt") if IS_CLONE else sys.executable))
    output = os.environ.get("OUTPUT_PATH") or str(Path("outputs", "quickstart"))
    say("== fine-tuning sample/tiny-llama in 4-bit on sample/merge_sample.json")
    _start(python, "finetune", "--config", "config-sample/tiny-llama_qlora_cpu.yaml", "--output_path", output, *words)
    say("== before and after, on questions that were not in the training data")
    _start(python, "score", "--data_path", "sample/held_out.json", "--lora_path", output, "--examples", "3")
    shown = _shown(python)
    say(f"""
Ask it one thing:
  {shown} generate --lora_path {output} --instruction "What is the capital of Poland?"
Chat with it in the browser (or here, with --cli):
  {shown} chat --lora_path {output}
Train on your own data, on your own card:
  {shown} finetune --model_path Qwen/Qwen2.5-7B-Instruct --data_path my_data.json --output_path outputs/mine""")


def _start(python: Path, *words: str) -> None:
    code = call([python, "-m", "onecard", *words])
    if code:
        raise SystemExit(code)


def _shown(python: Path) -> str:
    """What to type before a verb."""
    if not IS_CLONE:
        return "onecard"
    inside = python.relative_to(SHIPPED) if SHIPPED in python.parents else python
    return f"{inside} -m onecard"
