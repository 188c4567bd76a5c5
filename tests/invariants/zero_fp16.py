"""One process under torchrun: fp16's loss scale through DeepSpeed. Prints OK; started by `test_deepspeed.py`."""

from __future__ import annotations

import math
import sys

import torch
from accelerate import Accelerator

from onecard.train.deepspeed_engine import DeepSpeedEngine, prepare

CONFIG = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.005,
          "zero_optimization": {"stage": int(sys.argv[1])}}  # fmt: skip


def loss_of(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.float().square().sum() / 1000  # times the scale: still within what fp16 holds


def main() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    torch.manual_seed(0)
    plain = torch.nn.Linear(8, 3)
    expected = torch.nn.Linear(8, 3)
    expected.load_state_dict(plain.state_dict())
    reference = torch.optim.AdamW(expected.parameters(), lr=0.1)
    model, optimizer = prepare(
        plain, torch.optim.AdamW(plain.parameters(), lr=0.1), CONFIG, torch.float16, torch.device("cpu")
    )
    engine = DeepSpeedEngine(accelerator, model, optimizer)

    def weight() -> torch.Tensor:
        with engine.whole_weights():
            return plain.weight.detach().clone()

    inputs = torch.randn(5, 8)
    for step in range(3):
        for part, is_last in ((inputs[:2], False), (inputs[2:], True)):
            with engine.gathering(is_last):
                engine.backward(loss_of(model(part)), is_last)
        with torch.autocast("cpu", dtype=torch.float16):
            outputs = expected(inputs)
        loss_of(outputs).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.005))
        reference.step()
        reference.zero_grad()
        assert abs(engine.clip() - norm) < 0.01 * norm, step
        assert not engine.step()
        assert torch.allclose(weight(), expected.weight, atol=1e-3), step

    before, scale = weight(), engine.scaler.scale
    with engine.gathering(True):
        engine.backward(model(inputs).float().sum() * 1e4, is_last=True)  # times the scale: above what fp16 holds
    assert engine.clip() == math.inf
    assert engine.step()
    assert engine.scaler.scale == scale / 2
    assert torch.equal(weight(), before)

    with engine.gathering(True):
        engine.backward(loss_of(model(inputs)), is_last=True)
    assert 0 < engine.clip() < math.inf
    assert not engine.step()
    assert not torch.equal(weight(), before)
    print("OK")


if __name__ == "__main__":
    main()
