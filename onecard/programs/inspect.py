"""Show what training would learn: samples coloured by loss mask, lengths, what is cut or skipped and why.

onecard inspect --data_path sample/merge_sample.json --cutoff_len 256
Learned text is green on a terminal, and between « and » elsewhere. --json prints everything for programs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from onecard.config.base_model import DEFAULT_BASE
from onecard.config.data import DataOptions, toy_base_problem
from onecard.config.parsing import parse
from onecard.config.problems import Problem, too_small
from onecard.console import escaped, rendered, say, warn

BAR_WIDTH = 40


@dataclass
class InspectOptions:
    """Which data, for which model."""

    model_path: str = DEFAULT_BASE
    """Whose tokenizer and chat template are used: a directory or a Hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the tokenizer."""
    n_shown: int = 3
    """Samples that are printed, taken evenly from all of them."""
    n_skipped_shown: int = 20
    """Skipped records that are named; --json names the first 1000."""
    json: bool = False
    """Print JSON instead of text."""
    data: DataOptions = field(default_factory=DataOptions)

    def problems(self) -> list[Problem]:
        return too_small(self, n_shown=0, n_skipped_shown=0)


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    options = parse(InspectOptions, argv, description=__doc__ or "")

    # Imported after the options are known to be good: these take seconds to load.
    from onecard.data.chat_template import load_template
    from onecard.data.dataset import cache_directory
    from onecard.data.encode import EncodeSettings
    from onecard.data.inspect import NO_LIMIT, inspect, pieces
    from onecard.data.joined import encode_parts
    from onecard.data.mixture import parts_of
    from onecard.model.load import load_tokenizer

    data = options.data
    if problem := toy_base_problem(options.model_path, data.data or data.data_path):
        warn(problem)
    tokenizer = load_tokenizer(options.model_path, trust_remote_code=options.trust_remote_code)
    template = load_template(data.prompt_type, tokenizer, dialogue=data.dialogue)
    cache = cache_directory(data.cache_path)
    settings = EncodeSettings(data.cutoff_len, data.train_on, data.strict, data.thinking)
    limited, whole = (
        encode_parts(parts_of(data), template, tokenizer, replace(settings, cutoff_len=limit), cache)
        for limit in (data.cutoff_len, NO_LIMIT)
    )
    found = inspect(limited, whole, data.cutoff_len)
    chosen = sorted({i * len(limited) // max(1, options.n_shown) for i in range(min(options.n_shown, len(limited)))})
    shown = [(limited[i].record, pieces(limited[i], tokenizer)) for i in chosen]
    if options.json:
        samples = [{"record": record, "pieces": [p._asdict() for p in parts]} for record, parts in shown]
        say(
            json.dumps({"template": template.name, **found.as_dict(), "samples": samples}, ensure_ascii=False, indent=2)
        )
        return
    say(f"template {template.name}, tokenizer of {options.model_path}")
    say_samples(shown)
    say_lengths(found, limited)
    say_skipped(found, options.n_skipped_shown)


def say_samples(shown: list[tuple[str, list[Any]]]) -> None:
    """Each sample's text with what is learned marked."""
    from rich.console import Console
    from rich.text import Text

    is_terminal = Console().is_terminal
    for record, parts in shown:
        say(f"\n--- {record}")
        text = Text()
        for part in parts:
            written = escaped(part.text)
            if is_terminal:
                text.append(written, style="bold green" if part.learned else "dim")
            else:
                text.append(f"«{written}»" if part.learned else written)
        say(rendered(text, soft_wrap=True), is_styled=True)


def say_lengths(found: Any, limited: Any) -> None:
    """The histogram of lengths before the limit, and what the limit costs."""
    say("\ntokens per sample, before the limit of --cutoff_len " + str(found.cutoff_len))
    most = max(bar.n_samples for bar in found.bars)
    for bar in found.bars:
        over = "  over the limit" if bar.low > found.cutoff_len and bar.n_samples else ""
        filled = -(-bar.n_samples * BAR_WIDTH // max(1, most))
        say(f"{bar.low:>7,}-{bar.high:<7,} {bar.n_samples:>9,} {'█' * filled}{over}")
    say(f"median {found.median:,}, longest {found.longest:,} tokens")
    say(f"{found.n_cut:,} samples ({found.share(found.n_cut):.1%}) are cut to fit")
    say(f"{found.n_dropped:,} samples ({found.share(found.n_dropped):.1%}) are dropped: nothing to learn is left")
    say("")
    for line in limited.summary_lines(names_skipped=False):  # `say_skipped` does
        say(line)


def say_skipped(found: Any, n_shown: int) -> None:
    """Which records are not learned from, and why."""
    skipped = found.bad + found.dropped
    if not skipped or not n_shown:
        return
    say("\nnot learned from:")
    for record, reason in skipped[:n_shown]:
        say(f"  {record}: {reason}")
    left = found.n_bad + found.n_dropped - min(n_shown, len(skipped))
    if left > 0:
        say(f"  ... and {left:,} more; --n_skipped_shown {len(skipped)} names {len(skipped):,}")
