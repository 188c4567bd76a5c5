"""From options to a `Run` that is ready to train: data, model, optimizer, and the position to go on from."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, gather_object

from onecard.config import FinetuneConfig, TrainOptions
from onecard.console import CheckpointError, ConfigError, quiet_rank, say, warn
from onecard.model.adapters import add_lora, load_adapter
from onecard.model.attention import avoid_flash
from onecard.model.hardware import Hardware, choose_dtype
from onecard.model.head import quantize_head
from onecard.model.kernels import use_liger
from onecard.model.load import LoadedBase, base_fingerprint, load_base, load_tokenizer
from onecard.model.offload import embeddings_to_ram
from onecard.text.batches import split
from onecard.text.dataset import cache_directory, encode_dataset
from onecard.text.encode import Encoded, EncodeSettings
from onecard.text.template import Template, load_template
from onecard.train.checkpoint import Found, verify
from onecard.train.deepspeed_config import check_deepspeed, deepspeed_config
from onecard.train.deepspeed_engine import prepare
from onecard.train.fit import choices_of, limits_of
from onecard.train.loop import resume, total_steps
from onecard.train.optim import allocate_state, build_optimizer, build_schedule, tidy_loaded_state
from onecard.train.reporting import Reporter, TensorBoardSink, WandbSink
from onecard.train.run import Run
from onecard.train.rundir import RunDirectory
from onecard.train.state import TrainerState, differences, read_state
from onecard.train.step import use_limits

MIXED_PRECISION = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "no"}
GONE_BACK_NAME = "gone_back_to.txt"


class SampleView:
    """Some rows of an encoded dataset, by index, with `lengths` and `supervised` in the same order."""

    def __init__(self, dataset: Any, indices: np.ndarray) -> None:
        self.dataset, self.indices = dataset, indices
        self.lengths, self.supervised = dataset.lengths[indices], dataset.supervised[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Encoded:
        return self.dataset[int(self.indices[position])]


@dataclass(frozen=True)
class Data:
    """What is learned from, encoded, and what encoded it."""

    tokenizer: Any
    template: Template
    train: SampleView
    test: list[Encoded]
    fingerprint: str

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, held-out ones included."""
        return max(int(self.train.lengths.max()), *(len(sample.input_ids) for sample in self.test), 1)


def build_accelerator(config: FinetuneConfig, hardware: Hardware, model_type: str) -> Accelerator:
    """The accelerator of this process, in the number format that suits the card and the family; which and why is said.

    Raises ConfigError for a format that the card does not have.
    """
    model = config.model
    if config.train.deepspeed:
        check_deepspeed(config.train)
    dtype, reason = choose_dtype(model.dtype, model.bits, hardware, model_type)
    say(f"{hardware.name}: {model.bits}-bit base, arithmetic in {str(dtype).removeprefix('torch.')} ({reason})")
    # Under DeepSpeed the accelerator only connects the processes; see train/deepspeed_engine.py.
    mixed_precision = "no" if config.train.deepspeed else MIXED_PRECISION[dtype]
    # Autocast would keep a 16-bit copy of every adapter from its first use to the end of the forward pass.
    no_copies = AutocastKwargs(cache_enabled=False)
    return Accelerator(cpu=not hardware.is_gpu, mixed_precision=mixed_precision, kwargs_handlers=[no_copies])


def prepare_data(config: FinetuneConfig, accelerator: Accelerator) -> Data:
    """Read and encode the data (or find it encoded), and set the held-out rows aside.

    Raises DataError for data that cannot be used, ConfigError for a split that leaves nothing to train on.
    """
    options = config.data
    tokenizer = load_tokenizer(config.model.model_path, trust_remote_code=config.model.trust_remote_code)
    template = load_template(options.prompt_type, tokenizer, dialogue=options.dialogue)
    settings = EncodeSettings(options.cutoff_len, options.train_on, options.strict)
    with accelerator.main_process_first():  # the others find the first one's cache
        dataset = encode_dataset(options.data_path, template, tokenizer, settings, cache_directory(options.cache_path))
    for line in dataset.summary_lines():
        say(line)
    train_rows, test_rows = split(dataset.groups, options.test_size, config.train.seed)
    say(f"template {template.name}; {len(train_rows)} samples to train on, {len(test_rows)} to evaluate on")
    test = [dataset[int(i)] for i in test_rows]
    return Data(tokenizer, template, SampleView(dataset, train_rows), test, dataset.fingerprint)


def start_position(config: FinetuneConfig, directory: RunDirectory, accelerator: Accelerator) -> Found | None:
    """The checkpoint to go on from, verified, or None for a new run; the same on every process.

    Raises CheckpointError for checkpoints that are all broken, ConfigError for contradictions.
    """
    with accelerator.main_process_first():  # the first one sets broken checkpoints aside
        found = find_start(config.train, directory)
    steps = gather_object([found.step if found is not None else None])
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the processes see different checkpoints in {directory.path} (steps {steps}). Several machines need an "
            "--output_path that all of them share."
        )
    return found


def find_start(options: TrainOptions, directory: RunDirectory) -> Found | None:
    """What `--resume_from_checkpoint` means here.

    Checkpoints in the run's own directory win over another directory that was typed, so that the same command can be
    given again after a kill; an older checkpoint of the same run can be gone back to, which sets the newer ones aside.
    """
    typed = options.resume_from_checkpoint
    if options.from_data_beginning and typed in ("auto", "none"):
        raise ConfigError("--from_data_beginning", "needs --resume_from_checkpoint DIR, the checkpoint to start from")
    inside = typed not in ("auto", "none") and Path(typed).resolve().parent == directory.path.resolve()
    if inside and options.from_data_beginning:
        raise ConfigError("--from_data_beginning", "needs an --output_path of its own; the checkpoint lies in this one")
    if inside:
        return _gone_back(Path(typed), directory)
    own = directory.store.newest_whole()
    if own is None:
        return None if typed in ("auto", "none") else _named(_newest_in(Path(typed)))
    if typed == "none":
        hint = "give another --output_path, or let the run go on with --resume_from_checkpoint auto"
        raise ConfigError("--resume_from_checkpoint", f"none, but {directory.path} holds {own.path.name}; {hint}")
    for name, reason in own.skipped:
        warn(f"{name} was set aside: {reason}")
    say(f"going on from {own.path}")
    return own


def stored_choices(found: Found | None) -> dict[str, Any]:
    """What the run that goes on has chosen before; nothing for a new one."""
    return read_state(found.path).choices if found is not None else {}


def build_run(config: FinetuneConfig, hardware: Hardware, accelerator: Accelerator, data: Data, found: Found | None,
              directory: RunDirectory) -> Run:  # fmt: skip
    """Load the base, add or restore the adapter, build the optimizer, and check that it is the same run.

    `config` is one that `fit.settle` has filled in.
    """
    options = config.train
    identity = run_identity(config, data)
    planned = total_steps(options, len(data.train))
    state = TrainerState(total_steps=planned, identity=identity, choices=choices_of(config))
    if found is not None:
        state = _continued(config, read_state(found.path), state, found)
    base = load_base(config.model, hardware)
    prepare_base(config, hardware, base)
    torch.manual_seed(options.seed)  # the adapter's first values
    plain = _adapter(config, base.model, found)
    optimizer = build_optimizer(plain, options)
    schedule = build_schedule(optimizer, options, planned)
    if options.deepspeed:
        model, stepper = prepare(plain, optimizer, deepspeed_config(options), base.dtype, accelerator.device)
    else:
        # evaluation_mode: not inside DistributedDataParallel; see `engine.Engine`.
        model, stepper = accelerator.prepare_model(plain, evaluation_mode=True), accelerator.prepare(optimizer)
        if found is None:
            # Only now: accelerate puts what it finds onto the card, and paged state would no longer be paged.
            allocate_state(optimizer)
    run = Run(options, model, plain, stepper, schedule, accelerator, data.train, data.test, directory.store, state)
    if config.memory.offload_embeddings == "on":
        embeddings_to_ram(plain, accelerator.device)
    use_limits(run, limits_of(config))
    if found is not None:
        resume(run, found.path, from_data_beginning=options.from_data_beginning)
        tidy_loaded_state(optimizer)
    return run


def prepare_base(config: FinetuneConfig, hardware: Hardware, base: LoadedBase) -> None:
    """What the plan wants of the base before adapters are attached."""
    if config.memory.head_bits in ("4", "8"):
        bits: Any = int(config.memory.head_bits)
        saved = quantize_head(base.model, bits, base.dtype)
        say(f"the head lies in {config.memory.head_bits} bits ({saved / 2**20:+,.0f} MiB freed)")
    if hardware.is_gpu and not hardware.has_flash_attention:
        avoid_flash(base.model)
    if config.memory.kernels == "liger":
        use_liger(base.model, hardware)


def run_identity(config: FinetuneConfig, data: Data) -> dict[str, Any]:
    """What makes two starts parts of one run. Card, micro-batch and number of processes are no part of it."""
    return {
        "base": base_fingerprint(config.model.model_path),
        "data": data.fingerprint,
        "template": hashlib.sha256(data.template.jinja.encode()).hexdigest(),
        # Options that came later stand there only when used: runs from before them go on.
        "lora": {
            name: value
            for name, value in asdict(config.lora).items()
            if value or not name.startswith(("train_", "lora_target_parameters"))
        },
        "bits": config.model.bits,
        "batch": {"total_batch": config.train.total_batch, "test_size": config.data.test_size},
        "seed": config.train.seed,
    }


def open_reporter(config: FinetuneConfig, run: Run, directory: RunDirectory) -> Reporter:
    """The run's reporter, with the sinks that were asked for."""
    options = config.train
    reporter = Reporter(directory.path, run.state.total_steps, run.state.step, enabled=run.accelerator.is_main_process)
    if reporter.enabled and options.tensorboard:
        reporter.sinks.append(TensorBoardSink(directory.path))
    if reporter.enabled and options.wandb:
        reporter.sinks.append(WandbSink(directory.path, options.wandb_project, asdict(config)))
    return reporter


def _adapter(config: FinetuneConfig, base: Any, found: Found | None) -> Any:
    """The adapter over the base: fresh, from other weights, or in the form of the checkpoint whose values follow."""
    start = config.train.start_adapter
    if start is None:
        return add_lora(base, config.lora)
    # The rank and the layers are those of the adapter that the run began with, not of the flags.
    loaded = load_adapter(base, found.path if found is not None else start, trainable=True)
    say(f"starting from the adapter {start}; its rank and layers stay")
    for note in loaded.notes:
        warn(note)
    return loaded.model


def _continued(config: FinetuneConfig, stored: TrainerState, fresh: TrainerState, found: Found) -> TrainerState:
    """The stored position, once it is sure that it belongs to this run."""
    options = config.train
    allowed = set(filter(None, options.accept_changes.replace(" ", "").split(",")))
    if options.from_data_beginning:
        allowed |= {"data", "batch", "seed", "template"}
    changed = differences(stored.identity, fresh.identity)
    refused = {name: values for name, values in changed.items() if name not in allowed}
    if refused:
        listed = "\n".join(f"  {name}: then {then!r}, now {now!r}" for name, (then, now) in refused.items())
        raise CheckpointError(
            f"{found.path} belongs to a run that differs from this command:\n{listed}\n"
            f"Give the old settings, another --output_path, or --accept_changes {','.join(refused)} if you mean it."
        )
    for name in changed:
        warn(f"{name} differs from the run that wrote {found.path.name}, as asked for")
    if options.from_data_beginning:
        return fresh
    if stored.total_steps != fresh.total_steps:
        warn(f"the run was planned for {stored.total_steps} steps, now for {fresh.total_steps}: the schedule changes")
    stored.total_steps, stored.identity, stored.choices = fresh.total_steps, fresh.identity, fresh.choices
    if stored.step >= stored.total_steps:
        say(f"this run has already done its {stored.total_steps} steps; a larger --num_epoch would go on")
    return stored


def _gone_back(path: Path, directory: RunDirectory) -> Found:
    """An older checkpoint of this very run; newer ones are set aside, unless they came from it already.

    So the same command can be given again after a kill without losing what was done since it went back.
    """
    if path.is_dir():
        _explicit(path)  # a damaged one is refused before anything is renamed
    newest = directory.store.newest_whole()
    mark = directory.path / GONE_BACK_NAME
    came_from = mark.read_text(encoding="utf-8") if mark.is_file() else None
    if newest is not None and newest.path.name != path.name and came_from == path.name:
        say(f"it was gone back to before; going on from {newest.path}, which came from it")
        return newest
    found = _named(path)
    for name in directory.store.set_aside_newer(found.step):
        warn(f"going back to step {found.step}: a newer checkpoint is now {name}")
    if not quiet_rank():
        mark.write_text(path.name, encoding="utf-8")
    return found


def _named(path: Path) -> Found:
    """As `_explicit`, and say so."""
    found = _explicit(path)
    say(f"going on from {path}")
    return found


def _explicit(path: Path) -> Found:
    """A checkpoint that was typed by name. Raises CheckpointError when it cannot be trusted."""
    if not path.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint: there is no directory {path}")
    problems = verify(path, require_manifest=False)
    if problems:
        raise CheckpointError(f"--resume_from_checkpoint: {path} is broken: {'; '.join(problems)}")
    return Found(path, read_state(path).step)


def _newest_in(path: Path) -> Path:
    """`path` itself when it is a checkpoint; else the newest one in it, as for a run directory."""
    if (path / "optimizer.pt").exists() or not path.is_dir():
        return path
    numbered = {int(p.name.split("-")[1]): p for p in path.glob("checkpoint-*") if p.name.split("-")[1].isdigit()}
    for _, candidate in sorted(numbered.items(), reverse=True):
        if not verify(candidate):
            return candidate
    return path
