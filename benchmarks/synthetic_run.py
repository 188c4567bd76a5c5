"""A real `Run` over made-up samples and a base in memory: what the benchmarks of memory and speed step through.

The same parts in the same order as `setup.build_run`, without files, checkpoints or a tokenizer: as a program's options
say (`build_run`), or as a plan's setup does (`real_run`). Also how the peak of a piece of work is measured on each kind
of device. It does not know which settings are worth comparing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs

from benchmarks.random_models import random_base
from onecard.config.base_model import ModelOptions
from onecard.config.lora import LoraOptions
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.data.chat_template import load_template
from onecard.data.dataset import encode_dataset
from onecard.data.encode import IGNORE_INDEX, EncodeSettings, LabelledSample
from onecard.model.hardware import Hardware, choose_dtype
from onecard.model.load import LoadedBase, load_tokenizer
from onecard.model.lora.adapter import add_lora, rank_allocation
from onecard.model.lora.vocabulary import freeze_adapter
from onecard.model.memory.architecture import Architecture
from onecard.model.memory.estimate import CONTEXT, MemoryEstimate
from onecard.model.memory.plan import Plan, make_plan
from onecard.model.memory_saving.embeddings_in_ram import embeddings_to_ram
from onecard.model.memory_saving.lm_head import quantize_head
from onecard.model.memory_saving.streamed_layers import stream_layers
from onecard.model.trained import make_trainable
from onecard.train.auto_config import card_of, limits_of
from onecard.train.build import build_accelerator, prepare_base, prepared
from onecard.train.checkpoint import CheckpointStore
from onecard.train.oom import MicroBatchLimits
from onecard.train.optim import USUAL_LORA_RATE, allocate_state, build_optimizer
from onecard.train.run import Run
from onecard.train.state import TrainerState
from onecard.train.step import use_limits
from tests.live_memory import held_bytes, peak_bytes

SPECIAL_IDS = 3  # the first ids of a vocabulary are control tokens
STEPS = 100  # that a run of `real_run` is planned for: AdaLoRA cuts ranks by their number


class Samples(Sequence[Any]):
    """Samples of one source in memory, as a run takes them: with `lengths` and `units` in the same order.

    Both follow from encoded texts; of anything else they are given.
    """

    parts = None
    dataset = SimpleNamespace(names=())

    def __init__(self, samples: Sequence[Any], lengths: Sequence[int] = (), units: Sequence[float] = ()) -> None:
        self.samples = list(samples)
        self.lengths = np.array(lengths or [len(sample.input_ids) for sample in samples])
        # The first token of a row is predicted by nothing.
        self.units = np.array(units or [sum(n != IGNORE_INDEX for n in sample.labels[1:]) for sample in samples])
        self.order = self.n_per_epoch = len(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: Any) -> Any:
        return self.samples[int(position)]


@dataclass(frozen=True)
class Peak:
    """The most bytes of tensors on the card during some work, weights included, and what waits in RAM meanwhile.

    reserved_bytes: what the allocator held; None without a card. There the "card" is all that was not sent to RAM.
    """

    tensor_bytes: int
    ram_bytes: int = 0
    reserved_bytes: int | None = None


def random_samples(lengths: Sequence[int], vocab_size: int, *, seed: int = 0) -> Samples:
    """Samples of these lengths whose every token is learned: the most that the loss can ask for."""
    made = []
    for number, length in enumerate(lengths):
        ids = np.random.RandomState([seed, number]).randint(SPECIAL_IDS, vocab_size, length).tolist()
        made.append(LabelledSample(ids, list(ids), f"random:{number}", number))
    return Samples(made)


def samples_of(data_path: str, tokenizer_path: Path, cutoff_len: int) -> Samples:
    """Real records, encoded with a small tokenizer whose ids every larger vocabulary has, too. Caches nothing."""
    tokenizer = load_tokenizer(str(tokenizer_path))
    template = load_template("auto", tokenizer)
    with TemporaryDirectory() as cache:
        dataset = encode_dataset(data_path, template, tokenizer, EncodeSettings(cutoff_len), Path(cache))
        return Samples([dataset[number] for number in range(len(dataset))])


def plan_for(config: FinetuneConfig, model: Architecture, hardware: Hardware, longest: int) -> Plan:
    """The plan for samples of `longest` tokens, with what is typed in `config` and nothing said."""
    dtype, _ = choose_dtype(config.model.dtype, config.model.bits, hardware, model.model_type)
    card = card_of(hardware, config.memory.vram)
    config = replace(config, data=replace(config.data, cutoff_len=longest))
    return make_plan(model, config, card, element_bytes=dtype.itemsize)


def build_run(config: FinetuneConfig, hardware: Hardware, base: LoadedBase, samples: Samples) -> Run:
    """A run that is ready for `step.take_step`, as `setup.build_run` makes one. `config` has every choice filled in."""
    options = replace(config.train, learning_rate=config.train.learning_rate or USUAL_LORA_RATE)
    # One of its own: an accelerator keeps every optimizer that it ever prepared, and so their models.
    accelerator = build_accelerator(config, hardware, str(base.model.config.model_type))
    prepare_base(config, hardware, base)
    torch.manual_seed(options.seed)
    plain = add_lora(base.model, config.lora)
    streams = config.model.stream_layers == "on"
    if streams:
        stream_layers(plain, accelerator.device, embeddings_stay=config.memory.offload_embeddings == "on")
    optimizer = build_optimizer(plain, options)
    allocate_state(optimizer)
    model, stepper = prepared(accelerator, plain, streams), accelerator.prepare(optimizer)
    state = TrainerState(total_steps=options.max_steps)
    store = CheckpointStore(Path("unused"))
    run = Run(options, model, plain, stepper, accelerator, samples, [], store, state)
    if config.memory.offload_embeddings == "on":
        embeddings_to_ram(plain, accelerator.device)
    use_limits(run, limits_of(config))
    run.model.train()
    return run


def real_run(config: dict[str, Any], setup: Any, hardware: Hardware, **lora_options: Any) -> Run:
    """A run over random token ids, put together as a `MemoryConfig` says; every step is two micro-batches.

    Two, because the gradients of the adapter are there from the second on: the plan counts them. lora_options: those
    that change nothing in a plan.
    """
    lora = LoraOptions(
        lora_r=setup.rank, use_dora=setup.use_dora, lora_dropout=setup.lora_dropout,
        train_embeddings=setup.train_embeddings, train_new_tokens=setup.n_new_tokens > 0,
        peft_method=setup.peft_method, peft_option=setup.peft_option, **lora_options,
    )  # fmt: skip
    base = _base_of(config, setup, hardware)
    plain = _adapted(base, lora, setup, hardware)
    options = TrainOptions(total_batch=2 * setup.rows, optimizer=setup.optimizer, learning_rate=2e-4)
    optimizer = build_optimizer(plain, options)
    AcceleratorState._reset_state(True)
    mixed = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(base.dtype, "no")
    accelerator = Accelerator(cpu=not hardware.is_gpu, mixed_precision=mixed,
                              kwargs_handlers=[AutocastKwargs(cache_enabled=False)])  # fmt: skip
    model, stepper = prepared(accelerator, plain, setup.stream_layers), accelerator.prepare(optimizer)
    allocate_state(optimizer)  # after accelerate, as `train.build`: what it finds it copies
    if setup.offload_embeddings:  # last: accelerate would move them back
        embeddings_to_ram(plain, hardware.device)
    samples = random_samples([setup.length] * options.total_batch, int(config["vocab_size"]))
    run = Run(options, model, plain, stepper, accelerator, samples, [], CheckpointStore(Path("unused")))
    run.ranks, run.state.total_steps = rank_allocation(plain, lora), STEPS
    use_limits(run, MicroBatchLimits(setup.rows, 0, setup.loss_chunk, setup.offload_activations, setup.mlp_tile))
    plain.train()
    return run


def _base_of(config: dict[str, Any], setup: Any, hardware: Hardware) -> LoadedBase:
    options = ModelOptions(bits=setup.bits, gradient_checkpointing=setup.gradient_checkpointing,
                           stream_layers="on" if setup.stream_layers else "off")  # fmt: skip
    base = random_base(config, options, hardware)
    if setup.eager_attention:
        base.model.set_attn_implementation("eager")
    if setup.head_bits < 16:
        quantize_head(base.model, setup.head_bits, base.dtype)
    return base


def _adapted(base: LoadedBase, lora: LoraOptions, setup: Any, hardware: Hardware) -> Any:
    n_all = int(base.model.config.vocab_size)
    new_ids = list(range(n_all - setup.n_new_tokens, n_all))
    plain = make_trainable(base.model, lora, new_ids=new_ids, gives_reward=setup.gives_reward)
    if setup.only_vocabulary:
        freeze_adapter(plain)
    if setup.stream_layers:
        stream_layers(plain, hardware.device, embeddings_stay=setup.offload_embeddings)
    return plain


def peak_of(work: Callable[[], object], device: torch.device, *holders: Any) -> Peak:
    """The peak of `work`, done once before so that libraries, optimizers and buffers in RAM have taken what they keep.

    On a card: what the allocator says. On a CPU: what models and optimizers among `holders` hold, and what torch's
    profiler sees come and go.
    """
    work()
    if device.type != "cuda":
        return Peak(held_bytes(*holders) + peak_bytes(work))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return Peak(peaks[0], reserved_bytes=peaks[1])


def run_peak(run: Run, work: Callable[[], object], *, embeddings_in_ram: bool) -> Peak:
    """The peak of `work`, which steps through `run`. Without a card the embeddings "in RAM" are where they were."""
    device = run.accelerator.device
    peak = peak_of(work, device, run.plain_model, run.optimizer.optimizer)
    base = run.plain_model.get_base_model()
    embeddings, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    moved = embeddings.nbytes if embeddings_in_ram and embeddings is not head else 0
    waiting = run.offload.host_bytes if run.offload is not None else 0
    on_card = peak.tensor_bytes - (moved if device.type != "cuda" else 0)
    return replace(peak, tensor_bytes=on_card, ram_bytes=moved + waiting)


def planned_peak(account: MemoryEstimate) -> Peak:
    """What the plan says of the same."""
    context = sum(part.n_bytes for part in account.parts if part.name == CONTEXT)
    return Peak(account.tensor_bytes, account.ram_bytes, account.card_bytes - context)
