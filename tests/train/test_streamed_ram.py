"""RAM that a run with streamed layers takes: the quantised weights once, while it loads and while it trains."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.estimate import MemoryConfig, account
from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("traced_peaks"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 2**20
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
START = """
import resource, sys
from pathlib import Path
import bitsandbytes, torch
from onecard.recipes import finetune
from onecard.train import build, loop  # with all libraries
from tests import tiny

torch.set_num_threads(1)
base, data, run = map(Path, sys.argv[1:])
config = tiny.config_for(base, data, run, bits=4, stream_layers="on", gradient_checkpointing=True, total_batch=1,
                         micro_batch=1, max_steps=2, lora_r=4)
print("ready", flush=True)
sys.stdin.readline()
finetune(config)
print("largest RSS in KiB:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def anonymous_bytes(pid: int) -> int:
    """What a process holds that no file stands behind: pages of a file go when the system wants them."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return 1024 * int(found[0]) if found else 0  # none: it has ended


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.31 B random weights in 16 bits, which take 160 MiB in 4 bits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("base")
    config = LlamaConfig(vocab_size=448, num_hidden_layers=6, max_position_embeddings=512, bos_token_id=1,
                         eos_token_id=2, dtype="bfloat16", **SIZES)  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(directory)
    finally:
        torch.set_default_dtype(before)
    return tiny.save_sentencepiece_tokenizer(directory)


def test_ram_holds_the_quantised_weights_once(base: Path, instructions: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", START, str(base), str(instructions), str(tmp_path / "run")]
    child = subprocess.Popen(
        words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert child.stdin is not None and child.stdout is not None and child.stdout.readline() == "ready\n"
    before = most = anonymous_bytes(child.pid)
    child.stdin.write("\n")
    child.stdin.flush()
    while child.poll() is None:
        most = max(most, anonymous_bytes(child.pid))
        time.sleep(0.005)
    printed = child.stdout.read()
    assert child.returncode == 0 and "6 layers lie in RAM" in printed, printed
    largest = 1024 * int(printed.split("largest RSS in KiB:")[1])
    setup = MemoryConfig(bits=4, element_bytes=4, rows=1, length=128, rank=4, on_gpu=False, stream_layers=True)
    planned = account(architecture_of(base), setup)
    weights = planned.ram_bytes
    print(f"\n{before / MIB:.0f} MiB before, {most / MIB:.0f} at most, {largest / MIB:.0f} with files; weights "
          f"{weights / MIB:.0f}, planned beside them {planned.tensor_bytes / MIB:.0f}")  # fmt: skip
    assert largest <= 1.05 * weights + 2 * 2**30
    # Beside the weights: what is planned, and what one weight takes on its way into 4 bits (11.5 M numbers in fp32).
    assert most - before <= 1.05 * weights + planned.tensor_bytes + 128 * MIB
