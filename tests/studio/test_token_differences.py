"""log p(tuned) - log p(base) of an answer's tokens, against the same computed with transformers and peft alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
import torch

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, ServeOptions
from onecard.inference.engine import open_engine
from onecard.serve.api.app import Api, build_app
from onecard.serve.http_error import ApiError
from onecard.studio.token_differences import TokenDifference, token_differences, whole_characters
from tests.inference.conftest import lively_base, run_dir

__all__ = ["lively_base", "run_dir"]

QUESTION, ANSWER = "Count to 3", "1 2 3 北京 é"


@pytest.fixture(scope="module")
def app(run_dir: Path, lively_base: Path) -> Api:
    model = ModelOptions(model_path=str(lively_base), bits=32, device="cpu", gradient_checkpointing=False)
    limits = LimitOptions()
    engine = open_engine(model, InferenceOptions(lora_path=str(run_dir)), limits, adapters_path=str(run_dir.parent))
    return build_app(engine, ServeOptions(), limits)


def asked(app: Api, answer: str = ANSWER) -> list[TokenDifference]:
    async def ask() -> list[TokenDifference]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            messages = [{"role": "user", "content": QUESTION}]
            return await token_differences(client, messages, answer, *app.engine.names)

    return asyncio.run(ask())


def test_equals_a_plain_computation(app: Api, run_dir: Path, lively_base: Path) -> None:
    """The ids that training encodes, and two forward passes of plain models."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = asked(app)
    assert "".join(one.text for one in found).strip() == ANSWER
    assert max(one.n_tokens for one in found) > 1, "no character of several byte tokens: nothing was joined"

    tokenizer = AutoTokenizer.from_pretrained(run_dir)
    model = AutoModelForCausalLM.from_pretrained(lively_base, dtype=torch.float32).eval()
    ids = full_ids(app)
    n_tokens = sum(one.n_tokens for one in found)
    assert tokenizer.decode(ids[-n_tokens:]).strip() == ANSWER

    def log_probs(one: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            table = one(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        return table[:-1].gather(1, torch.tensor(ids[1:])[:, None])[-n_tokens:, 0]

    of_base = log_probs(model)
    of_tuned = log_probs(PeftModel.from_pretrained(model, run_dir).eval())
    position = 0
    for one in found:
        ours = slice(position, position + one.n_tokens)
        assert one.tuned == pytest.approx(float(of_tuned[ours].sum()), abs=1e-3)
        assert one.base == pytest.approx(float(of_base[ours].sum()), abs=1e-3)
        assert one.difference == pytest.approx(float((of_tuned - of_base)[ours].sum()), abs=2e-3)
        position += one.n_tokens
    assert position == n_tokens
    assert max(abs(one.difference) for one in found) > 0.1, "the adapter changes nothing, so nothing was compared"


def full_ids(app: Api) -> list[int]:
    """Question and answer as training encodes them, without the end token."""
    from onecard.data.encode import EncodeSettings, encode_sample
    from onecard.data.messages import Conversation, Turn

    name = app.engine.names[0]
    sample = Conversation((Turn("user", QUESTION), Turn("assistant", ANSWER)), "test")
    encoded = encode_sample(sample, app.engine.template(name), app.engine.tokenizer(name), EncodeSettings(512))[0]
    ids, labels = list(encoded.input_ids), list(encoded.labels)
    learned = [k for k, label in enumerate(labels) if label != -100]
    text = [app.engine.tokenizer(name).decode(ids[: k + 1]) for k in learned]
    last = next(k for k, so_far in zip(learned, text, strict=True) if so_far.rstrip().endswith(ANSWER))
    return ids[: last + 1]


def test_what_the_server_refuses_is_told(app: Api) -> None:
    with pytest.raises(ApiError, match="tokens"):
        asked(app, "word " * 2000)


def test_bytes_become_characters() -> None:
    def token(text: str) -> TokenDifference:
        return TokenDifference(text, -1.0, -3.0)

    spelled = [f"bytes:\\x{byte:02x}" for byte in "北".encode()]
    found = whole_characters([token("a"), *map(token, spelled), token("b"), token(spelled[0])])
    assert [(one.text, one.n_tokens, one.difference) for one in found] == [
        ("a", 1, 2.0), ("北", 3, 6.0), ("b", 1, 2.0), ("\N{REPLACEMENT CHARACTER}", 1, 2.0),
    ]  # fmt: skip
