"""The DeepSpeed configuration file: checked before anything heavy is loaded, and its open values filled in.

A step is a set of samples, the number format is ``--dtype``, the optimizer and its schedule are those of every run: the
file decides how optimizer state and gradients are divided over the processes, and nothing else. So a file written for
the Trainer of transformers works as it is. Knows JSON; imports neither torch nor DeepSpeed.

Keys: https://www.deepspeed.ai/docs/config-json/
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onecard.config.problems import Problem, refuse
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.config.zero_stage import AUTO, AUTO_STAGE, DIVIDES_BASE
from onecard.console import nearest, warn
from onecard.errors import ConfigError
from onecard.installation import IS_CLONE, install_command

FLAG = "--deepspeed"
STAGES = (1, 2, 3)
# What is set by flags; a value in the file is told to be unused.
_BY_FLAG = {
    "optimizer": "--optimizer", "scheduler": "--schedule", "gradient_clipping": "--max_grad_norm",
    "train_batch_size": "--total_batch", "train_micro_batch_size_per_gpu": "--micro_batch",
    "gradient_accumulation_steps": "--total_batch", "fp16": "--dtype", "bf16": "--dtype", "bfloat16": "--dtype",
    "torch_autocast": "--dtype", "amp": "--dtype",
}  # fmt: skip
# Others (tensor or sequence parallelism, curricula, compression ...) would change what a step computes.
_PASSED_ON = (
    "activation_checkpointing", "aio", "comms_logger", "communication_data_type", "csv_monitor", "data_types",
    "dump_state", "flops_profiler", "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients",
    "sparse_gradients", "steps_per_print", "wall_clock_breakdown",
)  # fmt: skip
# Of the section about ZeRO: what computes a step in another way, with coarser weights or gradients, or late updates.
_OTHER_ARITHMETIC = (
    "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "zenflow",
)  # fmt: skip
# Larger than any adapter: the optimizer then has one flat parameter for each of its groups, as in stages 1 and 2.
_WHOLE_GROUP = 10**15
# Methods whose layers call those of the base and read nothing of them.
WITH_STAGE_3 = ("lora", "bottleneck")
_OURS = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
_KNOWN = ("zero_optimization", *_BY_FLAG, *_PASSED_ON, *_OURS)


def check_deepspeed(config: FinetuneConfig) -> None:
    """Find out what keeps ``--deepspeed`` from working, and say what in its file is decided by flags instead.

    Raises ConfigError for a missing package, launcher or file, what its file may not ask for, and what does not go with
    its stage.
    """
    options = config.train
    if find_spec("deepspeed") is None:
        remedy = install_command("deepspeed")
        raise ConfigError(FLAG, f"needs the package deepspeed: {remedy}. Several GPUs work without it too: torchrun")
    if "LOCAL_RANK" not in os.environ:
        program = "finetune.py" if IS_CLONE else "-m onecard finetune"
        raise ConfigError(FLAG, "divides work over several processes; start them with torchrun --nproc_per_node N "
                          f"{program} ..., or leave the flag out")  # fmt: skip
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise ConfigError(FLAG, "was given to accelerate launch as well (--use_deepspeed, or its config file); there "
                          "choose plain multi-GPU, or start with torchrun")  # fmt: skip
    deepspeed_config(options)
    path = Path(str(options.deepspeed)).expanduser()
    content = _read(path)
    unused = [f"{key} ({flag})" for key, flag in _BY_FLAG.items() if _says_something(content.get(key, AUTO))]
    if unused:
        warn(f"{path} decides how state is divided; these parts are decided by flags instead: {', '.join(unused)}")
    if options.divides_base:
        refuse(_problems_of_stage_3(config))


def _problems_of_stage_3(config: FinetuneConfig) -> list[Problem]:
    """What does not go with weights that are put together where a module is called, and nowhere else."""
    found: list[Problem] = []
    lora, bits = config.lora, config.model.bits
    if bits < 16:
        found.append(("--bits", f"{bits} does not go with ZeRO stage 3 of {FLAG}, use 16 or 32; or stage 2, or --shard"
                      " in its place, which divides a base of 4 bits"))  # fmt: skip
    reads = {f"--peft_method {lora.peft_method}": lora.peft_method not in WITH_STAGE_3, "--use_dora": lora.use_dora,
             f"--lora_init {lora.lora_init}": lora.lora_init in ("pissa", "olora"),
             "--lora_target_parameters": lora.lora_target_parameters}  # fmt: skip
    found += [
        (FLAG, f"with ZeRO stage 3 does not go with {flag}, which needs weights of the base at hand; use plain LoRA, "
         "or stage 2") for flag, is_on in reads.items() if is_on
    ]  # fmt: skip
    if lora.trains_vocabulary:
        found.append((lora.trains_vocabulary, f"does not go with ZeRO stage 3 of {FLAG}, which keeps embeddings and "
                      "head whole; use stage 2"))  # fmt: skip
    of_memory = {"--mlp_tile": config.memory.mlp_tile > 0,
                 "--offload_activations": config.memory.offload_activations == "on"}  # fmt: skip
    found += [
        (flag, f"does not go with ZeRO stage 3 of {FLAG}, whose weights come and go with each call of a module; leave "
         "it out") for flag, is_on in of_memory.items() if is_on
    ]  # fmt: skip
    return found


def deepspeed_config(options: TrainOptions) -> dict[str, Any]:
    """The configuration that DeepSpeed gets: the file of ``--deepspeed`` with all that this project decides filled in.

    {"train_batch_size": "auto", "fp16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}
    -> {"zero_optimization": {"stage": 2, ...}, "gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": 1, ...}
    """
    path = Path(str(options.deepspeed)).expanduser()
    content = _read(path)
    unknown = [f"{key}{nearest(key, _KNOWN)}" for key in content if key not in _KNOWN and not key.startswith("_")]
    if unknown:
        raise ConfigError(FLAG, f"{path} holds what is not known or not supported here: {', '.join(unknown)}")
    zero = _zero(content, path)
    return _without_auto({key: value for key, value in content.items() if key in _PASSED_ON}) | {
        "zero_optimization": zero,
        "gradient_clipping": float(options.max_grad_norm),
        # The loop says itself which backward pass is the last one of a step.
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own CPU optimizer is compiled at first use and computes something slightly different.
        "zero_force_ds_cpu_optimizer": False,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as reason:
        raise ConfigError(FLAG, f"{path} cannot be read ({reason.strerror}); config-sample/deepspeed_zero2.json is "
                          "one to start from") from reason  # fmt: skip
    except json.JSONDecodeError as reason:
        raise ConfigError(FLAG, f"{path}, line {reason.lineno}: is not JSON ({reason.msg})") from reason
    except UnicodeDecodeError as reason:
        raise ConfigError(FLAG, f"{path} is not a text file ({reason})") from reason
    if not isinstance(config, dict):
        raise ConfigError(FLAG, f"{path} holds {type(config).__name__} where an object {{...}} is needed")
    return config


def _zero(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The section about ZeRO with its stage made sure."""
    section = config.get("zero_optimization")
    if not isinstance(section, dict):
        raise ConfigError(FLAG, f'{path} has no section "zero_optimization"; add "zero_optimization": {{"stage": 2}}')
    stage = section.get("stage", 0)
    stage = AUTO_STAGE if stage == AUTO else stage
    if stage not in STAGES or isinstance(stage, bool):
        raise ConfigError(FLAG, f"{path}: zero_optimization.stage is {stage!r}; 1, 2 and 3 work (0 is what runs "
                          "without --deepspeed)")  # fmt: skip
    other = [key for key in _OTHER_ARITHMETIC if section.get(key) not in (None, False, AUTO)]
    if other:
        raise ConfigError(FLAG, f"{path}: zero_optimization.{other[0]} would change what a step computes, which no "
                          "number of processes may do here; leave it out")  # fmt: skip
    for key in ("offload_optimizer", "offload_param"):
        device = section[key].get("device", AUTO) if isinstance(section.get(key), dict) else AUTO
        if device not in (AUTO, "none", "cpu"):
            raise ConfigError(FLAG, f"{path}: zero_optimization.{key}.device is {device!r}; cpu works")
    # Our checkpoints fit any number of processes without elastic_checkpoint. With round_robin_gradients DeepSpeed 0.19
    # says wrongly where a parameter's state lies; it only pays where gradients are copied to RAM.
    ours = {"stage": stage, "elastic_checkpoint": False, "round_robin_gradients": False}
    return _without_auto(section) | ours | ({"sub_group_size": _WHOLE_GROUP} if stage == DIVIDES_BASE else {})


def _says_something(section: Any) -> bool:
    """Whether a section asks for anything of its own: not so when it is switched off or all its values are "auto"."""
    if isinstance(section, dict) and section.get("enabled", True) in (False, AUTO):
        return False
    values = section.get("params", section) if isinstance(section, dict) else section
    return any(value != AUTO for value in _leaves(values))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    else:
        yield value


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """The section without values "auto", at any depth: DeepSpeed's own defaults take their place."""
    kept = {key: value for key, value in section.items() if value != AUTO}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}
