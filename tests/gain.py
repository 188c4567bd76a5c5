"""How well a model answers held-out rows: what an adapter gained there, and how much of it an export keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from onecard.console import say
from onecard.data.chat_template import load_template
from onecard.data.encode import Encoder, EncodeSettings
from onecard.data.sources import ReadReport, read
from onecard.model.chunked_loss import IGNORE_INDEX

HELD_OUT = Path(__file__).resolve().parents[1] / "sample" / "held_out.json"


def answer_nll(model: Any, tokenizer: Any, prompt_type: str, *, n_rows: int = 30, path: Path = HELD_OUT) -> float:
    """Mean negative log likelihood of the answers' tokens, nats, in fp32."""
    encoder = Encoder(load_template(prompt_type, tokenizer), tokenizer, EncodeSettings(256))
    total, n_tokens = 0.0, 0
    for sample in list(read(str(path), report=ReadReport()))[:n_rows]:
        for coded in encoder.encode_many([sample])[0]:
            labels = torch.full((len(coded.ids),), IGNORE_INDEX)
            for start, end in zip(coded.spans[::2], coded.spans[1::2], strict=True):
                labels[start:end] = torch.tensor(coded.ids[start:end])
            with torch.no_grad():
                logits = model(torch.tensor([coded.ids]), use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
            n_tokens += int((labels[1:] != IGNORE_INDEX).sum())
    return total / n_tokens


def kept_share(base: float, adapted: float, exported: float, what: str) -> float:
    """The share of the gain in NLL that an export keeps; printed with its figures."""
    share = (base - exported) / (base - adapted)
    say(f"{what}: NLL {base:.4f} -> {adapted:.4f}, exported {exported:.4f}: {share:.2%} of the gain")
    return share
