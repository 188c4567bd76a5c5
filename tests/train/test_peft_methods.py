"""Every PEFT method on every base: it learns, resumes bit for bit, and PEFT, chat and merge read what it wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

from onecard.config.base_model import ModelOptions
from onecard.config.lora import BOTTLENECK_FORMS, LORA_FORMS, NOT_IN_4_BITS, LoraOptions
from onecard.config.parsing import parse
from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError, ModelError
from onecard.export.merge.merge import merge_into
from onecard.export.merge.options import MergeSettings
from onecard.inference.load import load_bundle
from onecard.model.lora.methods import METHODS
from onecard.recipes import finetune
from tests import tiny
from tests.runs import assert_same_end, run_and_stop

OTHERS = [name for name in METHODS if name != "lora"]
FORMS = [*OTHERS[:-1], *BOTTLENECK_FORMS]  # each form of bottlenecks by itself
FAST = [("vera", 32), ("p_tuning", 32), ("houlsby", 32)]
EVERY = [(name, bits) for name in [*FORMS, "olora"] for bits in (4, 8, 16, 32)]
# At a rate of LoRA those with few or bounded weights would barely move in the steps of a test.
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"lora_r": 4, "learning_rate": 3e-2},
    "vera": {"peft_option": "r=32,d_initial=0.5", "learning_rate": 0.1}, "ia3": {"learning_rate": 0.1},
    "oft": {"peft_option": "oft_block_size=8"}, "miss": {"peft_option": "r=4"}, "shira": {"lora_r": 2},
    "randlora": {"peft_option": "r=8"}, "loha": {"learning_rate": 3e-2}, "lokr": {"learning_rate": 3e-2},
    "olora": {"peft_method": "lora", "lora_init": "olora"},
    "prompt_tuning": {"learning_rate": 0.1, "peft_option": "num_virtual_tokens=5"},
    "p_tuning": {"peft_option": "num_virtual_tokens=5"},
    "prefix_tuning": {"learning_rate": 0.1, "peft_option": "num_virtual_tokens=5"},
    **{form: {"peft_method": "bottleneck", "peft_option": f"form={form}"} for form in BOTTLENECK_FORMS},
}  # fmt: skip
IDS = torch.tensor([[1, 5, 9, 33, 7, 120, 64, 3]])


def options_of(method: str, bits: int) -> dict[str, Any]:
    return {"peft_method": method, "bits": bits, "num_epoch": 3, "save_steps": 100, **SETTINGS[method]}


def refused(method: str, bits: int) -> bool:
    return (method in NOT_IN_4_BITS and bits == 4) or (method == "olora" and bits < 16)


@pytest.fixture(autouse=True)
def _own_number_format() -> Iterator[None]:
    """accelerate keeps one for the process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def marked(cases: list[tuple[str, int]]) -> list[Any]:
    return [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("method", "bits"), marked([case for case in EVERY if not refused(*case)]))
def test_it_learns_goes_on_bitwise_and_is_plain_peft(method, bits, tiny_base, instructions, tmp_path, monkeypatch):
    settings = options_of(method, bits)
    straight = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "straight", **settings))
    losses = [loss for _, loss in tiny.losses_of(straight)]
    assert sum(losses[-2:]) / 2 < losses[0] - 0.05, losses
    config = tiny.config_for(tiny_base, instructions, tmp_path / "run", **settings)
    run_and_stop(config, monkeypatch, after_steps=4)
    assert_same_end(finetune(config), straight)

    bundle, _ = load_bundle(ModelOptions("auto", bits=bits, device="cpu"), str(straight), "auto")
    alone = load_bundle(ModelOptions(str(tiny_base), bits=bits, device="cpu"), None, "auto")[0]
    base: Any = alone.model
    with torch.no_grad():
        untouched = base(IDS).logits
        plain: Any = peft.PeftModel.from_pretrained(base, straight).eval()
        logits = plain(IDS).logits[:, -IDS.shape[1] :]  # with those of virtual tokens in front
        assert torch.equal(logits, bundle.model(IDS).logits)
        assert not torch.allclose(logits, untouched, atol=1e-3)


@pytest.mark.parametrize("method", NOT_IN_4_BITS)
def test_what_packed_weights_cannot_have_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=f"--bits: 4 does not work with --peft_method {method}"):
        parse(FinetuneConfig, ["--peft_method", method, "--bits", "4"])


def test_olora_is_refused_on_quantised_weights(tiny_base, instructions, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"--lora_init: olora moves part"):
        finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", bits=8, lora_init="olora"))


@pytest.mark.parametrize(("method", "bits"), marked([(name, 32) for name in [*FORMS, "olora"]]))
def test_merged_it_answers_alike_or_is_refused_by_name(method, bits, tiny_base, instructions, tmp_path) -> None:
    run = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", **options_of(method, bits)))
    (tmp_path / "merged").mkdir()
    settings = MergeSettings(dtype="fp32")
    name = LoraOptions(method).peft_method
    if not METHODS[name].mergeable:
        with pytest.raises(ModelError, match=f"of the method {name}, which is not merged here"):
            merge_into(tmp_path / "merged", str(tiny_base), [str(run)], settings)
        return
    merge_into(tmp_path / "merged", str(tiny_base), [str(run)], settings)
    merged: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    bundle, _ = load_bundle(ModelOptions("auto", bits=32, device="cpu"), str(run), "auto")
    with torch.no_grad():
        assert (merged(IDS).logits - bundle.model(IDS).logits).abs().max() < 1e-3


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, (field, _) in LORA_FORMS.items()])
def test_a_form_of_lora_is_the_same_run_as_its_option(name: str, field: str) -> None:
    value = str(LORA_FORMS[name][1]).lower()
    bits = ["--bits", "16"]
    by_name = parse(FinetuneConfig, ["--peft_method", name, *bits])
    assert by_name.lora == parse(FinetuneConfig, [f"--{field}", value, *bits]).lora
    assert by_name.lora.peft_method == "lora"


@pytest.mark.parametrize(
    ("words", "said"),
    [("pissa --lora_init loftq", r"--peft_method: pissa is --lora_init pissa, and contradicts --lora_init loftq"),
     ("ia3 --lora_r 4", r"--lora_r: does not go with --peft_method ia3"),
     ("loha --bits 8 --use_dora true", r"--use_dora: does not go with --peft_method loha"),
     ("vera --loraplus_ratio 16", r"--loraplus_ratio: does not go with --peft_method vera"),
     ("miss --peft_option init_weights=bat", r"--bits: 4 does not work with --peft_option init_weights=bat"),
     ("lokr", r"--bits: 4 does not work with --peft_method lokr"),
     ("vera --peft_option r", r"--peft_option: 'r' is not of the form name=value"),
     ("boft", r"--peft_method: 'boft' is not one of lora, ")],
)  # fmt: skip
def test_settings_that_contradict_a_method_are_named(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(FinetuneConfig, ["--peft_method", *words.split()])


@pytest.mark.parametrize(
    ("method", "option", "said"),
    [("vera", "d_inital=0.2", r"d_inital is no setting of VeraConfig \(did you mean d_initial\?\)"),
     ("vera", "r=many", r"r=many is not a whole number"), ("lora", "r=4", r"r is given by --lora_r"),
     ("shira", "target_modules=q_proj", r"target_modules is given by --lora_target_modules"),
     ("lora", "bias=all", r"bias cannot be set: it would train biases of the base"),
     ("oft", "r=4", r"r=4: You can only specify"), ("oft", "coft=perhaps", r"coft=perhaps is not true or false"),
     ("lora", "rank_pattern=4", r"rank_pattern=4 is not none or a list or table"),
     ("shira", "mask_type=best", r"mask_type=best is not one of random")],
)  # fmt: skip
def test_a_wrong_peft_option_is_refused_before_the_base_is_loaded(
    method, option, said, tiny_base, instructions, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("onecard.train.build.load_base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(ConfigError, match=f"--peft_option: {said}"):
        finetune(tiny.config_for(tiny_base, instructions, tmp_path / "run", peft_method=method, peft_option=option))
