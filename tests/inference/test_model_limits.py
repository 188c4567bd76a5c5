"""Model types that cannot pad, search with beams, or read in pieces: done another way, or refused by the flag."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onecard.config.inference import SamplingOptions
from onecard.data.chat_template import load_template
from onecard.errors import ConfigError
from onecard.inference import embeddings as reading
from onecard.inference.call import ModelBundle, PromptRow
from onecard.inference.generate import answer_rows, stream_rows
from onecard.inference.model_limits import check_generation, go_together, reads_in_pieces
from onecard.inference.sampling import CacheOptions
from onecard.model.load import load_tokenizer
from tests.model.every_family import save_small
from tests.model.test_every_family import loaded, pair


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    kept: dict[str, Any] = {}

    def model(model_type: str) -> Any:
        if model_type not in kept:
            kept[model_type] = loaded(save_small(model_type, tmp_path_factory.mktemp(model_type)))
        return kept[model_type]

    return model


def rows() -> list[PromptRow]:
    ids = pair()["input_ids"]
    return [
        PromptRow(ids[0].tolist(), 5, 0),
        PromptRow(ids[1, :13].tolist(), 5, 1),
        PromptRow(ids[0].flip(0).tolist(), 5, 2),
    ]


@pytest.mark.parametrize("model_type", ["rwkv", "xlstm", "mamba2"])
def test_a_batch_says_what_each_row_says_alone(model_type: str, small: Any, lively_base: Path) -> None:
    tokenizer = load_tokenizer(str(lively_base))
    bundle = ModelBundle(small(model_type), tokenizer, load_template("alpaca", tokenizer))
    sampling = SamplingOptions(min_new_tokens=5, max_new_tokens=5)
    together = answer_rows(bundle, rows(), sampling)
    assert together == [answer_rows(bundle, [row], sampling)[0] for row in rows()]
    assert len({answer.text for answer in together}) > 1


def test_what_a_model_type_cannot_do_is_refused_by_its_flag(small: Any, lively_base: Path) -> None:
    tokenizer = load_tokenizer(str(lively_base))
    bundle = ModelBundle(small("rwkv"), tokenizer, load_template("alpaca", tokenizer))
    with pytest.raises(ConfigError, match=r"--num_beams: 2 does not work with rwkv models; use 1"):
        answer_rows(bundle, rows()[:1], SamplingOptions(num_beams=2))
    with pytest.raises(ConfigError, match=r"--n: 3 answers at once do not work with rwkv models"):
        list(stream_rows(bundle, [rows()[0]] * 3, SamplingOptions()))
    static = CacheOptions(static=True)
    for model_type in ("gpt_neo", "deepseek_v4"):
        model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
        with pytest.raises(ConfigError, match=f"--static_cache: does not work with {model_type} models"):
            check_generation(model, 1, SamplingOptions(), static)
    llama = SimpleNamespace(config=SimpleNamespace(model_type="llama"))
    check_generation(llama, 3, SamplingOptions(num_beams=2), static)
    assert go_together(llama, [3, 4]) and not go_together(small("rwkv"), [3, 3]) and go_together(small("xlstm"), [3, 3])


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "zamba", "openai-gpt", "gemma3n_text", "llama"])
def test_texts_are_measured_as_if_read_at_once(model_type: str, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_TOKENS", 7)
    model, ids = small(model_type), pair()["input_ids"][0].tolist()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    found = reading.score(model, ids, 0, lambda: None)
    assert found[0] is None and len(found) == len(ids)
    there = [expected[k, token].item() for k, token in enumerate(ids[1:])]
    assert [entry.logprob for entry in found[1:] if entry] == pytest.approx(there, abs=1e-3)
    texts = [ids, ids[:2], ids[:3]]
    for vector, text in zip(reading.embed(model, texts, lambda: None), texts, strict=True):
        assert len(vector) == 64
        assert list(vector) == pytest.approx(list(reading.embed(model, [text], lambda: None)[0]), abs=1e-5)
    assert reads_in_pieces(model) == (model_type == "llama")
    assert reading.score(model, ids[:1], 0, lambda: None) == [None]
