"""What is chosen for a run: by the plan, so that it fits, and by the number of rows, so that it learns and is saved.

The plan is made and printed before anything is downloaded. What decides the result (the optimizer, the head's bits,
samples per step) is chosen once per run and stays when the run goes on, on another card too. The rest (budgets,
recomputed layers, offload, tiles) is chosen anew at each start. Knows options and plans; what the choices do is told in
`model/`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from onecard.config.base_model import memory_map
from onecard.config.problems import Problem
from onecard.config.run import LARGEST_TOTAL_BATCH, TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.console import say, warn
from onecard.data.batches import auto_test_size
from onecard.errors import ConfigError
from onecard.installation import command
from onecard.model.allocator import HEAP_GROWTH, give_back_freed_ram, has_expandable_segments
from onecard.model.hardware import (
    Hardware,
    choose_dtype,
    count_gpus,
    free_and_total_bytes,
    limit_memory,
    reserved_bytes,
)
from onecard.model.load import check_stored_bits
from onecard.model.memory.architecture import Architecture, architecture_of
from onecard.model.memory.estimate import CUDA_CONTEXT_BYTES, GIB
from onecard.model.memory.plan import CardSpec, Plan, make_plan
from onecard.model.memory.report import plan_lines
from onecard.train.intervals import resolve_intervals, say_intervals
from onecard.train.loop import total_steps
from onecard.train.oom import MicroBatchLimits
from onecard.train.optim import default_learning_rate, warmup_steps
from onecard.train.resume import ResumePoint

RAM_LEFT_ALONE = 2 * GIB  # for the rest of the machine
# A step has half a percent of the rows (measured: docs/benchmarks.md; OpenAI's fine-tuning took 0.2 %), 4 at least.
SMALLEST_TOTAL_BATCH, STEPS_PER_EPOCH = 4, 200


def card_of(hardware: Hardware, vram_gib: float = 0.0, max_memory: str | None = None) -> CardSpec:
    """The card as the plan sees it: what is free on it (the fullest of those of --max_memory), or `vram_gib` of it."""
    ram = max(0, psutil.virtual_memory().available - RAM_LEFT_ALONE)
    if not hardware.is_gpu:
        total = int(vram_gib * GIB) or hardware.total_bytes
        return CardSpec(hardware.name, total, ram, is_gpu=False, repeats_kv=False)
    free = min(free_and_total_bytes(device)[0] + reserved_bytes(device) for device in _devices(hardware, max_memory))
    # Of the context that the plan counts about half is there already, so it is not among what is free.
    total = int(vram_gib * GIB) or free + CUDA_CONTEXT_BYTES // 2
    return CardSpec(
        hardware.name,
        min(total, hardware.total_bytes),
        ram,
        repeats_kv=not hardware.has_flash_attention,
        expandable_segments=has_expandable_segments(),
    )


def _devices(hardware: Hardware, max_memory: str | None) -> list[torch.device]:
    """The cards that the model lies on: those that --max_memory names, else the one of this process."""
    named = [place for place in memory_map(max_memory or "") or {} if isinstance(place, int) and place < count_gpus()]
    return [torch.device("cuda", index) for index in named] or [hardware.device]


def cap_memory(hardware: Hardware, vram_gib: float, max_memory: str | None = None) -> None:
    """Let this process use no more than `vram_gib` of each card, so that a larger card behaves like a smaller one."""
    if vram_gib and hardware.is_gpu:
        # The limit is for tensors; on a card of that size the context would take its part, too.
        share = min(1.0, max(0.0, vram_gib * GIB - CUDA_CONTEXT_BYTES) / hardware.total_bytes)
        for device in _devices(hardware, max_memory):
            limit_memory(share, device)


def first_plan(config: FinetuneConfig, hardware: Hardware) -> Plan:
    """Plan from config.json alone, for samples of --cutoff_len tokens; prints it.

    Raises ModelError for a base that cannot be planned because it cannot be loaded either, and ConfigError for one
    whose weights lie quantised in another form than --bits.
    """
    check_stored_bits(config.model)
    base = config.model
    model = architecture_of(base.model_path, trust_remote_code=base.trust_remote_code, rope_scaling=base.rope_scaling)
    plan = _plan(model, config, hardware, card_of(hardware, config.memory.vram, config.model.max_memory))
    for line in plan_lines(plan):
        say(line)
    return plan


def resolve(
    config: FinetuneConfig, hardware: Hardware, first: Plan, longest_row: int, accelerator: Accelerator | None = None
) -> tuple[FinetuneConfig, Plan]:
    """Plan again for the samples as they are; returns the config with every choice filled in.

    The processes of `accelerator` choose alike: for the smallest of their cards. Raises ConfigError when it cannot fit,
    unless --ignore_plan.
    """
    card = card_of(hardware, config.memory.vram, config.model.max_memory)
    if accelerator is not None and accelerator.num_processes > 1:
        cards = gather_object([card])
        card = replace(card, total_bytes=min(c.total_bytes for c in cards), ram_bytes=min(c.ram_bytes for c in cards))
    plan = _plan(first.model, config, hardware, card, longest_row)
    before = {choice.flag: choice.value for choice in first.choices}
    for choice in plan.choices:
        if before.get(choice.flag) != choice.value:
            say(f"the longest sample has {plan.longest_row:,} tokens: {choice.flag} {choice.value} ({choice.reason})")
    if not plan.fits and not config.memory.ignore_plan:
        raise ConfigError("--vram" if config.memory.vram else "--model_path", _remedy(plan))
    _bound_heap(plan)
    return _filled(config, plan), plan


def _bound_heap(plan: Plan) -> None:
    """Where the machine's RAM may not hold what a heap keeps beyond the tensors, have it keep nothing."""
    needed = plan.account.card_bytes
    if not plan.card.is_gpu and needed * HEAP_GROWTH > plan.card.ram_bytes and give_back_freed_ram():
        free = f"{plan.card.ram_bytes / GIB:.1f} GiB of RAM are free for {needed / GIB:.1f} planned"
        say(f"{free}: freed memory goes back to the system at once, which costs time")


def resolve_total_batch(config: FinetuneConfig, point: ResumePoint | None, n_rows: int) -> FinetuneConfig:
    """Fill in --total_batch where it is 0: what the run began with, or what suits the number of training rows."""
    if config.train.total_batch:
        return config
    batch = (as_it_began(point) or {}).get("total_batch")
    reason = f"for {n_rows:,} training rows" if batch is None else "as the run began"
    batch = batch or auto_total_batch(n_rows)
    say(f"{batch} samples per optimizer step, {reason}; --total_batch sets another number")
    return replace(config, train=replace(config.train, total_batch=batch))


def resolve_learning_rate(config: FinetuneConfig, model: Architecture, point: ResumePoint | None) -> FinetuneConfig:
    """Fill in --learning_rate where it is 0: what the run began with, or what suits family and width of the base."""
    if config.train.learning_rate:
        return config
    began = point.options.get("learning_rate") if point is not None and point.same_run else None
    rate, reason = default_learning_rate(
        model.model_type, model.hidden_size, config.train.objective, config.lora.peft_method
    )
    if began:
        rate, reason = began, "as the run began"
    say(f"learning rate {rate:.1e}, {reason}; --learning_rate sets another one")
    return replace(config, train=replace(config.train, learning_rate=rate))


def resolve_test_size(typed: float | Literal["auto"], point: ResumePoint | None, n_conversations: int) -> float:
    """--test_size as a share or a count: as typed, else what the run began with, else what suits so much data."""
    if typed != "auto":
        return typed
    began: float | None = (as_it_began(point) or {}).get("test_size")
    chosen = auto_test_size(n_conversations) if began is None else began
    if chosen >= 1 and began is None:
        say(f"--test_size auto keeps {chosen:,.0f} of {n_conversations:,} conversations for evaluation, not 5 %")
    return chosen


def as_it_began(point: ResumePoint | None) -> dict[str, Any] | None:
    """The sizes that the run began with, by option; None for a run that begins now."""
    return point.state.identity.get("batch", {}) if point is not None and point.same_run else None


def auto_total_batch(n_rows: int) -> int:
    """Samples per optimizer step for so many training rows: 4, 8, 16 or 32, the most that leave enough steps per epoch.

    Few steps teach little: 272 rows are 68 steps per epoch in fours and 9 in batches of 32.
    """
    batch = LARGEST_TOTAL_BATCH
    while batch > SMALLEST_TOTAL_BATCH and n_rows < batch * STEPS_PER_EPOCH:
        batch //= 2
    return batch


def resolve_lengths(config: FinetuneConfig, n_rows: int, n_test: int) -> FinetuneConfig:
    """Choose when to evaluate and save, say it, and warn of settings that cannot do what they say in so short a run."""
    options, total = config.train, total_steps(config.train, n_rows)
    for flag, problem in useless_settings(options, n_rows, n_test, total):
        warn(f"{flag}: {problem}")
    resolved = resolve_intervals(options, n_rows, n_test, total)
    say_intervals(options, resolved, n_test, total)
    return replace(config, train=resolved)


def useless_settings(options: TrainOptions, n_rows: int, n_test: int, total_steps: int) -> list[Problem]:
    """Settings that do not go with the length of the run, with what would."""
    found: list[Problem] = []
    if options.total_batch > n_rows:
        better = auto_total_batch(n_rows)
        found.append(("--total_batch", f"{options.total_batch} is more than the {n_rows} training rows: each epoch is "
                      f"one step. {better} would be chosen for them"))  # fmt: skip
    warmup = warmup_steps(options, total_steps)
    if warmup >= total_steps > 1:
        flag = "--warmup_steps" if options.warmup_steps else "--warmup_ratio"
        found.append((flag, f"the learning rate rises for {warmup} steps, but the run has {total_steps}: it never "
                      f"falls, and reaches {min(1.0, total_steps / warmup):.0%} of --learning_rate"))  # fmt: skip
    for flag, steps, done in (("--eval_steps", options.eval_steps * bool(n_test), "evaluated"),
                              ("--save_steps", options.save_steps, "saved")):  # fmt: skip
        if steps > total_steps:
            found.append(
                (
                    flag,
                    f"{steps} is more than the {total_steps} steps of the run: by it only the last is {done}",
                )
            )
    if options.early_stopping_patience and not n_test:
        found.append(("--early_stopping_patience", "needs rows to evaluate on (--test_size); the run goes to its end"))
    if options.final_weights in ("best", "balanced") and not n_test:
        found.append(("--final_weights", f"{options.final_weights} needs rows to evaluate on (--test_size); the last "
                      "weights are taken"))  # fmt: skip
    return found


def pin_choices(config: FinetuneConfig, point: ResumePoint | None) -> FinetuneConfig:
    """What an earlier start of this run chose and what therefore stays: `optimizer` and `head_bits`.

    Raises ConfigError where another value was typed.
    """
    stored = point.state.choices if point is not None else {}
    if "optimizer" in stored and config.train.optimizer not in ("auto", stored["optimizer"]):
        raise ConfigError(
            "--optimizer", f"{config.train.optimizer} cannot go on with the checkpoint's state of {stored['optimizer']}"
        )
    if "head_bits" in stored and config.memory.head_bits not in ("auto", stored["head_bits"]):
        raise ConfigError(
            "--head_bits", f"the run began with a head in {stored['head_bits']} bits; with others it is another run"
        )
    train = replace(config.train, optimizer=stored.get("optimizer", config.train.optimizer))
    memory = replace(config.memory, head_bits=stored.get("head_bits", config.memory.head_bits))
    return replace(config, train=train, memory=memory)


def choices_of(config: FinetuneConfig) -> dict[str, Any]:
    """What `pin_choices` keeps, of a config that `resolve` has filled in."""
    return {"optimizer": config.train.optimizer, "head_bits": config.memory.head_bits}


def limits_of(config: FinetuneConfig) -> MicroBatchLimits:
    """What passes through the model at once, of a config that `resolve` has filled in."""
    memory, train = config.memory, config.train
    return MicroBatchLimits(
        train.micro_batch, train.micro_tokens, max(0, memory.loss_chunk), memory.offload_activations == "on",
        max(0, memory.mlp_tile), row_tokens=config.row_tokens,
    )  # fmt: skip


def _plan(
    model: Architecture, config: FinetuneConfig, hardware: Hardware, card: CardSpec, longest_row: int = 0
) -> Plan:
    dtype, _ = choose_dtype(config.model.dtype, config.model.bits, hardware, model.model_type)
    return make_plan(model, config, card, element_bytes=dtype.itemsize, longest_row=longest_row)


def _filled(config: FinetuneConfig, plan: Plan) -> FinetuneConfig:
    setup = plan.setup
    budget = config.train.micro_tokens or (0 if config.train.micro_batch else plan.micro_tokens)
    memory = replace(
        config.memory,
        loss_chunk=setup.loss_chunk or -1,
        offload_activations="on" if setup.offload_activations else "off",
        offload_embeddings="on" if setup.offload_embeddings else "off",
        head_bits=str(setup.head_bits),  # type: ignore[arg-type]
        mlp_tile=setup.mlp_tile or -1,
    )
    train = replace(config.train, optimizer=setup.optimizer, micro_tokens=budget)  # type: ignore[arg-type]
    streams: Any = "on" if setup.stream_layers else "off"
    model = replace(config.model, gradient_checkpointing=setup.gradient_checkpointing, stream_layers=streams)
    return replace(config, model=model, memory=memory, train=train)


def _remedy(plan: Plan) -> str:
    """Why it does not fit, and what would."""
    need, have = plan.account.card_bytes / GIB, plan.card.total_bytes / GIB
    if plan.account.card_bytes <= plan.card.total_bytes:
        ram = plan.account.ram_bytes / GIB
        return f"{ram:.1f} GiB of RAM are needed for what leaves the card; close other programs or shorten --cutoff_len"
    return (
        f"{plan.model.name} would need {need:.2f} GiB of {have:.2f} with {plan.longest_row:,} tokens per sample; use a "
        f"shorter --cutoff_len, fewer --bits, a smaller --lora_r or a smaller model ({command('plan')} shows what "
        "each gives), or --ignore_plan to try it all the same"
    )
