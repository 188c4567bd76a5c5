"""What the plan gives up, in which order and why; what was typed by hand stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError
from onecard.model.memory import plan as plan_module
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.estimate import GIB, account
from onecard.model.memory.plan import CardSpec, Plan, fits_somehow, longest_context, make_plan
from tests.formula import plan_by_formula
from tests.tiny import with_options

NAMES = ("Llama-3.1-8B", "Qwen2.5-0.5B", "Llama-3.2-1B")  # the two small ones have tied embeddings
ORDER = ["--gradient_checkpointing", "--micro_tokens", "--loss_chunk", "--offload_activations", "--optimizer",
         "--offload_embeddings", "--head_bits", "--mlp_tile", "--stream_layers"]  # fmt: skip


def card(gib: float, ram_gib: float = 256.0, *, is_gpu: bool = True) -> CardSpec:
    return CardSpec("a card", int(gib * GIB), int(ram_gib * GIB), is_gpu=is_gpu)


def plan(name: str, gib: float, ram_gib: float = 256.0, *, is_gpu: bool = True, **options: object) -> Plan:
    config = with_options(FinetuneConfig(), options)
    return make_plan(architecture_of(name), config, card(gib, ram_gib, is_gpu=is_gpu))


def given_up(found: Plan) -> list[str]:
    return [choice.flag for choice in found.choices if "would be needed, " in choice.reason and not choice.by_hand]


def test_nothing_is_given_up_without_need() -> None:
    found = plan("Llama-3.1-8B", 80)
    assert found.fits and given_up(found) == []
    assert [choice.flag for choice in found.choices] == ORDER
    assert found.setup.gradient_checkpointing is False
    recompute, *others = [choice.reason for choice in found.choices]
    assert "GiB are needed without it, which leaves room" in recompute and set(others) == {"fits"}


@pytest.mark.parametrize("is_traced", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_this_order_the_less_room_there_is(is_traced: bool, request: pytest.FixtureRequest) -> None:
    """Each smaller card gives up what the larger one did, and perhaps more; what is given up is a beginning."""
    if not is_traced:
        request.getfixturevalue("peaks_by_formula")
    seen: set[str] = set()
    n_cards = 0
    for name, sizes in (("Llama-3.1-8B", range(1500, 400, -20)), ("Qwen2.5-0.5B", range(400, 90, -10))):
        last = -1
        for hundredths in sizes:
            found = plan(name, hundredths / 100, cutoff_len=4096, lora_r=64)
            now, n_cards = given_up(found), n_cards + 1
            seen |= set(now)
            assert now == sorted(now, key=ORDER.index)
            if found.fits and now:
                assert ORDER.index(now[-1]) >= last, "a smaller card gave up less"
                last = ORDER.index(now[-1])
    assert n_cards == 55 + 31
    assert seen >= {*ORDER[2:7]}


@pytest.mark.parametrize(("gib", "ram_gib", "is_gpu", "chosen"), [
    (80, 64, True, False), (24, 64, True, True), (80, 64, False, False), (80, 20, False, True), (0.1, 64, True, True),
])  # fmt: skip
def test_layers_are_recomputed_unless_all_fits_with_room(
    gib: float, ram_gib: float, is_gpu: bool, chosen: bool
) -> None:
    """8 billion weights and 4,096 tokens need 31 GiB without it; a CPU must have them free, not only built in."""
    found = plan("Llama-3.1-8B", gib, ram_gib, is_gpu=is_gpu)
    assert found.setup.gradient_checkpointing == chosen
    assert found.choices[0].value == ("on" if chosen else "off") and "GiB" in found.choices[0].reason
    without = account(found.model, replace(found.setup, gradient_checkpointing=False, rows=4))
    assert chosen or without.card_bytes <= 0.8 * min(gib, gib if is_gpu else ram_gib) * GIB


@pytest.mark.parametrize(
    "options", [{"offload_activations": "on"}, {"deepspeed": "zero.json"}, {"max_memory": "0:9GiB"}]
)
def test_layers_are_recomputed_where_something_else_needs_it(options: dict[str, object]) -> None:
    choice = plan("Llama-3.1-8B", 80, **options).choices[0]
    assert (choice.value, choice.reason) == ("on", f"goes with --{next(iter(options))}")


@pytest.mark.usefixtures("peaks_by_formula")
def test_each_of_two_cards_holds_half_and_a_layer_more() -> None:
    """16 bits of 8B take 15 GiB: too much for one card of 12 GiB, and what only one card can do is not chosen."""
    one, two = (plan("Llama-3.1-8B", 12, bits=16, max_memory=shares) for shares in ("0:11GiB", "0:11GiB,1:11GiB"))
    assert not one.fits and two.fits
    base = [sum(p.n_bytes for p in found.account.parts if p.name.startswith("base")) for found in (one, two)]
    assert 0.5 < base[1] / base[0] < 0.55
    assert not two.setup.offload_activations and not two.setup.offload_embeddings and two.setup.head_bits == 16
    tight = plan("Llama-3.1-8B", 6, bits=16, max_memory="0:11GiB,1:11GiB")
    assert not tight.fits and not {"--offload_activations", "--head_bits"} & set(given_up(tight))


@pytest.mark.usefixtures("peaks_by_formula")
def test_fp32_repeats_shared_key_heads_on_every_card() -> None:
    found = [make_plan(architecture_of("Llama-3.2-1B"), FinetuneConfig(), replace(card(24), repeats_kv=False),
                       element_bytes=width) for width in (2, 4)]  # fmt: skip
    assert [one.setup.repeats_kv for one in found] == [False, True]


@pytest.mark.usefixtures("peaks_by_formula")
def test_layers_that_cannot_be_recomputed_are_not_said_to_be() -> None:
    model = replace(architecture_of("Llama-3.1-8B"), checkpoints=False)
    found = make_plan(model, FinetuneConfig(), card(8))
    choice = {choice.flag: choice for choice in found.choices}["--gradient_checkpointing"]
    assert (choice.value, choice.reason) == ("off", "llama layers cannot be computed again")
    assert not found.setup.gradient_checkpointing and not found.setup.offload_activations


def test_the_budget_goes_first() -> None:
    found = plan("Llama-3.1-8B", 7.2, cutoff_len=512)
    assert given_up(found)[0] == "--micro_tokens"
    assert found.fits and found.setup.tokens < 4096


TYPED = st.fixed_dictionaries({}, optional={
    "loss_chunk": st.sampled_from([-1, 64, 700]), "offload_activations": st.sampled_from(["on", "off"]),
    "offload_embeddings": st.sampled_from(["on", "off"]), "head_bits": st.sampled_from(["4", "8", "16"]),
    "mlp_tile": st.sampled_from([-1, 512]), "micro_tokens": st.sampled_from([300, 9000]),
    "micro_batch": st.sampled_from([1, 7]),
    "optimizer": st.sampled_from(["adamw", "adamw_8bit", "paged_adamw_32bit"]),
})  # fmt: skip


@settings(max_examples=40, deadline=None)
@example({"offload_embeddings": "off"}, "Llama-3.1-8B", 2, 64.0, 64, True, True)
@given(
    TYPED, st.sampled_from(NAMES), st.sampled_from([0.5, 2, 6, 7, 9, 24]), st.sampled_from([0.1, 64.0]),
    st.sampled_from([64, 1024, 20_000]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_what_was_typed_stays(
    typed: dict[str, object], name: str, gib: float, ram_gib: float, length: int, is_gpu: bool, checkpointing: bool
) -> None:
    options = {**typed, "cutoff_len": length, "gradient_checkpointing": checkpointing}
    with pytest.MonkeyPatch.context() as patch:
        plan_by_formula(patch)
        found = plan(name, gib, ram_gib, is_gpu=is_gpu, **options)
        assert found.account == account(found.model, found.setup)
    setup = found.setup
    if "loss_chunk" in typed:
        assert setup.loss_chunk == max(0, typed["loss_chunk"])  # type: ignore[call-overload]
    for flag in ("offload_activations", "offload_embeddings"):
        if flag in typed:
            assert getattr(setup, flag) == (typed[flag] == "on")
    if "head_bits" in typed:
        assert str(setup.head_bits) == typed["head_bits"]
    if "mlp_tile" in typed:
        assert setup.mlp_tile == max(0, typed["mlp_tile"])  # type: ignore[call-overload]
    if "optimizer" in typed:
        assert setup.optimizer == typed["optimizer"]
    if "micro_batch" in typed:
        assert setup.rows <= typed["micro_batch"]  # type: ignore[operator]
    if "micro_tokens" in typed and "micro_batch" not in typed:
        assert setup.rows == min(32, max(1, typed["micro_tokens"] // length))  # type: ignore[operator]
    assert setup.offload_activations <= (checkpointing or typed.get("offload_activations") == "on")
    flags = [choice.flag for choice in found.choices]
    assert len(flags) == len(set(flags)) and set(flags) | {"--micro_tokens"} >= set(ORDER)
    assert all(choice.reason for choice in found.choices)
    by_hand = {choice.flag for choice in found.choices if choice.by_hand}
    assert by_hand == {f"--{flag}" for flag in (*typed, "gradient_checkpointing")}
    said = {choice.flag: choice.value for choice in found.choices if not choice.by_hand}
    assert said.get("--head_bits", str(setup.head_bits)) == str(setup.head_bits)
    assert said.get("--optimizer", setup.optimizer) == setup.optimizer
    for flag in ("offload_activations", "offload_embeddings"):
        on = getattr(setup, flag)
        assert said.get(f"--{flag}", "on" if on else "off") == ("on" if on else "off")
        if on and flag not in typed:
            assert {c.flag: c.reason for c in found.choices}[f"--{flag}"] != "fits", "given up without a reason"


@pytest.mark.usefixtures("peaks_by_formula")
def test_too_little_ram_is_said() -> None:
    options = {"cutoff_len": 32_768, "lora_r": 8}
    enough, little = (plan("Llama-3.1-8B", 9, ram, **options) for ram in (64, 0.25))
    assert enough.setup.offload_activations and not little.setup.offload_activations
    (choice,) = [choice for choice in little.choices if choice.flag == "--offload_activations"]
    assert choice.value == "off" and "on would help, but" in choice.reason and "0.25 GiB are there" in choice.reason
    assert not little.fits


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (NAMES[0], (1, 12)),
        *(pytest.param(name, (1, 2, 4, 6, 8, 12, 24, 48), marks=pytest.mark.slow) for name in NAMES),
    ],
)
def test_longest_context_grows_with_the_card(name: str, sizes: tuple[int, ...]) -> None:
    model, config = architecture_of(name), FinetuneConfig()
    found = [longest_context(model, config, card(gib)) for gib in sizes]
    assert found == sorted(found) and found[-1] > 10_000
    assert found[0] == 0 or name != "Llama-3.1-8B"
    for gib in {12, 24} & {*sizes}:
        length = found[sizes.index(gib)]
        data = replace(config.data, cutoff_len=length)
        assert make_plan(model, replace(config, data=data), card(gib)).fits
        longer = replace(config.data, cutoff_len=int(length * 1.02))
        assert not make_plan(model, replace(config, data=longer), card(gib)).fits


@pytest.mark.usefixtures("peaks_by_formula")
def test_a_model_that_is_too_large_for_the_card_is_asked_for_with_its_layers_in_ram_alone(monkeypatch) -> None:
    """What cannot fit by its weights is not traced for each technique before it is streamed."""
    model, asked = architecture_of("Llama-3.1-8B"), []
    monkeypatch.setattr(plan_module, "account", lambda model, setup, *within, **rest: asked.append(setup) or account(
        model, setup, *within, **rest))  # fmt: skip
    assert fits_somehow(model, FinetuneConfig(), card(3.5)) and make_plan(model, FinetuneConfig(), card(3.5)).fits
    n_asked = next(number for number, setup in enumerate(asked) if not setup.stream_layers)
    assert 0 < n_asked < len(asked), "make_plan says what would be needed without"
    assert not fits_somehow(model, FinetuneConfig(), card(3.5, 2)), "the RAM has no room for them"


@pytest.mark.usefixtures("peaks_by_formula")
def test_the_plan_is_for_the_longest_sample() -> None:
    model, config = architecture_of("Llama-3.1-8B"), with_options(FinetuneConfig(), {"cutoff_len": 4096})
    assert make_plan(model, config, card(24), longest_row=100).setup.length == 100
    assert make_plan(model, config, card(24), longest_row=9999).setup.length == 4096
    assert make_plan(model, config, card(24)).setup.length == 4096


@pytest.mark.parametrize("wanted", ["q_prj,v_proj", "lm_head", "model.layers.0.mlp.up"])
def test_layers_that_the_model_does_not_have(wanted: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--lora_target_modules: .* has no layer (q_prj \(did you mean q_proj|lm_h|up)"
    ):
        plan("Llama-3.1-8B", 24, lora_target_modules=wanted)
    assert plan("Llama-3.1-8B", 24, lora_target_modules=" q_proj , self_attn.v_proj").fits
