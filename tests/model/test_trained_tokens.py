"""What is trained beside LoRA: rows of new tokens, or embeddings and head in full; tied and untied, at all bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.plan_accuracy import element_bytes, peaks, toy_config
from benchmarks.synthetic_run import real_run
from onecard.config.base_model import ModelOptions
from onecard.config.lora import LoraOptions
from onecard.config.training import FinetuneConfig, MemoryOptions
from onecard.errors import ConfigError, ModelError
from onecard.model.chunked_loss import summed_loss
from onecard.model.hardware import detect
from onecard.model.lora.adapter import add_lora, describe_trainable, load_adapter, restore_adapter, save_adapter
from onecard.model.lora.peft_model import remove_adapter
from onecard.model.lora.vocabulary import read_new_tokens
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.estimate import MemoryConfig, account
from onecard.model.memory.plan import CardSpec, make_plan
from onecard.model.memory.tensor_sizes import FP32, n_trained, optimizer_bytes
from onecard.model.memory_saving.activation_offload import ActivationOffload
from onecard.model.memory_saving.embeddings_in_ram import embeddings_to_ram
from onecard.model.memory_saving.lm_head import quantize_head
from onecard.model.quantised_loading import quantization_config
from onecard.model.quantization import keep_one_arithmetic_on_cpu
from tests.covering import every_pair_fast
from tests.live_memory import held_bytes
from tests.model.model_families import VOCAB, save_family

NEW = list(range(VOCAB - 20, VOCAB))
ROWS, ALL = LoraOptions(lora_r=4, train_new_tokens=True), LoraOptions(lora_r=4, train_embeddings=True)
KINDS = pytest.mark.parametrize("options", [ROWS, ALL], ids=["rows", "all"])
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An enlarged base: its last 20 tokens are new."""
    saved: dict[tuple[str, bool], Path] = {}

    def make(family: str = "llama", tied: bool = False) -> Path:
        if (family, tied) not in saved:
            path = tmp_path_factory.mktemp(f"{family}-{tied}")
            save_family(family, path, tie_word_embeddings=tied)
            write_list(path, NEW)
            saved[family, tied] = path
        return saved[family, tied]

    return make


def write_list(directory: Path, ids: Any, **more: Any) -> None:
    content = {"format": 1, "first_new_id": ids[0] if ids else 0, "new_ids": ids, "pieces": [], **more}
    (directory / "new_tokens.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def load(directory: Callable[..., Path], load_family: Load) -> Load:
    def base(tied: bool = False, bits: int = 32, family: str = "llama") -> Any:
        return load_family(family, bits, model_path=directory(family, tied)).model

    return base


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Old tokens and new ones in turn; every fifth label is not learned."""
    ids = torch.randint(3, VOCAB, (3, 21), generator=torch.Generator().manual_seed(seed))
    ids[:, ::2] = ids[:, ::2] % 20 + VOCAB - 20
    labels = ids.clone()
    labels[:, ::5] = -100
    return {"input_ids": ids, "labels": labels}


def train(model: Any, steps: int = 3) -> Any:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    device_type = "cpu"
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device_type, torch.bfloat16, model.dtype == torch.bfloat16, cache_enabled=False):
            summed_loss(model, batch(step), chunk_tokens=8)[0].backward()
        optimizer.step()
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(batch()["input_ids"]).logits.float()


def plain(base: Path, adapter: Path, bits: int) -> Any:
    """The run as anyone loads it, without this project."""
    low = {"quantization_config": quantization_config(bits, torch.float32)} if bits < 16 else {}
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map={"": "cpu"}, **low)
    keep_one_arithmetic_on_cpu(model)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def vocabulary_weights(model: Any) -> list[torch.Tensor]:
    """The matrices of the vocabulary as the model reads and says them."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [m.weight.detach().clone() for m in (inner.get_input_embeddings(), inner.get_output_embeddings())]


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- what is learned


@KINDS
@TIED
@pytest.mark.parametrize("chunk", [0, 7])
def test_loss_and_gradients_are_those_of_plain_autograd(options, tied, chunk, load) -> None:
    model = train(add_lora(load(tied), options), steps=2).train()
    sample = batch(9)
    wanted = sample["labels"][:, 1:]
    scores = model(sample["input_ids"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten(), reduction="sum")
    model.zero_grad()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    loss, n_tokens = summed_loss(model, sample, chunk_tokens=chunk)
    loss.backward()
    assert n_tokens == int((wanted != -100).sum()) and torch.allclose(loss, expected, rtol=1e-6)
    assert len(gradients) == 28 + (1 if tied else 2)
    for name, parameter in trained(model).items():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5), name
        assert parameter.grad.abs().max() > 1e-3, name


@pytest.mark.parametrize(("bits", "tied"), [(4, False), (8, False), (16, True), (32, True)])
def test_only_new_rows_and_the_adapter_change(bits, tied, load) -> None:
    model = add_lora(load(tied, bits), ROWS)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before, start = vocabulary_weights(model), summed_loss(model, batch())[0]
    train(model, steps=6)
    assert len(frozen) >= 19
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name
    for old, new in zip(before, vocabulary_weights(model), strict=True):
        changed = (old != new).any(dim=1).nonzero().flatten().tolist()
        assert changed == NEW
    assert summed_loss(model, batch())[0] < start
    kinds = {p.dtype for p in trained(model).values()}
    assert kinds == {torch.float32}


@TIED
def test_new_rows_of_embeddings_and_head_are_one_where_tied(tied, load) -> None:
    model = train(add_lora(load(tied), ROWS))
    embedding, head = vocabulary_weights(model)
    assert torch.equal(embedding, head) == tied
    assert "20 rows of new tokens" in describe_trainable(model)


@TIED
def test_whole_matrices_stay_tied(tied, load) -> None:
    model = train(add_lora(load(tied), ALL))
    embedding, head = vocabulary_weights(model)
    assert torch.equal(embedding, head) == tied
    n_whole = sum("modules_to_save" in name for name in trained(model))
    assert n_whole == (1 if tied else 2) and f"{n_whole} whole matrices" in describe_trainable(model)


# --- what is saved

SAVED = [(32, False), (32, True), (16, True), (16, False), (8, False), (4, True)]


@pytest.mark.parametrize(
    ("options", "bits", "tied"),
    [
        pytest.param(options, *case, marks=[] if (number + kind) % 2 == 0 else pytest.mark.slow)
        for number, case in enumerate(SAVED)
        for kind, options in enumerate((ROWS, ALL))
    ],
)
def test_saved_loaded_restored_and_plain_peft_answer_alike(options, bits, tied, load, directory, tmp_path) -> None:
    model = train(add_lora(load(tied, bits), options))
    with torch.autocast("cpu", torch.bfloat16, bits == 16):
        here = logits(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(load(tied, bits), tmp_path, trainable=False).model.eval()
    assert not trained(loaded)
    outside = logits(plain(directory("llama", tied), tmp_path, bits))
    assert torch.equal(logits(loaded), outside), "others read the files otherwise"
    with torch.autocast("cpu", torch.bfloat16, bits == 16):
        assert torch.allclose(logits(loaded), here, atol=1e-6)
    assert not torch.allclose(outside, logits(load(tied, bits)), atol=1e-2)

    torch.manual_seed(99)
    fresh = add_lora(load(tied, bits), options)
    parameters = trained(fresh)
    restore_adapter(fresh, tmp_path)
    again = load_adapter(load(tied, bits), tmp_path, trainable=True).model
    for name, parameter in trained(model).items():
        assert torch.equal(parameters[name], parameter), name
        assert fresh.get_parameter(name) is parameters[name]
        assert torch.equal(again.get_parameter(name), parameter) and again.get_parameter(name).requires_grad
    save_adapter(fresh, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize(
    ("options", "bits", "more"),
    [
        (ROWS, 4, {"use_dora": True, "use_rslora": True}),
        (ROWS, 32, {"lora_init": "pissa", "lora_dropout": 0.1}),
        (ROWS, 4, {"lora_init": "loftq"}),
        (ALL, 32, {"use_dora": True}),
        (ALL, 32, {"lora_init": "pissa"}),
    ],
)
def test_with_every_kind_of_adapter(options, bits, more, load, directory, tmp_path) -> None:
    options = LoraOptions(**{**vars(options), **more})
    model = train(add_lora(load(False, bits), options))
    save_adapter(model, tmp_path)
    assert torch.allclose(logits(plain(directory(), tmp_path, bits)), logits(model), atol=2e-5)
    fresh = add_lora(load(False, bits), options)
    restore_adapter(fresh, tmp_path)
    for name, parameter in trained(model).items():
        assert torch.equal(fresh.get_parameter(name), parameter), name


@KINDS
@TIED
def test_the_base_comes_back_as_it_was(options, tied, load, tmp_path) -> None:
    base = load(tied)
    before = logits(base)
    save_adapter(train(add_lora(base, options)), tmp_path)
    loaded = load_adapter(load(tied), tmp_path, trainable=False).model
    bare = remove_adapter(loaded)
    assert torch.equal(logits(bare), before)
    assert not trained(bare) and not any(
        "original" in name or "token_adapter" in name for name, _ in bare.named_modules()
    )
    assert (bare.lm_head.weight is bare.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(("family", "options"), [("gemma3_text", ROWS), ("gemma3_text", ALL), ("gpt2", ROWS)])
def test_other_families_in_bf16(family, options, load, directory, tmp_path) -> None:
    """Gemma 3 scales inside its embeddings, GPT-2 has other names; both have tied heads."""
    tied = True
    model = train(add_lora(load(tied, 16, family), options))
    assert torch.equal(*vocabulary_weights(model))
    save_adapter(model, tmp_path)
    outside = plain(directory(family, tied), tmp_path, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(outside), logits(model))


def test_whole_matrices_are_fp32_and_hidden_states_are_not(load) -> None:
    model = add_lora(load(False, 16), ALL)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    inner = model.get_base_model()
    assert inner.get_input_embeddings()(torch.tensor([[5]])).dtype == torch.bfloat16


# --- what is refused


def test_other_tokens_are_not_restored(load, tmp_path) -> None:
    save_adapter(train(add_lora(load(), ROWS)), tmp_path)
    other = add_lora(load(), ROWS, new_ids=[i - 1 for i in NEW])
    with pytest.raises(ModelError, match="other tokens"):
        restore_adapter(other, tmp_path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "has no new_tokens.json"),
        ("{", "cannot be read as JSON"),
        ("[1]", "no JSON object"),
        ({"format": 2, "new_ids": [5]}, "no list of new tokens of format 1"),
        ({"format": 1}, "no list of new tokens"),
        ({"format": 1, "new_ids": []}, "no list of new tokens"),
        ({"format": 1, "new_ids": [5, "6"]}, "is damaged"),
        ({"format": 1, "new_ids": [5, True]}, "is damaged"),
        ({"format": 1, "new_ids": [6, 5]}, "is damaged"),
        ({"format": 1, "new_ids": [5, 5]}, "is damaged"),
        ({"format": 1, "new_ids": [-1, 5]}, "names the token -1"),
        ({"format": 1, "new_ids": [5, VOCAB]}, f"names the token {VOCAB} of {VOCAB}"),
    ],
)
def test_lists_that_cannot_be_used(content, word, tmp_path) -> None:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "new_tokens.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_new_tokens(str(tmp_path), VOCAB)
    text = str(caught.value)
    assert caught.value.flag == "--train_new_tokens" and word in text and len(text.splitlines()) == 1
    assert "tools/expand_vocab.py" in text and "--train_embeddings" in text


def test_a_head_with_a_bias_is_not_trained_by_rows(load, directory, tmp_path) -> None:
    """peft would leave the bias out and answer otherwise."""
    with pytest.raises(ConfigError, match="has a bias; use --train_embeddings"):
        add_lora(load(family="phi"), ROWS)
    model = train(add_lora(load(family="phi"), ALL))
    save_adapter(model, tmp_path)
    assert torch.equal(logits(plain(directory("phi"), tmp_path, 32)), logits(model))


def test_a_tied_head_that_peft_would_forget_is_refused(load) -> None:
    """peft ties whole matrices only under the names of Llama; the head of GPT-2 would stay what it was."""
    with pytest.raises(ConfigError, match="peft does not tie them; use --train_new_tokens"):
        add_lora(load(True, family="gpt2"), ALL)


def test_a_quantised_head_is_not_trained(load) -> None:
    for options in (ROWS, ALL):
        base = load()
        quantize_head(base, 4, torch.float32)
        with pytest.raises(ConfigError, match="of plain weights"):
            add_lora(base, options)


def test_embeddings_in_training_stay_on_the_card(load) -> None:
    for options in (ROWS, ALL):
        with pytest.raises(ConfigError, match="--offload_embeddings"):
            embeddings_to_ram(add_lora(load(), options), "cpu")


@KINDS
def test_adapter_of_an_enlarged_base_on_a_smaller_one(options, load, load_family, tmp_path) -> None:
    save_adapter(train(add_lora(load(), options), steps=1), tmp_path / "run")
    small = load_family("llama", model_path=save_family("llama", tmp_path / "small", vocab_size=VOCAB - 20)).model
    ids = torch.arange(3, 20)[None]
    before = small(ids).logits
    with pytest.raises(ModelError) as caught:
        load_adapter(small, tmp_path / "run", trainable=False)
    # Whole matrices come along in a merge; `expand_vocab.py apply` would pad to other rows than theirs.
    remedy = "tools/merge_lora.py" if options.train_embeddings else "tools/expand_vocab.py apply"
    assert remedy in str(caught.value) and str(VOCAB - 20) in str(caught.value)
    assert torch.equal(small(ids).logits, before) and not trained(small)


def test_a_foreign_adapter_with_whole_matrices(load, directory, tmp_path) -> None:
    """As Chinese-LLaMA-Alpaca published them: fp16, both matrices in modules_to_save, made by peft alone."""
    base = transformers.AutoModelForCausalLM.from_pretrained(directory())
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    foreign = train(peft.get_peft_model(base, config))
    foreign.save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(file).items()}
    assert {name for name in halves if "lora" not in name} == {
        "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
    }  # fmt: skip
    save_file(halves, file)
    here = load_adapter(load(), tmp_path, trainable=True).model
    assert torch.allclose(logits(here.eval()), logits(foreign), atol=2e-2)
    assert len(trained(here)) == 2 * 4 + 2
    save_adapter(train(here), tmp_path / "again")
    assert torch.equal(logits(plain(directory(), tmp_path / "again", 32)), logits(here))


# --- memory


def planned_over_measured(setup: MemoryConfig, tied: bool, **changes: Any) -> float:
    config = toy_config("llama", num_hidden_layers=2, tie_word_embeddings=tied, **changes)
    measured = peaks(config, setup, detect("cpu"))
    planned = account(architecture_of(config), setup).tensor_bytes
    assert measured["evaluation_bytes"] <= measured["training_bytes"]
    return float(planned / measured["training_bytes"])


MORE = [
    {"loss_chunk": 40},
    {"loss_chunk": 0},
    {"loss_chunk": 40, "gradient_checkpointing": False},
    {"loss_chunk": 64, "optimizer": "adamw_8bit"},
]


@pytest.mark.parametrize(
    ("vocabulary", "tied", "number"),
    every_pair_fast([{"n_new_tokens": 20}, {"train_embeddings": True}], [False, True], range(len(MORE))),
)
def test_planned_bytes_are_those_of_a_real_step(vocabulary, tied, number) -> None:
    bits = (4, 16, 8, 32)[(number + tied) % 4]
    width = element_bytes(bits, detect("cpu"))
    setup = MemoryConfig(bits, width, 2, 72, rank=12, on_gpu=False, **vocabulary, **MORE[number])
    assert 0.99 <= planned_over_measured(setup, tied) <= 1.03


@pytest.mark.parametrize(
    ("vocabulary", "optimizer", "tied"),
    [
        ({"n_new_tokens": 500}, "adamw", False),
        ({"train_embeddings": True}, "adamw", True),
        ({"train_embeddings": True}, "adamw_8bit", False),  # which has more than the backward pass
        pytest.param({"n_new_tokens": 500}, "adamw", True, marks=pytest.mark.slow),
        pytest.param({"train_embeddings": True}, "adamw", False, marks=pytest.mark.slow),
        pytest.param({"train_embeddings": True}, "adamw_8bit", True, marks=pytest.mark.slow),
    ],
)
def test_a_vocabulary_larger_than_the_rest_is_planned(vocabulary, optimizer, tied) -> None:
    setup = MemoryConfig(16, 2, 1, 32, rank=4, loss_chunk=8, optimizer=optimizer, on_gpu=False, **vocabulary)
    assert 0.99 <= planned_over_measured(setup, tied, vocab_size=8000) <= 1.03


@pytest.mark.parametrize(
    "vocabulary", [{"n_new_tokens": 33}, {"train_embeddings": True}, {"n_new_tokens": 33, "only_vocabulary": True}]
)
@pytest.mark.parametrize(("tied", "optimizer"), [(False, "adamw"), (True, "adamw_8bit")])
def test_what_lies_still_is_right_to_the_byte(vocabulary, tied, optimizer) -> None:
    setup = MemoryConfig(16, 2, 1, 8, rank=48, optimizer=optimizer, on_gpu=False, **vocabulary)
    config = toy_config("llama", num_hidden_layers=2, tie_word_embeddings=tied, vocab_size=1777)
    run = real_run(config, setup, detect("cpu"))
    model, parameters = architecture_of(config), [p for p in run.plain_model.parameters() if p.requires_grad]
    assert n_trained(model, setup) * FP32 == sum(p.nbytes for p in parameters) > 0
    state = held_bytes(list(run.optimizer.state.values()))
    counters = sum(isinstance(e.get("step"), torch.Tensor) * FP32 for e in run.optimizer.state.values())
    assert optimizer_bytes(model, setup) == state - counters - (2 * 256 * FP32 if "8bit" in optimizer else 0)


@pytest.mark.usefixtures("peaks_by_formula")
@KINDS
def test_the_plan_leaves_trained_matrices_alone(options, directory) -> None:
    """However small the card, it neither moves nor quantises what is trained."""
    model = architecture_of(str(directory()))
    config = FinetuneConfig(ModelOptions(model_path=str(directory()), bits=16), lora=options)
    plan = make_plan(model, config, CardSpec("none", 1 << 20, 1 << 40))
    assert not plan.fits and not plan.setup.offload_embeddings and plan.setup.head_bits == 16
    names = [part.name for part in plan.account.parts]
    assert any("trained, fp32" in name for name in names), names
    frozen = make_plan(model, FinetuneConfig(config.model, memory=MemoryOptions()), CardSpec("none", 1 << 20, 1 << 40))
    assert frozen.setup.offload_embeddings or frozen.setup.head_bits < 16


def test_only_activations_go_to_ram_with_a_trained_head(load) -> None:
    """In 16 bits a trained head works on a copy of its weight for each chunk; that copy is no activation."""
    n_packed = []
    for options in (LoraOptions(lora_r=4), ROWS, ALL):
        model = add_lora(load(False, 16), options).train()
        offload = ActivationOffload(model, "cpu", min_bytes=VOCAB * 64 * 2)
        with offload, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = summed_loss(model, batch(), chunk_tokens=8)[0]
            n_packed.append(offload.n_packed)
            offload.turn_back()
            loss.backward()
    assert n_packed[0] == n_packed[1], "rows"
    assert n_packed[2] == n_packed[0] + 1, "the head's gradient alone is as large"
