"""The table "Where do I run it?" of docs/en/exporting.md: each of its commands is run, and what it wrote is opened as
the program that it is for would open it."""

from __future__ import annotations

import importlib
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from onecard.console import run_main
from onecard.installation import SCRIPTS
from onecard.recipes import finetune
from tests import tiny

REPOSITORY = Path(__file__).resolve().parents[2]
HEADINGS = {"docs/en/exporting.md": "## Where do I run it?", "docs/zh/exporting.md": "## 训练好了，在哪里运行？"}
ENGLISH = next(iter(HEADINGS))
PROMPT = "Below is an instruction. Name three rivers."


def commands(document: str) -> list[str]:
    """The commands in the table, in its order."""
    section = (REPOSITORY / document).read_text(encoding="utf-8").split(HEADINGS[document])[1].split("\n## ")[0]
    return re.findall(r"^\|.*\| `(python .*)` \|$", section, re.MULTILINE)


def make(form: str) -> Path:
    """outputs/FORM, made by the table's command for it; what that command reads is made before."""
    target = Path("outputs", form)
    if not target.exists():
        (command,) = (line for line in commands(ENGLISH) if f"--output_path outputs/{form}" in line)
        if "outputs/merged" in command and form != "merged":
            make("merged")
        run(command)
    return target


def run(command: str) -> None:
    """Run one command of the table inside this process."""
    program, *words = shlex.split(command)[1:]
    verb = next(verb for verb, script in SCRIPTS.items() if script == program)
    module: Any = importlib.import_module(f"onecard.programs.{verb.replace('-', '_')}")
    assert run_main(lambda: module.main(words), debug=True) == 0, command


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a short real run of the embedded base in outputs/mine, in which the commands run."""
    root = tmp_path_factory.mktemp("stage")
    (root / "sample").symlink_to(REPOSITORY / "sample", target_is_directory=True)
    before = Path.cwd()
    os.chdir(root)
    try:
        data = REPOSITORY / "sample" / "merge_sample.json"
        config = tiny.config_for(Path("sample/tiny-llama"), data, Path("outputs/mine"), max_steps=3, save_steps=3)
        finetune(config)
        yield root
    finally:
        os.chdir(before)


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """(seq, vocab) of the prompt, in fp32."""
    with torch.no_grad():
        return model(**tokenizer(PROMPT, return_tensors="pt")).logits[0].float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def adapted(stage: Path) -> torch.Tensor:
    """What PEFT gives with the run as it is: what all other forms should give."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained("sample/tiny-llama", dtype=torch.float32)
    return logits(PeftModel.from_pretrained(base, "outputs/mine"), AutoTokenizer.from_pretrained("outputs/mine"))


def test_both_languages_have_the_same_commands() -> None:
    english, chinese = ([re.sub(r'"[^"]*"', '""', line) for line in commands(name)] for name in HEADINGS)
    assert english == chinese
    assert len(english) == 7


FORMS = ["merged", pytest.param("gptq", marks=pytest.mark.gptq), "nf4"]
BOUNDS = {"merged": 2e-3, "gptq": 0.5, "nf4": 0.5}  # of the largest logit


@pytest.mark.parametrize("form", FORMS)
def test_transformers_opens_it(stage: Path, adapted: torch.Tensor, form: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

    path = make(form)
    # On a CPU transformers' first choice of kernel cannot take a group that does not divide a layer's width.
    torch_kernel: Any = {"quantization_config": GPTQConfig(bits=4, backend="torch"), "dtype": "auto"}
    how = torch_kernel if form == "gptq" else {"dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(path, **how)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert relative(logits(model, tokenizer), adapted) < BOUNDS[form]
    assert tokenizer.chat_template == Path("outputs/mine/chat_template.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", FORMS)
def test_onecard_answers_from_it(stage: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    path = make(form)
    capsys.readouterr()
    run(f'python generate.py --model_path {path} --max_new_tokens 4 --instruction "Name three rivers."')
    assert capsys.readouterr().out.strip()


def test_the_run_itself_answers(stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(commands(ENGLISH)[0])
    assert capsys.readouterr().out.strip()


def test_gguf_is_whole(stage: Path) -> None:
    from gguf import GGUFReader

    path = make("gguf")
    (file,) = path.glob("*.gguf")
    assert len(GGUFReader(file).tensors) > 10
    modelfile = (path / "Modelfile").read_text(encoding="utf-8")
    assert f"FROM ./{file.name}" in modelfile
    assert "### Response:" in modelfile


def test_metas_layout_is_whole(stage: Path) -> None:
    path = make("pth")
    state = torch.load(path / "consolidated.00.pth", weights_only=True)
    assert {"tok_embeddings.weight", "norm.weight", "output.weight"} <= state.keys()
    assert {file.name for file in path.iterdir()} >= {"params.json", "tokenizer.model"}


def test_the_difference_gives_every_bit_back(stage: Path) -> None:
    make("diff")
    run(
        "python tools/weight_diff.py recover --base_path sample/tiny-llama --diff_path outputs/diff "
        "--output_path outputs/tuned"
    )
    files = [Path(name) / "model.safetensors" for name in ("outputs/tuned", "outputs/merged")]
    assert tiny.same_tensors(*map(tiny.tensors_of, files))
