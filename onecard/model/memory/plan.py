"""The plan: which settings make a model fit a card, why, and what would be the longest context.

Layers are recomputed (gradient checkpointing) unless everything fits without it, with room. Then settings are given up
in the order of what they cost: first the token budget (nothing but time), then the loss in smaller pieces, activations
in RAM, the 8-bit optimizer, embeddings in RAM, a quantised head, tiled MLPs. Where all that is not enough, the layers
pass through the card and the rest is chosen anew. A setting that was given by hand is not touched. It knows options and
cards as numbers; the arithmetic is `estimate.py`'s, the words `report.py`'s, and nothing here touches a device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial

from onecard.config.base_model import n_gpus_of
from onecard.config.run import LARGEST_TOTAL_BATCH
from onecard.config.training import FinetuneConfig, MemoryOptions
from onecard.console import nearest
from onecard.errors import ConfigError
from onecard.model.lora.vocabulary import read_new_tokens
from onecard.model.memory.architecture import Architecture
from onecard.model.memory.estimate import GIB, MemoryConfig, MemoryEstimate, account, held_bytes
from onecard.model.memory.techniques import EMBEDDINGS, LOSS_CHUNKS, PlannedSetting, steps
from onecard.model.memory.tensor_sizes import FP32

DEFAULT_MICRO_TOKENS = 4096
LONGEST_TRIED = 2**21  # tokens
ROOM = 0.8  # of the card may be used without recomputed layers: the plan is not exact, and others use the card too
FROM_RAM = "the layers come from RAM, one after the other"
RECOMPUTE = "--gradient_checkpointing"
STREAM = "--stream_layers"


@dataclass(frozen=True)
class CardSpec:
    """A card, or a machine without one, as the plan sees it."""

    name: str
    total_bytes: int
    """What the run may use: the card's memory, or the machine's for a CPU."""
    ram_bytes: int
    """The machine's memory, where what leaves the card goes."""
    is_gpu: bool = True
    repeats_kv: bool = True
    """Its attention kernel copies keys and values for each query head: cards before Ampere, and unknown ones.

    In fp32 all do."""
    expandable_segments: bool = True
    """torch's allocator leaves no gaps between what is freed; see `model/allocator.py`."""


@dataclass(frozen=True)
class Plan:
    """What was chosen, what it needs, and whether that fits."""

    model: Architecture
    card: CardSpec
    setup: MemoryConfig
    account: MemoryEstimate
    choices: tuple[PlannedSetting, ...]
    longest_row: int
    """Tokens of the longest sample that the plan is for."""
    rows_per_sample: int = 1
    """2 where a sample is a pair of answers."""

    @property
    def fits(self) -> bool:
        """Whether the peak is within the card, and what moves to RAM within the RAM."""
        return self.account.card_bytes <= self.card.total_bytes and self.account.ram_bytes <= self.card.ram_bytes

    @property
    def micro_tokens(self) -> int:
        """The token budget of a micro-batch."""
        return self.setup.tokens


def make_plan(
    model: Architecture,
    config: FinetuneConfig,
    card: CardSpec,
    *,
    element_bytes: int = 2,
    longest_row: int = 0,
    only_fits: bool = False,
) -> Plan:
    """Choose what is auto in `config` so that `model` trains within `card`.

    element_bytes: of the arithmetic, 2 or 4. longest_row: tokens of the longest sample where the data are known;
    0: --cutoff_len. only_fits: whether it fits is all that is asked, which takes less time. The plan is returned
    whether it fits or not. Raises ConfigError for an adapter on layers that the model does not have, and for
    --train_new_tokens of a base without a list of them.
    """
    _check_targets(model, config)
    model = replace(model, checkpoints=model.checkpoints and config.lora.may_recompute)
    make = partial(
        _make_plan, model, card=card, element_bytes=element_bytes, longest_row=longest_row, only_fits=only_fits
    )
    plan = make(config)
    if plan.fits or not _may_stream(model, config, card):
        return plan
    streamed = make(replace(config, model=replace(config.model, stream_layers="on")))
    if not streamed.fits:
        return plan
    reason = f"{_gib(plan.account.card_bytes)} would be needed, {_gib(card.total_bytes)} are there; {FROM_RAM}"
    on = PlannedSetting(STREAM, "on", reason)
    return replace(streamed, choices=tuple(on if choice.flag == STREAM else choice for choice in streamed.choices))


def _may_stream(model: Architecture, config: FinetuneConfig, card: CardSpec) -> bool:
    options = config.model
    free = options.stream_layers == "auto" and not options.max_memory and not config.train.deepspeed
    free = free and not config.train.shard
    return free and card.is_gpu and model.checkpoints and bool(options.gradient_checkpointing)


def _make_plan(
    model: Architecture, config: FinetuneConfig, card: CardSpec, element_bytes: int, longest_row: int, only_fits: bool
) -> Plan:
    limit = config.data.cutoff_len * config.train.rows_per_sample
    longest = min(longest_row or limit, limit)
    setup = _first_setup(model, config, card, element_bytes, longest)
    choices = _typed(config)
    if config.model.gradient_checkpointing == "auto":
        setup, recompute = _recomputed(model, config, card, setup)
        choices.append(recompute)
    measured = partial(account, model, within=card.total_bytes, only_fits=only_fits)
    here = measured(setup)
    for step in steps(config, setup):
        if here.card_bytes <= card.total_bytes:
            break
        for changed, choice in step(setup):
            there = measured(changed)
            if there.tensor_bytes >= here.tensor_bytes:
                continue  # of no use here, such as embeddings in RAM whose head is tied to them
            if there.ram_bytes > max(card.ram_bytes, here.ram_bytes):
                choices += (
                    [] if choice.flag in {c.flag for c in choices} else [_without_ram(choice, setup, there, card)]
                )
                continue
            reason = f"{_gib(here.card_bytes)} would be needed, {_gib(card.total_bytes)} are there; {choice.reason}"
            made = [replace(choice, reason=reason)]
            if changed.offload_embeddings > setup.offload_embeddings and choice.flag != EMBEDDINGS:
                made.append(PlannedSetting(EMBEDDINGS, "on", f"--head_bits {changed.head_bits} leaves them free to go"))
            choices = [c for c in choices if c.flag not in {m.flag for m in made}] + made
            setup, here = changed, there
            if here.card_bytes <= card.total_bytes:
                break
    choices = _defaults(config, setup, choices)
    return Plan(model, card, setup, here, tuple(choices), longest, config.train.rows_per_sample)


def _recomputed(
    model: Architecture, config: FinetuneConfig, card: CardSpec, setup: MemoryConfig
) -> tuple[MemoryConfig, PlannedSetting]:
    """Whether layers are computed again in the backward pass: not where all fits without it, and that is certain."""
    without = replace(setup, gradient_checkpointing=False)
    if not model.checkpoints:
        which = model.model_type if config.lora.may_recompute else config.lora.peft_method
        return without, PlannedSetting(RECOMPUTE, "off", f"{which} layers cannot be computed again")
    needs_it = {"--offload_activations": setup.offload_activations, "--deepspeed": config.train.deepspeed,
                "--max_memory": config.model.max_memory, STREAM: setup.stream_layers}  # fmt: skip
    for flag, wanted in needs_it.items():
        if wanted:
            return setup, PlannedSetting(RECOMPUTE, "on", f"goes with {flag}")
    needed = account(model, without, card.total_bytes).card_bytes
    # Without a card, what other programs hold of the machine's memory is not there either.
    room = int(ROOM * (card.total_bytes if card.is_gpu else min(card.total_bytes, card.ram_bytes)))
    if needed <= room:
        return without, PlannedSetting(
            RECOMPUTE, "off", f"{_gib(needed)} are needed without it, which leaves room: faster"
        )
    return setup, PlannedSetting(
        RECOMPUTE, "on", f"{_gib(needed)} would be needed without it, {_gib(room)} may be used so"
    )


def fits_somehow(model: Architecture, config: FinetuneConfig, card: CardSpec, *, element_bytes: int = 2) -> bool:
    """Whether `make_plan` finds a setup that fits, in less time: what it gives up first is given up at once."""
    train = config.train
    model = replace(model, checkpoints=model.checkpoints and config.lora.may_recompute)
    if not train.micro_tokens and not train.micro_batch:
        config = replace(config, train=replace(train, micro_batch=1))
    if config.model.gradient_checkpointing == "auto" and model.checkpoints:
        config = replace(config, model=replace(config.model, gradient_checkpointing=True))
    may_stream = _may_stream(model, config, card)
    if _least_held(model, config, card, element_bytes) > card.total_bytes:
        if not may_stream:
            return False
        config = replace(config, model=replace(config.model, stream_layers="on"))  # the only way
        if _least_held(model, config, card, element_bytes) > card.total_bytes:
            return False
    return make_plan(model, config, card, element_bytes=element_bytes, only_fits=True).fits


def _least_held(model: Architecture, config: FinetuneConfig, card: CardSpec, element_bytes: int) -> int:
    """What lies on the card all the time where everything is given up that may be."""
    setup = _first_setup(model, config, card, element_bytes, config.data.cutoff_len)
    least = held_bytes(model, setup)
    for step in steps(config, setup):
        for changed, _ in step(setup):
            least = min(least, held_bytes(model, changed))
            setup = changed
    return least


def longest_context(model: Architecture, config: FinetuneConfig, card: CardSpec, *, element_bytes: int = 2) -> int:
    """The longest single row, in tokens, for which `make_plan` finds a setup that fits; 0 when none does."""

    def fits(length: int) -> bool:
        data = replace(config.data, cutoff_len=length)
        train = replace(config.train, micro_batch=0, micro_tokens=0)
        return fits_somehow(model, replace(config, data=data, train=train), card, element_bytes=element_bytes)

    low, high = 0, DEFAULT_MICRO_TOKENS
    while high <= LONGEST_TRIED and fits(high):  # upwards, since a plan costs more far beyond what a model is made for
        low, high = high, 2 * high
    if low == 0 and not fits(1):
        return 0
    low = max(1, low)
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _check_targets(model: Architecture, config: FinetuneConfig) -> None:
    if config.lora.peft_option:
        from onecard.model.lora.peft_config import check_peft_option  # only here: peft takes seconds

        check_peft_option(config.lora)
    targets = config.lora.lora_target_modules
    if config.lora.lora_target_parameters and not model.experts:
        raise ConfigError("--lora_target_parameters", f"{model.name} has no experts; leave it out")
    if config.lora.lora_target_parameters and config.model.bits == 4:
        raise ConfigError("--bits", "4 does not go with --lora_target_parameters; use 16, or 8 (experts stay in 16)")
    known = sorted({linear.name for linear in model.linears})
    names = [name.strip().rsplit(".", 1)[-1] for name in targets.split(",") if name.strip()]
    wrong = [name for name in names if name not in known and targets.strip() != "all-linear"]
    if wrong:
        listed = f"{model.name} has no layer {wrong[0]}{nearest(wrong[0], known)}; it has {', '.join(known)}"
        raise ConfigError("--lora_target_modules", listed)


def _without_ram(choice: PlannedSetting, setup: MemoryConfig, there: MemoryEstimate, card: CardSpec) -> PlannedSetting:
    """Why something that would help stays as it is."""
    now = {"--offload_activations": setup.offload_activations, "--offload_embeddings": setup.offload_embeddings}
    value = str(setup.head_bits) if choice.flag not in now else "on" if now[choice.flag] else "off"
    reason = f"{_gib(there.ram_bytes)} of RAM would be needed, {_gib(card.ram_bytes)} are there"
    return PlannedSetting(choice.flag, value, f"{choice.value} would help, but {reason}")


def _first_setup(
    model: Architecture, config: FinetuneConfig, card: CardSpec, element_bytes: int, longest: int
) -> MemoryConfig:
    """The setup with everything typed by hand in it and nothing given up yet."""
    memory, train = config.memory, config.train
    budget = train.micro_tokens or (train.micro_batch * longest if train.micro_batch else DEFAULT_MICRO_TOKENS)
    rows = max(1, budget // longest)
    if train.micro_batch:
        rows = min(rows, train.micro_batch)
    return MemoryConfig(
        bits=model.stored_bits or config.model.bits,
        element_bytes=element_bytes,
        rows=min(rows, train.total_batch or LARGEST_TOTAL_BATCH),
        length=longest,
        rank=config.lora.lora_r,
        targets=config.lora.lora_target_modules,
        expert_targets=config.lora.lora_target_parameters,
        use_dora=config.lora.use_dora,
        peft_method=config.lora.peft_method,
        peft_option=config.lora.peft_option,
        train_embeddings=bool(config.lora.train_embeddings),
        n_new_tokens=len(read_new_tokens(config.model.model_path)) if config.lora.train_new_tokens else 0,
        gives_reward=train.objective == "reward",
        only_vocabulary=config.lora.only_vocabulary,
        lora_dropout=config.lora.lora_dropout,
        optimizer="adamw" if train.optimizer == "auto" else train.optimizer,
        gradient_checkpointing=bool(config.model.gradient_checkpointing),
        loss_chunk=memory.loss_chunk if memory.loss_chunk > 0 else 0 if memory.loss_chunk < 0 else LOSS_CHUNKS[0],
        offload_activations=memory.offload_activations == "on",
        offload_embeddings=memory.offload_embeddings == "on",
        head_bits=16 if memory.head_bits == "auto" else int(memory.head_bits),
        mlp_tile=max(0, memory.mlp_tile),
        stream_layers=config.model.stream_layers == "on",
        eager_attention=config.model.attn_implementation == "eager",
        packs_texts=train.packs_texts,
        masks_parts=train.share_prompt is True,
        # FlashAttention takes no mask, and keys shared by queries are the kernel's own only in it.
        repeats_kv=card.is_gpu and (card.repeats_kv or element_bytes == FP32 or train.share_prompt is True),
        on_gpu=card.is_gpu,
        expandable_segments=card.expandable_segments,
        n_shards=int(os.environ.get("WORLD_SIZE", "1")) if train.divides_base else 1,
        n_cards=n_gpus_of(config.model.max_memory) if card.is_gpu else 1,
    )


def _typed(config: FinetuneConfig) -> list[PlannedSetting]:
    """The settings that were given by hand."""
    empty = MemoryOptions()
    found = [
        (f"--{name}", getattr(config.memory, name), getattr(empty, name))
        for name in ("loss_chunk", "offload_activations", "offload_embeddings", "head_bits", "mlp_tile")
    ]
    found += [("--micro_tokens", config.train.micro_tokens, 0), ("--micro_batch", config.train.micro_batch, 0)]
    found += [("--optimizer", config.train.optimizer, "auto")]
    found += [(STREAM, config.model.stream_layers, "auto")]
    if config.model.gradient_checkpointing != "auto":
        found.append((RECOMPUTE, "on" if config.model.gradient_checkpointing else "off", "auto"))
    return [
        PlannedSetting(flag, str(value), "given", by_hand=True) for flag, value, default in found if value != default
    ]


def _defaults(config: FinetuneConfig, setup: MemoryConfig, choices: list[PlannedSetting]) -> list[PlannedSetting]:
    """Say as well what did not have to be given up, so that every setting of the run is on the page."""
    named = {choice.flag for choice in choices}
    if "--micro_batch" in named:
        named.add("--micro_tokens")
    fits = "fits"
    plain = [
        PlannedSetting(RECOMPUTE, "on" if setup.gradient_checkpointing else "off", fits),
        PlannedSetting("--micro_tokens", f"{setup.tokens:,}", fits),
        PlannedSetting("--loss_chunk", str(setup.loss_chunk), fits),
        PlannedSetting("--offload_activations", "on" if setup.offload_activations else "off", fits),
        PlannedSetting("--optimizer", setup.optimizer, fits),
        PlannedSetting("--offload_embeddings", "on" if setup.offload_embeddings else "off", fits),
        PlannedSetting("--head_bits", str(setup.head_bits), fits),
        PlannedSetting("--mlp_tile", str(setup.mlp_tile or "off"), fits),
        PlannedSetting(STREAM, "on" if setup.stream_layers else "off", fits),
    ]
    order = [choice.flag for choice in plain]
    every = choices + [choice for choice in plain if choice.flag not in named]
    return sorted(every, key=lambda choice: order.index(choice.flag) if choice.flag in order else -1)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f} GiB"
