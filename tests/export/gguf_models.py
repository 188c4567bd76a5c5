"""Tiny models of every family that export_gguf writes, with the tokenizers these families have; random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import tiny

# From the tokenizer.json of Llama 3 and of Qwen2.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROPE_LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = ("llama", "llama-biases", "llama-3", "mistral", "qwen2", "qwen3", "yarn")


def save_model(directory: Path, family: str, *, dtype: str = "float16", seed: int = 0) -> Path:
    """A model with its tokenizer. Biases and norms are random too, so that leaving one out or moving it shows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings, save_tokenizer = _recipe(family)
    rows = save_tokenizer(directory)
    config = AutoConfig.for_model(kind, **(SIZES | {"vocab_size": rows + 5} | settings))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (0 if name.endswith("bias") else 1))
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def _recipe(family: str) -> tuple[str, dict[str, Any], Any]:
    """(model type, settings, what saves the tokenizer and returns its size)."""
    return {
        "llama": ("llama", {}, _sentencepiece),
        "llama-biases": (
            "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, _pieces_json
        ),
        "llama-3": ("llama", {"rope_parameters": ROPE_LLAMA_3, "num_key_value_heads": 1}, save_llama_3_tokenizer),
        "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}, _sentencepiece),
        "qwen2": ("qwen2", {"tie_word_embeddings": True}, save_qwen_tokenizer),
        "qwen3": ("qwen3", {"head_dim": 32}, save_qwen_tokenizer),
        "yarn": ("qwen3", {"head_dim": 32, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        }}, save_qwen_tokenizer),
    }[family]  # fmt: skip


def _sentencepiece(directory: Path) -> int:
    return len(load_tokenizer(tiny.save_sentencepiece_tokenizer(directory)))


def _pieces_json(directory: Path) -> int:
    """The same kind of tokenizer as newer transformers stores it: without tokenizer.model, with an added token."""
    tokenizer = load_tokenizer(tiny.save_sentencepiece_tokenizer(directory))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.add_tokens(["<plain added>"])
    tokenizer.save_pretrained(directory)
    (directory / "tokenizer.model").unlink()
    return len(tokenizer)


def save_llama_3_tokenizer(directory: Path) -> int:
    """Byte-level BPE cut as Llama 3 does, BOS in front, whole words looked up before merges."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return _save_byte_level(directory, LLAMA_3_WORDS, special, bos=special[0], eos=special[1])


def save_qwen_tokenizer(directory: Path) -> int:
    """Byte-level BPE cut as Qwen2 does, no BOS, NFC."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _save_byte_level(directory, QWEN_WORDS, special, bos=None, eos="<|im_end|>")


def _save_byte_level(directory: Path, words: str, special: list[str], *, bos: str | None, eos: str) -> int:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(ignore_merges=bos is not None))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    if bos is None:
        core.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(tiny.CORPUS, trainer)
    core.add_special_tokens(special)
    if bos is not None:
        number = core.token_to_id(bos)
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.save_pretrained(directory)
    return len(tokenizer)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer as transformers loads it, also where no config.json stands beside it yet."""
    from transformers import AutoTokenizer

    if not (directory / "config.json").is_file():
        (directory / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return AutoTokenizer.from_pretrained(directory)
