"""A plan in words, as a table, a matrix, JSON and a picture: what a person reads must be what was computed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest

from onecard.config.training import FinetuneConfig
from onecard.model.memory import report as plan_text
from onecard.model.memory.architecture import Architecture, architecture_of, known_models
from onecard.model.memory.estimate import GIB, MemoryComponent, MemoryConfig, MemoryEstimate
from onecard.model.memory.plan import CardSpec, Plan, longest_context, make_plan
from onecard.model.memory.techniques import PlannedSetting
from onecard.translation import translated, use_language

LLAMA = "Llama-3.1-8B"


@pytest.fixture(scope="module", autouse=True)
def _plans_trace_no_model(module_peaks_by_formula: None) -> None:
    """How a plan is said is looked at; the curves of the picture are of traced ones."""


def config_of(**changes: object) -> FinetuneConfig:
    config = FinetuneConfig()
    for name, value in changes.items():
        holder = next(group for group in vars(config).values() if hasattr(group, name))
        setattr(holder, name, value)
    return config


def card_of(gib: float, ram_gib: float = 64) -> CardSpec:
    return CardSpec(f"a card of {gib:g} GiB", int(gib * GIB), int(ram_gib * GIB))


def plan_of(gib: float = 11, model: str = LLAMA, ram_gib: float = 64, **changes: object) -> Plan:
    return make_plan(architecture_of(model), config_of(**changes), card_of(gib, ram_gib))


def made_plan(parts: list[MemoryComponent], gib: float, ram_gib: float = 64, **changes: object) -> Plan:
    """A plan with these parts, whatever the arithmetic would say."""
    setup = MemoryConfig(bits=4, element_bytes=2, rows=1, length=512)
    plan = Plan(architecture_of(LLAMA), card_of(gib, ram_gib), setup, MemoryEstimate(tuple(parts)), (), 512)
    return replace(plan, **changes)  # type: ignore[arg-type]


def joined(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


# --- the table


def test_every_part_is_in_the_table_with_its_size_and_share() -> None:
    plan = plan_of(11, cutoff_len=16384)
    lines = plan_text.table_lines(plan)
    on_card = [part for part in plan.account.parts if part.place == "card"]
    for part in on_card:
        row = next(line for line in lines if line.strip().startswith(part.name))
        share = f"{100 * part.n_bytes / plan.account.card_bytes:.1f} %"
        assert row.endswith(share) and (plan_text.gib(part.n_bytes) + " ") in row, row
    assert len(on_card) >= 10
    shares = [float(found) for line in lines for found in re.findall(r"([\d.]+) %$", line)]
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.1 * len(shares)) and shares[-1] == 100


def test_numbers_stand_below_one_another() -> None:
    lines = plan_text.table_lines(plan_of(11))
    ends = {re.search(r"(<?\d+\.\d\d)(?= |$)", line).end() for line in lines if re.search(r"\d\.\d\d( |$)", line)}  # type: ignore[union-attr]
    assert len(ends) == 1 and lines[0].index("GiB") + 3 == ends.pop()


def test_what_lies_in_ram_is_apart_and_not_in_the_peak() -> None:
    parts = [
        MemoryComponent("weights", 3 * GIB),
        MemoryComponent("inputs", 5 * GIB, "RAM"),
        MemoryComponent("layer", GIB, transient=True),
    ]
    lines = plan_text.table_lines(made_plan(parts, 8))
    ram = lines.index("  in RAM, pinned")
    assert "inputs" in lines[ram + 1] and "5.00" in lines[ram + 1] and "64.00" in lines[ram + 2]
    assert not any("inputs" in line for line in lines[:ram])
    peak = next(line for line in lines if line.strip().startswith("peak"))
    left = next(line for line in lines if line.strip().startswith("left"))
    assert peak.split() == ["peak", "4.00", "100.0", "%"] and left.split() == ["left", "4.00"]
    assert "in RAM, pinned" not in plan_text.table_lines(made_plan(parts[:1], 8))


def test_a_little_is_not_nothing() -> None:
    assert [plan_text.gib(n) for n in (0, 1, GIB // 150, GIB, int(11.004 * GIB))] == [
        "0.00", "<0.01", "0.01", "1.00", "11.00",
    ]  # fmt: skip


# --- the verdict


def test_it_fits() -> None:
    text = joined(plan_text.verdict_lines(made_plan([MemoryComponent("weights", 3 * GIB)], 8)))
    assert text == "It fits: 3.00 of 8.00 GiB at the worst moment; 5.00 GiB stay free."


def test_exactly_full_fits_and_a_byte_more_does_not() -> None:
    assert plan_text.verdict_lines(made_plan([MemoryComponent("weights", 8 * GIB)], 8))[0].startswith("It fits")
    text = joined(plan_text.verdict_lines(made_plan([MemoryComponent("weights", 8 * GIB + 1)], 8)))
    assert text.startswith("It does not fit: the card's 8.00 GiB are 1 MiB too few.")


def test_a_machine_without_a_card_is_not_called_one() -> None:
    config = config_of()
    for gib, verdict in ((1, "the machine's 1.00 GiB are"), (64, "It fits")):
        plan = make_plan(
            architecture_of("Qwen3-1.7B"), config, CardSpec("CPU", gib * GIB, 0, is_gpu=False), element_bytes=4
        )
        text = joined(plan_text.plan_lines(plan, 5))
        assert verdict in text and "card" not in text.replace("allocator", "") and "the machine has" in text


def test_too_little_ram_is_said_as_such() -> None:
    parts = [MemoryComponent("weights", 3 * GIB), MemoryComponent("inputs", 20 * GIB, "RAM")]
    text = joined(plan_text.verdict_lines(made_plan(parts, 8, ram_gib=16)))
    assert text.startswith("It does not fit: the RAM's 16.00 GiB are 4.00 GiB too few.")


def test_advice_is_about_what_stands_in_the_way() -> None:
    plan = plan_of(4, "Qwen2.5-7B", bits=8, micro_batch=4, lora_r=64, gradient_checkpointing=False)
    text = joined(plan_text.verdict_lines(plan, 300))
    for advice in ("--micro_batch, given as 4", "--gradient_checkpointing, given as off", "--cutoff_len 300",
                   "--bits 4", "--lora_r 8", "a smaller model"):  # fmt: skip
        assert advice in text, advice
    plain = joined(plan_text.verdict_lines(plan_of(1), 0))
    assert "It does not fit" in plain and plain.endswith("What would help: - a smaller model")


# --- the settings


def test_every_setting_has_its_value_and_reason() -> None:
    plan = plan_of(8, cutoff_len=16384, loss_chunk=256)
    text = joined(plan_text.setting_lines(plan))
    for choice in plan.choices:
        reason = "given by hand" if choice.by_hand else choice.reason
        assert f"{choice.flag} {choice.value} {reason}" in text, choice
    assert len(plan.choices) >= 7 and sum(choice.by_hand for choice in plan.choices) == 1
    assert "--loss_chunk 256 given by hand" in text and "would be needed" in text


def test_nothing_fits_in_a_plan_that_does_not() -> None:
    plan = plan_of(3, stream_layers="off")
    assert not plan.fits and any(choice.reason == plan_text.UNTOUCHED for choice in plan.choices)
    assert "fits" not in joined(plan_text.setting_lines(plan)) and "of no use here" in joined(
        plan_text.setting_lines(plan)
    )
    assert plan_text.UNTOUCHED in joined(plan_text.setting_lines(plan_of(24)))


def test_long_reasons_hang_below_themselves() -> None:
    reason = "words " * 40
    lines = plan_text.setting_lines(made_plan([], 8, choices=(PlannedSetting("--offload_activations", "on", reason),)))
    assert len(lines) > 4 and all(len(line) <= 80 for line in lines)
    assert {len(line) - len(line.lstrip()) for line in lines[2:]} == {lines[1].index("words")}


# --- the whole


@pytest.mark.parametrize(
    ("model", "gib", "changes"),
    [
        (LLAMA, 11, {}),
        (LLAMA, 6, {"cutoff_len": 32768}),
        pytest.param(
            "Gemma-3-12B",
            8,
            {"cutoff_len": 200_000, "lora_target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj"},
            marks=pytest.mark.slow,
        ),
        ("Qwen2.5-0.5B", 96, {"bits": 32, "micro_batch": 4}),
    ],
)
def test_a_plan_is_readable_at_eighty_columns(model, gib, changes) -> None:
    plan = plan_of(gib, model, **changes)
    lines = plan_text.plan_lines(plan, 12345)
    assert all(len(line) <= 80 and line == line.rstrip() and line.isascii() for line in lines)
    text = joined(lines)
    for words in (model, "peak", "the card has", f"a card of {gib} GiB", "settings", "12,345 tokens in one row"):
        assert words in text, words
    assert ("It fits" in text) == plan.fits and ("missing" in text) == (not plan.fits)
    assert all(note in text for note in plan.model.notes)
    beyond = f"more than the model's {plan.model.max_positions:,} positions"
    assert (beyond in text) == (plan.longest_row > plan.model.max_positions)


def test_without_a_longest_context_nothing_is_said_of_it() -> None:
    assert "Longest" not in joined(plan_text.plan_lines(plan_of(11)))


def test_the_longest_context_is_held_against_the_model() -> None:
    plan = plan_of(24, "TinyLlama-1.1B")
    assert "Not even one token" in joined(plan_text.longest_lines(plan, 0))
    assert "positions" not in joined(plan_text.longest_lines(plan, 2048))
    assert "2,049 tokens in one row, more than the 2,048 positions" in joined(plan_text.longest_lines(plan, 2049))


def test_the_width_of_the_arithmetic_is_told() -> None:
    for element_bytes, words in ((2, "arithmetic in 16,"), (4, "arithmetic in 32,")):
        plan = make_plan(architecture_of(LLAMA), config_of(), card_of(24), element_bytes=element_bytes)
        assert words in joined(plan_text.plan_lines(plan))


def test_stored_bits_are_told() -> None:
    config = {**known_models()[LLAMA].config, "quantization_config": {"load_in_4bit": True}}
    plan = make_plan(architecture_of(config), config_of(bits=8), card_of(11))
    text = joined(plan_text.plan_lines(plan))
    assert "quantised already, to 4 bits" in text and "base in 4 bits" in text


# --- the matrix


def test_the_matrix_has_every_peak_and_marks_what_does_not_fit() -> None:
    sizes, lengths, names = (3, 6, 24), (512, 16384), ("Qwen3-1.7B", LLAMA)
    plans = [plan_of(gib, name, cutoff_len=n) for name, gib, n in product(names, sizes, lengths)]
    longest = list(range(1000, 1000 + len(plans)))
    lines = plan_text.matrix_lines(plans, longest)
    blocks = "\n".join(lines).split("\n\n")
    assert len(blocks) == 2 and all(len(line) <= 80 for line in lines)
    seen = 0
    for name, block in zip(names, blocks, strict=True):
        rows = {row.split()[0]: row.split()[1:] for row in block.splitlines()}
        assert rows["tokens"] == ["3", "GiB", "6", "GiB", "24", "GiB"] and block.startswith(name)
        for (column, gib), length in product(enumerate(sizes), lengths):
            plan = next(p for p in plans if (p.model.name, p.longest_row, p.card) == (name, length, card_of(gib)))
            mark = ("~" if plan.setup.stream_layers else "") + ("" if plan.fits else "!")
            assert rows[f"{length:,}"][column] == plan_text.gib(plan.account.card_bytes) + mark
            seen += 1
        assert len(rows["longest"]) == 3
    assert seen == 12 and any("!" in line for line in lines[:-2]) and not all(plan.fits for plan in plans)
    assert any(plan.setup.stream_layers for plan in plans)


def test_a_wide_matrix_goes_on_below() -> None:
    plans = [plan_of(gib) for gib in range(8, 18)]
    lines = plan_text.matrix_lines(plans)
    heads = [line for line in lines if line.strip().startswith("tokens")]
    assert len(heads) == 2 and sum(line.count("GiB") for line in heads) == 10 and all(len(line) <= 80 for line in lines)
    assert not any("longest" in line for line in lines)


# --- for programs


def test_the_dict_is_json_with_whole_bytes() -> None:
    plan = plan_of(6, cutoff_len=16384)
    found = json.loads(json.dumps(plan_text.plan_dict(plan, 77)))
    assert (
        found["peak_bytes"]
        == plan.account.card_bytes
        == sum(p["n_bytes"] for p in found["parts"] if p["place"] == "card")
    )
    assert found["ram_bytes"] == plan.account.ram_bytes > 0 and found["tensor_bytes"] == plan.account.tensor_bytes
    assert found["left_bytes"] == 6 * GIB - plan.account.card_bytes and found["fits"] is plan.fits
    assert found["model"]["n_weights"] == 8_030_261_248 and found["card"]["total_bytes"] == 6 * GIB
    assert found["longest_context_tokens"] == 77 and found["longest_row_tokens"] == 16384
    assert len(found["choices"]) == len(plan.choices) and found["setup"]["length"] == 16384
    assert all(isinstance(value, int) for key, value in found.items() if key.endswith(("_bytes", "_tokens")))
    assert "longest_context_tokens" not in plan_text.plan_dict(plan)


# --- time and names


@pytest.mark.parametrize(
    ("n_tokens", "speed", "words"),
    [
        (3_600_000, 1000, "about 1 h 00 min for 3,600,000 tokens at 1,000 tokens/s (given)"),
        (90_000, 1000, "about 2 minutes"),
        (20_000, 1000, "about 20 seconds"),
        (0, 1000, "1,000 tokens/s (given); give --n_tokens"),
        (5000, None, "no throughput known; give --tokens_per_s"),
    ],
)
def test_time(n_tokens, speed, words) -> None:
    assert words in joined(plan_text.time_lines(n_tokens, speed, "given"))


def test_known_models_are_listed_with_size_and_id() -> None:
    lines = plan_text.known_lines(known_models())
    assert len(lines) == len(known_models()) + 1 and all(len(line) <= 80 for line in lines)
    assert any(line.split()[:4] == [LLAMA, "8.03", "B", "meta-llama/Llama-3.1-8B"] for line in lines)


def test_largest_line() -> None:
    assert plan_text.largest_line("Phi-4", "a card", 2048).endswith("at 2,048 tokens: Phi-4.")
    assert plan_text.largest_line(None, "a card", 2048).startswith("No known model fits a card")


# --- the picture


def rising(curve: plan_text.Curve) -> bool:
    return all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(curve))


@pytest.mark.parametrize("is_traced", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_curve_per_technique_each_below_the_one_before(is_traced: bool, request: pytest.FixtureRequest) -> None:
    if is_traced:
        request.getfixturevalue("traced_peaks")
    curves = plan_text.curves_of([architecture_of(LLAMA)], config_of())
    assert len(curves) == 5 and all(len(curve) >= 20 and rising(curve) for curve in curves.values())
    ends = [curve[-1][1] for curve in curves.values()]
    assert all(above > below for above, below in pairwise(ends)) and ends[0] > 4 * ends[-1]


@pytest.mark.usefixtures("traced_peaks")
@pytest.mark.slow
def test_the_curves_are_of_one_row_whatever_the_micro_batch() -> None:
    for models in ([architecture_of(LLAMA)], [architecture_of(LLAMA), architecture_of("Qwen3-4B")]):
        assert plan_text.curves_of(models, config_of(micro_batch=4)) == plan_text.curves_of(models, config_of())


@pytest.mark.usefixtures("traced_peaks")
@pytest.mark.slow
def test_one_curve_per_model_with_everything_given_up() -> None:
    names = ["Qwen2.5-3B", LLAMA, "Phi-4"]
    models: list[Architecture] = [architecture_of(name) for name in names]
    curves = plan_text.curves_of(models, config_of())
    assert list(curves) == names and [curve[0][1] for curve in curves.values()] == sorted(
        c[0][1] for c in curves.values()
    )
    # Where the curve of a model passes a card is, nearly, the longest context that the plan finds there.
    for model in models:
        crossing = plan_text._crossing(curves[model.name], 11)
        assert crossing == pytest.approx(
            longest_context(model, config_of(stream_layers="off"), card_of(11, 2**20)), rel=0.05
        )


def test_a_crossing_is_between_its_points() -> None:
    curve = [(100, 2.0), (200, 4.0), (300, 8.0)]
    assert [plan_text._crossing(curve, gib) for gib in (1, 3, 4, 9)] == [None, 150, 200, None]


def test_the_picture_is_a_png_of_readable_size(tmp_path: Path) -> None:
    path = tmp_path / "memory.png"
    plan_text.draw_curves({"a": [(256, 2.0), (1024, 9.0)], "b": [(256, 1.0), (1024, 4.0)]}, [8, 11], "title", path)
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(head[16:20], "big") >= 1000
    with pytest.raises(OSError):
        plan_text.draw_curves({"a": [(256, 2.0), (1024, 9.0)]}, [], "title", tmp_path / "no" / "memory.png")


PLANS = (
    {}, {"cutoff_len": 16384}, {"micro_batch": 4, "gradient_checkpointing": "off"}, {"offload_activations": "on"},
    {"bits": 16}, {"bits": 8, "lora_r": 64}, {"peft_method": "p_tuning"}, {"lora_target_modules": "q_proj,v_proj"},
    {"optimizer": "adamw", "loss_chunk": 256, "head_bits": "16", "mlp_tile": 64, "offload_embeddings": "on"},
    {"stream_layers": "on"}, {"rope_scaling": "yarn:4", "cutoff_len": 200_000},
)  # fmt: skip


@pytest.mark.parametrize("changes", PLANS)
@pytest.mark.parametrize(("gib", "ram_gib", "is_gpu"), [(11, 64, True), (24, 4, True), (4, 16, True), (80, 80, False)])
def test_a_plan_is_told_in_chinese(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], gib: float, ram_gib: float, is_gpu: bool
) -> None:
    use_language("zh")
    card = replace(card_of(gib, ram_gib), is_gpu=is_gpu, expandable_segments=gib == 11)
    plan = make_plan(architecture_of(LLAMA), config_of(**changes), card)
    told = translated("\n".join(plan_text.plan_lines(plan, longest=512)))
    use_language("auto")
    lines = [re.sub(r"Llama-\S+|a card of|of up to", "", line) for line in told.splitlines()]
    assert not [line for line in lines if re.search(r"(?<![\w/.-])[A-Za-z]{2,} [a-z]{2,}", line)]
