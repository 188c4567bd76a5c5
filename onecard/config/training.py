"""Everything that a training run needs, declared once, and which settings do not go together.

The options of base, data, adapter and run stand beside it, of inference, too. A field's docstring is its help text;
flags, YAML keys and documentation derive from these classes (see `parsing.py`). They know types, defaults and
contradictions. They do not know the disk, the card or the model, and import nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from onecard.config.base_model import ModelOptions, n_gpus_of
from onecard.config.data import DataOptions
from onecard.config.lora import NOT_IN_4_BITS, VIRTUAL_TOKENS, LoraOptions
from onecard.config.objectives import PREFERENCE_OBJECTIVES, WITH_REFERENCE
from onecard.config.problems import Problem
from onecard.config.run import TrainOptions
from onecard.installation import command

Contradiction = tuple[str, object, str]  # a flag, whether what it says cannot be (by truth), and why


@dataclass
class MemoryOptions:
    """How the run is made to fit; what is auto is chosen by the plan, which prints its reasons."""

    vram: float = 0.0
    """GiB of the card that the run may use; 0: all that is free."""
    loss_chunk: int = 0
    """Supervised tokens whose logits exist at once; 0: chosen by the plan; -1: all of a micro-batch."""
    offload_activations: Literal["auto", "on", "off"] = "auto"
    """Keep the inputs of the layers in RAM until their gradients are computed."""
    offload_embeddings: Literal["auto", "on", "off"] = "auto"
    """Keep the frozen input embeddings in RAM."""
    head_bits: Literal["auto", "4", "8", "16"] = "auto"
    """Bits of the frozen output head; 4 and 8 change the logits a little."""
    mlp_tile: int = 0
    """Tokens that pass through an MLP at once; 0: chosen by the plan; -1: all of a micro-batch."""
    kernels: Literal["torch", "liger"] = "torch"
    """liger: norms, rotary positions and MLPs from liger-kernel (pip install liger-kernel; Triton, not on Turing)."""
    pretend_turing: bool = False
    """Treat any card as one of the Turing generation: fp16 with a scaler, no bf16, no FlashAttention."""
    rehearsal: Literal["auto", True, False] = field(default="auto", metadata={"bare": "true"})
    """Try the largest micro-batch first (on, off). auto: not on a CPU that has room where it would take long."""
    ignore_plan: bool = False
    """Start although the plan says that it does not fit."""

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if self.vram < 0:
            found.append(("--vram", f"{self.vram:g} GiB is negative; give the card's memory, or 0 for what is free"))
        for name in ("loss_chunk", "mlp_tile"):
            if getattr(self, name) < -1:
                found.append((f"--{name}", f"{getattr(self, name)} is no number of tokens; 0: by the plan, -1: all"))
        if self.kernels == "liger" and self.pretend_turing:
            found.append(("--kernels", "liger does not go with --pretend_turing: it needs a newer card; use torch"))
        return found


@dataclass
class FinetuneConfig:
    """Everything one training run needs, or several in a row."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)

    @property
    def row_tokens(self) -> int:
        """Tokens of the rows that whole samples share; 0: each sample is a row."""
        return self.data.cutoff_len if self.train.packs and self.train.objective != "pretrain" else 0

    @property
    def keeps_prompts_apart(self) -> bool:
        """Whether these options do not go with answers that share a row."""
        return self.lora.has_virtual_tokens or self.model.attn_implementation == "flash_attention_2"

    def problems(self) -> list[Problem]:
        return contradictions(self)


def contradictions(config: FinetuneConfig) -> list[Problem]:
    """All settings that do not go together, in the order in which they are told."""
    rows = [*_of_places(config), *_of_adapters(config), *_of_base_weights(config), *_of_divergence(config)]
    rows += _of_virtual_tokens(config) if config.lora.has_virtual_tokens else ()
    rows += [*_of_vocabulary(config), *_of_reward_models(config), *_of_pairs(config), *_of_rollouts(config)]
    return _true(rows)


def virtual_token_contradictions(config: FinetuneConfig) -> list[Problem]:
    """What does not go with vectors in front of every text, which --init_adapter may bring, too."""
    return _true(_of_virtual_tokens(config))


def _true(rows: list[Contradiction]) -> list[Problem]:
    return [(flag, text) for flag, is_so, text in rows if is_so]


def _of_places(config: FinetuneConfig) -> list[Contradiction]:
    """Where the weights and the inputs of layers lie."""
    train, model, memory, lora = config.train, config.model, config.memory, config.lora
    streams, offloads = model.stream_layers == "on", memory.offload_activations == "on"
    asked = {
        "--offload_activations": offloads, "--deepspeed": train.deepspeed,
        "--offload_embeddings": memory.offload_embeddings == "on", "--head_bits": memory.head_bits in ("4", "8"),
        "--stream_layers": streams,
    }  # fmt: skip
    places = {"--deepspeed": train.deepspeed, "--max_memory": model.max_memory, "--stream_layers": streams}
    compares = train.objective in ("grpo", *WITH_REFERENCE)
    return [
        ("--stages", train.stages, "is for the command line, not for a --config file"),
        ("--offload_activations", offloads and not model.gradient_checkpointing,
         "on needs --gradient_checkpointing on: it keeps the inputs of layers"),
        *((flag, is_on and n_gpus_of(model.max_memory) > 1,
           "does not go with --max_memory over several GPUs, where accelerate places the layers; leave one out")
          for flag, is_on in asked.items()),
        ("--stream_layers", streams and not model.gradient_checkpointing,
         "on needs --gradient_checkpointing on: a layer's weights are gone when its gradients are due"),
        ("--stream_layers", streams and train.deepspeed,
         "on does not go with --deepspeed, which places the weights itself"),
        ("--bits", train.shard and model.bits == 8,
         "8 does not go with --shard: bitsandbytes loses the scales of weights that are divided; use --bits 4 or 16, "
         "or --max_memory"),
        ("--shard", train.shard and lora.peft_method == "adalora",
         "does not go with --peft_method adalora; use --max_memory"),
        *(("--shard", train.shard and is_on, f"does not go with {flag}, which places the weights, too")
          for flag, is_on in places.items()),
        ("--shard", train.shard and compares,
         f"does not go with --objective {train.objective}, where processes differ in what they ask the model"),
        ("--peft_method", train.shard and lora.tunes_base,
         f"{lora.peft_method} does not go with --shard, which divides what is frozen"),
        ("--lora_init", train.shard and lora.lora_init in ("pissa", "olora"),
         f"{lora.lora_init} does not go with --shard: it changes the base's weights"),
    ]  # fmt: skip


def _of_adapters(config: FinetuneConfig) -> list[Contradiction]:
    """What a method of PEFT cannot do."""
    train, bits, method = config.train, config.model.bits, config.lora.peft_method
    return [
        ("--bits", method in NOT_IN_4_BITS and bits == 4,
         f"4 does not work with --peft_method {method}; use --bits 8, 16 or 32"),
        ("--bits", bits < 16 and "init_weights=bat" in config.lora.peft_option,  # of MiSS: it mixes the weights
         f"{bits} does not work with --peft_option init_weights=bat; use 16"),
        ("--loraplus_ratio", method != "lora" and train.loraplus_ratio,
         f"does not go with --peft_method {method}: LoRA+ is LoRA's"),
        ("--deepspeed", method == "adalora" and train.deepspeed,
         "does not go with --peft_method adalora, which cuts ranks by whole gradients; leave it out"),
    ]  # fmt: skip


def _of_base_weights(config: FinetuneConfig) -> list[Contradiction]:
    """What does not go with weights of the base that are trained themselves."""
    if not config.lora.tunes_base:
        return []
    train, method = config.train, f"--peft_method {config.lora.peft_method}"
    return [
        ("--bits", config.model.bits < 16,
         f"{config.model.bits} does not work with {method}: quantised weights cannot be trained; use 16 or 32"),
        ("--stream_layers", config.model.stream_layers == "on",
         f"on does not go with {method}: only frozen layers can lie in RAM"),
        ("--init_adapter", train.start_adapter,
         f"does not go with {method}; merge that adapter ({command('merge')}), and give the result as --model_path"),
        ("--objective", train.objective in WITH_REFERENCE,
         f"{train.objective} does not go with {method}: it compares with the base, which is then another one; use "
         "simpo or orpo, or an adapter"),
    ]  # fmt: skip


def _of_divergence(config: FinetuneConfig) -> Iterator[Contradiction]:
    """Where there is no base to stay near, or to measure the distance from."""
    lora, train = config.lora, config.train
    for flag in filter(None, ("--kl_anchor" if train.kl_anchor else "", train.balances)):
        yield (
            flag,
            lora.tunes_base,
            f"does not go with --peft_method {lora.peft_method}, which changes the base itself; use an adapter",
        )
        yield (flag, lora.lora_init in ("pissa", "olora"),
               f"does not go with --lora_init {lora.lora_init}, which moves a part of the base into the adapter; use "
               "--lora_init default")  # fmt: skip
    yield "--kl_anchor", train.kl_anchor and train.deepspeed, "does not go with --deepspeed; leave one of them out"


def _of_virtual_tokens(config: FinetuneConfig) -> list[Contradiction]:
    """What does not go with vectors in front of every text."""
    train, may_recompute = config.train, config.lora.may_recompute
    asked = {
        "--packing": (train.packs_texts, "each text of a row would need them in front of itself"),
        f"--objective {train.objective}": (train.objective in ("grpo", "reward"), "use lora"),
        "--shard": (train.shard, "leave it out"), "--deepspeed": (train.deepspeed, "leave it out"),
    }  # fmt: skip
    recomputing = {
        "--gradient_checkpointing": config.model.gradient_checkpointing is True,
        "--stream_layers": config.model.stream_layers == "on",
        "--offload_activations": config.memory.offload_activations == "on",
    }
    return [
        *((flag, is_on, f"does not go with virtual tokens (--peft_method {', '.join(VIRTUAL_TOKENS)}): {text}")
          for flag, (is_on, text) in asked.items()),
        *((flag, is_on and not may_recompute,
           "on does not go with --peft_method prefix_tuning, whose layers cannot be computed again; leave it out")
          for flag, is_on in recomputing.items()),
    ]  # fmt: skip


def _of_vocabulary(config: FinetuneConfig) -> list[Contradiction]:
    """What does not go with trained embeddings, and with texts that are learned whole."""
    flag, memory = config.lora.trains_vocabulary, config.memory
    return [
        ("--offload_embeddings", flag and memory.offload_embeddings == "on",
         f"on contradicts {flag}: only frozen embeddings can stay in RAM"),
        ("--head_bits", flag and memory.head_bits in ("4", "8"),
         f"{memory.head_bits} contradicts {flag}: a quantised head cannot learn"),
        ("--train_on", config.train.objective == "pretrain" and config.data.train_on == "last",
         "last does not go with --objective pretrain, which learns texts whole; use all or everything"),
    ]  # fmt: skip


def _of_reward_models(config: FinetuneConfig) -> list[Contradiction]:
    """What does not go with a scalar head, which is part of an adapter and takes the output head's place."""
    if config.train.objective != "reward":
        return []
    text, lora = "does not go with --objective reward", config.lora
    return [
        (lora.trains_vocabulary, lora.trains_vocabulary and not lora.tunes_base,
         f"{text}: a reward model has no output head; leave it out"),
        ("--peft_method", lora.tunes_base,
         f"{lora.peft_method} {text}: the scalar head is saved with an adapter; use lora"),
        ("--shard", config.train.shard, "does not go with --objective reward; leave it out"),
        ("--init_adapter", config.train.start_adapter,
         f"{text}, whose head is new: merge that adapter ({command('merge')}), and give the result as --model_path"),
    ]  # fmt: skip


def _of_pairs(config: FinetuneConfig) -> list[Contradiction]:
    """What does not go with an objective of preferences."""
    objective, lora_init = config.train.objective, config.lora.lora_init
    if objective not in (*PREFERENCE_OBJECTIVES, "reward"):
        return []
    what = "virtual tokens" if config.lora.has_virtual_tokens else "--attn_implementation flash_attention_2"
    return [
        ("--share_prompt", config.train.share_prompt is True and config.keeps_prompts_apart,
         f"does not go with {what}, which take no mask of this kind; leave it out"),
        ("--train_on", config.data.train_on == "everything",
         f"everything does not go with --objective {objective}: answers are compared"),
        ("--deepspeed", config.train.deepspeed, f"does not go with --objective {objective}; leave it out"),
        ("--total_batch", objective == "kto" and config.train.total_batch == 1,
         "1 is too few for --objective kto, which mixes the answers of a step"),
        ("--lora_init", objective in WITH_REFERENCE and lora_init != "default",
         f"{lora_init} does not go with --objective {objective}, which compares with the base without adapter: there "
         "it is another model"),
    ]  # fmt: skip


def _of_rollouts(config: FinetuneConfig) -> list[Contradiction]:
    """What does not go with answers that are sampled while training."""
    train, lora = config.train, config.lora
    if train.objective != "grpo":
        return []
    return [
        ("--rollout_max_tokens", train.rollout_max_tokens >= config.data.cutoff_len,
         f"{train.rollout_max_tokens} leaves no room for prompts in --cutoff_len {config.data.cutoff_len}"),
        ("--deepspeed", train.deepspeed, "does not go with --objective grpo; leave it out"),
        ("--stream_layers", config.model.stream_layers == "on",
         "on does not go with --objective grpo: all layers would be read again for each token that is sampled"),
        ("--lora_init", train.kl_beta and lora.lora_init != "default",
         f"{lora.lora_init} does not go with --kl_beta: without adapter its base is another model"),
        ("--peft_method", train.kl_beta and lora.tunes_base,
         f"{lora.peft_method} does not go with --kl_beta: there is no adapter to be switched off"),
    ]  # fmt: skip
