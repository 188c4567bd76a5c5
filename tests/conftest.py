"""Fixtures that every test may use; each costs its time once per session."""

from __future__ import annotations

import gc
import importlib.util
import os
import ssl
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests import tiny

if TYPE_CHECKING:
    from tests.faults.fork_server import ForkServer

# Two cores run the tests; torch's own threads would only fight each other over matrices this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# bitsandbytes hands functions to torch.compile when it is imported, which costs each process 1.5 seconds of a core.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Where bytecode is not written, as in many containers, each process compiles the package anew, and each worker all
# tests and their assertions: half of the 40 seconds of a core that collecting them takes.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# How long an example takes says how busy the machine is.
settings.register_profile("onecard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("onecard")

# A slow test takes minutes of a core that is its own, and many times that of one that others use, too.
SLOW_SECONDS = 3600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for mark, package in (("gptq", "gptqmodel"), ("trl", "trl")):
        if importlib.util.find_spec(package) is None:
            missing = pytest.mark.skip(reason=f"{package} is not installed: bash scripts/test.sh --{mark}")
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(missing)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@pytest.fixture(scope="module", autouse=True)
def _number_format_of_each_module() -> None:
    """Accelerate fixes one per process, and the tests of another file may have trained in another one."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(True)


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage() -> None:
    """Left out of each search for cycles, such as the one after memory ran out, which takes half a second with them.

    Not where there is a card: what gives it back looks for its tensors among all objects, and would not see these.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _files_are_not_waited_for() -> Iterator[None]:
    """No test takes the power away: a run of three steps would wait forty times for the disk."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _certificates_are_read_once() -> Iterator[None]:
    """Each client of httpx reads those of all authorities, which takes 30 ms, and no test asks by https."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ssl, "create_default_context", lru_cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="session", autouse=True)
def _runs_end_with_a_blank_picture() -> Iterator[None]:
    """Drawing loss.png is a third of a tiny run; test_trackers.py calls the function itself."""
    if "torch" not in sys.modules:  # files that train nothing need not import it for this
        yield
        return
    from onecard.train import trackers

    def leave_blank(run_dir: Path, _unit: str = "") -> None:
        (run_dir / "loss.png").write_bytes(b"")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trackers, "draw_loss", leave_blank)
        yield


@pytest.fixture
def only_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """`onecard plan` looks neither for the longest context nor for the largest model: each takes several plans."""
    monkeypatch.setattr("onecard.model.memory.plan.longest_context", lambda *_, **__: 1)
    monkeypatch.setattr("onecard.model.memory.cards.largest_known", lambda *_: None)


@pytest.fixture
def peaks_by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans trace no model, where only what is decided and said with a peak is looked at: a size takes 0.2 s."""
    from tests.formula import plan_by_formula

    plan_by_formula(monkeypatch)


@pytest.fixture(scope="module")
def module_peaks_by_formula() -> Iterator[None]:
    """As `peaks_by_formula`, for folders of runs whose plans are no matter: their conftest.py asks for it."""
    from tests.formula import plan_by_formula

    with pytest.MonkeyPatch.context() as patched:
        plan_by_formula(patched)
        yield


@pytest.fixture
def traced_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans trace the model, in a folder where most do not."""
    from onecard.model.memory.activation_peak import find_peak
    from onecard.model.memory.reserved_memory import reserved_beyond_tensors

    monkeypatch.setattr("onecard.model.memory.estimate.find_peak", find_peak)
    monkeypatch.setattr("onecard.model.memory.estimate.reserved_beyond_tensors", reserved_beyond_tensors)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """One for all tests that kill programs: its imports take nine seconds of a core."""
    if sys.platform != "linux":
        pytest.skip("the fork server needs Linux; the file-level tests in tests/train run everywhere")
    from tests.faults.fork_server import ForkServer

    server = ForkServer(tmp_path_factory.mktemp("starts"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with a SentencePiece tokenizer, as a directory."""
    return tiny.save_tiny_llama(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def sp_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A Llama-style tokenizer: real SentencePiece BPE with byte fallback."""
    from transformers import AutoTokenizer

    directory = tiny.save_sentencepiece_tokenizer(tmp_path_factory.mktemp("sp"))
    (directory / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="session")
def bytelevel_tokenizer():
    """A byte-level BPE tokenizer in the manner of GPT-2 and Qwen, with ChatML's control tokens and no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(tiny.CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 alpaca records of ragged length."""
    return tiny.write_instructions(tmp_path_factory.mktemp("data") / "instructions.json")
