from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from onecard.config.base_model import ModelOptions
from onecard.model.hardware import Hardware, detect
from onecard.model.load import LoadedBase, load_base
from tests.model.model_families import save_family


@pytest.fixture(scope="session")
def family_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    saved: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in saved:
            saved[name] = save_family(name, tmp_path_factory.mktemp(name))
        return saved[name]

    return directory


@pytest.fixture(scope="session")
def cpu() -> Hardware:
    return detect("cpu")


@pytest.fixture(scope="session")
def load_family(family_directory: Callable[[str], Path], cpu: Hardware) -> Callable[..., LoadedBase]:
    def load(name: str, bits: int = 32, **options: object) -> LoadedBase:
        path = str(options.pop("model_path", None) or family_directory(name))
        return load_base(ModelOptions(model_path=path, bits=bits, **options), cpu)  # type: ignore[arg-type]

    return load


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
