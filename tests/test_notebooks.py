"""The notebooks: alike in both languages, without outputs, and each runs from top to bottom on the tiny base."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest

from onecard.installation import SHIPPED

NOTEBOOKS = sorted((SHIPPED / "notebooks").glob("*.ipynb"))
# In place of the cell of parameters: what two CPU cores can do.
SMALL = """
MODEL = "sample/tiny-llama"
DATA, QUESTIONS = "sample/merge_sample.json", "sample/held_out.json"
RUN, GGUF = "outputs/notebook", "outputs/notebook-gguf"
TRAINING = ["--max_steps", "4", "--test_size", "8", "--lora_r", "2", "--device", "cpu"]
"""


def cells(notebook: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == kind]


def test_both_languages_have_the_same_code() -> None:
    english, chinese = NOTEBOOKS
    assert [cell.source for cell in cells(english, "code")] == [cell.source for cell in cells(chinese, "code")]
    texts = [[cell.source for cell in cells(notebook, "markdown")] for notebook in NOTEBOOKS]
    assert len(texts[0]) == len(texts[1]) >= 8
    commands = [re.findall(r"`([^`]+)`", "".join(each)) for each in texts]
    assert commands[0] == commands[1]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_whole_and_has_no_outputs(notebook: Path) -> None:
    read = nbformat.read(notebook, as_version=4)
    nbformat.validate(read)
    code = cells(notebook, "code")
    assert len(code) == 9
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert [cell.metadata.tags for cell in code if "tags" in cell.metadata] == [["install"], ["parameters"]]
    assert not re.search(r"/(home|root|content|kaggle|work)/|[A-Z]:\\\\", notebook.read_text(encoding="utf-8"))
    parameters = next(cell.source for cell in code if "parameters" in cell.metadata.get("tags", []))
    names = set(re.findall(r"\b[A-Z]{3,}\b(?=.* = )", SMALL))
    assert names == set(re.findall(r"^([A-Z]+) = ", parameters, re.MULTILINE)), "what the tests set in their place"


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SHIPPED), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    read = nbformat.read(notebook, as_version=4)
    for cell in read.cells:
        tags = cell.metadata.get("tags", [])
        cell.source = "" if "install" in tags else SMALL if "parameters" in tags else cell.source
    NotebookClient(read, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "\n".join(output.get("text", "") for cell in read.cells if cell.cell_type == "code"
                      for output in cell.outputs)  # fmt: skip
    for words in ("adapter of step 4 saved", "exact match", "model-q8_0.gguf: ", "Modelfile: "):
        assert words in shown
    assert (tmp_path / "outputs" / "notebook" / "adapter_model.safetensors").is_file()
