#!/usr/bin/env python3
"""Attention of packed rows text by text against a mask over whole rows: CPU milliseconds, forward and backward.

    python benchmarks/packed_attention.py [--rounds 9]

One layer's attention with the heads of sample/tiny-llama, in fp32, over 2,048 tokens in rows of 512 and of 2,048 that
texts of 47 to 86 tokens fill, as those of `packing.py` are. Both ways are taken in turns and must give the same
numbers. Seconds are CPU seconds of this process. Writes benchmarks/results/packed_attention.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from onecard.config.parsing import parse  # noqa: E402
from onecard.console import run_main  # noqa: E402
from onecard.errors import ModelError  # noqa: E402

HEADS, KEY_HEADS, WIDTH = 4, 2, 64
N_TOKENS, SHORTEST, LONGEST = 2048, 47, 86
TOLERANCE = 1e-5


@dataclass
class AttentionOptions:
    """What is compared."""

    rounds: int = 9
    """Rounds; medians are reported."""
    seed: int = 42
    """Of lengths and numbers."""
    output: str = str(ROOT / "benchmarks" / "results" / "packed_attention.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""


def main(argv: list[str] | None = None) -> None:
    options = parse(AttentionOptions, argv, description=__doc__ or "")

    from benchmarks.machine import machine, say_table, write_result

    rows = [compare(length, options) for length in (512, N_TOKENS)]
    say_table(["row", "texts", "mask, ms", "by text, ms", "mask / by text"], [[*row.values()] for row in rows])
    given = asdict(options) | {"output": Path(options.output).name}
    write_result(options.output, {"options": given, "rows": rows, "machine": machine("cpu")})


def compare(length: int, options: AttentionOptions) -> dict[str, Any]:
    """Both ways over rows of so many tokens. Raises ModelError where they do not compute the same."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from onecard.model.packed_attention import attend_by_text

    torch.manual_seed(options.seed)
    config = LlamaConfig(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS,
                         num_hidden_layers=1, intermediate_size=8, vocab_size=8)  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    layer, n_rows = model.model.layers[0].self_attn, N_TOKENS // length
    positions = torch.stack([filled(length) for _ in range(n_rows)])
    sizes = [(n_rows, length, heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    sides = [torch.randn(size).transpose(1, 2).requires_grad_() for size in sizes]
    gradient = torch.randn(n_rows, length, HEADS, WIDTH)

    def once() -> tuple[float, list[Any]]:
        begun = time.process_time()
        mask = create_causal_mask(model.config, torch.zeros(n_rows, length, 1), None, None, positions)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, sdpa_attention_forward)
        out, _ = attend(layer, *sides, mask, scaling=WIDTH**-0.5, dropout=0.0)
        found = [out.detach(), *torch.autograd.grad(out, sides, gradient)]
        return 1e3 * (time.process_time() - begun), found

    assert attend_by_text(model)
    by_text = model.config._attn_implementation
    taken: dict[str, list[float]] = {"sdpa": [], by_text: []}
    for turn in range(options.rounds + 1):  # the first one warms up
        results = []
        for name, seconds in taken.items():
            model.set_attn_implementation(name)
            spent, found = once()
            results.append(found)
            seconds += [spent] if turn else []
        apart = max(float((one - other).abs().max()) for one, other in zip(*results, strict=True))
        if not apart <= TOLERANCE:
            raise ModelError(f"the two ways lie {apart:.1e} apart, so times mean nothing")
    mask_ms, text_ms = (statistics.median(seconds) for seconds in taken.values())
    n_texts = int((positions == 0).sum())
    return {"row_tokens": length, "texts": n_texts, "mask_ms": round(mask_ms, 1), "by_text_ms": round(text_ms, 1),
            "mask_to_by_text": round(mask_ms / text_ms, 2)}  # fmt: skip


def filled(length: int) -> Any:
    """The positions of a row that texts of drawn lengths fill, the last one being what is left; int64 (length,)."""
    import torch

    positions: list[int] = []
    while len(positions) < length:
        n = int(torch.randint(SHORTEST, LONGEST + 1, ()))
        positions += range(min(n, length - len(positions)))
    return torch.tensor(positions)


if __name__ == "__main__":
    sys.exit(run_main(main))
