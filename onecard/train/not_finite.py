"""Where a loss or gradient that is not finite comes from: the base, some records, or the adapter.

The base is asked alone, without the adapter, for the records of the step and some others. Knows a `Run`; changes
nothing in it, since the run ends here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from onecard.console import few
from onecard.installation import command
from onecard.model.lora.methods import is_adapter_weight
from onecard.model.memory_saving.streamed_layers import tensors_in_turn
from onecard.model.out_of_memory import give_back_memory, is_out_of_memory
from onecard.model.trained import has_adapter, without_adapter
from onecard.train.run import Run

N_OTHERS = 4  # records from outside the step: where the base fails on all of these too, no record is to blame


def explain(run: Run, indices: np.ndarray, what: str) -> str:
    """The message that ends the run, with the cause as far as it can be found and what to do about it."""
    run.engine.forget()
    give_back_memory()
    head = f"step {run.state.step + 1}: {what}. This step was not taken; the newest checkpoint is finite.\n"
    try:
        return head + _cause(run, indices)
    except (RuntimeError, MemoryError) as reason:
        if not is_out_of_memory(reason):
            raise
    return head + _unknown(run, indices)


def _cause(run: Run, indices: np.ndarray) -> str:
    others = np.setdiff1d(np.arange(min(len(run.train_samples), len(indices) + N_OTHERS)), indices)[:N_OTHERS]
    failing = [number for number in indices if not _is_finite(run, int(number))]
    if not has_adapter(run.plain_model):
        tensors = [*_broken_tensors(run)]
        if tensors:
            return f"The weights themselves are not finite ({few(tensors)}): they began so, or diverged."
        of_which = f"no finite loss for {len(failing)} of" if failing else "a finite loss for each of"
        return f"The weights are finite, and give {of_which} its {len(indices)} records: " + _unknown(run, indices)
    if not failing:
        broken = [name for name in _broken_tensors(run) if is_adapter_weight(name)]
        if broken:
            return (
                f"The adapter itself is not finite ({few(broken)}): it began so, or diverged. Start from another one."
            )
        return "The base alone gives a finite loss for each record of the step: " + _unknown(run, indices)
    tensors = [name for name in _broken_tensors(run) if not is_adapter_weight(name)]
    told = f"Its tensors {few(tensors)} hold NaN or Inf" if tensors else "Its tensors are finite"
    n_asked = len(indices) + len(others)
    if len(failing) == len(indices) and n_asked > 1 and not any(_is_finite(run, int(number)) for number in others):
        remedy = "download or convert it again" if tensors else "the arithmetic overflows: use --dtype fp32"
        return f"It is not the data: the base of --model_path computes no record without the adapter. {told}; {remedy}."
    listed = "\n  ".join(run.records(np.array(failing)))
    return (
        f"The base alone, without the adapter, cannot compute these records of the step:\n  {listed}\n"
        f"{told}. Look at the records with {command('inspect')} and leave them out, or use --dtype fp32."
    )


def _unknown(run: Run, indices: np.ndarray) -> str:
    records = "\n  ".join(run.records(indices))
    return (
        f"lower --learning_rate, or use --dtype fp32. The step's records are:\n  {records}\n"
        f"Look at them with {command('inspect')}."
    )


def _is_finite(run: Run, number: int) -> bool:
    """Whether the base without an adapter has a finite loss for one record."""
    with torch.no_grad(), without_adapter(run.plain_model), run.accelerator.autocast():
        loss, _ = run.objective.loss_of(
            run.plain_model, [run.train_samples[number]], run.accelerator.device, chunk_tokens=run.limits.loss_chunk
        )
    return bool(torch.isfinite(loss))


def _broken_tensors(run: Run) -> Iterator[str]:
    """The unquantised tensors that hold NaN or Inf, by the names that they have in files."""
    with run.engine.whole_weights():
        for name, tensor in tensors_in_turn(run.plain_model):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                yield name.removeprefix("base_model.model.").replace(".base_layer", "")
