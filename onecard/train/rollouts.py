"""Answers to the prompts of a step, sampled by the weights as they are, with their rewards and the log of both.

What is drawn is a function of (seed, step, prompt, number of the answer), so a run that goes on draws the same. Knows
a `Run`; the sampler is handed in (inference/rollouts.py), since packages of one layer do not know each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from onecard.data.batches import micro_batches
from onecard.errors import ModelError
from onecard.model.out_of_memory import give_back_memory, is_out_of_memory
from onecard.objectives.grpo import GroupRelative, Rollout, RolloutView, rollout_of
from onecard.objectives.rewards import Answer, Rewards
from onecard.train.run import Run, RunEvent
from onecard.train.step_log import StepLog

Sampler = Callable[[Sequence[list[int]], Sequence[int], float], Sequence[Any]]


class Rollouts:
    """Samples and rewards answers for one run."""

    def __init__(self, sample: Sampler, rewards: Rewards, log: StepLog, at_once: int) -> None:
        """sample: prompts of ids, numbers of answers and a temperature to answers with ids, text and ended.

        at_once: answers that are sampled together.
        """
        self._sample, self._rewards = sample, rewards
        self._log, self._at_once = log, at_once

    def of_step(self, run: Run, indices: np.ndarray) -> RolloutView:
        """The rollouts of the prompts of the present step, those of a prompt side by side; alike on every process."""
        objective, n = _objective(run), run.options.rollouts
        wanted = [(int(index), k) for index in indices for k in range(n)]
        # step, prompt and k in a number of its own each; the seed is the sampler's.
        numbers = [(run.state.step * len(run.train_samples) + index) * n + k for index, k in wanted]
        samples = [run.train_samples[index] for index, _ in wanted]
        every = self._sampled(run, samples, numbers, run.options.rollout_temperature)
        if run.options.log_rollouts and run.accelerator.is_main_process:
            self._log.write(run.state.step + 1, map(_row, every))
        groups = [every[start : start + n] for start in range(0, len(every), n)]
        parts = run.train_samples.parts
        view = objective.rollout_view(groups, None if parts is None else parts[indices])
        if run.options.grpo_updates > 1:
            self._keep_log_probs(run, objective, view)
        return view

    def evaluate(self, run: Run, samples: Sequence[Rollout]) -> torch.Tensor:
        """The sums of the likeliest answers to held-out prompts, as of `evaluate.Evaluator.sums`."""
        return _objective(run).evaluation_sums(self._sampled(run, samples, range(len(samples)), 0.0))

    def close(self) -> None:
        self._rewards.close()

    def _sampled(
        self, run: Run, samples: Sequence[Rollout], numbers: Sequence[int], temperature: float
    ) -> list[Rollout]:
        """An answer to each sample's prompt with its reward; each process makes its share."""
        rank, n_processes = run.accelerator.process_index, run.accelerator.num_processes
        own = range(rank, len(samples), n_processes)
        with _answering(run):
            answers = self._answers(run, [samples[i] for i in own], [numbers[i] for i in own], temperature)
        found = []
        for place, answer in zip(own, answers, strict=True):
            row = samples[place]
            fullness = len(answer.ids) / run.options.rollout_max_tokens
            reward, parts = self._rewards.of(Answer(answer.text, json.loads(row.fields), row.record, fullness))
            found.append((place, answer, reward, parts))
        every = gather_object(found) if n_processes > 1 else found
        return [
            rollout_of(samples[place], answer.ids, text=answer.text, ended=answer.ended, rewards=parts, reward=reward)
            for place, answer, reward, parts in sorted(every, key=lambda each: each[0])
        ]

    def _answers(self, run: Run, samples: Sequence[Rollout], numbers: Sequence[int], temperature: float) -> list[Any]:
        """In the order of the samples; those of about one length are asked together, fewer where memory runs out."""
        lengths = np.array([sample.n_prompt for sample in samples], dtype=np.int64)
        found: list[Any] = [None] * len(samples)
        waiting = [np.arange(len(samples))]
        while waiting:
            batch = waiting.pop()
            if len(batch) > self._at_once:
                waiting += micro_batches(batch, lengths, micro_batch=self._at_once)
                continue
            try:
                places = batch.tolist()
                answers = self._sample([samples[i].prompt for i in places], [numbers[i] for i in places], temperature)
            except (RuntimeError, MemoryError) as reason:
                if not is_out_of_memory(reason):
                    raise
                answers = None
            if answers is None:
                waiting.append(batch)
                self._make_room(run, len(batch))
                continue
            for place, answer in zip(batch, answers, strict=True):
                found[place] = answer
        return found

    def _keep_log_probs(self, run: Run, objective: GroupRelative, view: RolloutView) -> None:
        """Those of the answers under the weights that sampled them, against which several updates are measured."""
        for micro in micro_batches(np.arange(len(view)), view.lengths, **run.limits.cut):
            rollouts = [view[int(i)] for i in micro]
            batch = {name: tensor.to(run.accelerator.device) for name, tensor in objective.collate(rollouts).items()}
            with _answering(run):
                found = objective.log_probs(run.plain_model, batch, run.limits.loss_chunk)
            for each, row in zip(rollouts, found.tolist(), strict=True):
                each.old = row[each.n_prompt - 1 : len(each.input_ids) - 1]

    def _make_room(self, run: Run, n_rows: int) -> None:
        """Raises ModelError where a single answer does not fit."""
        give_back_memory()
        if n_rows == 1:
            raise ModelError(f"out of memory at step {run.state.step + 1} while one answer was sampled; use a smaller "
                             "--rollout_max_tokens, or fewer --bits")  # fmt: skip
        self._at_once = n_rows // 2
        change = f"{self._at_once} answers are sampled at once instead of {n_rows}"
        message = f"step {run.state.step + 1}: out of memory; {change}. What is drawn does not change."
        run.events.append(RunEvent({"step": run.state.step + 1, "event": "out_of_memory", "change": change}, message))


def _row(rollout: Rollout) -> dict[str, Any]:
    """What the log keeps of an answer."""
    fields = json.loads(rollout.fields)
    return {"record": rollout.record, "prompt": fields["prompt"], "answer": rollout.text,
            "reference": fields["reference"], "reward": rollout.reward, "rewards": rollout.rewards,
            "n_tokens": len(rollout.input_ids) - rollout.n_prompt, "ended": rollout.ended}  # fmt: skip


def _objective(run: Run) -> GroupRelative:
    found = run.objective
    assert isinstance(found, GroupRelative)
    return found


@contextmanager
def _answering(run: Run) -> Iterator[None]:
    """The model as it answers: without dropout, noise and recomputed layers, in the arithmetic of training."""
    model = run.plain_model
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), run.accelerator.autocast():
            yield
    finally:
        model.train(was_training)
