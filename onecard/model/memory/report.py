"""A plan in words, as a table, as a matrix, as JSON and as a picture.

It knows the shape of `plan.py`'s answers and 80 columns of plain text. It adds up nothing that `estimate.py` adds up,
and it prints nothing: the callers do. The picture is drawn without a display.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from onecard.config.lora import LoraOptions
from onecard.config.training import FinetuneConfig
from onecard.model.memory.architecture import Architecture, KnownModel
from onecard.model.memory.estimate import GIB, MemoryConfig, account
from onecard.model.memory.plan import CardSpec, Plan, make_plan
from onecard.model.memory.streaming_speed import COPY_BYTES_PER_S, OPERATIONS_PER_S, streaming_speed
from onecard.model.memory.techniques import LOSS_CHUNKS, MLP_TILES
from onecard.translation import language, translated

WIDTH = 80
NAME_WIDTH, GIB_WIDTH, SHARE_WIDTH = 46, 9, 7
SETTING_WIDTH = 34
CELL_WIDTH, LENGTH_WIDTH = 10, 10
MISFIT, STREAMED = "!", "~"
UNTOUCHED = "fits"  # the reason that `plan.py` gives for what it did not have to give up
SHORTEST_DRAWN, LONGEST_DRAWN, POINTS_DRAWN = 256, 131072, 48
COLOURS = ("#1f4e8c", "#c8561b", "#3a8f5c", "#8a4fa3", "#b58900", "#5b6770", "#c2407a", "#2aa1b3")
Curve = list[tuple[int, float]]  # (tokens of the row, GiB)


def plan_lines(plan: Plan, longest: int | None = None) -> list[str]:
    """The whole plan for a person: the table, the verdict, every setting with its reason.

    longest: what `plan.longest_context` says for the same options; None leaves that line out.
    """
    return [
        *_head_lines(plan),
        "",
        *table_lines(plan),
        "",
        *verdict_lines(plan, longest),
        "",
        *setting_lines(plan),
        *streaming_lines(plan),
        *([] if longest is None else ["", *longest_lines(plan, longest)]),
    ]


def table_lines(plan: Plan) -> list[str]:
    """Part, GiB and share of the peak; what lies in RAM is listed apart. Without settings and verdict."""
    peak, total = plan.account.card_bytes, plan.card.total_bytes
    place = "on the card" if plan.card.is_gpu else "in memory"
    lines = [f"  {place:<{NAME_WIDTH}}{'GiB':>{GIB_WIDTH}}{'share':>{SHARE_WIDTH}}"]
    lines += [_row(part.name, part.n_bytes, peak) for part in plan.account.parts if part.place == "card"]
    lines += ["  " + "-" * (NAME_WIDTH + GIB_WIDTH + SHARE_WIDTH), _row("peak", peak, peak)]
    lines += [_row("the card has" if plan.card.is_gpu else "the machine has", total)]
    lines += [_row("left" if peak <= total else "missing", abs(total - peak))]
    in_ram = [part for part in plan.account.parts if part.place == "RAM"]
    if in_ram:
        lines += ["", "  in RAM, pinned", *(_row(part.name, part.n_bytes) for part in in_ram)]
        lines += [_row("the machine has", plan.card.ram_bytes)]
    return lines


def verdict_lines(plan: Plan, longest: int | None = None) -> list[str]:
    """Whether it fits, and if not what could be done, most harmless first."""
    peak, total, ram = plan.account.card_bytes, plan.card.total_bytes, plan.account.ram_bytes
    if plan.fits:
        left = total - peak
        return _wrap(f"It fits: {gib(peak)} of {gib(total)} GiB at the worst moment; {gib(left)} GiB stay free.")
    short = []
    if peak > total:
        short.append(
            f"the {'card' if plan.card.is_gpu else 'machine'}'s {gib(total)} GiB are {_size(peak - total)} too few"
        )
    if ram > plan.card.ram_bytes:
        short.append(f"the RAM's {gib(plan.card.ram_bytes)} GiB are {_size(ram - plan.card.ram_bytes)} too few")
    lines = _wrap(f"It does not fit: {'; '.join(short)}. What would help:")
    return lines + [line for each in advice(plan, longest) for line in _wrap(f"- {translated(each)}", "  ")]


def advice(plan: Plan, longest: int | None) -> list[str]:
    """What would make a plan fit, the most harmless first."""
    found = [f"let the plan choose {choice.flag}, given as {choice.value}" for choice in plan.choices if choice.by_hand]
    if longest:
        found.append(f"shorter samples: --cutoff_len {longest}")
    if plan.setup.bits > 4 and not plan.model.stored_bits:
        found.append(f"fewer bits: --bits {4 if plan.setup.bits <= 8 else 8}")
    if plan.setup.rank > 8:
        found.append("a lower rank: --lora_r 8")
    return [*found, "a smaller model"]


def setting_lines(plan: Plan) -> list[str]:
    """Every setting that decides the memory, its value and why."""
    lines = ["settings"]
    for choice in plan.choices:
        reason = "given by hand" if choice.by_hand else choice.reason
        if reason == UNTOUCHED and not plan.fits:
            reason = "of no use here"
        first = f"  {choice.flag} {choice.value}".ljust(SETTING_WIDTH - 1) + " "
        lines += textwrap.wrap(first + reason, _width(), subsequent_indent=" " * SETTING_WIDTH, drop_whitespace=True)
    return lines


def streaming_lines(plan: Plan) -> list[str]:
    """How fast layers from RAM can be, and by which rates; nothing where they lie on the card."""
    if not plan.setup.stream_layers:
        return []
    speed = streaming_speed(plan.model, plan.setup)
    rates = f"{COPY_BYTES_PER_S / 1e9:g} GB/s and {OPERATIONS_PER_S / 1e12:g} TFLOP/s"
    return ["", *_wrap(
        f"Streamed layers: each takes {1e3 * speed.copy_s:.1f} ms to come and {1e3 * speed.forward_s:.1f} ms to "
        f"compute {plan.setup.tokens:,} tokens forward; copies hide from {speed.hidden_tokens:,} tokens on. At most "
        f"{speed.tokens_per_s:,.0f} tokens/s, at {rates} (assumed, not measured)."
    )]  # fmt: skip


def longest_lines(plan: Plan, longest: int) -> list[str]:
    """The longest context that would fit this card, one row at a time."""
    if not longest:
        return _wrap(f"Not even one token fits {_card(plan.card)} with these options.")
    positions = plan.model.max_positions
    beyond = f", more than the {positions:,} positions of the model" if 0 < positions < longest else ""
    ram = (
        f" (layer inputs and layers may wait in {plan.card.ram_bytes / GIB:.4g} GiB of RAM)" if plan.card.is_gpu else ""
    )
    return _wrap(f"Longest context that fits with these options: {longest:,} tokens in one row{beyond}{ram}.")


def matrix_lines(plans: Sequence[Plan], longest: Sequence[int] = ()) -> list[str]:
    """Peak in GiB by length (rows) and card (columns), one block per model; `!` marks what does not fit.

    longest: for each of `plans` what `plan.longest_context` says; it becomes a last row.
    """
    lines: list[str] = []
    per_block = (WIDTH - LENGTH_WIDTH) // CELL_WIDTH
    cards = list(dict.fromkeys(plan.card for plan in plans))
    contexts = {(plan.model, plan.card): tokens for plan, tokens in zip(plans, longest, strict=False)}
    for model in dict.fromkeys(plan.model for plan in plans):
        mine = {(plan.longest_row, plan.card): plan for plan in plans if plan.model == model}
        lengths = sorted({length for length, _ in mine})
        lines += ["", f"{model.name}: {_billions(model.n_weights)} weights, peak in GiB"]
        for start in range(0, len(cards), per_block):
            block = cards[start : start + per_block]
            lines += [_matrix_row("tokens", [f"{card.total_bytes / GIB:.4g} GiB" for card in block])]
            for length in lengths:
                cells = [_cell(mine[length, card]) if (length, card) in mine else "" for card in block]
                lines.append(_matrix_row(f"{length:,}", cells))
            if contexts:
                lines.append(_matrix_row("longest", [f"{contexts[model, card]:,}" for card in block]))
    if any(plan.setup.stream_layers for plan in plans):
        lines += _wrap(f"{STREAMED} --stream_layers: its layers lie in RAM and pass through the card.")
    legend = f"{MISFIT} does not fit. A bigger card gives up less for it, so its peak may be higher."
    if contexts:
        legend += f" longest: tokens of one row that fits, with {cards[0].ram_bytes / GIB:.4g} GiB of RAM."
    return [*lines[1:], *_wrap(legend)]


def plan_dict(plan: Plan, longest: int | None = None) -> dict[str, Any]:
    """The plan for programs: sizes are whole bytes, lengths tokens."""
    total, peak = plan.card.total_bytes, plan.account.card_bytes
    numbers = {name: value for name, value in asdict(plan.model).items() if name != "source"}
    found: dict[str, Any] = {
        "model": {**numbers, "n_weights": plan.model.n_weights, "tied": plan.model.tied},
        "card": asdict(plan.card),
        "setup": asdict(plan.setup),
        "longest_row_tokens": plan.longest_row,
        "micro_batch_tokens": plan.micro_tokens,
        "fits": plan.fits,
        "peak_bytes": peak,
        "tensor_bytes": plan.account.tensor_bytes,
        "left_bytes": total - peak,
        "ram_bytes": plan.account.ram_bytes,
        "parts": [asdict(part) for part in plan.account.parts],
        "choices": [asdict(choice) for choice in plan.choices],
    }
    return found if longest is None else {**found, "longest_context_tokens": longest}


def known_lines(models: Mapping[str, KnownModel]) -> list[str]:
    """The known models by name, size and Hub id."""
    lines = [f"{'name':<18}{'weights':>10}  Hub id (+ others of the same shape)"]
    for model in models.values():
        others = f" (+{len(model.hub_ids) - 1})" if len(model.hub_ids) > 1 else ""
        lines.append(f"{model.name:<18}{_billions(model.n_parameters):>10}  {model.hub_ids[0]}{others}")
    return lines


def largest_line(name: str | None, card: str, length: int) -> str:
    """The largest known model that would fit, or that none does."""
    if name is None:
        return f"No known model fits {card} with these options at {length:,} tokens."
    return f"Largest known model that fits {card} at {length:,} tokens: {name}."


def time_lines(n_tokens: float, tokens_per_s: float | None, source: str) -> list[str]:
    """How long the run would take, or what is missing to say it. n_tokens: over all epochs; 0: not known."""
    if not tokens_per_s:
        return _wrap("Time: no throughput known; give --tokens_per_s, or the --output_path of a run like this one.")
    at = f"{tokens_per_s:,.0f} tokens/s ({source})"
    if n_tokens <= 0:
        return _wrap(f"Time: {at}; give --n_tokens to see how long the run would take.")
    return _wrap(f"Time: about {_duration(n_tokens / tokens_per_s)} for {n_tokens:,.0f} tokens at {at}.")


def curves_of(models: Sequence[Architecture], config: FinetuneConfig, element_bytes: int = 2) -> dict[str, Curve]:
    """Memory against the length of one row: of several models with everything given up, or of one by technique."""
    lengths = _drawn_lengths()
    if len(models) > 1:
        return {
            model.name: [(n, _gib_of(model, _frugal(model, config, element_bytes, n), n)) for n in lengths]
            for model in models
        }
    model, setups = models[0], _techniques(models[0], config, element_bytes)
    return {name: [(n, _gib_of(model, setup, n)) for n in lengths] for name, setup in setups.items()}


def draw_curves(curves: Mapping[str, Curve], cards_gib: Sequence[float], title: str, path: Path) -> None:
    """Write a PNG: GiB against tokens, one line per curve, one horizontal line per card. Raises OSError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(9, 5.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    shortest, longest = SHORTEST_DRAWN, max(tokens for curve in curves.values() for tokens, _ in curve)
    for (name, curve), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        axes.plot(*zip(*curve, strict=True), color=colour, linewidth=2, label=name)
        crossings = [(crossing, card) for card in cards_gib if (crossing := _crossing(curve, card))]
        if crossings:
            axes.plot(*zip(*crossings, strict=True), "o", color=colour, markersize=5)
    for card in sorted(cards_gib):
        axes.axhline(card, color="#888888", linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        axes.annotate(f"{card:g} GiB", (1, card), xycoords=("axes fraction", "data"), xytext=(4, 0),
                      textcoords="offset points", va="center", color="#555555")  # fmt: skip
    highest = max(peak for curve in curves.values() for _, peak in curve)
    top = 1.25 * max(cards_gib) if cards_gib else 1.05 * highest
    axes.set(xscale="log", xlim=(shortest, longest), ylim=(0, top), title=title,
             xlabel="tokens in one row", ylabel="peak on the card (GiB)")  # fmt: skip
    ticks = [tokens for tokens in (2**power for power in range(8, 22)) if shortest <= tokens <= longest]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _short(int(tokens))))
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", framealpha=0.95)
    figure.savefig(path)


def gib(n_bytes: int) -> str:
    """Bytes as GiB with the digits that matter; a little is not nothing."""
    return f"{n_bytes / GIB:.2f}" if n_bytes == 0 or n_bytes >= GIB // 200 else "<0.01"


def _head_lines(plan: Plan) -> list[str]:
    setup, model = plan.setup, plan.model
    rows = "1 row" if setup.rows == 1 else f"{setup.rows} rows"
    targets = "all linear layers" if setup.targets.strip() == "all-linear" else setup.targets
    lines = _wrap(f"{model.name}, {_billions(model.n_weights)} weights, on {_card(plan.card)}")
    options = LoraOptions(setup.peft_method)
    what = f"LoRA rank {setup.rank} on {targets}"
    if options.sized_by_model:
        what = f"virtual tokens ({setup.peft_method})" if options.has_virtual_tokens else "bottleneck adapters"
    lines += _wrap(
        f"base in {setup.bits} bits, arithmetic in {8 * setup.element_bytes}, {what}; "
        f"{rows} of up to {plan.longest_row:,} tokens at once"
    )
    if model.stored_bits:
        lines += _wrap(f"note: its files are quantised already, to {model.stored_bits} bits")
    lines += [line for note in model.notes for line in _wrap(f"note: {note}")]
    if plan.card.is_gpu and not plan.card.expandable_segments:
        lines += _wrap(
            "note: without expandable segments, which Windows and WSL do not have, torch leaves gaps in the card's "
            "memory; more is counted for them"
        )
    longest = plan.longest_row // plan.rows_per_sample
    if 0 < model.max_positions < longest:
        lines += _wrap(f"note: {longest:,} tokens are more than the model's {model.max_positions:,} positions "
                       f"(--rope_scaling yarn:{-(-longest // model.max_positions)} stretches them)")  # fmt: skip
    return lines


def _techniques(model: Architecture, config: FinetuneConfig, element_bytes: int) -> dict[str, MemoryConfig]:
    """What each technique adds, one after the other, beginning with none of them but recomputed layers."""
    endless = CardSpec("endless", 2**60, 2**60)
    first = make_plan(model, config, endless, element_bytes=element_bytes).setup
    setup = replace(
        first, rows=1, gradient_checkpointing=True, loss_chunk=0, offload_activations=False, offload_embeddings=False,
        mlp_tile=0,
    )  # fmt: skip
    found = {"all logits at once": setup}
    for name, changed in {
        "+ loss in chunks": {"loss_chunk": first.loss_chunk or LOSS_CHUNKS[0]},
        "+ layer inputs in RAM": {"offload_activations": True},
        "+ 8-bit optimizer, embeddings in RAM, 4-bit head": {
            "optimizer": "paged_adamw_8bit",
            "offload_embeddings": True,
            "head_bits": 4,
        },
        "+ MLP in tiles": {"mlp_tile": MLP_TILES[-1]},
    }.items():
        setup = replace(setup, **changed)  # type: ignore[arg-type]
        found[name] = setup
    return found


def _frugal(model: Architecture, config: FinetuneConfig, element_bytes: int, length: int) -> MemoryConfig:
    """The setup with everything given up that helps: what the plan arrives at when no card is big enough."""
    data, train = replace(config.data, cutoff_len=length), replace(config.train, micro_batch=1, micro_tokens=0)
    nothing = CardSpec("none", 0, 2**60)
    return make_plan(model, replace(config, data=data, train=train), nothing, element_bytes=element_bytes).setup


def _gib_of(model: Architecture, setup: MemoryConfig, length: int) -> float:
    return account(model, replace(setup, length=length)).card_bytes / GIB


def _crossing(curve: Curve, card_gib: float) -> float | None:
    """Where a rising curve passes the card, in tokens, on a straight line between two drawn points."""
    for (tokens, below), (more_tokens, above) in pairwise(curve):
        if below <= card_gib < above:
            return tokens + (more_tokens - tokens) * (card_gib - below) / (above - below)
    return None


def _drawn_lengths() -> list[int]:
    growth = (LONGEST_DRAWN / SHORTEST_DRAWN) ** (1 / (POINTS_DRAWN - 1))
    return [round(SHORTEST_DRAWN * growth**i) for i in range(POINTS_DRAWN)]


def _size(n_bytes: int) -> str:
    return f"{gib(n_bytes)} GiB" if n_bytes >= GIB // 10 else f"{-(-n_bytes // 2**20)} MiB"


def _row(name: str, n_bytes: int, whole: int = 0) -> str:
    share = f"{100 * n_bytes / whole:.1f} %" if whole else ""
    return f"  {name:<{NAME_WIDTH}}{gib(n_bytes):>{GIB_WIDTH}}{share:>{SHARE_WIDTH + 1}}".rstrip()


def _matrix_row(name: str, cells: Sequence[str]) -> str:
    aligned = [
        cell.rjust(CELL_WIDTH) if cell.endswith((MISFIT, STREAMED)) else cell.rjust(CELL_WIDTH - 1) + " "
        for cell in cells
    ]
    return (name.rjust(LENGTH_WIDTH) + "".join(aligned)).rstrip()


def _cell(plan: Plan) -> str:
    return gib(plan.account.card_bytes) + (MISFIT if not plan.fits else STREAMED if plan.setup.stream_layers else "")


def _card(card: CardSpec) -> str:
    size = f"{card.total_bytes / GIB:.4g} GiB"
    return card.name if card.name.endswith(size) else f"{card.name} ({size})"


def _wrap(text: str, later: str = "") -> list[str]:
    shown = translated(text)  # as a whole: its lines are no messages
    if shown != text:
        return [shown]  # Chinese has no blanks to be broken at; the terminal breaks it anywhere
    return textwrap.wrap(text, _width(), subsequent_indent=later, break_long_words=False, break_on_hyphens=False)


def _width() -> int:
    # A line that is translated must be whole; the terminal wraps it.
    return WIDTH if language() == "en" else 10_000


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 10**8 else f"{number / 1e6:.1f} M"


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} seconds"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} minutes"
