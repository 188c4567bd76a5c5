"""Virtual tokens: every way to answer and to score goes on behind them, as PEFT alone would compute it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from onecard.config.base_model import ModelOptions
from onecard.config.inference import InferenceOptions, LimitOptions, ParallelOptions, SamplingOptions
from onecard.config.lora import VIRTUAL_TOKENS, LoraOptions
from onecard.config.parsing import parse
from onecard.config.training import FinetuneConfig
from onecard.data.messages import Turn
from onecard.errors import ConfigError, ModelError
from onecard.evaluate.likelihood import log_probs
from onecard.export.gguf.adapter import export_adapter
from onecard.export.gguf.options import ExportOptions, OllamaOptions
from onecard.inference.adapters import AdapterManager
from onecard.inference.call import GenerateCall
from onecard.inference.embeddings import embed, score
from onecard.inference.engine import GenerationRequest, InferenceEngine
from onecard.inference.generate import longest_sequence, prepare, stream
from onecard.inference.load import load_bundle
from onecard.inference.sampling import CacheOptions
from onecard.model.input_limits import position_limit
from onecard.model.lora.adapter import add_lora, load_adapter, restore_adapter, save_adapter
from onecard.model.lora.formats import ENCODER
from onecard.model.lora.peft_model import remove_adapter
from onecard.model.trained import without_adapter, write_result
from onecard.recipes import finetune
from tests import tiny
from tests.answers import answers_of

N, RATES = 5, {"prompt_tuning": 0.1, "p_tuning": 0.01, "prefix_tuning": 0.1}
GREEDY = SamplingOptions(temperature=0, max_new_tokens=9)
BEAMS = SamplingOptions(temperature=0, num_beams=3, max_new_tokens=9)
ASKED = ["Count to 5", "数到 3，从一开始，一个一个地说", "Hi"]
TEXTS = [[1, 5, 9, 33, 7, 120], [1, 44, 8]]


@pytest.fixture(scope="module", params=VIRTUAL_TOKENS)
def run(request, tiny_base, instructions, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("virtual") / "run"
    settings = {"peft_option": f"num_virtual_tokens={N}", "learning_rate": RATES[request.param], "save_steps": 100}
    return finetune(tiny.config_for(tiny_base, instructions, out, peft_method=request.param, **settings))


@pytest.fixture(scope="module")
def bundle(run: Path) -> Any:
    return load_bundle(ModelOptions("auto", bits=32, device="cpu"), str(run), "auto")[0]


@pytest.fixture(scope="module")
def plain(run: Path, tiny_base: Path) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), run).eval()


def by_hand(plain: Any, ids: list[int], n_new: int) -> list[int]:
    """Greedy, one token after the other, and no cache."""
    for _ in range(n_new):
        with torch.no_grad():
            ids = [*ids, int(plain(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-n_new:]


def test_answers_are_those_of_plain_peft_alone_together_and_streamed(bundle, plain) -> None:
    turns = [[Turn("user", text)] for text in ASKED]
    rows = [prepare(bundle, each, GREEDY) for each in turns]
    assert len({len(row.ids) for row in rows}) > 1  # the shorter ones are padded
    call = GenerateCall(bundle, rows, GREEDY)
    for row, new in zip(rows, call.run(), strict=True):
        alone = by_hand(plain, row.ids, GREEDY.max_new_tokens)
        n = next((k + 1 for k, token in enumerate(alone) if token in call.stop_ids), len(alone))
        assert new[:n] == alone[:n]
    answers = answers_of(bundle, turns, GREEDY)
    assert [answer.text for answer in answers] == [[*stream(bundle, each, GREEDY)][-1].text for each in turns]
    together = answers_of(bundle, turns, BEAMS)
    alone = [[*stream(bundle, each, BEAMS)][-1].text for each in turns]
    assert [answer.text for answer in together] == alone


def test_a_static_cache_is_refused(bundle) -> None:
    static = replace(bundle, cache=CacheOptions(static=True))
    with pytest.raises(ConfigError, match="--static_cache: does not work with virtual tokens"):
        [*stream(static, [Turn("user", "Hi")], GREEDY)]


def test_scores_and_embeddings_are_those_behind_the_virtual_tokens(bundle, plain) -> None:
    with torch.no_grad():
        tables = [plain(torch.tensor([ids])).logits[0, -len(ids) :].log_softmax(-1) for ids in TEXTS]
    asked = [[(k - 1, ids[k]) for k in range(1, len(ids))] for ids in TEXTS]
    for ids, table, found in zip(TEXTS, tables, log_probs(bundle.model, TEXTS, asked), strict=True):
        true = [float(table[k - 1, ids[k]]) for k in range(1, len(ids))]
        assert found == pytest.approx(true, abs=1e-4)
        scored = [each.logprob for each in score(bundle.model, ids, 0, lambda: None)[1:]]  # type: ignore[union-attr]
        assert scored == pytest.approx(true, abs=1e-4)
    together = embed(bundle.model, TEXTS, lambda: None)
    for ids, vector in zip(TEXTS, together, strict=True):
        assert list(embed(bundle.model, [ids], lambda: None)[0]) == pytest.approx(list(vector), abs=1e-5)
        with without_adapter(bundle.model):
            base = embed(bundle.model, [ids], lambda: None)[0]
        assert list(base) != pytest.approx(list(vector), abs=1e-3)


def test_a_gguf_adapter_cannot_hold_them(run, tiny_base, tmp_path) -> None:
    options = ExportOptions(model_path=str(tiny_base), output_path=str(tmp_path / "gguf"), lora_path=str(run))
    with pytest.raises(ModelError, match="no weight of a base can hold what stands in front of every text"):
        export_adapter(options, OllamaOptions())


def test_switched_off_or_taken_off_the_base_is_left(bundle, run, tiny_base) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    ids = torch.tensor(TEXTS[:1])
    with torch.no_grad(), without_adapter(bundle.model):
        assert torch.equal(bundle.model(ids).logits, base(ids).logits)
        assert longest_sequence(bundle.model) == 512
    assert longest_sequence(bundle.model) == 512 - N
    assert type(
        remove_adapter(load_bundle(ModelOptions("auto", bits=32, device="cpu"), str(run), "auto")[0].model)
    ) is (type(base))


def test_the_engine_answers_with_it_beside_other_adapters(run, bundle, tiny_base) -> None:
    """In a batch it has no place, which is said; the others keep theirs."""
    options, inference = ModelOptions(str(tiny_base), bits=32, device="cpu"), InferenceOptions(prompt_type="alpaca")
    true = answers_of(bundle, [[Turn("user", ASKED[0])]], GREEDY)[0].text
    for paths in ({"base": None, "virtual": str(run)}, {"virtual": str(run), "base": None}):
        engine = InferenceEngine(
            AdapterManager(options, inference, paths), LimitOptions(), ParallelOptions(max_parallel=2)
        )
        try:
            for name in ("virtual", "base", "virtual"):
                request = GenerationRequest((Turn("user", ASKED[0]),), sampling=GREEDY, adapter=name)
                text = [*engine.stream(request, threading.Event())][-1][0].text
                assert (text == true) == (name == "virtual")
        finally:
            engine.close()


@pytest.mark.parametrize("method", VIRTUAL_TOKENS)
def test_positions_are_counted_and_other_bases_refused(method: str) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    assert position_limit(add_lora(gpt2, LoraOptions(method, f"num_virtual_tokens={N}"))) == 32 - N
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ModelError, match=f"MambaForCausalLM .*so {method} has no place"):
        add_lora(mamba, LoraOptions(method))


@pytest.mark.parametrize(
    ("words", "said"),
    [("prompt --packing true", "--packing: does not go with virtual tokens"),
     ("prompt --objective grpo --rewards length", "--objective grpo: does not go with virtual tokens"),
     ("prompt --shard true", "--shard: does not go with virtual tokens"),
     ("prompt --deepspeed true", "--deepspeed: does not go with virtual tokens"),
     ("prompt --lora_target_modules q_proj", "--lora_target_modules: does not go with --peft_method prompt_tuning"),
     ("prompt --train_embeddings true", "--train_embeddings: does not go with --peft_method prompt_tuning"),
     ("prefix --gradient_checkpointing true", "--gradient_checkpointing: on does not go with --peft_method prefix_t"),
     ("prefix --stream_layers on", "--stream_layers: on does not go with --peft_method prefix_tuning"),
     ("prefix --offload_activations on", "--offload_activations: on does not go with --peft_method prefix_tuning")],
)  # fmt: skip
def test_what_does_not_go_with_them_is_named(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(FinetuneConfig, ["--peft_method", *words.split()])


@pytest.mark.parametrize(
    ("option", "said"),
    [("num_virtual_tokens=0", "num_virtual_tokens=0 would train nothing"), ("token_dim=8", "token_dim cannot be set"),
     ("prompt_tuning_init=BEST", "prompt_tuning_init=BEST is not one of TEXT, SAMPLE_VOCAB, RANDOM"),
     ("prompt_tuning_init_text=Answer", "prompt_tuning_init_text cannot be set: it is a text")],
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_name(option: str, said: str, tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=f"--peft_option: .*{said}"):
        add_lora(AutoModelForCausalLM.from_pretrained(tiny_base), LoraOptions("prompt", option))


def test_the_network_of_p_tuning_is_kept_for_further_training(tiny_base: Path, tmp_path: Path) -> None:
    """What answers does not need it; the mean of several has none."""

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_base).requires_grad_(False)

    first, second = (add_lora(fresh(), LoraOptions("p_tuning", f"num_virtual_tokens={N}")) for _ in range(2))
    for model, name in ((first, "one"), (second, "two")):
        save_adapter(model, tmp_path / name)
    trained = load_adapter(fresh(), tmp_path / "one", trainable=True).model
    assert tiny.same_tensors(trained.prompt_encoder.state_dict(), first.prompt_encoder.state_dict())
    restore_adapter(second, tmp_path / "one")
    assert tiny.same_tensors(second.prompt_encoder.state_dict(), first.prompt_encoder.state_dict())
    write_result(first, [tmp_path / "one"], make(tmp_path / "result"))
    assert (tmp_path / "result" / ENCODER).is_file()
    write_result(first, [tmp_path / "one", tmp_path / "two"], make(tmp_path / "mean"))
    load_adapter(fresh(), tmp_path / "mean", trainable=False)
    with pytest.raises(ModelError, match=r"mean has no adapter_prompt_encoder\.safetensors: .*can answer"):
        load_adapter(fresh(), tmp_path / "mean", trainable=True)


def make(directory: Path) -> Path:
    directory.mkdir()
    return directory
