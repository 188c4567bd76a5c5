"""Say what memory a training run would need on a card: part by part, before anything is downloaded or loaded.

onecard plan --model_path Llama-3.1-8B --vram 11 --cutoff_len 4096
onecard plan --models Qwen3-4B,Qwen3-8B --vram 8,11,24 --lengths 1024,4096,16384 --plot memory.png
Common models are known by name (--known); others are read from config.json alone. Every training option counts.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from onecard.config.base_model import ModelOptions
from onecard.config.data import DataOptions
from onecard.config.lora import LoraOptions
from onecard.config.parsing import comma_list, parse
from onecard.config.problems import Problem, too_small
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig, MemoryOptions
from onecard.console import say
from onecard.errors import ConfigError


@dataclass
class CardOptions(MemoryOptions):
    """The cards that are planned for, and how the run is made to fit them."""

    vram: float | str = 0.0  # type: ignore[assignment]
    """Memory of the card in GiB; several with commas between them: 8,11,24. 0: the card found here."""

    @property
    def sizes(self) -> str:
        """The sizes as a list in text; empty for the card found here."""
        return str(self.vram or "")

    def problems(self) -> list[Problem]:
        return list_problems("--vram", self.sizes, float) or self.of_a_run().problems()

    def of_a_run(self) -> MemoryOptions:
        """The same options as training takes them, which has one card."""
        return MemoryOptions(**{f.name: getattr(self, f.name) for f in fields(MemoryOptions)} | {"vram": 0.0})


@dataclass
class PlanOptions:
    """What is planned, and in which form the answer comes."""

    models: str = ""
    """Several models with commas between them, in the place of --model_path: names, Hub ids or directories."""
    lengths: str = ""
    """Several lengths in tokens with commas between them, in the place of --cutoff_len: 512,1024,2048."""
    known: bool = False
    """List the models that are known by name."""
    json: bool = False
    """Print JSON instead of text."""
    plot: str | None = None
    """Draw memory against context into this PNG: one line per model, or of one model one per technique."""
    tokens_per_s: float = 0.0
    """Training speed, for the expected time; 0: the median in log.jsonl of --output_path, if there is one."""
    n_tokens: int = 0
    """Tokens of the training data, one pass (`onecard inspect` tells); --num_epoch multiplies it."""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    memory: CardOptions = field(default_factory=CardOptions)

    def problems(self) -> list[Problem]:
        found = list_problems("--lengths", self.lengths, int) + too_small(self, tokens_per_s=0, n_tokens=0)
        if self.plot is not None and Path(self.plot).suffix.lower() != ".png":
            found.append(("--plot", f"{self.plot} is no name of a PNG; end it with .png"))
        return found


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    options = parse(PlanOptions, argv, description=__doc__ or "", opens_files=False)

    # bitsandbytes hands functions to torch's compiler when it is imported: a second of a core, and a plan calls none.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Imported after the options are known to be good: these take seconds to load.
    from onecard.model.memory import report as plan_text
    from onecard.model.memory.architecture import architecture_of, known_models
    from onecard.model.memory.cards import element_bytes, largest_known
    from onecard.model.memory.plan import longest_context, make_plan

    if options.known:
        for line in plan_text.known_lines(known_models()):
            say(line)
        return
    config = FinetuneConfig(options.model, options.data, options.lora, options.train, options.memory.of_a_run())
    cards = find_cards(options)
    names = comma_list(options.models) or [options.model.model_path]
    base = options.model
    models = [
        architecture_of(name, trust_remote_code=base.trust_remote_code, rope_scaling=base.rope_scaling)
        for name in names
    ]
    lengths = numbers(options.lengths, int) or [options.data.cutoff_len]
    configs = [replace(config, data=replace(config.data, cutoff_len=length)) for length in lengths]
    plans, longest = [], []
    for model in models:
        for card, hardware in cards:
            width = element_bytes(config, hardware, model.model_type)
            plans += [make_plan(model, each, card, element_bytes=width) for each in configs]
            longest += [longest_context(model, config, card, element_bytes=width)] * len(configs)
    largest = {card.name: largest_known(configs[0], card, hardware) for card, hardware in cards}
    speed, source = throughput(options)
    n_tokens = options.n_tokens * options.train.num_epoch
    if options.plot:
        draw(models, config, cards, Path(options.plot).expanduser())
    if options.json:
        listed = [plan_text.plan_dict(plan, n) for plan, n in zip(plans, longest, strict=True)]
        times = {"tokens_per_s": speed, "n_tokens": n_tokens, "seconds": n_tokens / speed if speed else None}
        say(json.dumps({"plans": listed, "largest_known_model": largest, **times}, indent=2))
        return
    one = len(plans) == 1
    lines = plan_text.plan_lines(plans[0], longest[0]) if one else plan_text.matrix_lines(plans, longest)
    lines += ["", *(plan_text.largest_line(name, card, lengths[0]) for card, name in largest.items())]
    for line in [*lines, *plan_text.time_lines(n_tokens, speed, source)]:
        say(line)
    if options.plot:
        say(f"Drawn: {options.plot}")


def numbers(text: str, kind: type) -> list[Any]:
    """The numbers in a text with commas between them. Raises ValueError."""
    return [kind(word) for word in text.replace(" ", "").split(",") if word]


def list_problems(flag: str, text: str, kind: type) -> list[Problem]:
    """What is wrong with a list of lengths in tokens (int) or of sizes in GiB (float)."""
    try:
        found = numbers(text, kind)
    except ValueError:
        return [(flag, f"{text!r} is no list of numbers with commas between them, such as 8,11,24")]
    if kind is int:
        return [(flag, f"{n} tokens leave no room for an answer; use 8 or more") for n in found if n < 8]
    return [(flag, f"{n:g} GiB is no size of a card; use more than 0") for n in found if not 0 < n < 2**20]


def find_cards(options: PlanOptions) -> list[tuple[Any, Any]]:
    """Each card as the plan sees it, and as the choice of the number format does."""
    from onecard.model.allocator import prefer_expandable_segments
    from onecard.model.hardware import detect
    from onecard.model.memory.cards import card_of_size

    prefer_expandable_segments()  # as the run will
    old = options.memory.pretend_turing
    if sizes := numbers(options.memory.sizes, float):
        return [card_of_size(gib, is_old=old) for gib in dict.fromkeys(sizes)]
    from onecard.train.auto_config import card_of

    found = detect(options.model.device, pretend_turing=old)
    if not found.is_gpu:
        raise ConfigError("--vram", "no card is found here; give its memory in GiB, such as --vram 11")
    return [(card_of(found, max_memory=options.model.max_memory), found)]


def throughput(options: PlanOptions) -> tuple[float | None, str]:
    """Tokens per second, and where that is from; None when nobody knows."""
    if options.tokens_per_s:
        return options.tokens_per_s, "given"
    from onecard.train.trackers import read_log

    run = Path(options.train.output_path).expanduser()
    logged = [row["tokens_per_s"] for row in read_log(run) if row.get("tokens_per_s")]
    return (statistics.median(logged), f"median of {run}") if logged else (None, "")


def draw(models: list[Any], config: FinetuneConfig, cards: list[tuple[Any, Any]], path: Path) -> None:
    """Write the PNG. Raises ConfigError when it cannot be written."""
    from onecard.model.memory.cards import element_bytes
    from onecard.model.memory.report import curves_of, draw_curves

    what = models[0].name if len(models) == 1 else "Every saving on"
    title = f"{what}, {config.model.bits} bits, LoRA rank {config.lora.lora_r}"
    curves = curves_of(models, config, element_bytes(config, cards[0][1], models[0].model_type))
    try:
        draw_curves(curves, [card.total_bytes / 2**30 for card, _ in cards], title, path)
    except OSError as reason:
        raise ConfigError("--plot", f"{path} cannot be written: {reason.strerror or reason}") from reason
