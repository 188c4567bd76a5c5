"""The card of a model made here: names only, the licence of the base, and none of the base's own claims."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from onecard import export
from onecard.export.io.model_card import CARD, adapter_lines, front_matter, lines_of, name_of, write_card

BASE_CARD = """---
license: other
license_name: qwen-research
license_link: https://example.org/LICENSE
language: [zh, en]
pipeline_tag: text-generation
---

# Qwen9 scores 99 on everything
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / CARD).write_text(BASE_CARD, encoding="utf-8")
    return tmp_path / "base"


def test_a_card_names_base_adapter_and_data_and_carries_the_licence_over(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "secret folder" / "mine"
    (run / "checkpoint-3").mkdir(parents=True)
    data = [str(tmp_path / "patients" / "chats.json"), "shibing624/medical"]
    (run / "onecard.yaml").write_text(yaml.safe_dump({"data_path": data}), encoding="utf-8")
    lines = adapter_lines(str(run), run / "checkpoint-3")
    assert lines == ["- adapter: mine", "- trained on: chats.json, shibing624/medical"]
    write_card(tmp_path, source, "Qwen/Qwen9-7B", "finetune", [*lines, "- merged in fp16"])
    text = (tmp_path / CARD).read_text(encoding="utf-8")
    assert front_matter(tmp_path / CARD) == {
        "license": "other", "license_name": "qwen-research", "license_link": "https://example.org/LICENSE",
        "language": ["zh", "en"], "library_name": "transformers", "base_model_relation": "finetune",
        "base_model": "Qwen/Qwen9-7B",
    }  # fmt: skip
    assert "Qwen9-7B, made with OneCard" in text and "qwen-research" in text and "99" not in text
    assert str(tmp_path) not in text and "secret" not in text and "patients" not in text
    assert lines_of(tmp_path / CARD) == lines and lines_of(source / CARD) == []


def test_a_base_without_a_card_or_with_a_broken_one_is_no_obstacle(tmp_path: Path) -> None:
    for content in (None, "no front matter", "---\n: [\n---\n", "---\nlicense: mit"):
        if content is not None:
            (tmp_path / CARD).write_text(content, encoding="utf-8")
        write_card(tmp_path, tmp_path, str(tmp_path), "quantized", [])
        head = front_matter(tmp_path / CARD)
        assert head == {"library_name": "transformers", "base_model_relation": "quantized"}
        assert "do not name one" in (tmp_path / CARD).read_text(encoding="utf-8")
    assert name_of("C:\\Users\\me\\model") == "model" and name_of("../x/model") == "model"


def test_every_maker_of_a_model_writes_its_own_card() -> None:
    """A tool that copies what lies beside the weights copies the base's card, too."""
    files = sorted(Path(export.__file__).parent.rglob("*.py"))
    text = {f"{file.parent.name}/{file.name}": file.read_text(encoding="utf-8") for file in files}
    copying = {name for name, code in text.items() if "copy_small_files(" in code}
    writing = {name for name, code in text.items() if "write_card(" in code}
    # quantize/run.py writes for gptq.py and bnb.py; a difference gives back every bit of the original, its card
    # included.
    assert copying - writing == {"quantize/gptq.py", "quantize/bnb.py", "weight_diff/diff.py", "io/weights.py"}
    assert "quantize/run.py" in writing
