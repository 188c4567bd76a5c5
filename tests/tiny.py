"""Small real parts for the tests: a SentencePiece tokenizer, a byte-level one, models of a few thousand weights, runs.

Everything is made in the process in well under a second; nothing is downloaded.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from onecard.config.training import FinetuneConfig

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "中国的首都是北京。",
    "What is the capital of France? Paris.",
    "把下面的句子翻译成英文：你好，世界。",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Input: ### Response: User: Assistant: system user assistant",
    "0 1 2 3 4 5 6 7 8 9 + = - * / ( ) [ ] { } < > | _ ' \" ! ? , ; :",
] * 20


def save_sentencepiece_tokenizer(directory: Path, vocab_size: int = 420) -> Path:
    """A Llama-style tokenizer: real SentencePiece BPE with byte fallback, `<s>` in front."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=vocab_size, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "legacy": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def save_tiny_llama(directory: Path, *, vocab_size: int = 448, layers: int = 2, seed: int = 0, **changes: Any) -> Path:
    """A Llama of random weights (hidden 64, so that 4-bit blocks fit) with the tokenizer beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, **changes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return save_sentencepiece_tokenizer(directory)


def write_instructions(path: Path, n: int = 24) -> Path:
    """`n` alpaca records of ragged length, every one different."""
    rows = [
        {"instruction": f"Count to {i}" if i % 3 else f"数到 {i}", "input": "" if i % 2 else f"from {i}",
         "output": " ".join(str(k) for k in range(1 + i % 7))}
        for i in range(n)
    ]  # fmt: skip
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def config_for(base: Path, data: Path, output: Path, /, **changes: Any) -> FinetuneConfig:
    """A quick fp32 run on CPU; `changes` are options by name, whichever group they are in."""
    settings = {
        "model_path": str(base), "bits": 32, "device": "cpu", "gradient_checkpointing": False, "data_path": str(data),
        "cache_path": str(output.parent / "cache"), "cutoff_len": 256, "test_size": 0, "output_path": str(output),
        "num_epoch": 1, "total_batch": 8, "micro_batch": 4, "learning_rate": 1e-2, "log_steps": 1, "save_steps": 1,
        "prompt_type": "alpaca", "server_check": False,
    }  # fmt: skip
    return with_options(FinetuneConfig(), settings | changes)


def with_options(config: Any, values: dict[str, Any]) -> Any:
    """Set options by name in whichever group has them; an unknown name is an error."""
    groups = [*(getattr(config, group.name) for group in fields(config)), config]
    for name, value in values.items():
        holders = [group for group in groups if hasattr(group, name)]
        assert holders, f"no option {name}"
        setattr(holders[0], name, value)
    return config


def tensors_of(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name."""
    from safetensors.torch import load_file

    return load_file(file)


def losses_of(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every logged training step of a run."""
    from onecard.train.trackers import read_log

    return [(row["step"], row["loss"]) for row in read_log(run) if "loss" in row]


def same_tensors(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """True when names, shapes and every bit agree."""
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest absolute difference over tensors of the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def flatten(items: Iterable[Iterable[Any]]) -> list[Any]:
    """One list of all inner items."""
    return [item for inner in items for item in inner]


def same_values(one: Any, other: Any) -> bool:
    """True when two nested values agree, tensors to the last bit."""
    import torch

    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_values(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same_values(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
