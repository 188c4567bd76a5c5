"""Each command of docs/en/feature-table.md runs to its end: here on a tiny model, or in the test that is named for it.

tests/test_documents.py starts them all with their options; here they do what they say.
"""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from onecard.translation import use_language
from tests import tiny
from tests.evaluate import layouts
from tests.test_documents import REPOSITORY, commands, in_table

PAGE = "docs/en/feature-table.md"
COMMANDS = [line for block in in_table(PAGE) for line in commands(block)]
# By a part of the command: the test that runs it, as it needs a server, a card, a partner or an hour.
ELSEWHERE = {
    "recipe medical": "test_field_recipes.py::test_the_rows_put_aside_are_answered_better_after_the_trial",
    "--attn_implementation flash_attention_2": "model/test_load.py::test_attention_kernel_that_is_not_there",
    "torchrun --standalone --nproc_per_node 2 finetune.py --model_path":
        "invariants/test_processes.py::test_two_processes_equal_one",
    "--deepspeed": "invariants/test_deepspeed.py::test_zero2_equals_one_plain_process",
    "data make self-instruct": "curation/test_make.py::test_self_instruct_makes_the_rows_that_were_asked_for",
    "chat.py --lora_path": "browser/test_chat_page.py::test_an_answer_is_typed_live",
    "tools/serve.py": "serve/api/test_process.py::test_a_signal_ends_it_and_the_client_is_told",
    "convert_llama.py hf": "export/test_llama_pth.py::test_converted_model_computes_what_metas_code_computes",
    "quantize_gptq.py": "export/test_gptq.py::test_files_are_autogptq_v1",
    "weight_diff.py recover": "export/test_weight_diff.py::test_a_model_comes_back_bit_for_bit",
    "--max_memory 0:10GiB,cpu:30GiB": "inference/test_placements.py::test_a_map_of_memory_places_the_model",
    "evaluate blind": "browser/test_blind_page.py::test_twenty_pairs_by_keyboard",
    "--judge_model": "evaluate/test_program.py::test_the_grades_of_a_judge_are_in_the_report",
}  # fmt: skip
TRAINING = """--model_path base --max_steps 2 --save_steps 1 --total_batch 8 --test_size 0 --device cpu --cutoff_len 256
    --cache_path cache --server_check false --prompt_type alpaca"""
ANSWERING = "--device cpu --max_new_tokens 4"
# What is put behind a command, by its program: of an option that is given twice, the last one counts.
SMALL = {
    "finetune.py": TRAINING,
    "finetune_chat.py": TRAINING,
    "generate.py": ANSWERING,
    "chat.py": ANSWERING,
    "documents ask": f"{ANSWERING} --bits 32",
    "tools/evaluate.py": "--device cpu --bits 32",
    "tools/expand_vocab.py": "--vocab_size 420",
}


def elsewhere(command: str) -> str:
    return next((part for part in ELSEWHERE if part in command), "")


def test_what_runs_elsewhere_is_there() -> None:
    assert [sum(part in command for command in COMMANDS) for part in ELSEWHERE] == [1] * len(ELSEWHERE)
    for place in ELSEWHERE.values():
        file, name = place.split("::")
        assert f"\ndef {name}(" in (REPOSITORY / "tests" / file).read_text(encoding="utf-8"), place


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands read, by the names that they give it."""
    root = tmp_path_factory.mktemp("features")
    tiny.save_tiny_llama(root / "base")
    (root / "models").mkdir()
    (root / "models" / "my-model").symlink_to(root / "base", target_is_directory=True)
    tiny.write_instructions(root / "my_data.json")
    text = (REPOSITORY / "sample" / "shapes" / "plain.txt").read_text(encoding="utf-8")
    for name in ("corpus/a.txt", "chinese.txt", "manuals/warranty.md"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text * 20, encoding="utf-8")
    lines = {
        "my_pairs.jsonl": [{"prompt": f"Count to {k}", "chosen": "1 2 3", "rejected": "no"} for k in range(16)],
        "questions.jsonl": [{"instruction": f"Count to {k}", "output": "1"} for k in range(3)],
        "instructie.jsonl": [{"text": "Ada lives in Bern.", "relation": [
            {"head": "Ada", "head_type": "person", "relation": "lives in", "tail": "Bern", "tail_type": "place"}]}],
    }  # fmt: skip
    for name, rows in lines.items():
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (root / "gsm8k.tsv").write_text("What is 1 + 1?\t2\tOne and one are two.\n" * 3, encoding="utf-8")
    layouts.ceval(root / "ceval-exam")
    run(root, next(line for line in COMMANDS if line.endswith("--output_path outputs/mine")))
    run(root, "python -m onecard documents add manuals --index outputs/manuals")
    run(root, next(line for line in COMMANDS if "merge_lora.py" in line))
    run(root, next(line for line in COMMANDS if "onecard data extraction" in line))
    return root


def run(folder: Path, command: str) -> str:
    """Run a command in this process, made small; what it printed."""
    name, *words = shlex.split(re.sub(r"^python (-m )?", "", command))
    program = name if name.endswith(".py") else " ".join(words[:2])
    small = shlex.split(SMALL.get(program, ""))
    if program.startswith("finetune") and "--bits" not in words:
        small += ["--bits", "32"]
    state = sys.modules.get("accelerate.state")
    if state is not None:  # another number format than that of the command before
        state.AcceleratorState._reset_state(True)
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [name, *words, *small])
        patch.setattr(sys, "stdout", shown)
        patch.setattr(sys, "stderr", shown)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Name a river.\n"), encoding="utf-8"))
        if name.endswith(".py"):
            patch.syspath_prepend(str((REPOSITORY / name).parent))  # as python has it for a script
            runpy.run_path(str(REPOSITORY / name), run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__")
    use_language("auto")
    assert ended.value.code == 0, shown.getvalue()
    return shown.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in COMMANDS if not elsewhere(line)])
def test_a_command_of_the_table_does_what_it_says(command: str, stage: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    shutil.copytree(stage, folder, symlinks=True)
    (given,) = re.findall(r"--output_path (\S+)", command) or re.findall(r"handover \w+ \S+ (\S+)", command) or [""]
    if given and (old := folder / given).is_dir():  # what the stage made by the same command, or a run of other options
        shutil.rmtree(old)
    elif given:
        (folder / given).unlink(missing_ok=True)
    shown = run(folder, command)
    assert shown.strip()
    if given and (made := folder / given).is_dir():
        assert any(made.iterdir())
    elif given:
        assert made.stat().st_size
