"""Files that an earlier version wrote are read: a chat, and answers that a stopped job is to go on with.

Written by the version before the modules moved into packages; tests/train has a run directory of an older one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from onecard.console import run_main
from onecard.data.messages import Turn
from onecard.inference.chat_file import load_chat
from onecard.programs import generate

EARLIER = Path(__file__).parent / "earlier_version"
REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_chat_is_read() -> None:
    loaded = load_chat(EARLIER / "chat.json")
    chat = loaded.chat
    assert chat.session.system == "Be brief."
    assert chat.session.turns == (Turn("user", "早上好！"), Turn("assistant", "Good morning! 😀"))
    assert (chat.adapter, chat.prompt_type, chat.title) == ("my-run", "chatml", "A greeting")
    assert chat.sampling is not None
    assert (chat.sampling.temperature, chat.sampling.top_p, chat.sampling.max_new_tokens) == (0.7, 0.9, 64)
    assert not loaded.notes


def test_a_job_goes_on_with_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of five answers stand in the file; the two that are added are the ones that the earlier version gave."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    expected = (EARLIER / "answers.jsonl").read_bytes()
    lines = expected.splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:3]))
    words = ["--model_path", str(REPOSITORY / "sample" / "tiny-llama"), "--data_path", "questions.json",
             "--output_path", "answers.jsonl", "--max_new_tokens", "8", "--temperature", "0", "--device", "cpu",
             "--bits", "32", "--batch_size", "2"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run_main(lambda: generate.main(words)) == 0
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_bytes().splitlines()] == [
        json.loads(line) for line in lines
    ]
    assert (tmp_path / "answers.jsonl").read_bytes().startswith(b"".join(lines[:3]))
    assert len(lines) == 5
