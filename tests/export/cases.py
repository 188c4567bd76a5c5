"""What `test_faults.py` does to the tools: their smallest real starts, and inputs that must be refused.

Each case names a tool, the words after its name, and what it writes; each bad input a regular expression for the one
line that the tool must say.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onecard.console import run_main
from onecard.recipes import finetune
from tests import tiny


@dataclass(frozen=True)
class Inputs:
    """Small real things to export, made once."""

    base: Path  # a Llama with SentencePiece, fp16, in two shards
    run: Path  # a finished run on it
    merged: Path
    pth: Path  # the base in Meta's layout
    diff: Path
    corpus: Path
    pieces: Path
    tokenizer: Path


Words = Callable[[Inputs, Path], list[str]]
BadWords = Callable[[Inputs, Path, Path], list[str]]


@dataclass(frozen=True)
class Case:
    """One tool at work: `words(inputs, target)` follow its name; `target` is the name of what it writes."""

    name: str
    tool: str
    words: Words
    target: str = "target"
    takes_long: bool = False


@dataclass(frozen=True)
class BadInput:
    """One refusal: `words(inputs, scratch, target)`; `says` must be found in the only error line."""

    name: str
    tool: str
    words: BadWords
    says: str


def run_tool(name: str, *words: str | Path) -> None:
    """Start one tool inside this process; it must succeed."""
    import importlib

    tool = importlib.import_module(f"onecard.programs.{name}")
    assert run_main(lambda: tool.main([str(word) for word in words]), debug=True) == 0


def make_inputs(root: Path) -> Inputs:
    """Make everything that the cases read."""
    from transformers import AutoModelForCausalLM

    inputs = Inputs(**{name: root / name for name in Inputs.__dataclass_fields__})
    tiny.save_tiny_llama(root / "fp32")
    model = AutoModelForCausalLM.from_pretrained(root / "fp32", dtype=torch.float16)
    model.save_pretrained(inputs.base, max_shard_size="150KB")
    for file in (root / "fp32").glob("tokenizer*"):
        shutil.copyfile(file, inputs.base / file.name)
    data = tiny.write_instructions(root / "data.json")
    finetune(tiny.config_for(inputs.base, data, inputs.run))
    run_tool("merge", "--lora_path", inputs.run, "--output_path", inputs.merged)
    run_tool("convert_llama", "pth", "--model_path", inputs.base, "--output_path", inputs.pth)
    run_tool(
        "weight_diff", "make", "--base_path", inputs.base, "--tuned_path", inputs.merged, "--output_path", inputs.diff
    )
    inputs.corpus.mkdir()
    lines = [f"中国的首都是北京，第{i}次。人工智能帮助人们学习语言。The answer is {i}." for i in range(400)]
    (inputs.corpus / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    run_tool("expand_vocab", "train", *train_words(inputs), "--output_path", inputs.pieces)
    run_tool(
        "expand_vocab", "merge", "--tokenizer_path", inputs.base, "--new_path", inputs.pieces,
        "--output_path", inputs.tokenizer,
    )  # fmt: skip
    return inputs


def train_words(inputs: Inputs) -> list[str]:
    return ["--data_path", str(inputs.corpus), "--vocab_size", "100"]


def little_text() -> list[str]:
    """Words that keep the measuring of perplexity short."""
    return ["--eval_samples", "2", "--device", "cpu"]


CASES = [
    Case("merge", "merge", lambda i, t: ["--lora_path", str(i.run), "--output_path", str(t)]),
    Case(
        "merge_pth",
        "merge",
        lambda i, t: ["--lora_path", str(i.run), "--format", "pth", "--output_path", str(t)],
        takes_long=True,
    ),
    Case("convert_hf", "convert_llama", lambda i, t: ["hf", "--model_path", str(i.pth), "--output_path", str(t)]),
    Case("convert_pth", "convert_llama", lambda i, t: ["pth", "--model_path", str(i.base), "--output_path", str(t)]),
    Case(
        "diff_make",
        "weight_diff",
        lambda i, t: ["make", "--base_path", str(i.base), "--tuned_path", str(i.merged), "--output_path", str(t)],
    ),
    Case(
        "diff_recover",
        "weight_diff",
        lambda i, t: ["recover", "--base_path", str(i.base), "--diff_path", str(i.diff), "--output_path", str(t)],
    ),
    Case(
        "gguf",
        "gguf",
        lambda i, t: ["--model_path", str(i.merged), "--gguf_type", "f16", "--output_path", str(t)],
    ),
    Case(
        "gguf_adapter",
        "gguf",
        lambda i, t: [
            "--model_path", str(i.base), "--lora_path", str(i.run), "--adapter_only", "--gguf_type", "f16",
            "--output_path", str(t),
        ],
    ),
    Case(
        "handover",
        "handover",
        lambda i, t: ["ray-serve", str(i.run), str(t)],
    ),
    Case(
        "handover_gguf",
        "handover",
        lambda i, t: ["ollama", str(i.run), str(t), "--gguf_type", "f16"],
        takes_long=True,
    ),
    Case(
        "nf4",
        "quantize_bnb",
        lambda i, t: ["--model_path", str(i.merged), "--eval_len", "64", *little_text(), "--output_path", str(t)],
        takes_long=True,
    ),
    Case(
        "gptq",
        "quantize_gptq",
        lambda i, t: [
            "--model_path", str(i.merged), "--group_size", "64", "--calibration_samples", "48",
            "--calibration_len", "64", *little_text(), "--output_path", str(t),
        ],
        takes_long=True,
    ),
    Case(
        "data_clean",
        "data",
        lambda i, t: [
            "clean", "--data_path", str(i.corpus), "--near_duplicates", "0", "--fix_encoding", "false",
            "--output_path", str(t),
        ],
    ),
    Case(
        "data_split",
        "data",
        lambda i, t: ["split", "--data_path", str(i.corpus), "--near_duplicates", "0", "--output_path", str(t)],
    ),
    Case("vocab_train", "expand_vocab", lambda i, t: ["train", *train_words(i), "--output_path", str(t)]),
    Case(
        "vocab_merge",
        "expand_vocab",
        lambda i, t: ["merge", "--tokenizer_path", str(i.base), "--new_path", str(i.pieces), "--output_path", str(t)],
    ),
    Case(
        "vocab_apply",
        "expand_vocab",
        lambda i, t: [
            "apply", "--model_path", str(i.base), "--tokenizer_path", str(i.tokenizer), "--output_path", str(t)
        ],
    ),
]  # fmt: skip


# --- broken on purpose -----------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def copy_of(source: Path, scratch: Path) -> Path:
    return Path(shutil.copytree(source, scratch / source.name))


def truncated(source: Path, scratch: Path) -> str:
    """A copy whose last weight file lacks its end."""
    directory = copy_of(source, scratch)
    weights = sorted([*directory.glob("*.safetensors"), *directory.glob("*.pth")])[-1]
    weights.write_bytes(weights.read_bytes()[:-100])
    return str(directory)


def with_code(source: Path, scratch: Path, name: str = "pytorch_model.bin") -> str:
    """A copy whose weights are a pickle that would make a directory `code-ran` when it is loaded."""
    directory = copy_of(source, scratch)
    for file in [*directory.glob("*.safetensors*"), *directory.glob("*.pth"), *directory.glob("*.bin")]:
        file.unlink()
    (directory / name).write_bytes(pickle.dumps({"x": Bomb(scratch / "code-ran")}))
    return str(directory)


def other_family(source: Path, scratch: Path) -> str:
    """A copy that calls itself another family, with the same tensors."""
    directory = copy_of(source, scratch)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(directory)


def other_shape(source: Path, scratch: Path) -> str:
    """A base of another width under the same names, with the tokenizer beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = copy_of(source, scratch)
    config = LlamaConfig.from_pretrained(directory)
    config.intermediate_size = 96
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    LlamaForCausalLM(config).half().save_pretrained(directory)
    return str(directory)


def other_tokenizer(scratch: Path) -> str:
    """A tokenizer whose pieces stand under other ids."""
    directory = scratch / "tokenizer"
    return str(tiny.save_sentencepiece_tokenizer(directory, vocab_size=380))


def emptied(scratch: Path) -> str:
    (scratch / "empty").mkdir()
    return str(scratch / "empty")


def output(target: Path) -> list[str]:
    return ["--output_path", str(target)]


def model_inputs(tool: str, *before: str, source: Callable[[Inputs], Path] = lambda i: i.merged) -> list[BadInput]:
    """What every tool that reads one model must refuse."""
    return [
        BadInput(
            f"{tool}-no-directory", tool,
            lambda i, s, t: [*before, "--model_path", str(s / "nothing"), *output(t)], "nothing",
        ),
        BadInput(
            f"{tool}-empty", tool,
            lambda i, s, t: [*before, "--model_path", emptied(s), *output(t)], "empty",
        ),
        BadInput(
            f"{tool}-truncated", tool,
            lambda i, s, t: [*before, "--model_path", truncated(source(i), s), *output(t)], "damaged",
        ),
        BadInput(
            f"{tool}-code", tool,
            lambda i, s, t: [*before, "--model_path", with_code(source(i), s), *output(t)], "code|no model|no weights",
        ),
    ]  # fmt: skip


BAD_INPUTS = [
    *model_inputs("gguf"),
    *model_inputs("quantize_bnb"),
    *model_inputs("quantize_gptq"),
    *model_inputs("convert_llama", "pth", source=lambda i: i.base),
    BadInput(
        "handover-no-run", "handover",
        lambda i, s, t: ["vllm", str(s / "nothing"), str(t)], "nothing is not a directory",
    ),
    BadInput(
        "handover-empty", "handover",
        lambda i, s, t: ["vllm", emptied(s), str(t)], "empty|model_path",
    ),
    BadInput(
        "handover-truncated-base", "handover",
        lambda i, s, t: ["ray-serve", str(i.run), str(t), "--model_path", truncated(i.base, s)], "damaged",
    ),
    BadInput(
        "merge-other-shape", "merge",
        lambda i, s, t: ["--model_path", other_shape(i.base, s), "--lora_path", str(i.run), *output(t)],
        "does not fit|not the (base|one)",
    ),
    BadInput(
        "merge-truncated-base", "merge",
        lambda i, s, t: ["--model_path", truncated(i.base, s), "--lora_path", str(i.run), *output(t)], "damaged",
    ),
    BadInput(
        "merge-truncated-adapter", "merge",
        lambda i, s, t: ["--model_path", str(i.base), "--lora_path", truncated(i.run, s), *output(t)], "damaged",
    ),
    BadInput(
        "merge-code", "merge",
        lambda i, s, t: ["--model_path", str(i.base), "--lora_path", with_code(i.run, s, "adapter_model.bin"),
                         *output(t)],
        "code",
    ),
    BadInput(
        "merge-no-adapter", "merge",
        lambda i, s, t: ["--model_path", str(i.base), "--lora_path", emptied(s), *output(t)], "holds no adapter",
    ),
    BadInput(
        "convert_llama-hf-truncated", "convert_llama",
        lambda i, s, t: ["hf", "--model_path", truncated(i.pth, s), *output(t)], "damaged",
    ),
    BadInput(
        "convert_llama-hf-code", "convert_llama",
        lambda i, s, t: ["hf", "--model_path", with_code(i.pth, s, "consolidated.00.pth"), *output(t)], "code",
    ),
    BadInput(
        "convert_llama-family", "convert_llama",
        lambda i, s, t: ["pth", "--model_path", other_family(i.base, s), *output(t)], "gpt_neox",
    ),
    BadInput(
        "gguf-family", "gguf",
        lambda i, s, t: ["--model_path", other_family(i.merged, s), *output(t)], "gpt_neox",
    ),
    BadInput(
        "gguf-adapter-truncated", "gguf",
        lambda i, s, t: ["--model_path", str(i.base), "--lora_path", truncated(i.run, s), "--adapter_only", *output(t)],
        "damaged",
    ),
    BadInput(
        "gguf-adapter-other-shape", "gguf",
        lambda i, s, t: ["--model_path", other_shape(i.base, s), "--lora_path", str(i.run), "--adapter_only",
                         *output(t)],
        "another base",
    ),
    BadInput(
        "weight_diff-shape", "weight_diff",
        lambda i, s, t: ["make", "--base_path", other_shape(i.base, s), "--tuned_path", str(i.merged), *output(t)],
        "is not made from",
    ),
    BadInput(
        "weight_diff-truncated", "weight_diff",
        lambda i, s, t: ["make", "--base_path", str(i.base), "--tuned_path", truncated(i.merged, s), *output(t)],
        "damaged",
    ),
    BadInput(
        "weight_diff-other-base", "weight_diff",
        lambda i, s, t: ["recover", "--base_path", str(i.merged), "--diff_path", str(i.diff), *output(t)], "base",
    ),
    BadInput(
        "weight_diff-code", "weight_diff",
        lambda i, s, t: ["make", "--base_path", with_code(i.base, s), "--tuned_path", str(i.merged), *output(t)],
        "code",
    ),
    BadInput(
        "expand_vocab-mismatch", "expand_vocab",
        lambda i, s, t: ["apply", "--model_path", str(i.base), "--tokenizer_path", other_tokenizer(s),
                         *output(t)],
        "token",
    ),
    BadInput(
        "expand_vocab-truncated", "expand_vocab",
        lambda i, s, t: ["apply", "--model_path", truncated(i.base, s), "--tokenizer_path", str(i.tokenizer),
                         *output(t)],
        "damaged",
    ),
    BadInput(
        "data-empty", "data",
        lambda i, s, t: ["clean", "--data_path", emptied(s), "--near_duplicates", "0", "--fix_encoding", "false",
                         *output(t)],
        "holds no record",
    ),
    BadInput(
        "data-inside", "data",
        lambda i, s, t: ["split", "--data_path", str(i.corpus), "--near_duplicates", "0", "--output_path",
                         str(i.corpus)],
        "is or holds what is read here",
    ),
    BadInput(
        "expand_vocab-no-corpus", "expand_vocab",
        lambda i, s, t: ["train", "--data_path", emptied(s), "--vocab_size", "300", *output(t)], "empty",
    ),
    BadInput(
        "expand_vocab-no-tokenizer", "expand_vocab",
        lambda i, s, t: ["merge", "--tokenizer_path", emptied(s), "--new_path", str(i.pieces), *output(t)],
        "tokenizer",
    ),
]  # fmt: skip
