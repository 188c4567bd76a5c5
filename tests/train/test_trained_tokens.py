"""Runs that train new tokens: what they learn, that they go on bit for bit, and that the cut changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

from onecard.config.base_model import ModelOptions
from onecard.config.inference import SamplingOptions
from onecard.config.lora import LoraOptions
from onecard.config.run import TrainOptions
from onecard.config.training import FinetuneConfig
from onecard.data.messages import Turn
from onecard.errors import CheckpointError, ConfigError
from onecard.inference.load import adapter_fingerprint, load_bundle
from onecard.model.lora.adapter import add_lora
from onecard.recipes import finetune
from onecard.train.optim import build_optimizer
from tests import tiny
from tests.answers import answers_of
from tests.runs import assert_same_end, run_and_stop

WORDS = [f"zebra{number:02d}" for number in range(20)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose last 20 tokens are words that were added to it."""
    return enlarged(tmp_path_factory.mktemp("enlarged"))


def enlarged(directory: Path, **changes: Any) -> Path:
    tiny.save_sentencepiece_tokenizer(directory)
    n_old = len(transformers.AutoTokenizer.from_pretrained(directory))
    tiny.save_tiny_llama(directory, vocab_size=n_old + len(WORDS), **changes)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer.add_tokens(WORDS) == len(WORDS)
    tokenizer.save_pretrained(directory)
    ids = tokenizer.convert_tokens_to_ids(WORDS)
    listed = {"format": 1, "first_new_id": ids[0], "new_ids": ids, "pieces": WORDS}
    (directory / "new_tokens.json").write_text(json.dumps(listed), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 questions; every answer is made of new words."""
    rows = [
        {"instruction": f"Name {1 + i % 3} of them", "input": "", "output": " ".join([WORDS[7]] * (1 + i % 3))}
        for i in range(24)
    ]
    file = tmp_path_factory.mktemp("data") / "words.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def new_ids(directory: Path) -> list[int]:
    return list(json.loads((directory / "new_tokens.json").read_text(encoding="utf-8"))["new_ids"])


@pytest.mark.parametrize(
    ("tied", "options"),
    [(False, {"train_new_tokens": True}), (True, {"train_new_tokens": True}), (True, {"train_embeddings": True})],
)
def test_the_trained_model_says_new_words(tied, options, data, tmp_path) -> None:
    directory = enlarged(tmp_path / "base", tie_word_embeddings=tied)
    settings = {"num_epoch": 10, "save_steps": 100, "learning_rate": 1e-2, **options}
    run = finetune(tiny.config_for(directory, data, tmp_path / "run", **settings))
    losses = [loss for _, loss in tiny.losses_of(run)]
    assert len(losses) == 30 and losses[-1] < 0.6 * losses[0]

    bundle, depends_on = load_bundle(ModelOptions("auto", bits=32, device="cpu"), str(run), "auto")
    tokenizer: Any = bundle.tokenizer
    assert all(len(tokenizer.encode(word, add_special_tokens=False)) == 1 for word in WORDS)
    sampling = SamplingOptions(max_new_tokens=8)
    question = [Turn("user", "Name 2 of them")]
    answers = answers_of(bundle, [question], sampling)
    assert WORDS[7] in answers[0].text
    ids = torch.tensor([[1, 5, *new_ids(directory), 7]])
    plain = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(directory), run).eval()
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, bundle.model(ids).logits)

    assert depends_on["adapter"] == adapter_fingerprint(bundle.model)
    rows = [p for name, p in bundle.model.named_parameters() if "trainable_tokens" in name or "modules_to_save" in name]
    with torch.no_grad():
        rows[0][0] += 1
    assert depends_on["adapter"] != adapter_fingerprint(bundle.model), "answers of other rows would pass for these"


VARIANTS = {
    "rows-4bit-8bit-adam": {"train_new_tokens": True, "bits": 4, "optimizer": "adamw_8bit", "lora_r": 64},
    "all-16bit": {"train_embeddings": True, "bits": 16},
    "only-rows": {"train_new_tokens": "only"},
}


@pytest.fixture
def another_number_format() -> Iterator[None]:
    """accelerate keeps one for the process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.usefixtures("another_number_format")
def test_stopped_and_resumed_equals_straight(variant, base, data, tmp_path, monkeypatch) -> None:
    shared = {"num_epoch": 2, "save_steps": 100, "lora_dropout": 0.1, "gradient_checkpointing": True}
    settings = {**shared, **VARIANTS[variant]}
    straight = finetune(tiny.config_for(base, data, tmp_path / "straight", **settings))
    config = tiny.config_for(base, data, tmp_path / "run", **settings)
    run_and_stop(config, monkeypatch, after_steps=4)
    assert_same_end(finetune(config), straight)
    names = tiny.tensors_of(straight / "adapter_model.safetensors").keys()
    assert sum("lora_" not in name for name in names) == 2


@pytest.mark.parametrize("options", [{"train_new_tokens": True}, {"train_embeddings": True}])
def test_any_cut_gives_the_same_weights(options, base, data, tmp_path) -> None:
    shared = {"num_epoch": 2, "save_steps": 100, "learning_rate": 1e-3, **options}
    cuts = [{"micro_batch": 1}, {"micro_batch": 8}, {"micro_batch": 0, "micro_tokens": 300, "loss_chunk": 5}]
    runs = [finetune(tiny.config_for(base, data, tmp_path / str(n), **shared, **cut)) for n, cut in enumerate(cuts)]
    weights = [tiny.tensors_of(run / "adapter_model.safetensors") for run in runs]
    for other in (1, 2):
        assert tiny.largest_difference(weights[0], weights[other]) < 1e-4
        pairs = zip(tiny.losses_of(runs[0]), tiny.losses_of(runs[other]), strict=True)
        assert max(abs(a - b) for (_, a), (_, b) in pairs) < 1e-5


@pytest.mark.parametrize("name", ["train_new_tokens", "train_embeddings"])
def test_the_vocabulary_alone_and_then_the_adapter_with_it(name, base, data, tmp_path) -> None:
    first = finetune(tiny.config_for(base, data, tmp_path / "first", **{name: "only"}))
    further = tiny.config_for(base, data, tmp_path / "further", init_adapter=str(first), **{name: True})
    alone, both = (tiny.tensors_of(run / "adapter_model.safetensors") for run in (first, finetune(further)))
    assert all(not alone[key].any() for key in alone if "lora_B" in key)
    assert all(both[key].any() for key in both if "lora_B" in key)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.detach()
    (rows,) = (alone[key] for key in alone if "embed_tokens" in key)
    start = plain if name == "train_embeddings" else plain[new_ids(base)]
    moved = (rows - start).abs()[-len(WORDS) :]
    assert 1e-4 < moved[7].max() < 0.1, "the word that was said"
    assert alone.keys() == both.keys()


def test_what_the_first_adapter_did_not_train_is_refused(base, data, tmp_path, monkeypatch) -> None:
    first = finetune(tiny.config_for(base, data, tmp_path / "first", max_steps=1, train_new_tokens=True))
    monkeypatch.setattr("onecard.train.build.load_base", lambda *_: pytest.fail("the base was loaded"))
    further = tiny.config_for(base, data, tmp_path / "further", init_adapter=str(first), train_embeddings=True)
    with pytest.raises(ConfigError, match=r"--train_embeddings: does not go with --init_adapter .*has not trained"):
        finetune(further)


def test_runs_from_before_these_options_go_on(base, data, tmp_path, monkeypatch) -> None:
    config = tiny.config_for(base, data, tmp_path / "run", save_steps=100)
    run_and_stop(config, monkeypatch, after_steps=1)
    stored = json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text(encoding="utf-8"))
    assert not any(name.startswith(("train_", "lora_target_parameters")) for name in stored["identity"]["lora"])
    config.lora.train_new_tokens = True
    with pytest.raises(CheckpointError, match=r"lora: --train_new_tokens false -> true"):
        finetune(config)


def test_a_base_without_new_tokens_is_refused_before_it_is_loaded(tiny_base, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("onecard.train.build.load_base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(ConfigError, match=r"has no new_tokens\.json"):
        finetune(tiny.config_for(tiny_base, data, tmp_path / "run", train_new_tokens=True))


@pytest.mark.parametrize("options", [LoraOptions(train_new_tokens=True), LoraOptions(train_embeddings=True)])
@pytest.mark.parametrize("ratio", [0, 16])
def test_what_is_no_lora_matrix_does_not_decay(options, ratio, base) -> None:
    """Zero is where LoRA's matrices come from; a row of the embeddings comes from somewhere else."""
    model = add_lora(transformers.AutoModelForCausalLM.from_pretrained(base).requires_grad_(False), options)
    optimizer = build_optimizer(model, TrainOptions(weight_decay=0.1, loraplus_ratio=ratio))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    seen = {"lora_" in name: decay.pop(id(p)) for name, p in model.named_parameters() if p.requires_grad}
    assert seen == {True: 0.1, False: 0.0} and not decay
    assert FinetuneConfig(lora=options).problems() == []
