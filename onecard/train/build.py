"""From options to a `Run` that is ready to train: data, model, optimizer; `resume.py` knows where it goes on."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from transformers.integrations.neftune import neftune_post_forward_hook

from onecard.config.lora import LoraOptions
from onecard.config.objectives import CACHES_REFERENCE, WITH_REFERENCE
from onecard.config.problems import refuse
from onecard.config.training import FinetuneConfig, virtual_token_contradictions
from onecard.console import first_line, say, warn
from onecard.data.built_in_templates import first_version
from onecard.data.chat_template import Template, load_template
from onecard.data.dataset import cache_directory
from onecard.data.encode import EncodeSettings
from onecard.data.joined import encode_parts
from onecard.data.mixture import parts_of
from onecard.errors import ConfigError, ModelError
from onecard.installation import command
from onecard.model.hardware import Hardware, choose_dtype
from onecard.model.input_limits import embedding_rows, head_rows, no_row, position_limit, rotary_limit
from onecard.model.kernels import use_liger
from onecard.model.load import LoadedBase, base_fingerprint, load_base, load_tokenizer
from onecard.model.lora.adapter import load_adapter, rank_allocation
from onecard.model.lora.methods import MOVING_STARTS
from onecard.model.lora.rank_allocation import RankAllocation
from onecard.model.lora.vocabulary import freeze_adapter
from onecard.model.memory_saving.embeddings_in_ram import embeddings_to_ram
from onecard.model.memory_saving.lm_head import quantize_head
from onecard.model.memory_saving.sharded_layers import shard_layers
from onecard.model.memory_saving.streamed_layers import stream_layers
from onecard.model.out_of_memory import give_back_memory, is_out_of_memory
from onecard.model.output_head import positions_in_front
from onecard.model.rope_scaling import check_same_positions
from onecard.model.trained import make_trainable
from onecard.objectives.base import Objective, SampleView
from onecard.objectives.registry import objective_named
from onecard.train.anchor import LARGEST_PASS, Anchor
from onecard.train.auto_config import as_it_began, choices_of, limits_of, resolve_test_size
from onecard.train.deepspeed_config import check_deepspeed, deepspeed_config
from onecard.train.deepspeed_engine import prepare
from onecard.train.evaluate import EvaluationLimits
from onecard.train.forgetting import ANCHORING, EVERY, LARGEST_SHARE, MEASURED, affordable_rows, text_rows
from onecard.train.held_out import CLUSTERED, Likeness, held_out
from onecard.train.loop import total_steps
from onecard.train.optim import allocate_state, build_optimizer, tidy_loaded_state
from onecard.train.reference import CachedReference, cached_reference, check_start, fill_reference, reference_of
from onecard.train.resume import ResumePoint, continued
from onecard.train.run import HeldOutSources, Run
from onecard.train.rundir import RunDirectory
from onecard.train.shared_prompt import check_shared_rows
from onecard.train.state import TrainerState, restore_state
from onecard.train.step import SMALLER_HINT, use_limits
from onecard.train.trackers import Reporter, open_trackers

# They stand in a run's identity only when used: runs from before them go on.
LATER_OPTIONS = ("peft_method", "peft_option", "train_new_tokens", "train_embeddings", "lora_target_parameters")
MIXED_PRECISION = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "no"}


@dataclass(frozen=True)
class TrainingData:
    """What is learned from, encoded, and what encoded it."""

    tokenizer: Any
    template: Template
    train: SampleView
    test: SampleView
    fingerprint: str
    test_size: float
    objective: Objective
    test_sources: HeldOutSources | None = None
    least_pass: int = 1
    near_duplicates: float | None = None
    """The similarity of rows that decided which are held out; None: none did."""
    must_share_prompt: bool = False
    """Whether --share_prompt on was typed."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row, held-out ones and those of the anchor included."""
        return max(self.least_pass, *(int(view.lengths.max(initial=0)) for view in (self.train, self.test)))


def build_accelerator(config: FinetuneConfig, hardware: Hardware, model_type: str) -> Accelerator:
    """The accelerator of this process, in the number format that suits the card and the family; which and why is said.

    Raises ConfigError for a format that the card does not have.
    """
    model = config.model
    if config.train.deepspeed:
        check_deepspeed(config)
    dtype, reason = choose_dtype(model.dtype, model.bits, hardware, model_type)
    say(f"{hardware.name}: {model.bits}-bit base, arithmetic in {str(dtype).removeprefix('torch.')} ({reason})")
    # Under DeepSpeed the accelerator only connects the processes; see train/deepspeed_engine.py.
    mixed_precision = "no" if config.train.deepspeed else MIXED_PRECISION[dtype]
    # Autocast would keep a 16-bit copy of every adapter from its first use to the end of the forward pass.
    no_copies = AutocastKwargs(cache_enabled=False)
    accelerator = Accelerator(cpu=not hardware.is_gpu, mixed_precision=mixed_precision, kwargs_handlers=[no_copies])
    if config.train.shard and accelerator.num_processes == 1:
        text = "needs several processes, one per GPU: start with `torchrun --standalone --nproc_per_node 2`"
        raise ConfigError("--shard", f"{text}. On one card a run goes on without it")
    return accelerator


def prepare_data(
    config: FinetuneConfig, accelerator: Accelerator, point: ResumePoint | None, likeness: Likeness
) -> TrainingData:
    """Read and encode the data (or find it encoded), and set the held-out rows aside, as the run began.

    Raises DataError for data that cannot be used, ConfigError for a split that leaves nothing to train on.
    """
    options, objective = config.data, objective_named(config.train.objective).with_options(config.train)
    tokenizer = load_tokenizer(config.model.model_path, trust_remote_code=config.model.trust_remote_code)
    template = load_template(options.prompt_type, tokenizer, dialogue=options.dialogue)
    parts = parts_of(options)
    longest = options.cutoff_len - config.train.answer_tokens if objective.encoder.cuts else 0
    settings = EncodeSettings(longest, options.train_on, options.strict, options.thinking)
    with accelerator.main_process_first():  # the others find the first one's cache
        cache = cache_directory(options.cache_path)
        dataset = encode_parts(parts, template, tokenizer, settings, cache, encoder=objective.encoder)
    for line in dataset.summary_lines():
        say(line)
    test_size = resolve_test_size(options.test_size, point, len(np.unique(dataset.groups)))
    clusters = partial(likeness.clusters, parts, dataset, objective.encoder)
    rows = held_out(dataset, test_size, config.train.seed, as_it_began(point), likeness.threshold, clusters)
    train, test = (objective.view(dataset, each, config) for each in (rows.train, rows.test))
    say(f"template {template.name}; {len(train):,} samples to train on, {len(test):,} to evaluate on")
    for line in [*filter(None, [train.summary]), *_shares(train)]:
        say(line)
    sources = None if test.parts is None else HeldOutSources(dataset.names, test.parts)
    least_pass = max(1, config.row_tokens, LARGEST_PASS if config.train.kl_anchor else 0)
    return TrainingData(tokenizer, template, train, test, train.fingerprint, test_size, objective, sources,
                        least_pass, rows.threshold, config.train.share_prompt is True)  # fmt: skip


def _shares(train: SampleView) -> list[str]:
    """What an epoch has of each source, a line each, where their shares differ."""
    if isinstance(train.order, int):
        return []
    counts, names = train.order.counts, train.dataset.names
    lines = [f"  {name}: {count:,} ({count / sum(counts):.1%})" for name, count in zip(names, counts, strict=True)]
    return [f"{sum(counts):,} samples in each epoch:", *lines]


def check_inputs(model: Any, data: TrainingData) -> None:
    """Find what the base cannot be fed, held-out rows included, before a step does.

    Raises ModelError that names the record and the token, or its length; warns of positions that were never trained.
    """
    dataset, n_rows = data.train.dataset, min(embedding_rows(model), head_rows(model))
    beyond = dataset.first_beyond(n_rows)
    if beyond is not None:
        number, token_id = beyond
        raise ModelError(f"{dataset[number].record}: {no_row(data.tokenizer, token_id, n_rows)}")
    _check_lengths(model, data)


def _check_lengths(model: Any, data: TrainingData) -> None:
    longest = data.train.longest_sample
    n_tokens, limit = len(longest.input_ids), position_limit(model)
    if limit is not None and n_tokens > limit:
        behind = f" behind {positions_in_front(model)} virtual tokens" * bool(positions_in_front(model))
        raise ModelError(f"{longest.record} has {n_tokens:,} tokens, but the base has {limit:,} positions{behind}; use "
                         f"--cutoff_len {limit}")  # fmt: skip
    trained = rotary_limit(model)
    if trained is not None and n_tokens > trained:
        warn(f"{longest.record} has {n_tokens:,} tokens, more than the {trained:,} positions that the base is made for;"
             f" --cutoff_len {trained} keeps within them, and --rope_scaling yarn:{-(-n_tokens // trained)} stretches "
             "them")  # fmt: skip
    check_same_positions(model.config, longest.record, n_tokens)


def check_on_cards(model: Any) -> None:
    """Raise ConfigError for a base that --max_memory left in part in RAM or on disk: no gradient passes through it."""
    outside = [name for name, place in getattr(model, "hf_device_map", {}).items() if place in ("cpu", "disk")]
    if outside:
        raise ConfigError(
            "--max_memory",
            f"leaves {outside[0]}{f' and {len(outside) - 1} more parts' * (len(outside) > 1)} of the base outside the "
            "GPUs, where they can answer but not be trained; raise the shares, or use fewer --bits or a smaller model",
        )


def training_state(config: FinetuneConfig, data: TrainingData, point: ResumePoint | None) -> TrainerState:
    """The position to train from. Raises CheckpointError and ConfigError where the checkpoint is not of this run."""
    planned = total_steps(config.train, data.train.n_per_epoch)
    fresh = TrainerState(total_steps=planned, identity=run_identity(config, data, reference_of(config, point)))
    return fresh if point is None else continued(config, point, fresh)


def build_run(config: FinetuneConfig, hardware: Hardware, accelerator: Accelerator, data: TrainingData,
              state: TrainerState, point: ResumePoint | None, directory: RunDirectory) -> Run:  # fmt: skip
    """Load the base, add or restore the adapter, and build the optimizer.

    `config` is one that `auto_config.resolve` has filled in. Raises ModelError where memory runs out meanwhile.
    """
    try:
        return _built(config, hardware, accelerator, data, state, point, directory)
    except (RuntimeError, MemoryError) as reason:
        if not is_out_of_memory(reason):
            raise
        place = f"out of memory on {hardware.name} while the run is built ({first_line(reason)})"
        raise ModelError(f"{place}; end what else uses it, or {SMALLER_HINT}") from reason


def _built(config: FinetuneConfig, hardware: Hardware, accelerator: Accelerator, data: TrainingData,
           state: TrainerState, point: ResumePoint | None, directory: RunDirectory) -> Run:  # fmt: skip
    """`build_run`, whose errors of memory are not told yet."""
    options = config.train
    state = replace(state, choices=choices_of(config))
    in_ram = replace(config.model, stream_layers="on") if options.divides_base else config.model
    base = load_base(in_ram, hardware)
    if hardware.is_gpu:
        check_on_cards(base.model)
    check_inputs(base.model, data)
    prepare_base(config, hardware, base)
    torch.manual_seed(options.seed)  # the adapter's first values
    cached = cached_reference(config, data.train.dataset, base.dtype, state.identity.get("reference"))
    plain = _adapter(config, base.model, point, cached)
    _check_virtual_tokens(config, plain, data)
    if options.shard:
        say(shard_layers(plain, accelerator.device, accelerator.num_processes))
    streams = config.model.stream_layers == "on"
    if streams:
        stay = config.memory.offload_embeddings == "on"
        streamed = stream_layers(plain, accelerator.device, embeddings_stay=stay)
        say(streamed.summary)
    optimizer = build_optimizer(plain, options)
    if options.deepspeed:
        model, stepper = prepare(plain, optimizer, deepspeed_config(options), base.dtype, accelerator.device)
    else:
        # evaluation_mode: not inside DistributedDataParallel; see `engine.Engine`.
        model, stepper = prepared(accelerator, plain, streams), accelerator.prepare(optimizer)
        if point is None:
            # Only now: accelerate puts what it finds onto the card, and paged state would no longer be paged.
            allocate_state(optimizer)
    run = Run(options, model, plain, stepper, accelerator, data.train, data.test, directory.store, state,
              evaluation_limits=EvaluationLimits(every_turn=options.divides_base),
              test_sources=data.test_sources)  # fmt: skip
    run.ranks = _rank_allocation(config, plain, state.total_steps)
    run.forgetting_rows = _forgetting_rows(config, data)
    run.anchor = Anchor(text_rows(data.tokenizer, ANCHORING), options.kl_anchor) if options.kl_anchor else None
    if config.memory.offload_embeddings == "on":
        embeddings_to_ram(plain, accelerator.device)
    if options.neftune_alpha:  # after the move: the noise is made where the rows arrive
        embedding: Any = plain.get_input_embeddings()
        embedding.neftune_noise_alpha = options.neftune_alpha
        embedding.register_forward_hook(neftune_post_forward_hook)
    use_limits(run, limits_of(config))
    with accelerator.autocast():
        check_shared_rows(
            options, model, accelerator.device, (data.train, data.test), must_share=data.must_share_prompt
        )
    if hardware.is_gpu:
        give_back_memory()  # blocks of whole weights, quantised since, whose sizes no step asks for
    if cached is not None:
        fill_reference(run, cached)
    if point is not None:
        restore_state(point.path, plain, run.training, options, run.engine.whole_weights(written=True))
        tidy_loaded_state(optimizer)
    return run


def _check_virtual_tokens(config: FinetuneConfig, plain: Any, data: TrainingData) -> None:
    """Raise ConfigError and ModelError for what does not go with them, also where --init_adapter brought them."""
    if positions_in_front(plain):
        refuse(virtual_token_contradictions(config))
        _check_lengths(plain, data)


def _rank_allocation(config: FinetuneConfig, plain: Any, total_steps: int) -> RankAllocation | None:
    """What cuts the ranks of AdaLoRA. Raises ConfigError where it cannot, also for an adapter of --init_adapter."""
    ranks = rank_allocation(plain, config.lora)
    flag = "--deepspeed" if config.train.deepspeed else "--shard" if config.train.shard else ""
    if ranks is not None and flag:
        raise ConfigError(flag, "does not go with AdaLoRA, which cuts ranks by whole gradients; leave it out")
    if ranks is not None:
        ranks.check(total_steps)
    return ranks


def _forgetting_rows(config: FinetuneConfig, data: TrainingData) -> list[list[int]]:
    """The texts on which forgetting is measured; why it is not, is said."""
    options = config.train
    if not options.measure_forgetting or not data.test or options.objective == "reward":  # it writes nothing
        return []
    if config.lora.lora_init in MOVING_STARTS:
        say(f"forgetting is not measured: {config.lora.lora_init} moves a part of the base into the adapter, so that "
            "the base is not what is left without it")  # fmt: skip
        return []
    if config.lora.tunes_base:
        say(f"forgetting is not measured: --peft_method {config.lora.peft_method} changes the base itself")
        return []
    steps = total_steps(options, data.train.n_per_epoch)
    tokens = int(data.train.lengths.mean() * options.total_batch * steps)
    texts = MEASURED if options.kl_anchor else EVERY
    balances = bool(options.balances)
    rows = affordable_rows(data.tokenizer, tokens, -(-steps // options.eval_steps), texts, at_any_cost=balances)
    if not rows:
        say(f"forgetting is not measured: it would take more than {LARGEST_SHARE:.0%} of so short a run")
    return rows


def prepared(accelerator: Accelerator, plain: Any, streams: bool) -> Any:
    """The model as accelerate wraps it; one whose layers are streamed is in its place, and embeddings may be in RAM."""
    return accelerator.prepare_model(plain, device_placement=False if streams else None, evaluation_mode=True)


def prepare_base(config: FinetuneConfig, hardware: Hardware, base: LoadedBase) -> None:
    """What the plan wants of the base before adapters are attached."""
    if config.memory.head_bits in ("4", "8"):
        bits: Any = int(config.memory.head_bits)
        saved = quantize_head(base.model, bits, base.dtype)
        say(f"the head lies in {config.memory.head_bits} bits ({saved / 2**20:+,.0f} MiB freed)")
    if config.memory.kernels == "liger":
        use_liger(base.model, hardware)


def run_identity(config: FinetuneConfig, data: TrainingData, reference: str | None) -> dict[str, Any]:
    """What makes two starts parts of one run. Card, micro-batch and number of processes are no part of it."""
    clustered = {} if data.near_duplicates is None else {CLUSTERED: data.near_duplicates}
    return {
        "base": base_fingerprint(config.model.model_path),
        "data": data.fingerprint,
        "template": hashlib.sha256(first_version(data.template.jinja).encode()).hexdigest(),
        "lora": {
            name: value
            for name, value in asdict(config.lora).items()
            if name not in LATER_OPTIONS or value != getattr(LoraOptions(), name)
        },
        "bits": config.model.bits,
        "rope_scaling": config.model.rope_scaling.replace("auto", "none"),
        "batch": {"total_batch": config.train.total_batch, "test_size": data.test_size} | clustered,
        "seed": config.train.seed,
        "objective": config.train.objective,
        **({"reference": reference} if reference else {}),
    }


def open_reporter(config: FinetuneConfig, run: Run, directory: RunDirectory) -> Reporter:
    """The run's reporter, with the trackers that were asked for."""
    options = config.train
    reporter = Reporter(
        directory.path, run.state.total_steps, run.state.step, run.accelerator.is_main_process, run.objective.unit
    )
    if reporter.enabled:
        reporter.trackers = open_trackers(
            directory.path, asdict(config), tensorboard=options.tensorboard,
            wandb_project=options.wandb_project if options.wandb else None,
        )  # fmt: skip
    return reporter


def _adapter(config: FinetuneConfig, base: Any, point: ResumePoint | None, cached: CachedReference | None) -> Any:
    """The adapter over the base: fresh, from other weights, or in the form of the checkpoint whose values follow."""
    start = config.train.start_adapter
    gives_reward = config.train.objective == "reward"
    model = (
        make_trainable(base, config.lora, gives_reward=gives_reward)
        if start is None
        else _further_trained(config, base, start, point, cached)
    )
    if config.lora.only_vocabulary:
        freeze_adapter(model)
    return model


def _further_trained(
    config: FinetuneConfig, base: Any, start: str, point: ResumePoint | None, cached: CachedReference | None
) -> Any:
    """The adapter `start` in its checkpoint's form, or itself where it is the reference and that is not all cached."""
    # The rank and the layers are those of the adapter that the run began with, not of the flags.
    source = point.path if point is not None else start
    if cached is not None and cached.adapter is not None and not cached.is_whole:
        check_start(config, cached.adapter)
        source = start
    loaded = load_adapter(base, source, trainable=True)
    say(f"the adapter {start} is what this run starts from; its rank and layers stay")
    for note in loaded.notes:
        warn(note)
    if config.train.objective in WITH_REFERENCE and (cached is None or cached.adapter is None):
        warn(f"--objective {config.train.objective} compares with the base without any adapter, not with this adapter; "
             f"to compare with it, merge it first ({command('merge')}) and train on the result"
             f"{', or begin with --cache_reference auto' * (config.train.objective in CACHES_REFERENCE)}")  # fmt: skip
    return loaded.model
