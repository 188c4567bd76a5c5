"""Every causal language model of transformers, through this project's own path: it trains, or is refused by name.

A few families, one of each kind of architecture, are tried always; the whole table is slow (about four minutes).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

from onecard.config.base_model import ModelOptions
from onecard.config.inference import SamplingOptions
from onecard.config.lora import LoraOptions
from onecard.config.training import FinetuneConfig
from onecard.errors import ConfigError, OneCardError
from onecard.inference.call import pad_left
from onecard.inference.embeddings import embed, score
from onecard.inference.model_limits import NO_BEAMS, go_together
from onecard.inference.prefix_cache import PrefixCache, can_be_kept, expanded
from onecard.inference.sampling import generation_config
from onecard.model.chunked_loss import summed_loss
from onecard.model.hardware import FP32_FAMILIES, detect
from onecard.model.load import load_base
from onecard.model.lora.adapter import add_lora, load_adapter, save_adapter
from onecard.model.lora.peft_model import adaptable_layers
from onecard.model.memory.architecture import architecture_of
from onecard.model.memory.plan import CardSpec, make_plan
from onecard.model.quantization import unquantised
from tests.model.every_family import MODEL_TYPES, VOCAB, save_config_alone, save_small

GIB = 2**30
LENGTH, STOP = 24, VOCAB - 1
KINDS = ("deepseek_v2", "falcon", "falcon_h1", "gemma3", "gpt_oss", "hyperclovax", "llama4_text", "mamba2", "mixtral")

# Refused, and the words that say why. What is neither here nor trained fails.
ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
ENCODER_DECODERS = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
    "prophetnet", "whisper",
)  # fmt: skip
OTHERS = (
    "blt", "cpmant", "gemma4_assistant", "gemma4_unified_assistant", "git", "moshi", "musicgen", "musicgen_melody",
    "reformer", "trocr", "xlm", "xlnet",
)  # fmt: skip
# Half of a small state-space layer is read directly and stays in 16 bits; small eyes and ears are convolutions.
HALF = ("falcon_mamba", "got_ocr2", "mamba", "phi4_multimodal")
REFUSED = {
    **dict.fromkeys(ENCODERS, "is an encoder"),
    **dict.fromkeys(ENCODER_DECODERS, "is an encoder-decoder"),
    **dict.fromkeys(OTHERS, "cannot be trained to continue text"),
}
NOT_BUILT = {
    "dots3_note": "its default names layers that a small one lacks; its text part is dots3_note_text",
    "gemma3n": "its eyes are in timm, which is not installed; its text part is gemma3n_text",
}


def pair() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB - 8, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def ragged() -> dict[str, torch.Tensor]:
    batch = pair()
    batch["input_ids"][1, 13:], batch["labels"][1, 13:] = 0, -100
    return batch


def loaded(directory: Path, bits: int = 32, **options: Any) -> Any:
    return load_base(ModelOptions(model_path=str(directory), bits=bits, **options), detect("cpu")).model


def plain_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Transformers' own."""
    return model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss


def mean_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss, n_supervised = summed_loss(model, batch, chunk_tokens=16)
    return loss / n_supervised


def with_adapter(base: Any, **options: Any) -> Any:
    model = add_lora(base, LoraOptions(lora_r=4, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0, 0.05)
    return model


def gradients(model: Any, loss: Any, batch: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict:
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)  # Phi-MoE draws its experts while it learns
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        value = loss(model, batch)
    value.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(grad is not None for grad in found.values()), [name for name, grad in found.items() if grad is None][:3]
    assert all(torch.isfinite(grad).all() for grad in found.values())
    assert sum(float(grad.abs().sum()) for grad in found.values()) > 0
    model.eval()
    return {name: grad.clone() for name, grad in found.items()}


def assert_close(here: dict, there: dict) -> None:
    assert here.keys() == there.keys() and len(here) > 0
    for name, grad in here.items():
        torch.testing.assert_close(grad, there[name], rtol=2e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=pair()["input_ids"], use_cache=False).logits.float()


def check_plan(directory: Path, real: Any) -> None:
    """There is a plan for it, and it counts the model that is loaded."""
    model = architecture_of(directory)
    for bits in (4, 32):
        config = FinetuneConfig(model=ModelOptions(model_path=str(directory), bits=bits))
        assert make_plan(model, config, CardSpec("a card", 8 * GIB, 8 * GIB)).account.card_bytes > 0
    assert model.n_weights == sum(weight.numel() for weight in real.parameters())
    adaptable = adaptable_layers(real)
    assert 0 < sum(kind.count for kind in model.linears if kind.adapted) <= len(adaptable)
    adapted = {kind.name for kind in model.linears if kind.adapted}
    assert adapted == {name.rpartition(".")[2] for name in adaptable}


def check_loss(directory: Path, here: Any) -> None:
    """The loss is that of transformers, and a row's share does not depend on what lies beside it."""
    plain = tf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    batch, uneven = pair(), ragged()
    alone = {"input_ids": uneven["input_ids"][1:, :13], "labels": uneven["labels"][1:, :13]}
    with torch.no_grad():
        assert abs(mean_loss(here, batch).item() - plain_loss(plain, batch).item()) < 1e-5
        together = summed_loss(here, uneven, chunk_tokens=16)[0].item()
        first = {name: value[:1] for name, value in uneven.items()}
        one_by_one = sum(summed_loss(here, row)[0].item() for row in (first, alone))
        assert abs(together - one_by_one) < 1e-4 * abs(together)


def answers(model: Any, rows: list[list[int]], n_beams: int = 1) -> list[list[int]]:
    """Five new ids for each row, in one call where the talk package would make one."""
    found = []
    for group in [rows] if go_together(model, [len(row) for row in rows]) else [[row] for row in rows]:
        input_ids, attention_mask = pad_left(group, 1)
        sampling = SamplingOptions(num_beams=n_beams, min_new_tokens=5)
        config = generation_config(sampling, stop_ids=[STOP], pad_id=1, max_new_tokens=5)
        with torch.inference_mode():
            ids = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
        found += ids[:, input_ids.shape[1] :].tolist()
    return found


def check_answers(model: Any) -> None:
    """With its cache the model answers what it answers without, in a batch too; and texts are read right."""
    long, short = pair()["input_ids"][0].tolist(), pair()["input_ids"][1, :13].tolist()
    greedy = []
    with torch.no_grad():
        for _ in range(5):
            last = model(input_ids=torch.tensor([long + greedy]), use_cache=False).logits[0, -1]
            greedy.append(int(last[:STOP].argmax()))
        scores = model(input_ids=torch.tensor([long]), use_cache=False).logits[0].float().log_softmax(-1)
    assert answers(model, [long]) == [greedy]
    assert answers(model, [long, short]) == [greedy, *answers(model, [short])]
    read = score(model, long, 0, lambda: None)
    expected = [scores[k, token].item() for k, token in enumerate(long[1:])]
    assert [entry.logprob for entry in read[1:] if entry] == pytest.approx(expected, abs=1e-3)
    assert abs(sum(value**2 for value in embed(model, [long], lambda: None)[0]) - 1) < 1e-6
    if model.config.model_type not in NO_BEAMS:
        assert len(answers(model, [long], n_beams=2)) == 1


def check_next_turn(model: Any) -> None:
    """Behind the cache of the turn before, a prompt is answered as it is from its beginning; with two beams too."""
    first, other = pair()["input_ids"][0].tolist(), pair()["input_ids"][1].tolist()
    prefixes, n_rows = PrefixCache(1.0), 1 if model.config.model_type in NO_BEAMS else 2

    def answered(prompt: list[int], n_beams: int) -> list[int]:
        past = prefixes.take(model, "", prompt)
        sampling = SamplingOptions(num_beams=n_beams, min_new_tokens=5)
        config = generation_config(sampling, stop_ids=[STOP], pad_id=1, max_new_tokens=5)
        input_ids, attention_mask = pad_left([prompt], 1)
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        with torch.inference_mode():
            if past is not None:
                arguments["past_key_values"] = expanded(model, prompt, past, n_beams) if n_beams > 1 else past
            ids = model.generate(**arguments, generation_config=config)[0].tolist()
        if past is not None:
            prefixes.keep("", ids, past)
        return ids[len(prompt) :]

    prompt = first
    for n_beams in (1, n_rows, 1):
        reply = answered(prompt, n_beams)
        assert [reply] == answers(model, [prompt], n_beams)
        prompt = [*prompt, *reply[:-1], *other[:11]]
    assert answered([*first[:20], *other], 1) == answers(model, [[*first[:20], *other]])[0]
    assert prefixes.clear() == can_be_kept(model)


def check_adapter(directory: Path, tmp_path: Path) -> None:
    """A step's gradients are transformers' own, recomputed or not; plain peft gives the same logits."""
    batch = pair()
    model = with_adapter(loaded(directory))
    adapted = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in model.named_parameters()
               if ".lora_A" in name}  # fmt: skip
    assert adapted == set(adaptable_layers(model.get_base_model()))
    recomputed = gradients(model, mean_loss, batch)
    assert_close(recomputed, gradients(model, plain_loss, batch))
    save_adapter(model, tmp_path / "adapter")
    base = loaded(directory, gradient_checkpointing=False)
    kept = load_adapter(base, tmp_path / "adapter", trainable=True).model
    assert_close(recomputed, gradients(kept, mean_loss, batch))
    plain = tf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    there = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(model), logits(there), rtol=1e-5, atol=1e-5)


def check_bits(directory: Path, tmp_path: Path, bits: int) -> float:
    """Trains and reopens in few bits; returns the share of the matrices that lie in them."""
    base = loaded(directory, bits)
    small, large = unquantised(base)
    model = with_adapter(base)
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    gradients(model, mean_loss, pair(), dtype)
    save_adapter(model, tmp_path / f"adapter-{bits}")
    again = load_adapter(loaded(directory, bits), tmp_path / f"adapter-{bits}", trainable=False).model
    torch.testing.assert_close(logits(model), logits(again), rtol=1e-5, atol=1e-5)
    return small / (small + sum(large.values()))


def check_family(model_type: str, tmp_path: Path) -> None:
    directory = save_small(model_type, tmp_path / "base")
    here = loaded(directory, gradient_checkpointing=False)
    check_plan(directory, here)
    check_loss(directory, here)
    check_answers(here)
    check_next_turn(here)
    del here
    check_adapter(directory, tmp_path)
    if model_type in FP32_FAMILIES:
        with pytest.raises(ConfigError, match="computes in fp32 only"):
            loaded(directory, 16)
    else:
        check_bits(directory, tmp_path, 16)
    assert check_bits(directory, tmp_path, 4) > (0.2 if model_type in HALF else 0.6)


@pytest.mark.parametrize("model_type", KINDS)
def test_a_family_of_each_kind_trains(model_type, tmp_path) -> None:
    check_family(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in {*KINDS, *REFUSED, *NOT_BUILT}])
def test_every_family_trains(model_type, tmp_path) -> None:
    check_family(model_type, tmp_path)


def test_a_package_that_a_model_needs_is_named(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3n", "text_config": {}}', encoding="utf-8")
    with pytest.raises(OneCardError, match=r"needs a package that is not installed.* timm"):
        architecture_of(tmp_path)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_continues_no_text_is_refused_by_name(model_type, tmp_path) -> None:
    directory = save_config_alone(model_type, tmp_path)
    for attempt in (lambda: architecture_of(directory), lambda: loaded(directory)):
        with pytest.raises(OneCardError) as caught:
            attempt()
        assert model_type in str(caught.value) and REFUSED[model_type] in str(caught.value)
