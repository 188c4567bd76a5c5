"""LLaMA as Meta defines it, in plain tensors, and its files as Meta cuts them: made without any of the library's code.

The forward pass follows https://github.com/meta-llama/llama-models (models/llama3/model.py): rotation by complex
numbers of neighbouring pairs, repeated key-value heads, RMS norms in fp32, SwiGLU.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

LLAMA_1 = {"dim": 32, "multiple_of": 16, "n_heads": 8, "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1}
LLAMA_2 = {**LLAMA_1, "n_kv_heads": 4, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5}
LLAMA_3 = {**LLAMA_2, "vocab_size": 512, "rope_theta": 500000.0, "use_scaled_rope": True}
BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
BY_COLUMNS = ("wo", "w2")


def make_weights(params: dict[str, Any], n_tokens: int, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Random weights by Meta's names; large enough that attention and rotation matter."""
    random = torch.Generator().manual_seed(0)
    dim, n_heads = params["dim"], params["n_heads"]
    kv_dim = dim // n_heads * params.get("n_kv_heads", n_heads)
    hidden = int(2 * 4 * dim / 3)
    hidden = int(params.get("ffn_dim_multiplier", 1) * hidden)
    hidden = -(-hidden // params["multiple_of"]) * params["multiple_of"]

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=random) * 1.5 / math.sqrt(columns)).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.2 * torch.randn(dim, generator=random)).to(dtype)

    weights = {"tok_embeddings.weight": matrix(n_tokens, dim), "norm.weight": norm()}
    weights["output.weight"] = matrix(n_tokens, dim)
    for i in range(params["n_layers"]):
        weights |= {
            f"layers.{i}.attention.wq.weight": matrix(dim, dim),
            f"layers.{i}.attention.wk.weight": matrix(kv_dim, dim),
            f"layers.{i}.attention.wv.weight": matrix(kv_dim, dim),
            f"layers.{i}.attention.wo.weight": matrix(dim, dim),
            f"layers.{i}.feed_forward.w1.weight": matrix(hidden, dim),
            f"layers.{i}.feed_forward.w2.weight": matrix(dim, hidden),
            f"layers.{i}.feed_forward.w3.weight": matrix(hidden, dim),
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.ffn_norm.weight": norm(),
        }
    return weights


def save(
    directory: Path, params: dict[str, Any], weights: dict[str, Tensor], n_shards: int, *, embeddings_dim: int = 1
) -> Path:
    """consolidated.0x.pth and params.json. Heads that are fewer than shards stand in several of them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params), encoding="utf-8")
    n_kv_heads = params.get("n_kv_heads", params["n_heads"])
    for rank in range(n_shards):
        shard = {}
        for name, tensor in weights.items():
            short = name.split(".")[-2]
            rows_first = short in BY_ROWS or (short == "tok_embeddings" and embeddings_dim == 0)
            columns_first = short in BY_COLUMNS or (short == "tok_embeddings" and embeddings_dim == 1)
            if short in ("wk", "wv") and n_shards > n_kv_heads:
                shard[name] = tensor.tensor_split(n_kv_heads)[rank * n_kv_heads // n_shards].clone()
            elif rows_first or columns_first:
                shard[name] = tensor.tensor_split(n_shards, dim=0 if rows_first else 1)[rank].clone()
            else:
                shard[name] = tensor.clone()
        if "rope_theta" not in params:  # Meta's first files carry the table of their rotations
            head_dim = params["dim"] // params["n_heads"]
            shard["rope.freqs"] = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2) / head_dim)
        torch.save(shard, directory / f"consolidated.{rank:02d}.pth")
    return directory


def logits(params: dict[str, Any], weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """(seq, vocabulary) scores in fp32 for `tokens` of shape (seq,)."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    n_heads, n_kv_heads = params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    turns = _turns(params, len(tokens))
    mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)
    x = w["tok_embeddings.weight"][tokens]
    for i in range(params["n_layers"]):
        layer = {name.removeprefix(f"layers.{i}."): t for name, t in w.items() if name.startswith(f"layers.{i}.")}
        h = _norm(x, layer["attention_norm.weight"], params["norm_eps"])
        q = _rotated((h @ layer["attention.wq.weight"].T).unflatten(-1, (n_heads, -1)), turns)
        k = _rotated((h @ layer["attention.wk.weight"].T).unflatten(-1, (n_kv_heads, -1)), turns)
        v = (h @ layer["attention.wv.weight"].T).unflatten(-1, (n_kv_heads, -1))
        k, v = (t.repeat_interleave(n_heads // n_kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1]) + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ layer["attention.wo.weight"].T
        h = _norm(x, layer["ffn_norm.weight"], params["norm_eps"])
        gated = silu(h @ layer["feed_forward.w1.weight"].T) * (h @ layer["feed_forward.w3.weight"].T)
        x = x + gated @ layer["feed_forward.w2.weight"].T
    return _norm(x, w["norm.weight"], params["norm_eps"]) @ w["output.weight"].T


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _turns(params: dict[str, Any], length: int) -> Tensor:
    """(seq, head_dim / 2) complex numbers of length 1."""
    head_dim = params["dim"] // params["n_heads"]
    freqs = 1.0 / params.get("rope_theta", 10000.0) ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if params.get("use_scaled_rope"):
        freqs = torch.tensor([_stretched(float(freq)) for freq in freqs])
    angles = torch.outer(torch.arange(length).float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def _stretched(freq: float) -> float:
    wave = 2 * math.pi / freq
    if wave < 8192 / 4:
        return freq
    if wave > 8192 / 1:
        return freq / 8
    smooth = (8192 / wave - 1) / (4 - 1)
    return (1 - smooth) * freq / 8 + smooth * freq


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)
