"""Options of one run: how long, in which steps, what is saved and told. A field's docstring is its help text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from typing import Literal

from onecard.config.objectives import CACHES_REFERENCE, NEEDS_PAIRS, PREFERENCE_OBJECTIVES
from onecard.config.problems import Problem, too_small
from onecard.config.rollouts import RolloutOptions
from onecard.config.zero_stage import DIVIDES_BASE, zero_stage

LARGEST_TOTAL_BATCH = 32  # of those that are chosen
ScheduleName = Literal[
    "linear", "cosine", "constant", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "inverse_sqrt",
    "warmup_stable_decay",
]  # fmt: skip
# What --schedule_options can give to which schedule.
SCHEDULE_OPTIONS: dict[str, tuple[str, ...]] = {
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "polynomial": ("power", "lr_end"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": ("num_decay_steps", "min_lr_ratio"),
}
# The options of preference objectives, by those that take them.
_TAKEN_BY = {
    "pref_beta": PREFERENCE_OBJECTIVES, "label_smoothing": ("dpo", "simpo"), "sft_weight": ("dpo", "ipo", "simpo"),
    "simpo_gamma": ("simpo",), "cache_reference": CACHES_REFERENCE, "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",), "center_rewards": ("reward",), "share_prompt": NEEDS_PAIRS,
}  # fmt: skip


@dataclass
class TrainOptions(RolloutOptions):
    """One run: how long, in which steps, what is saved and what is told."""

    output_path: str = "outputs/my-first-adapter"
    """Directory of the run: adapter, checkpoints, log and options."""
    stages: str = ""
    """Several runs in a row, each from the result of the one before: a YAML file with the list of stages, their names
    and any of these options; see docs/en/training.md."""
    objective: Literal["sft", "pretrain", "dpo", "ipo", "simpo", "orpo", "kto", "grpo", "reward"] = "sft"
    """What is learned. sft: the answers of conversations (--train_on), every token of documents. pretrain: whole texts,
    with the end token behind each (--packing). Of pairs of a chosen and a rejected answer: dpo and ipo, which compare
    with a reference (the base, or --init_adapter), simpo and orpo, which do not. Of single answers that are marked good
    or bad (label, kto_tag): kto, which compares with the base. grpo: answers that are sampled while training, by their
    --reward. reward: a reward model, of pairs; it judges answers (generate --best_of) and writes none."""
    packing: Literal["auto", True, False] = field(default="auto", metadata={"bare": "true"})
    """Full rows in the place of padding. pretrain: texts flow through blocks of --cutoff_len tokens (auto: on). sft:
    whole samples share rows of that length, each with attention of its own; the result is the same (auto: off)."""
    pack_attention: Literal["auto", "block", "document"] = "auto"
    """What a token of a packed row sees before it. block: all of the row (auto for pretrain); document: only its own
    text, whose positions begin at 0 (always so for sft)."""
    pref_beta: float = 0.0
    """How strongly pairs pull: beta of dpo, ipo (tau), kto, simpo and orpo (lambda); 0: 0.1, for simpo 2."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be the wrong way round (dpo, simpo), below 0.5."""
    sft_weight: float = 0.0
    """Weight of the chosen answer's own loss, per token, beside that of the pair (dpo, ipo, simpo; RPO)."""
    simpo_gamma: float | Literal["auto"] = "auto"
    """Margin by which simpo wants the chosen answer to be the better one; auto: 1."""
    desirable_weight: float = 1.0
    """Weight of the loss of good answers (kto); with few of them more than 1: both kinds should weigh about alike."""
    undesirable_weight: float = 1.0
    """Weight of the loss of bad answers (kto)."""
    center_rewards: float = 0.0
    """Weight of the squared sum of both rewards of a pair (reward), which draws their mean to 0; 0.01 is usual."""
    cache_reference: Literal["auto", True, False] = field(default="auto", metadata={"bare": "true"})
    """Compute the log-probabilities of the reference (dpo, ipo) once, before training, and keep them with the encoded
    data (on, off). auto: with --init_adapter, whose adapter is then the reference; off: that is always the base."""
    share_prompt: Literal["auto", True, False] = field(default="auto", metadata={"bare": "true"})
    """Read the prompt of a pair once: both answers stand behind it in one row and do not see each other (dpo, ipo,
    simpo, orpo, reward). The result is the same. auto: where it saves a tenth of the work, and the base can."""
    num_epoch: float = 3
    """Passes over the training data."""
    max_steps: int = 0
    """End after so many optimizer steps whatever --num_epoch says; 0: no limit."""
    finish_by: str = ""
    """End by this time, last evaluation and checkpoint included: 07:00 (the next one) or 2026-12-24T07:00. The learning
    rate falls over the steps that fit; --num_epoch and --max_steps stay the most."""
    max_hours: float = 0.0
    """The same, after so many hours from the start, those of earlier starts of the run included; 0: no limit."""
    total_batch: int = 0
    """Samples per optimizer step, over all GPUs. This decides the result; 0: 4 to 32, by the number of rows."""
    micro_batch: int = 0
    """Most rows that pass through the model at once; 0: only --micro_tokens limits. A matter of memory alone."""
    micro_tokens: int = 0
    """Most tokens, padding included, that pass at once; 0: chosen by the plan unless --micro_batch is given."""
    learning_rate: float = 0.0
    """Highest learning rate; 0: by the family and the width of the base."""
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "auto"
    """auto: adamw where it fits, else paged_adamw_8bit: a quarter of the memory, and paged ones can move to RAM."""
    loraplus_ratio: float = 0.0
    """LoRA+: learning rate of the B matrices as a multiple of the A matrices' (arXiv:2402.12354); 0: off."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    schedule: ScheduleName = "linear"
    """Course of the learning rate after the warm-up, by the names of transformers."""
    schedule_options: str = field(default="", metadata={"several": True})
    """What it takes, as transformers calls it: num_cycles:3 (cosine_with_restarts), min_lr_rate:0.1 or min_lr:1e-5
    (cosine_with_min_lr), power:2 and lr_end:1e-6 (polynomial), timescale:100 (inverse_sqrt), num_decay_steps:50 and
    min_lr_ratio:0.1 (warmup_stable_decay, which falls over the last fifth by itself)."""
    warmup_ratio: float = 0.03
    """Share of all steps in which the learning rate rises from 0: at least 5 steps, or a fifth of a short run."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0; above 0 it takes the place of --warmup_ratio."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings while training, which can better the answers (NEFTune, arXiv:2310.05914); 5 is usual; 0:
    none."""
    seed: int = 42
    """Decides the order of the data, the split, the adapter's start and dropout."""
    log_steps: int = 10
    """Write a row to log.jsonl every so many steps."""
    log_samples: bool = False
    """Write the record ids of each step into log.jsonl, every step."""
    eval_steps: int = 0
    """Evaluate every so many steps (and at the end); 0: a third of the run, at most an epoch or 200 steps, but never
    more than a tenth of the time. --test_size 0 turns evaluation off."""
    early_stopping_patience: int = 0
    """End after so many evaluations by --eval_steps in a row that found no lower loss; 0: never."""
    stop_on: Literal["loss", "balanced"] = "loss"
    """What --early_stopping_patience waits for: a lower evaluation loss, or a lower sum of it and forgetting."""
    eval_suites: str = field(default="", metadata={"several": "texts"})
    """Suites as onecard evaluate has them, KIND:PATH with commas between them, to measure the base on before the first
    step and the result at the end, in OUTPUT_PATH/evaluation; one process."""
    ask: list[str] = field(default_factory=list)
    """Question that the model answers before the first step and at each evaluation, by the likeliest tokens; all
    answers are kept in OUTPUT_PATH/questions.jsonl. May be repeated."""
    ask_file: str = ""
    """More such questions: a file in any shape that training reads, answers in it are ignored; or txt, one a line."""
    compare_with_base: bool = True
    """Score the held-out records with the base before the first step and with the result after the last one, and say
    the difference with its interval."""
    server_check: bool = True
    """At the end, let the result answer a few short questions, held-out ones if there are any, and keep the answers as
    server_check.json, with which `onecard verify-server` compares servers."""
    measure_forgetting: bool = True
    """At each evaluation, measure how far the model has moved from its base on general texts (KL divergence, nats per
    token), as far as that is at most 2 % of its tokens; nothing that is learned changes."""
    kl_anchor: float = 0.0
    """Weight of staying near the base: so much of the divergence from it on general texts (nats per token) is added to
    the loss of each step, and less is forgotten; 0.1 is a beginning; 0: off."""
    save_steps: int = 0
    """Save a checkpoint every so many steps (and at the end); 0: an eighth of the run, at most an epoch or 200."""
    eval_minutes: float = 10
    """Evaluate after so many minutes as well, if that takes less than a tenth of the time; 0: never."""
    save_minutes: float = 10
    """Save a checkpoint after so many minutes as well, under the same condition; 0: never."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay, at least 2; the best one stays besides."""
    final_weights: str = "last"
    """Which weights the run directory ends with: last, the last step's; best, those of the lowest evaluation loss;
    balanced, those of the lowest sum of evaluation loss and forgetting; average:4, the mean of the newest 4
    checkpoints, which then stay."""
    resume_from_checkpoint: str = field(default="auto", metadata={"bare": "auto"})
    """auto goes on from the newest whole checkpoint in --output_path, if any; a directory: from that one; or none."""
    init_adapter: str | None = None
    """Start a new run from trained adapter weights: a directory or a Hub id."""
    lora_remote_checkpoint: str | None = None
    """The same as --init_adapter, under the name that users of older kits know."""
    from_data_beginning: bool = False
    """With a resumed run: keep weights and optimizer, but start at the first step of this (perhaps new) data."""
    accept_changes: str = field(default="", metadata={"several": True})
    """Go on although some of these differ from the checkpoint's run: base,data,template,lora,bits,batch,seed,objective,
    reference,rope_scaling. base also accepts an --init_adapter that was trained on another base."""
    wandb: bool = False
    """Send the log to Weights & Biases as well (pip install wandb)."""
    wandb_project: str = "onecard"
    """Project name on Weights & Biases."""
    tensorboard: bool = False
    """Write the log for TensorBoard as well, into OUTPUT_PATH/tensorboard."""
    deepspeed: str | None = None
    """DeepSpeed configuration (json) for several GPUs; start with `accelerate launch` or `torchrun`."""
    shard: bool = False
    """Lay the frozen layers of the base (not in 8 bits) over the GPUs of all processes (FSDP2), with torchrun."""
    debug: bool = False
    """Show tracebacks."""

    @property
    def start_adapter(self) -> str | None:
        """Where a new run takes its first adapter weights from, or None for fresh ones."""
        return self.init_adapter or self.lora_remote_checkpoint

    @property
    def divides_base(self) -> bool:
        """Whether the frozen layers lie over all processes: by --shard, or by ZeRO stage 3 of --deepspeed."""
        return self.shard or (self.deepspeed is not None and zero_stage(self.deepspeed) == DIVIDES_BASE)

    def problems(self) -> list[Problem]:
        found = too_small(
            self, log_steps=1, max_steps=0, total_batch=0, micro_batch=0, micro_tokens=0, warmup_steps=0,
            weight_decay=0, max_grad_norm=0, seed=0, eval_steps=0, save_steps=0, eval_minutes=0, save_minutes=0,
            early_stopping_patience=0, neftune_alpha=0, max_hours=0, kl_anchor=0,
        )  # fmt: skip
        if self.num_epoch <= 0 and not self.max_steps:
            found.append(("--num_epoch", f"{self.num_epoch} would train nothing; use more than 0, or --max_steps"))
        if not 0 <= self.learning_rate < 10:
            found.append(("--learning_rate", f"{self.learning_rate} is outside 0..10; 2e-4 is usual for LoRA"))
        if not 0 <= self.warmup_ratio < 1:
            found.append(("--warmup_ratio", f"{self.warmup_ratio} is not a share of the steps; use 0 up to below 1"))
        if self.loraplus_ratio and self.loraplus_ratio < 1:
            found.append(("--loraplus_ratio", f"{self.loraplus_ratio}: use 0 (off) or 1 and above; 16 is usual"))
        if self.keep_checkpoints < 2:
            found.append(("--keep_checkpoints", f"{self.keep_checkpoints}: the last two always stay; use 2 or more"))
        if not self.output_path:
            found.append(("--output_path", "is empty; give a directory for the run"))
        if self.init_adapter and self.lora_remote_checkpoint:
            found.append(("--lora_remote_checkpoint", "is another name of --init_adapter; give only one of them"))
        if self.deepspeed and "8bit" in self.optimizer:
            found.append(("--optimizer", f"{self.optimizer} does not work under DeepSpeed; use adamw"))
        found += [*self._clock_problems(), *self._schedule_problems(), *self._preference_problems()]
        found += [*self._packing_problems(), *self._ask_problems()]
        found += [*self._final_weights_problems(), *self._change_problems(), *self.rollout_problems(self.objective)]
        return found

    @property
    def balances(self) -> str:
        """The option by which loss and forgetting are weighed against each other; empty for none."""
        return "--final_weights" if self.final_weights == "balanced" else "--stop_on" * (self.stop_on == "balanced")

    @property
    def n_averaged(self) -> int:
        """How many of the newest checkpoints --final_weights takes the mean of; 0: of none."""
        word, _, number = self.final_weights.partition(":")
        return int(number) if word == "average" and number.isdecimal() else 0

    @property
    def n_kept(self) -> int:
        """How many of the newest checkpoints stay."""
        return max(self.keep_checkpoints, self.n_averaged)

    @property
    def schedule_settings(self) -> dict[str, float]:
        """--schedule_options by name. Raises ValueError where they cannot be read."""
        pairs = (part.split(":") for part in self.schedule_options.replace(" ", "").split(",") if part)
        return {name: float(value) for name, value in pairs}

    def _clock_problems(self) -> list[Problem]:
        found: list[Problem] = []
        if self.finish_by and moment(self.finish_by, datetime(2000, 1, 1)) is None:
            found.append(("--finish_by", f"{self.finish_by!r} is no time; use 07:00 or 2026-12-24T07:00"))
        if self.finish_by and self.max_hours:
            found.append(("--max_hours", "says the end, as --finish_by does; give only one of them"))
        return found

    @property
    def packs(self) -> bool:
        """Whether rows are filled up with further texts or samples."""
        return self.packing is True or (self.packing == "auto" and self.objective == "pretrain")

    @property
    def packs_texts(self) -> bool:
        """Whether rows hold several texts that must not see one another."""
        return self.packs and (self.objective != "pretrain" or self.pack_attention == "document")

    def _packing_problems(self) -> list[Problem]:
        found: list[Problem] = []
        if self.packing is True and self.objective not in ("sft", "pretrain"):
            text = f"does not go with --objective {self.objective}, which compares answers, each in a row; leave it out"
            found.append(("--packing", text))
        if self.pack_attention != "auto" and not self.packs:
            found.append(("--pack_attention", f"{self.pack_attention} is of packed rows; give --packing with it"))
        if self.pack_attention == "block" and self.packs and self.objective != "pretrain":
            text = f"block would let a sample of --objective {self.objective} see the one before it; use document"
            found.append(("--pack_attention", text))
        return found

    def _ask_problems(self) -> list[Problem]:
        flag = "--ask" if self.ask else "--ask_file" if self.ask_file else ""
        others = {"--deepspeed": bool(self.deepspeed), "--shard": self.shard,
                  "--objective reward": self.objective == "reward"}  # fmt: skip
        found = [
            (flag, f"does not go with {other}, under which the model cannot answer; leave it out")
            for other, is_given in others.items()
            if flag and is_given
        ]
        if any(not question.strip() for question in self.ask):
            found.append(("--ask", "is empty; give a question"))
        return found

    @property
    def of_pairs(self) -> bool:
        return self.objective in NEEDS_PAIRS

    @property
    def rows_per_sample(self) -> int:
        """Rows of tokens that one sample has: 2 where it is a pair."""
        return 2 if self.of_pairs else 1

    @property
    def answer_tokens(self) -> int:
        """Of --cutoff_len, the tokens that are kept for an answer which is sampled while training."""
        return self.rollout_max_tokens if self.objective == "grpo" else 0

    @property
    def answers_per_prompt(self) -> int:
        """Rows that one sample is in a step."""
        return self.rollouts if self.objective == "grpo" else 1

    @property
    def updates_per_step(self) -> int:
        return self.grpo_updates if self.objective == "grpo" else 1

    def _preference_problems(self) -> list[Problem]:
        given = {name: getattr(self, name) for name in _TAKEN_BY}
        found = [
            (f"--{name}", f"is of --objective {', '.join(_TAKEN_BY[name])}, and this one is {self.objective}")
            for name, value in given.items()
            if value != getattr(TrainOptions, name) and self.objective not in _TAKEN_BY[name]
        ]
        if not 0 <= self.label_smoothing < 0.5:
            found.append(("--label_smoothing", f"{self.label_smoothing:g} is no share of pairs; use 0 up to below 0.5"))
        for name in given:
            if (
                name not in ("label_smoothing", "cache_reference", "share_prompt")
                and given[name] != "auto"
                and not 0 <= given[name] < math.inf
            ):
                found.append((f"--{name}", f"{given[name]:g} is no weight; use a number above 0"))
        return found

    def _schedule_problems(self) -> list[Problem]:
        flag, known = "--schedule_options", SCHEDULE_OPTIONS.get(self.schedule, ())
        try:
            settings = self.schedule_settings
        except ValueError:
            return [(flag, f"{self.schedule_options!r} is not of the form name:number,name:number")]
        takes = f"takes {', '.join(known)}" if known else "takes none"
        found = [(flag, f"{name} is unknown; --schedule {self.schedule} {takes}") for name in settings.keys() - known]
        found += [(flag, f"{name}:{value:g} is not above 0") for name, value in settings.items() if not value > 0]
        if self.schedule == "cosine_with_min_lr" and len(settings) != 1:
            found.append((flag, "cosine_with_min_lr needs one of min_lr:1e-5 and min_lr_rate:0.1"))
        return found

    def _final_weights_problems(self) -> list[Problem]:
        found: list[Problem] = []
        if self.final_weights not in ("last", "best", "balanced") and self.n_averaged < 2:
            text = f"{self.final_weights!r} is none of last, best, balanced and average:N of 2 or more"
            found.append(("--final_weights", text))
        if self.stop_on == "balanced" and not self.early_stopping_patience:
            found.append(("--stop_on", "balanced says what --early_stopping_patience waits for; give that, too"))
        if self.balances and not self.measure_forgetting:
            found.append((self.balances, "balanced weighs what is forgotten; give --measure_forgetting true"))
        if self.balances and self.objective == "grpo":
            found.append((self.balances, "balanced does not go with --objective grpo, which has rewards and no loss"))
        return found

    def _change_problems(self) -> list[Problem]:
        known = {"base", "data", "template", "lora", "bits", "batch", "seed", "objective", "reference",
                 "rope_scaling"}  # fmt: skip
        unknown = sorted(set(filter(None, self.accept_changes.replace(" ", "").split(","))) - known)
        if not unknown:
            return []
        return [("--accept_changes", f"{', '.join(unknown)} is unknown; known are {', '.join(sorted(known))}")]


def moment(text: str, now: datetime) -> datetime | None:
    """The time that --finish_by names, local: "07:00" is the next one after `now`; None if it is no time."""
    try:
        if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text):
            end = datetime.combine(now.date(), time.fromisoformat(text.zfill(len(text.partition(":")[2]) + 3)))
            return end if end > now else end + timedelta(days=1)
        return datetime.fromisoformat(text).astimezone().replace(tzinfo=None)
    except ValueError:
        return None
