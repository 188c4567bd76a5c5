"""GGUF files: every tensor, number and token is what llama.cpp will need, told without llama.cpp."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

import onecard.programs.gguf as tool
from onecard.console import run_main
from onecard.data.built_in_templates import FOLDER
from onecard.data.jinja_chat import render_chat
from onecard.export.gguf import writer as writing
from onecard.export.gguf.layout import read_layout, rope_divisors
from onecard.export.gguf.tokenizer import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary
from tests import tiny
from tests.export import gguf_models

ROOT = Path(__file__).resolve().parents[2]
# Largest error as a share of the largest value of 32: half a step of a symmetric code, or one whole at its open end.
BOUNDS = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.005, "q5_0": 0.064, "q5_1": 0.034, "q4_0": 0.126,
          "q4_1": 0.068, "mxfp4": 0.26}  # fmt: skip
SMALL = ("q5_0", "q5_1", "q4_0", "q4_1", "mxfp4")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny model; each is made once."""
    folder = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        if not (folder / family).exists():
            gguf_models.save_model(folder / family, family)
        return folder / family

    return get


def export(model: Path, output: Path, *more: str, kind: str = "f32") -> gguf.GGUFReader:
    tool.main(["--model_path", str(model), "--output_path", str(output), "--gguf_type", kind, *more])
    assert sorted(path.name for path in output.iterdir()) == ["Modelfile", f"model-{kind}.gguf"]
    return gguf.GGUFReader(output / f"model-{kind}.gguf")


def contents(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def values(reader: gguf.GGUFReader) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor in fp32, in the shape torch gives it."""
    return {
        t.name: gguf.quants.dequantize(np.array(t.data), t.tensor_type).reshape(*reversed([int(n) for n in t.shape]))
        for t in reader.tensors
    }


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *expected: str) -> None:
    capsys.readouterr()
    code = run_main(lambda: tool.main(words), debug=False)
    told = capsys.readouterr().err
    assert code != 0
    assert told.count("error:") == 1, told
    for text in expected:
        assert text in told[told.index("error:") :], told


def llama_names(n_layers: int) -> dict[str, str]:
    """Hugging Face's name of each of llama.cpp's tensors, written by hand: the library's table is on trial too."""
    parts = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
             "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
             "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # fmt: skip
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    names |= {
        f"blk.{i}.{ours}": f"model.layers.{i}.{theirs}" for i in range(n_layers) for ours, theirs in parts.items()
    }
    return names


@pytest.mark.parametrize("family", gguf_models.FAMILIES)
def test_every_tensor_is_there_unchanged(family: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    model = models(family)
    source = tiny.tensors_of(model / "model.safetensors")
    found = values(export(model, tmp_path / "out"))
    names = llama_names(2)
    turned, seen = 0, set()
    for name, tensor in found.items():
        if name == "rope_freqs.weight":
            assert family == "llama-3"
            continue
        module, _, part = name.rpartition(".")
        wanted = source[f"{names[module]}.{part}"].float().numpy()
        seen.add(f"{names[module]}.{part}")
        if module.endswith(("attn_q", "attn_k")) and "qwen" not in family and family != "yarn":
            turned += 1
            assert not np.array_equal(tensor, wanted)
            # Row 2j + s of a head is row s * half + j of the source: the same rows, in another order.
            half = read_layout(model).head_dim // 2
            heads = range(0, len(tensor), 2 * half)
            wanted = wanted[[first + s * half + j for first in heads for j in range(half) for s in (0, 1)]]
        assert np.array_equal(tensor, wanted), name
    assert seen == source.keys() - {"lm_head.weight"} if read_layout(model).tied else seen == source.keys()
    assert turned == {"llama-biases": 8, "qwen2": 0, "qwen3": 0, "yarn": 0}.get(family, 4)


def attention_scores(x: torch.Tensor, file: dict[str, Any], layout: Any, pairs: str) -> torch.Tensor:
    """q·k of layer 0 between all positions, turned as Hugging Face (halves) or llama.cpp (neighbours) does it."""
    freqs = layout.rope_theta ** -(torch.arange(0, layout.head_dim, 2).double() / layout.head_dim)
    angle = torch.arange(len(x)).double()[:, None] * freqs
    turned = []
    for name, n_heads in (("q", layout.n_heads), ("k", layout.n_kv_heads)):
        y = x @ torch.as_tensor(file[f"{name}.weight"]).double().T + torch.as_tensor(file[f"{name}.bias"]).double()
        y = y.reshape(len(x), n_heads, layout.head_dim).transpose(0, 1)
        a, b = (y[..., 0::2], y[..., 1::2]) if pairs == "neighbours" else y.chunk(2, dim=-1)
        real, other = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        turned.append(torch.cat([real, other], dim=-1))
    q, k = turned
    return q @ k.repeat_interleave(layout.n_heads // layout.n_kv_heads, dim=0).transpose(1, 2)


def test_permuted_rows_give_the_same_attention(models: Callable[[str], Path], tmp_path: Path) -> None:
    """The reason for the permutation, biases included: llama.cpp turns neighbours, Hugging Face the two halves."""
    model = models("llama-biases")
    layout, source = read_layout(model), tiny.tensors_of(model / "model.safetensors")
    found = values(export(model, tmp_path / "out"))
    parts = ("weight", "bias")
    theirs = {f"{n}.{p}": source[f"model.layers.0.self_attn.{n}_proj.{p}"] for n in "qk" for p in parts}
    ours = {f"{n}.{p}": found[f"blk.0.attn_{n}.{p}"] for n in "qk" for p in parts}
    x = torch.randn(7, layout.hidden_size, generator=torch.Generator().manual_seed(1)).double()
    wanted = attention_scores(x, theirs, layout, "halves")
    torch.testing.assert_close(attention_scores(x, ours, layout, "neighbours"), wanted, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(attention_scores(x, theirs, layout, "neighbours"), wanted, rtol=1e-2)


def test_rope_factors_are_those_of_transformers(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = models("llama-3")
    theirs = AutoModelForCausalLM.from_pretrained(model).model.rotary_emb.inv_freq
    plain = 10000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    stored = values(export(model, tmp_path / "out"))["rope_freqs.weight"]
    torch.testing.assert_close(plain / torch.as_tensor(stored).double(), theirs.double(), rtol=1e-6, atol=0)
    assert set(stored) > {1.0, 8.0}
    assert rope_divisors(read_layout(model)).tolist() == stored.tolist()


@pytest.mark.parametrize("kind", list(BOUNDS))
def test_kinds_of_numbers(kind: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    """f32, f16 and bf16 round as torch does; the others stay within a step of their block; norms are never touched."""
    model = models("llama")
    source = tiny.tensors_of(model / "model.safetensors")
    reader = export(model, tmp_path / "out", kind=kind)
    kinds = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
    names, counted = llama_names(2), 0
    for name, tensor in values(reader).items():
        wanted = source[f"{names[name.rpartition('.')[0]]}.weight"].float()
        if wanted.dim() == 1:
            assert kinds[name] == "f32"
            assert np.array_equal(tensor, wanted.numpy())
            continue
        expected = "q8_0" if kind in SMALL and name == "output.weight" else kind
        assert kinds[name] == expected, name
        if "attn_q" in name or "attn_k" in name:
            continue
        counted += 1
        if kind in ("f32", "f16", "bf16"):
            rounded = wanted.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]).float()
            assert np.array_equal(tensor, rounded.numpy())
        blocks = wanted.reshape(-1, 32).numpy()
        span = np.abs(blocks).max(axis=1) if not kind.endswith("_1") else np.ptp(blocks, axis=1)
        off = np.abs(tensor.reshape(-1, 32) - blocks).max(axis=1)
        assert (off <= BOUNDS[expected] * span + 1e-5).all(), name
        assert kind in ("f32", "f16") or off.max() > 0
    assert counted == 2 + 2 * 5
    assert contents(reader)["general.file_type"] == writing.FILE_TYPES[kind]


def test_a_tied_head_is_written_once_and_finely(models: Callable[[str], Path], tmp_path: Path) -> None:
    kinds = {t.name: t.tensor_type for t in export(models("qwen2"), tmp_path / "out", kind="q4_0").tensors}
    assert kinds["token_embd.weight"] == Kind.Q8_0
    assert "output.weight" not in kinds
    assert kinds["blk.1.ffn_down.weight"] == Kind.Q4_0


def test_rows_that_are_no_whole_blocks_become_f16(tmp_path: Path) -> None:
    model = tiny.save_tiny_llama(tmp_path / "odd", layers=1, head_dim=20)
    kinds = {t.name: t.tensor_type for t in export(model, tmp_path / "out", kind="q8_0").tensors}
    assert kinds["blk.0.attn_output.weight"] == Kind.F16  # 4 heads of 20: 80 columns
    assert kinds["blk.0.attn_q.weight"] == Kind.Q8_0


def test_the_kinds_offered_are_those_the_library_can_write() -> None:
    writable = set()
    for kind in Kind:
        try:
            gguf.quants.quantize(np.ones((1, 256), dtype=np.float32), kind)
        except NotImplementedError:
            continue
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        if 8 * n_bytes / block >= 4:
            writable.add(kind)
    assert writable == set(writing.KINDS.values())
    offered = get_args(get_type_hints(tool.ExportOptions)["gguf_type"])
    assert set(offered) == set(writing.KINDS)
    assert writing.BLOCK_ERROR.keys() | writing.ROUNDING.keys() == writable


def test_all_numbers_of_a_llama_3(models: Callable[[str], Path], tmp_path: Path) -> None:
    found = contents(export(models("llama-3"), tmp_path / "named", "--prompt_type", "llama-3", kind="f16"))
    tokens, merges = found.pop("tokenizer.ggml.tokens"), found.pop("tokenizer.ggml.merges")
    types = found.pop("tokenizer.ggml.token_type")
    special = {text: tokens.index(text) for text in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")}
    assert found == {
        "general.architecture": "llama", "general.type": "model", "general.name": "named", "general.file_type": 1,
        "general.quantization_version": 2, "llama.vocab_size": 498, "llama.context_length": 512,
        "llama.embedding_length": 64, "llama.block_count": 2, "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 1, "llama.attention.key_length": 16,
        "llama.attention.value_length": 16, "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": special["<|begin_of_text|>"],
        "tokenizer.ggml.eos_token_id": special["<|end_of_text|>"],
        "tokenizer.ggml.eot_token_id": special["<|eot_id|>"],
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": (FOLDER / "llama-3.jinja").read_text(encoding="utf-8"),
    }  # fmt: skip
    assert len(tokens) == len(types) == 498
    assert types[-5:] == [UNUSED] * 5
    assert tokens[-5:] == [f"[PAD{i}]" for i in range(493, 498)]
    assert [types[i] for i in special.values()] == [CONTROL] * 3
    stored = json.loads((models("llama-3") / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert merges == [" ".join(merge) for merge in stored["merges"]]
    assert len(merges) > 100
    assert all(tokens[i] == text for text, i in stored["vocab"].items())


def test_numbers_of_other_families(models: Callable[[str], Path], tmp_path: Path) -> None:
    found = contents(export(models("mistral"), tmp_path / "mistral"))
    assert found["general.architecture"] == "llama"
    assert found["llama.attention.key_length"] == found["llama.rope.dimension_count"] == 32
    found = contents(export(models("yarn"), tmp_path / "yarn"))
    assert found["general.architecture"] == "qwen3"
    # LLM_KV_ROPE_SCALING_... of https://github.com/ggml-org/llama.cpp/blob/master/src/llama-arch.cpp
    assert found["qwen3.rope.scaling.type"] == "yarn"
    assert found["qwen3.rope.scaling.factor"] == 4.0
    assert found["qwen3.rope.scaling.original_context_length"] == 64
    found = contents(export(models("qwen2"), tmp_path / "qwen2"))
    assert found["tokenizer.ggml.pre"] == "qwen2"
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.eos_token_id"]


def test_sliding_window_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gguf_models.save_model(tmp_path / "m", "mistral")
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"sliding_window": 128}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    export(model, tmp_path / "out")
    assert "looks back 128 tokens" in capsys.readouterr().err


def llama_cpp_pieces(text: str, found: dict[str, Any]) -> list[int]:
    """llama.cpp's SentencePiece: join neighbours with the highest score, leftmost first; what is left goes as bytes."""
    ids = {token: i for i, token in enumerate(found["tokenizer.ggml.tokens"])}
    scores = found["tokenizer.ggml.scores"]
    parts = list((" " * found["tokenizer.ggml.add_space_prefix"] + text).replace(" ", "\u2581"))
    while True:
        joins = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not joins:
            break
        i = -max(joins)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    spelled = [[ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()] for p in parts]
    return [found["tokenizer.ggml.bos_token_id"]] * found["tokenizer.ggml.add_bos_token"] + tiny.flatten(spelled)


@pytest.mark.parametrize("source", ["tokenizer.model", "tokenizer.json"])
def test_sentencepiece_scores_lead_to_the_same_tokens(source: str, tmp_path: Path) -> None:
    """With the stored scores, and with those made from merges for a tokenizer that has no tokenizer.model."""
    model = shutil.copytree(ROOT / "sample" / "tiny-llama", tmp_path / "model")
    (model / "chat_template.jinja").unlink()  # with it a prompt begins with <s>, which takes no space behind it
    tokenizer = gguf_models.load_tokenizer(model)
    if source == "tokenizer.json":
        (model / "tokenizer.model").unlink()
    found = contents(export(model, tmp_path / "out"))
    if source == "tokenizer.model":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(model / source))
        assert found["tokenizer.ggml.scores"] == pytest.approx([processor.get_score(i) for i in range(4096)])
    pick = random.Random(1)
    words = [
        "The",
        " capital",
        "北京",
        "你好，",
        "\n",
        "  ",
        "x",
        "é",
        "🚀",
        " of",
        "123",
        "###",
        "'s",
        "Response:",
        "的",
    ]
    for _ in range(120):
        text = pick.choice(("The", "北京", "你好，", "###")) + "".join(pick.choices(words, k=8))
        assert llama_cpp_pieces(text, found) == tokenizer(text)["input_ids"]
    types = found["tokenizer.ggml.token_type"]
    assert types[:4] == [UNKNOWN, CONTROL, CONTROL, 6]
    assert types.count(6) == 256
    assert set(types) == {NORMAL, UNKNOWN, CONTROL, 6}


def test_added_tokens_and_empty_rows(models: Callable[[str], Path], tmp_path: Path) -> None:
    found = contents(export(models("llama-biases"), tmp_path / "out"))
    rows = list(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    tail = [("<|im_end|>", CONTROL), ("<plain added>", USER_DEFINED)]
    assert rows[-7:] == tail + [(f"[PAD{i}]", UNUSED) for i in range(len(rows) - 5, len(rows))]


def test_template_without_bos_writes_none(models: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp hands some token to `bos_token` in any case; Hugging Face hands nothing for Qwen."""
    reader = export(models("qwen3"), tmp_path / "out", "--prompt_type", "chatml")
    stored = contents(reader)["tokenizer.chat_template"]
    messages = [{"role": "user", "content": "Hi"}]
    plain = (FOLDER / "chatml.jinja").read_text(encoding="utf-8")
    wanted = render_chat(plain, messages, {"eos_token": "<|im_end|>"}, True)
    assert render_chat(stored, messages, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, True) == wanted
    assert stored.startswith('{#- onecard: {"end": "<|im_end|>"')
    assert "tokenizer.ggml.eot_token_id" not in contents(reader)  # it is the eos


def test_ollama_writes_bos_where_the_template_writes_it_and_it_is_not_added_anyway(tmp_path: Path) -> None:
    model = gguf_models.save_model(tmp_path / "m", "llama")
    file = FOLDER / "alpaca.jinja"  # as a run of a tokenizer that adds it has stored it; by name it is without
    n_visited = 0
    for adds, prompt_type, expected in (
        (True, "alpaca", False),
        (True, str(file), False),
        (False, "alpaca", False),
        (False, str(file), True),
    ):
        settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
        (model / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": adds}), encoding="utf-8")
        out = tmp_path / f"{adds}{n_visited}"
        found = contents(export(model, out, "--prompt_type", prompt_type))
        assert found["tokenizer.ggml.add_bos_token"] is adds
        assert ('{{ "<s>" }}' in (out / "Modelfile").read_text(encoding="utf-8").replace("{{- ", "{{ ")) is expected
        n_visited += 1
    assert n_visited == 4


def test_a_prompt_begins_as_it_does_here(models: Callable[[str], Path], tmp_path: Path) -> None:
    """ "<s>Hi" gets no space before Hi here, and "Hi" does: a file with a template that writes <s> says the former."""
    key = "tokenizer.ggml.add_space_prefix"
    assert contents(export(models("llama"), tmp_path / "plain"))[key] is True
    assert contents(export(models("llama"), tmp_path / "chat", "--prompt_type", "alpaca"))[key] is False


def test_pre_tokenizers(models: Callable[[str], Path]) -> None:
    """Each way of cutting words gets llama.cpp's name; an unknown one is refused, not guessed."""
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers as cuts  # noqa: I001
    from tokenizers import Regex
    from transformers import PreTrainedTokenizerFast

    byte_level, after_split = (
        cuts.ByteLevel(add_prefix_space=False),
        cuts.ByteLevel(add_prefix_space=False, use_regex=False),
    )
    alphabet = {text: i for i, text in enumerate([*sorted(cuts.ByteLevel.alphabet()), "</s>"])}

    def name_of(cut: Any, *, whole_words: bool = False) -> str:
        core = Tokenizer(kinds.BPE(vocab=alphabet, merges=[], ignore_merges=whole_words))
        core.pre_tokenizer = cut
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
        return read_vocabulary(tokenizer, Path("nowhere"), 300).pre

    def split(words: str) -> Any:
        return cuts.Sequence([cuts.Split(Regex(words), behavior="isolated"), after_split])

    assert name_of(byte_level) == "gpt-2"
    assert name_of(cuts.Sequence([cuts.Digits(individual_digits=True), byte_level])) == "smollm"
    assert name_of(split(gguf_models.LLAMA_3_WORDS), whole_words=True) == "llama-bpe"
    assert name_of(split(gguf_models.LLAMA_3_WORDS)) == "dbrx"
    assert name_of(split(gguf_models.QWEN_WORDS)) == "qwen2"
    for odd in (split(r"\w+"), cuts.ByteLevel(add_prefix_space=True)):
        with pytest.raises(Exception, match="cuts words in a way that has no name here"):
            name_of(odd)


def test_adapter_is_merged_first(models: Callable[[str], Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = models("llama")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "run")
    shutil.copy(FOLDER / "chatml.jinja", tmp_path / "run" / "chat_template.jinja")
    reader = export(base, tmp_path / "out", "--lora_path", str(tmp_path / "run"))
    merged = tuned.merge_and_unload().state_dict()
    found = values(reader)
    wanted = merged["model.layers.1.mlp.down_proj.weight"].numpy()
    np.testing.assert_allclose(found["blk.1.ffn_down.weight"], wanted, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(
        found["blk.1.ffn_down.weight"], values(export(base, tmp_path / "b"))["blk.1.ffn_down.weight"]
    )


def changed(model: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a model with other tensors."""
    from safetensors.torch import save_file

    shutil.copytree(model, target)
    tensors = tiny.tensors_of(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def configured(model: Path, target: Path, **settings: Any) -> Path:
    """A copy of a model with other settings in its config.json."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    return target


Q = "model.layers.1.self_attn.q_proj.weight"
BAD_TENSORS = {
    "missing": (lambda t: t.pop(Q), "lacks model.layers.1.self_attn.q_proj.weight"),
    "unknown": (lambda t: t.update(extra=torch.ones(2)), "holds extra"),
    "shape": (lambda t: t.update({Q: t[Q][:32].clone()}), "has the shape [32, 64]"),
    "kind": (lambda t: t.update({Q: t[Q].to(torch.int8)}), "is stored as torch.int8"),
    "nan": (lambda t: t[Q].__setitem__((3, 3), float("nan")), "holds NaN or Inf"),
    "large": (lambda t: t.update({Q: t[Q].float() * 1e6}), "too large for f16; use bf16 or f32"),
}
BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"model_type": "gpt2"}, "is a gpt2 model; this tool writes GGUF for llama, mistral, qwen2, qwen3"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "is quantised already (gptq)"),
    "activation": ({"hidden_act": "gelu"}, "its MLP uses 'gelu'"),
    "rope": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "scaled by 'dynamic'"),
    "rows": ({"vocab_size": 400}, "and config.json asks for [400, 64]"),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_bad_tensors_are_refused(what: str, models: Any, tmp_path: Path, capsys: Any) -> None:
    change, expected = BAD_TENSORS[what]
    model = changed(models("llama"), tmp_path / "bad", change)
    refused(capsys, ["--model_path", str(model), "--output_path", str(tmp_path / "out")], expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_bad_configs_are_refused(what: str, models: Any, tmp_path: Path, capsys: Any) -> None:
    settings, expected = BAD_CONFIGS[what]
    model = configured(models("llama"), tmp_path / "bad", **settings)
    refused(capsys, ["--model_path", str(model), "--output_path", str(tmp_path / "out")], expected)
    assert not (tmp_path / "out").exists()


def test_other_bad_input(models: Any, tmp_path: Path, capsys: Any) -> None:
    model, out = models("llama"), str(tmp_path / "out")
    grown = shutil.copytree(model, tmp_path / "grown")
    tokenizer = gguf_models.load_tokenizer(grown)
    tokenizer.add_tokens([f"<new {i}>" for i in range(9)])
    tokenizer.save_pretrained(grown)
    refused(capsys, ["--model_path", str(grown), "--output_path", out], "no row for '<new 5>'")
    short = shutil.copytree(model, tmp_path / "short")
    whole = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(whole[:-100])
    refused(capsys, ["--model_path", str(short), "--output_path", out], "is damaged")
    (tmp_path / "empty").mkdir()
    refused(capsys, ["--model_path", str(tmp_path / "empty"), "--output_path", out], "config.json is missing")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}", encoding="utf-8")
    refused(capsys, ["--model_path", str(tmp_path / "empty"), "--output_path", out], "give it as --lora_path")
    refused(capsys, ["--model_path", str(model), "--output_path", str(model)], "is or holds what is read here")
    refused(capsys, ["--model_path", str(model), "--output_path", "x.gguf"], "--output_path", "names a file")
    refused(capsys, ["--output_path", out, "--top_p", "2"], "--model_path", "--top_p")
    assert not Path(out).exists()


def test_nothing_is_replaced_unasked(models: Any, tmp_path: Path, capsys: Any) -> None:
    words = ["--model_path", str(models("llama")), "--output_path", str(tmp_path / "out")]
    tool.main(words)
    refused(capsys, words, "exists already", "--overwrite")
    tool.main([*words, "--overwrite", "--modelfile", "false"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model-f16.gguf"]


def test_a_wrong_order_of_rows_does_not_get_a_name(
    models: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check after writing counts rows by itself: it sees a permutation that was left out."""
    monkeypatch.setattr(writing, "permuted", lambda tensor, n_heads: tensor)
    words = ["--model_path", str(models("llama")), "--output_path", str(tmp_path / "out")]
    refused(capsys, words, "attn_", "reads back wrong")
    assert not list(tmp_path.iterdir())
