"""How a run comes to fit: the plan is made and printed before anything is downloaded, and its choices are put to work.

What decides the result (the optimizer, the head's bits) is chosen once per run and stays when the run goes on, on
another card too. The rest (budgets, offload, tiles) is chosen anew at each start. Knows options and plans; what the
choices do is told in `model/`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil
import torch

from onecard.config import FinetuneConfig
from onecard.console import ConfigError, say
from onecard.model.architecture import Architecture, architecture_of
from onecard.model.hardware import Hardware, choose_dtype
from onecard.model.load import check_stored_bits
from onecard.model.memory import CUDA_CONTEXT_BYTES, GIB
from onecard.model.plan import Card, Plan, make_plan
from onecard.model.plan_text import plan_lines
from onecard.train.recovery import Limits

RAM_LEFT_ALONE = 2 * GIB  # for the rest of the machine


def card_of(hardware: Hardware, vram_gib: float = 0.0) -> Card:
    """The card as the plan sees it: what is free on it, or `vram_gib` of it."""
    ram = max(0, psutil.virtual_memory().available - RAM_LEFT_ALONE)
    if not hardware.is_gpu:
        total = int(vram_gib * GIB) or hardware.total_bytes
        return Card(hardware.name, total, ram, is_gpu=False, repeats_kv=False)
    free, _ = torch.cuda.mem_get_info(hardware.device)
    held = torch.cuda.memory_reserved(hardware.device)
    # Of the context that the plan counts about half is there already, so it is not among what is free.
    total = int(vram_gib * GIB) or free + held + CUDA_CONTEXT_BYTES // 2
    return Card(hardware.name, min(total, hardware.total_bytes), ram, repeats_kv=not hardware.has_flash_attention)


def cap_memory(hardware: Hardware, vram_gib: float) -> None:
    """Let this process use no more than `vram_gib` of its card, so that a larger card behaves like a smaller one."""
    if vram_gib and hardware.is_gpu:
        # The limit is for tensors; on a card of that size the context would take its part, too.
        share = min(1.0, max(0.0, vram_gib * GIB - CUDA_CONTEXT_BYTES) / hardware.total_bytes)
        torch.cuda.set_per_process_memory_fraction(share, hardware.device)


def first_plan(config: FinetuneConfig, hardware: Hardware) -> Plan:
    """Plan from config.json alone, for samples of --cutoff_len tokens; prints it.

    Raises ModelError for a base that cannot be planned because it cannot be loaded either, and ConfigError for one
    whose weights lie quantised in another form than --bits.
    """
    check_stored_bits(config.model)
    model = architecture_of(config.model.model_path, trust_remote_code=config.model.trust_remote_code)
    plan = _plan(model, config, hardware)
    for line in plan_lines(plan):
        say(line)
    return plan


def settle(config: FinetuneConfig, hardware: Hardware, first: Plan, longest_row: int) -> tuple[FinetuneConfig, Plan]:
    """Plan again for the samples as they are; returns the config with every choice filled in.

    Raises ConfigError when it cannot fit, unless --ignore_plan.
    """
    plan = _plan(first.model, config, hardware, longest_row)
    before = {choice.flag: choice.value for choice in first.choices}
    for choice in plan.choices:
        if before.get(choice.flag) != choice.value:
            say(f"the longest sample has {plan.longest_row:,} tokens: {choice.flag} {choice.value} ({choice.reason})")
    if not plan.fits and not config.memory.ignore_plan:
        raise ConfigError("--vram" if config.memory.vram else "--model_path", _remedy(plan))
    return _filled(config, plan), plan


def keep_choices(config: FinetuneConfig, stored: dict[str, Any]) -> FinetuneConfig:
    """What an earlier start of this run chose and what therefore stays: `optimizer` and `head_bits`.

    Raises ConfigError where another value was typed.
    """
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
    """What `keep_choices` keeps, of a config that `settle` has filled in."""
    return {"optimizer": config.train.optimizer, "head_bits": config.memory.head_bits}


def limits_of(config: FinetuneConfig) -> Limits:
    """What passes through the model at once, of a config that `settle` has filled in."""
    memory, train = config.memory, config.train
    return Limits(
        train.micro_batch, train.micro_tokens, max(0, memory.loss_chunk), memory.offload_activations == "on",
        max(0, memory.mlp_tile),
    )  # fmt: skip


def _plan(model: Architecture, config: FinetuneConfig, hardware: Hardware, longest_row: int = 0) -> Plan:
    dtype, _ = choose_dtype(config.model.dtype, config.model.bits, hardware, model.model_type)
    card = card_of(hardware, config.memory.vram)
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
    return replace(config, memory=memory, train=train)


def _remedy(plan: Plan) -> str:
    """Why it does not fit, and what would."""
    need, have = plan.account.card_bytes / GIB, plan.card.total_bytes / GIB
    if plan.account.card_bytes <= plan.card.total_bytes:
        ram = plan.account.ram_bytes / GIB
        return f"{ram:.1f} GiB of RAM are needed for what leaves the card; close other programs or shorten --cutoff_len"
    return (
        f"{plan.model.name} would need {need:.2f} GiB of {have:.2f} with {plan.longest_row:,} tokens per sample; use a "
        "shorter --cutoff_len, fewer --bits, a smaller --lora_r or a smaller model (tools/plan_memory.py shows what "
        "each gives), or --ignore_plan to try it all the same"
    )
