"""Ids beyond the embeddings and rows beyond the table of positions are found before the first step, by record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from onecard.data.chat_template import load_template
from onecard.data.dataset import encode_dataset
from onecard.data.encode import EncodeSettings
from onecard.errors import ModelError
from onecard.objectives.base import SampleView
from onecard.recipes import finetune
from onecard.train.build import check_inputs
from tests import tiny
from tests.model.test_input_limits import small_model


@pytest.fixture(scope="module")
def larger_tokenizer(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose tokenizer has a token more than its embeddings have rows."""
    base = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("larger") / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    n_rows = json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokenizer.add_tokens([f"<new_{i}>" for i in range(n_rows - len(tokenizer) + 1)])
    assert len(tokenizer) == n_rows + 1
    tokenizer.save_pretrained(base)
    return base


@pytest.mark.parametrize("where", ["instruction", "output"])
@pytest.mark.parametrize("test_size", [0, 23])
def test_an_id_beyond_the_embeddings_is_named_with_its_record(
    where: str, test_size: int, larger_tokenizer: Path, tmp_path: Path
) -> None:
    """Asked or answered, trained on or held out (with 23 of 24 rows it is)."""
    tokenizer = AutoTokenizer.from_pretrained(larger_tokenizer)
    new = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    rows = [{"instruction": f"say {i}", "output": str(i)} for i in range(24)]
    rows[17][where] += new
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    words = rf"data\.jsonl:18: the token '{new}' has the id 448, but the base has rows for 448 ids.*expand_vocab"
    with pytest.raises(ModelError, match=words):
        finetune(tiny.config_for(larger_tokenizer, data, tmp_path / "run", test_size=test_size))
    assert not list((tmp_path / "run").glob("checkpoint*"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_row_beyond_the_positions_is_named(
    family: str, tiny_base: Path, instructions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a table it would end the run; rotary positions go on, but were never trained."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    dataset = encode_dataset(str(instructions), load_template("alpaca", tokenizer), tokenizer, EncodeSettings(256),
                             instructions.parent)  # fmt: skip
    data: Any = SimpleNamespace(train=SampleView(dataset, np.arange(24)), test=[], tokenizer=tokenizer)
    longest = int(dataset.lengths.max())
    model = small_model(family, vocab_size=448, max_position_embeddings=longest, n_positions=longest)
    check_inputs(model, data)
    assert capsys.readouterr().err == ""
    model = small_model(family, vocab_size=448, max_position_embeddings=longest - 1, n_positions=longest - 1)
    if family == "gpt2":
        with pytest.raises(
            ModelError, match=rf"has {longest} tokens, but .* {longest - 1} positions; use --cutoff_len"
        ):
            check_inputs(model, data)
    else:
        check_inputs(model, data)
        assert f"more than the {longest - 1} positions that the base is made for" in capsys.readouterr().err
