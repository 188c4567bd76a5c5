"""The optimizer and its learning rate.

The optimizer's moments lie in the checkpoint. Its hyper-parameters (learning rate, weight decay) are those of the
options at every start, and the learning rate of a step is a pure function of options, step and total steps, so a
resumed run cannot drift. Knows nothing of data, loss or checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from transformers import get_scheduler

from onecard.config.lora import LoraOptions
from onecard.config.objectives import PREFERENCE_OBJECTIVES
from onecard.config.run import TrainOptions
from onecard.errors import ConfigError
from onecard.model.hardware import synchronize
from onecard.model.lora.methods import is_adapter_weight, starts_at_zero
from onecard.model.quantization import allocate_bitsandbytes_state, optimizer_class

FEWEST_WARMUP_STEPS = 5
DECAY_SHARE = 0.2  # of warmup_stable_decay: 10 to 20 % of the steps serve best (arXiv:2405.18392)
# The published rule: 5e-5, ten times that for LoRA, by (2000 / width) to a power of the family's own. A base narrower
# than 2,000 gets what 2,000 gets, so that a toy is not trained ever faster. https://thinkingmachines.ai/blog/lora/
LORA_RATE, RULE_WIDTH, LORA_OVER_FULL = 5e-4, 2000, 10
POWER_OF_FAMILY = {"llama": 0.781, "qwen": 0.0775}
USUAL_LORA_RATE = 2e-4
# What a method's authors took where LoRA's rate would barely move it: (IA)3 has one number per output, no products.
# T-Few, https://arxiv.org/abs/2205.05638, section 3: 3e-3.
PUBLISHED_RATES = {  # of those in front of the texts what PEFT's comparison had for the starts that are used here
    "ia3": (3e-3, "as (IA)3 was published with"), "prompt_tuning": (1e-3, "as PEFT compares prompt tuning"),
    "p_tuning": (1e-4, "as PEFT compares p-tuning"), "prefix_tuning": (5e-3, "as PEFT compares prefix tuning"),
}  # fmt: skip
# VeRA learns by ten times what LoRA does in PEFT's comparison of methods: 1e-3 and 1e-4, commit 5d602fd,
# https://github.com/huggingface/peft/tree/main/method_comparison/MetaMathQA/experiments/vera
VERA_OVER_LORA = 10
USUAL_PAIR_RATE = 5e-6  # TRL's example of DPO with LoRA
USUAL_SCORE_RATE = 1e-4  # TRL's default of RewardConfig
USUAL_REWARD_RATE = 1e-5  # ten times TRL's for GRPO of whole weights, by the rule for LoRA


def default_learning_rate(
    model_type: str, hidden_size: int, objective: str = "sft", method: str = "lora"
) -> tuple[float, str]:
    """The rate on this base, to two digits, and why: for LoRA 2.9e-4 for Llama-3.1-8B, 4.7e-4 for Qwen3-8B.

    A tenth of it for weights of the base themselves, by the same rule; what was published for a method of its own kind.
    """
    if LoraOptions(method).tunes_base:
        rate, reason = default_learning_rate(model_type, hidden_size, objective)
        return float(f"{rate / LORA_OVER_FULL:.1e}"), f"a tenth of what LoRA gets, {reason}"
    if objective in PREFERENCE_OBJECTIVES:
        return USUAL_PAIR_RATE, "usual for preference pairs"
    if objective == "reward":
        return USUAL_SCORE_RATE, "usual for reward models"
    if objective == "grpo":
        return USUAL_REWARD_RATE, "usual for learning from rewards"
    if method == "vera":
        rate, reason = default_learning_rate(model_type, hidden_size, objective)
        return float(f"{rate * VERA_OVER_LORA:.1e}"), f"ten times what LoRA gets, as PEFT compares VeRA, {reason}"
    if method in PUBLISHED_RATES:
        return PUBLISHED_RATES[method]
    family = next((name for name in POWER_OF_FAMILY if model_type.startswith(name)), None)
    if family is None:
        return USUAL_LORA_RATE, f"usual for LoRA: no rule is known for {model_type}"
    rate = LORA_RATE * (RULE_WIDTH / max(RULE_WIDTH, hidden_size)) ** POWER_OF_FAMILY[family]
    return float(f"{rate:.1e}"), f"by the rule of {family} models for a width of {hidden_size:,}"


def build_optimizer(model: torch.nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW in the asked-for form over the trainable parameters only.

    With ``--loraplus_ratio`` the B matrices (and magnitude vectors stay with A) learn that many times faster than the
    A matrices: LoRA+, https://arxiv.org/abs/2402.12354. Parameters are sorted by name, so the state's order does not
    depend on how the model was built.
    """
    named = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    fast = [p for name, p in named if options.loraplus_ratio and starts_at_zero(name)]
    # Decay draws the matrices of LoRA back to the base, but rows and whole weights beside it away from the base: to
    # zero. Where there is no adapter, all but norms and biases decay, as in transformers' Trainer.
    tunes_base = not any(is_adapter_weight(name) for name, _ in named)
    whole = [p for name, p in named if not is_adapter_weight(name) and (p.dim() < 2 or not tunes_base)]
    others = {id(p) for p in [*fast, *whole]}
    plain = [p for _, p in named if id(p) not in others]
    rate = options.learning_rate
    groups: list[dict[str, Any]] = [{"params": plain, "lr": rate, "initial_lr": rate}]
    if fast:
        fast_rate = rate * options.loraplus_ratio
        groups.append({"params": fast, "lr": fast_rate, "initial_lr": fast_rate})
    if whole:
        groups.append({"params": whole, "lr": rate, "initial_lr": rate, "weight_decay": 0.0})
    make: Any = optimizer_class("adamw" if options.optimizer == "auto" else options.optimizer)
    # Fused: the plain one makes copies as large as all adapters, and a step that ran out of memory half-way through
    # could not be taken back.
    fused = {"fused": True} if make is torch.optim.AdamW and all(p.is_cuda for _, p in named) else {}
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": options.weight_decay, **fused}
    return make(groups, lr=options.learning_rate, **settings)


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its state now, all zeros, as the first step would: it is then in the memory probe's peak.

    The state that a step makes of it is the same, bit for bit. For AdamW of torch and the optimizers of bitsandbytes.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        allocate_bitsandbytes_state(optimizer)
        return
    stored = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stored["state"] = {
        number: {
            "step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)
        }
        for number, parameter in enumerate(parameters)
    }  # fmt: skip
    optimizer.load_state_dict(stored)


def tidy_loaded_state(optimizer: Any) -> None:
    """Let the state that an optimizer of bitsandbytes was given take no more of the card than its own did.

    Loading gives each tensor a table of its own, and puts paged state onto the card for good; here they share one
    again, and paged state returns into paged memory. Values stay as they are. Others are left alone.
    """
    tables: dict[tuple[str, torch.device], torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        for name, table in (("qmap1", "dynamic"), ("qmap2", "udynamic")):
            if name in state:
                own = optimizer.name2qmap[table]
                state[name] = tables.setdefault((name, parameter.device), own.to(parameter.device))
        for name in ("state1", "state2"):
            if name in state and getattr(optimizer, "is_paged", False) and parameter.is_cuda:
                state[name] = _paged(optimizer, parameter, state[name])


def _paged(optimizer: Any, parameter: torch.Tensor, loaded: torch.Tensor) -> torch.Tensor:
    buffer = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)
    synchronize(parameter.device)  # it is being filled with zeros
    return buffer.copy_(loaded)


def warmup_steps(options: TrainOptions, total_steps: int) -> int:
    """Steps of rising learning rate: ``--warmup_steps``, or ``--warmup_ratio`` of all steps, rounded up.

    By the ratio a short run has five, or a fifth of its steps: 3 % of 30 would be one, which is no warm-up.
    """
    by_ratio = math.ceil(options.warmup_ratio * total_steps)
    return options.warmup_steps or max(by_ratio, min(FEWEST_WARMUP_STEPS, total_steps // 5) if by_ratio else 0)


def learning_rate_factor(options: TrainOptions, step: int, total_steps: int) -> float:
    """The learning rate of a step, counted from 0, as a share of the highest one.

    It rises in equal parts over the warm-up, whose first step is already above 0; the rest of the steps is a schedule
    of transformers without a warm-up. For 2 warm-up steps of 6, linear: 0.5, 1, 1, 0.75, 0.5, 0.25.
    """
    warmup = warmup_steps(options, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    length = max(1, total_steps - warmup)
    settings: dict[str, float] = options.schedule_settings
    if options.schedule == "inverse_sqrt" and warmup:
        settings = {"timescale": warmup, **settings}
    if options.schedule == "warmup_stable_decay":
        settings = {"num_decay_steps": math.ceil(DECAY_SHARE * total_steps), **settings}
        settings["num_decay_steps"] = min(length, round(settings["num_decay_steps"]))
    course = _course(options.schedule, length, options.learning_rate, tuple(settings.items()))
    return course(min(step - warmup, length))


@lru_cache(maxsize=16)
def _course(
    schedule: str, length: int, learning_rate: float, settings: tuple[tuple[str, float], ...]
) -> Callable[[int], float]:
    """The share of the highest rate after the warm-up, by step, from the schedule of transformers of this name."""
    one = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate or 1.0)
    whole = {name: int(value) if value == int(value) else value for name, value in settings}
    made = get_scheduler(schedule, one, num_warmup_steps=0, num_training_steps=length, scheduler_specific_kwargs=whole)
    return made.lr_lambdas[0]


def set_learning_rate(optimizer: Any, options: TrainOptions, step: int, total_steps: int) -> float:
    """Give every parameter group the learning rate of this step; returns that of the first group."""
    factor = learning_rate_factor(options, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def with_present_options(stored: dict[str, Any], optimizer: Any, options: TrainOptions) -> dict[str, Any]:
    """A stored optimizer state with the hyper-parameters of `optimizer`, which was built from the present options.

    Raises ConfigError where its parameter groups are others: --loraplus_ratio was switched on or off.
    """
    present = optimizer.param_groups
    # Their number alone: DeepSpeed joins the parameters of a group into one.
    if len(present) != len(stored["param_groups"]):
        began, hint = ("without", "0") if options.loraplus_ratio else ("with", "its ratio (16 is usual)")
        raise ConfigError(
            "--loraplus_ratio",
            f"{options.loraplus_ratio:g} cannot go on with this optimizer state: the run began {began} LoRA+. Give "
            f"{hint}, or start a new run from its weights with --init_adapter",
        )
    groups = [
        {**then, **{name: value for name, value in now.items() if name != "params"}}
        for then, now in zip(stored["param_groups"], present, strict=True)
    ]
    return {**stored, "param_groups": groups}
