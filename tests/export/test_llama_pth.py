"""LLaMA's original files to Hugging Face and back: against Meta's own forward pass, bit for bit, and bad inputs."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onecard.console import run_main
from onecard.export.io.weights import same_bits
from onecard.export.llama_pth import layout
from onecard.export.llama_pth.pth import hf_to_pth, open_checkpoint
from onecard.programs import convert_llama
from tests import tiny
from tests.export import meta_llama
from tests.export.meta_llama import LLAMA_1, LLAMA_2, LLAMA_3

REPOSITORY = Path(__file__).resolve().parents[2]
N_TOKENS = 512
# name -> (params, shards, dtype, dimension that cuts the embeddings): LLaMA-1 13B, -2 70B, -3 70B and 405B in small
GENERATIONS = {
    "llama-1 in one": (LLAMA_1, 1, torch.float16, 1),
    "llama-1 in two": (LLAMA_1, 2, torch.float16, 1),
    "llama-2 in four": (LLAMA_2, 4, torch.bfloat16, 1),
    "llama-3 in one": (LLAMA_3, 1, torch.bfloat16, 0),
    "llama-3 in four": (LLAMA_3, 4, torch.bfloat16, 0),
    "heads fewer than shards": (LLAMA_3, 8, torch.float32, 0),
}


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sentencepiece_tokenizer(tmp_path_factory.mktemp("sp")) / "tokenizer.model"


def meta_model(directory: Path, generation: str, sp_model: Path | None = None) -> dict[str, torch.Tensor]:
    params, n_shards, dtype, embeddings_dim = GENERATIONS[generation]
    weights = meta_llama.make_weights(params, N_TOKENS, dtype)
    meta_llama.save(directory, params, weights, n_shards, embeddings_dim=embeddings_dim)
    if sp_model is not None:
        shutil.copyfile(sp_model, directory / "tokenizer.model")
    return weights


def run(*words: str | Path) -> int:
    return run_main(lambda: convert_llama.main([str(word) for word in words]), debug=False)


def refused(capsys: pytest.CaptureFixture[str], target: Path, *words: str | Path) -> str:
    """The one line that refuses; nothing is left behind."""
    assert run(*words, "--output_path", target) != 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert "not foreseen" not in lines[0]
    assert not target.exists()
    assert not [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}")]
    return lines[0]


def shards_of(directory: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(file, weights_only=True) for file in sorted(directory.glob("consolidated.*.pth"))]


def same_shards(one: Path, other: Path) -> int:
    """How many tensors were compared; every one of them was equal bit for bit, rotation tables aside."""
    pairs = list(zip(shards_of(one), shards_of(other), strict=True))
    n = 0
    for left, right in pairs:
        assert left.keys() - {"rope.freqs"} == right.keys() - {"rope.freqs"}
        for name in left.keys() - {"rope.freqs"}:
            assert same_bits(left[name], right[name]), name
            n += 1
    return n


@pytest.mark.parametrize("generation", GENERATIONS)
def test_converted_model_computes_what_metas_code_computes(tmp_path: Path, generation: str) -> None:
    from transformers import AutoModelForCausalLM

    params = GENERATIONS[generation][0]
    weights = meta_model(tmp_path / "meta", generation)
    assert (
        run("hf", "--model_path", tmp_path / "meta", "--output_path", tmp_path / "hf", "--max_shard_size", "20KB") == 0
    )
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(0, N_TOKENS, (300,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(tokens[None]).logits[0]
    theirs = meta_llama.logits(params, weights, tokens)
    assert float((ours - theirs).abs().max()) < 2e-4 * float(theirs.abs().max())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == GENERATIONS[generation][2]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_pth_to_hf_to_pth_is_bitwise(tmp_path: Path, generation: str, sp_model: Path) -> None:
    params, n_shards, _, _ = GENERATIONS[generation]
    meta_model(tmp_path / "meta", generation, sp_model)
    assert run("hf", "--model_path", tmp_path / "meta", "--output_path", tmp_path / "hf") == 0
    words = ("--model_path", tmp_path / "hf", "--output_path", tmp_path / "back", "--n_shards", str(n_shards))
    assert run("pth", *words) == 0
    assert same_shards(tmp_path / "meta", tmp_path / "back") == n_shards * (3 + 9 * params["n_layers"])
    written = json.loads((tmp_path / "back" / "params.json").read_text())
    assert layout.read_params(written, "") == layout.read_params({**params, "vocab_size": N_TOKENS}, "")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == sp_model.read_bytes()


@pytest.mark.parametrize("n_shards", [1, 2])
def test_hf_to_pth_to_hf_is_bitwise(tmp_path: Path, n_shards: int) -> None:
    base = REPOSITORY / "sample" / "tiny-llama"  # trained, tied, grouped heads
    assert run("pth", "--model_path", base, "--output_path", tmp_path / "pth", "--n_shards", str(n_shards)) == 0
    assert "output.weight" in shards_of(tmp_path / "pth")[0]  # Meta's programs know no tied head
    words = ("--model_path", tmp_path / "pth", "--output_path", tmp_path / "hf", "--max_positions", "1024")
    assert run("hf", *words) == 0
    one, other = (tiny.tensors_of(place / "model.safetensors") for place in (base, tmp_path / "hf"))
    assert one.keys() == other.keys()
    assert sum(same_bits(one[name], other[name]) for name in one) == len(one) == 38

    from transformers import AutoConfig, AutoTokenizer

    before, after = (AutoConfig.from_pretrained(place).to_dict() for place in (base, tmp_path / "hf"))
    for config in (before, after):
        config.pop("_name_or_path", None)
    assert before == after
    text = "What is 2 + 3? 你好，世界"
    ids = [AutoTokenizer.from_pretrained(place)(text).input_ids for place in (base, tmp_path / "hf")]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (1, 8), (4, 8)])
def test_reshard_is_bitwise(tmp_path: Path, before: int, after: int) -> None:
    weights = meta_llama.make_weights(LLAMA_2, N_TOKENS)
    meta_llama.save(tmp_path / "from", LLAMA_2, weights, before)
    meta_llama.save(tmp_path / "expected", LLAMA_2, weights, after)
    words = ("--model_path", tmp_path / "from", "--output_path", tmp_path / "to", "--n_shards", str(after))
    assert run("reshard", *words) == 0
    assert same_shards(tmp_path / "expected", tmp_path / "to") == after * 21
    assert all("rope.freqs" in shard for shard in shards_of(tmp_path / "to"))
    assert json.loads((tmp_path / "to" / "params.json").read_text()) == LLAMA_2


def test_a_shard_holds_no_more_than_its_part(tmp_path: Path) -> None:
    """torch.save writes all of a tensor for a slice of it; four shards must not be four whole models."""
    meta_model(tmp_path / "meta", "llama-2 in four")
    run("reshard", "--model_path", tmp_path / "meta", "--output_path", tmp_path / "to", "--n_shards", "8")
    sizes = [file.stat().st_size for file in (tmp_path / "to").glob("*.pth")]
    tensors = [sum(t.nbytes for t in shard.values()) for shard in shards_of(tmp_path / "to")]
    assert len(sizes) == 8
    assert max(sizes) < max(tensors) + 12_000


def test_hf_to_pth_for_other_helpers_takes_the_shards_that_meta_ships(tmp_path: Path) -> None:
    base = tiny.save_tiny_llama(tmp_path / "base", layers=1)
    (tmp_path / "pth").mkdir()
    hf_to_pth(base, tmp_path / "pth")
    assert sorted(p.name for p in (tmp_path / "pth").iterdir()) == [
        "consolidated.00.pth",
        "params.json",
        "tokenizer.model",
    ]
    sizes = {"7B": (4096, 32, 1), "13B": (5120, 40, 2), "30B": (6656, 60, 4), "65B": (8192, 80, 8)}
    for dim, n_layers, n_shards in sizes.values():
        assert layout.SHIPPED_SHARDS.get((dim, n_layers), 1) == n_shards


# dim, multiplier, multiple_of, width of the published checkpoints (their params.json and the Hub's config.json)
PUBLISHED_WIDTHS = [
    (4096, None, 256, 11008), (5120, None, 256, 13824), (6656, None, 256, 17920), (8192, None, 256, 22016),
    (8192, 1.3, 4096, 28672), (4096, 1.3, 1024, 14336), (2048, 1.5, 256, 8192), (3072, 1.0, 256, 8192),
    (16384, 1.2, 4096, 53248),
]  # fmt: skip


def test_published_widths() -> None:
    for dim, multiplier, multiple_of, width in PUBLISHED_WIDTHS:
        assert layout.intermediate_size(dim, multiplier, multiple_of) == width
        assert layout.intermediate_size(dim, *layout.ffn_settings(dim, width)) == width
    odd = [(dim, width) for dim in (64, 100, 4096) for width in (1, 7, 128, 1000, 9999, 11111, 40001)]
    found = sum(layout.intermediate_size(dim, *layout.ffn_settings(dim, width)) == width for dim, width in odd)
    assert found == len(odd) == 21


def test_context_lengths_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = {"llama-1 in one": 2048, "llama-2 in four": 4096, "llama-3 in one": 131072}
    for generation, length in expected.items():
        meta_model(tmp_path / generation, generation)
        run("hf", "--model_path", tmp_path / generation, "--output_path", tmp_path / f"{generation} hf")
        config = json.loads((tmp_path / f"{generation} hf" / "config.json").read_text())
        assert config["max_position_embeddings"] == length
        assert f"max_position_embeddings {length}" in capsys.readouterr().out


def tiktoken_file(path: Path) -> dict[bytes, int]:
    """Ranks of bytes and a few merges, as LLaMA-3's tokenizer.model has them."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"th", b"the", b" the", b"\xe4\xbd", b"\xe4\xbd\xa0", b"in", b"ing", b" q", b" qu", b"ck"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.mark.parametrize("instruct", [False, True])
def test_llama_3_tokenizer_encodes_as_tiktoken_does(tmp_path: Path, instruct: bool) -> None:
    from transformers import AutoTokenizer

    tiktoken = pytest.importorskip("tiktoken")
    params = {**LLAMA_3, "vocab_size": 768}
    meta_llama.save(tmp_path / "meta", params, meta_llama.make_weights(params, 768), 1)
    ranks = tiktoken_file(tmp_path / "meta" / "tokenizer.model")
    words = ["hf", "--model_path", tmp_path / "meta", "--output_path", tmp_path / "hf"]
    assert run(*words, *(["--instruct"] if instruct else [])) == 0
    reference = tiktoken.Encoding(
        "reference",
        pat_str=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
        mergeable_ranks=ranks,
        special_tokens={"<|begin_of_text|>": 266, "<|end_of_text|>": 267, "<|eot_id|>": 275},
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = ["the thing is quick", " the\n\n 12345 你好 it's\t the ", "naïve 🙂  end", "<|eot_id|>the<|end_of_text|>"]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids == [266, *reference.encode(text, allowed_special="all")]
        assert tokenizer.decode(ids[1:]) == text
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == ([267, 274, 275] if instruct else 267)
    assert tokenizer.convert_tokens_to_ids(["<|finetune_right_pad_id|>", "<|eom_id|>", "<|python_tag|>"]) == [
        270,
        274,
        276,
    ]
    assert tokenizer.convert_tokens_to_ids("<|reserved_special_token_2|>") == 271
    # And back: the file that Meta's programs read is kept.
    assert run("pth", "--model_path", tmp_path / "hf", "--output_path", tmp_path / "back") == 0
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (tmp_path / "meta" / "tokenizer.model").read_bytes()


def change_params(directory: Path, **changes: Any) -> None:
    content = json.loads((directory / "params.json").read_text()) | changes
    (directory / "params.json").write_text(json.dumps(content), encoding="utf-8")


def change_shard(directory: Path, number: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = directory / f"consolidated.{number:02d}.pth"
    shard = torch.load(file, weights_only=True)
    change(shard)
    torch.save(shard, file)


class Code:
    """What a hostile pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


Q = "layers.1.attention.wq.weight"
BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no params": (lambda d: (d / "params.json").unlink(), "no params.json"),
    "params no JSON": (lambda d: (d / "params.json").write_text("{"), "cannot be read as JSON"),
    "no shards": (lambda d: [file.unlink() for file in d.glob("*.pth")], "no consolidated.00.pth"),
    "shard 01 missing": (lambda d: (d / "consolidated.01.pth").unlink(), "lacks consolidated.01.pth"),
    "shard 03 missing": (lambda d: (d / "consolidated.03.pth").unlink(), "one of 4 shards, but 3 are here"),
    "dim": (lambda d: change_params(d, dim=48), "does not fit params.json"),
    "layers too few": (lambda d: change_params(d, n_layers=1), "holds layers.1.attention"),
    "layers too many": (lambda d: change_params(d, n_layers=3), "lacks layers.2.attention"),
    "heads": (lambda d: change_params(d, n_heads=4), "does not fit params.json: layers.0.attention.wk.weight is"),
    "heads that do not divide": (lambda d: change_params(d, n_heads=7), "disagrees with itself"),
    "heads no number": (lambda d: change_params(d, n_heads="8"), "n_heads '8'"),
    "key-value heads": (lambda d: change_params(d, n_kv_heads=2), "attention.wk.weight differs between shards 0 and 1"),
    "vocabulary": (lambda d: change_params(d, vocab_size=32000), "vocab_size 32000, but the head has 512 rows"),
    "width": (lambda d: change_params(d, multiple_of=256), "does not fit params.json: .*feed_forward"),
    "a picture model": (lambda d: change_params(d, vision_chunk_size=448), "sees pictures"),
    "shape": (
        lambda d: change_shard(d, 2, lambda s: s.update({Q: s[Q][:4].clone()})),
        r"consolidated.02.pth .*layers.1.attention.wq.weight is \(4, 32\), not \(8, 32\)",
    ),
    "quantised": (
        lambda d: change_shard(d, 0, lambda s: s.update({Q: s[Q].to(torch.int8)})), "int8: quantised",
    ),
    "NaN": (lambda d: change_shard(d, 1, lambda s: s[Q].fill_(float("nan"))), f"{Q} holds NaN"),
    "other norms": (
        lambda d: change_shard(d, 3, lambda s: s["norm.weight"].add_(1)), "norm.weight differs between shards 0 and 3",
    ),
    "another model": (
        lambda d: torch.save({"transformer.wte": torch.zeros(2)}, d / "consolidated.00.pth"), "transformer.wte",
    ),
    "no tensors": (lambda d: torch.save([1], d / "consolidated.00.pth"), "something else than named tensors"),
    "truncated": (lambda d: (d / "consolidated.01.pth").write_bytes((d / "consolidated.01.pth").read_bytes()[:-900]),
                  "consolidated.01.pth is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_original_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    import re

    damage, words = BAD_FILES[case]
    meta_model(tmp_path / "meta", "llama-2 in four")
    damage(tmp_path / "meta")
    line = refused(capsys, tmp_path / "out", "hf", "--model_path", tmp_path / "meta")
    assert re.search(words, line), line


def test_the_table_of_rotations_tells_a_wrong_number_of_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without grouped heads no shape depends on n_heads, and a wrong number would give a model that talks nonsense."""
    meta_model(tmp_path / "meta", "llama-1 in two")
    change_params(tmp_path / "meta", n_heads=4)
    assert "rope.freqs" in refused(capsys, tmp_path / "out", "hf", "--model_path", tmp_path / "meta")


def test_the_small_llama_3_2_are_stretched_further() -> None:
    """Their params.json says only use_scaled_rope; the factors are those of the configurations on the Hub."""
    small = {"n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "use_scaled_rope": True, "ffn_dim_multiplier": 1.5}
    factors = {(2048, 16): 32.0, (3072, 28): 32.0, (4096, 32): 8.0, (8192, 80): 8.0}
    for (dim, n_layers), factor in factors.items():
        params = layout.read_params({**small, "dim": dim, "n_layers": n_layers}, "")
        ids = layout.SpecialIds(128000, 128001)
        config = layout.config_of(params, torch.bfloat16, tied=False, max_positions=131072, ids=ids)
        assert config["rope_scaling"]["factor"] == factor
        assert params.rope_theta == 500000.0
        assert layout.params_of_config(config, "") == params


def test_code_in_a_shard_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta_model(tmp_path / "meta", "llama-1 in two")
    proof = tmp_path / "it ran"
    (tmp_path / "meta" / "consolidated.01.pth").write_bytes(pickle.dumps({"a": Code(proof)}))
    for words in (["hf"], ["reshard", "--n_shards", "1"]):
        assert "holds code" in refused(capsys, tmp_path / "out", *words, "--model_path", tmp_path / "meta")
    assert not proof.exists()


def change_config(directory: Path, **changes: Any) -> None:
    content = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"model_type": "mistral"}, "'mistral'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "is quantised"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "head_dim": ({"head_dim": 32}, "head_dim 32"),
    "rotation": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    "another stretch": ({"rope_parameters": {"rope_type": "llama3", "factor": 3.0}}, "rotary embeddings"),
    "layers": ({"num_hidden_layers": 3}, "lack model.layers.2"),
    "vocabulary": ({"vocab_size": 449}, "weight is .448, 64., not .449, 64."),
}


def test_bad_hf_directories_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_base: Path) -> None:
    import re

    for case, (changes, words) in BAD_CONFIGS.items():
        base = tmp_path / case
        shutil.copytree(tiny_base, base)
        change_config(base, **changes)
        line = refused(capsys, tmp_path / "out", "pth", "--model_path", base)
        assert re.search(words, line), (case, line)
    assert "cannot be cut into 3" in refused(
        capsys, tmp_path / "out", "pth", "--model_path", tiny_base, "--n_shards", "3"
    )
    assert "no params.json" in refused(capsys, tmp_path / "out", "hf", "--model_path", tiny_base)
    assert "is no directory" in refused(capsys, tmp_path / "out", "hf", "--model_path", tmp_path / "nowhere")


def test_a_missing_tokenizer_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_base: Path) -> None:
    meta_model(tmp_path / "a" / "meta", "llama-1 in two")
    assert run("hf", "--model_path", tmp_path / "a" / "meta", "--output_path", tmp_path / "hf") == 0
    assert "no tokenizer.model was found" in capsys.readouterr().out
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "tokenizer.model").unlink()
    assert run("pth", "--model_path", base, "--output_path", tmp_path / "pth") == 0
    assert "there is no tokenizer.model" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta_model(tmp_path / "meta", "llama-3 in one")
    tiktoken_file(tmp_path / "meta" / "tokenizer.model")  # 266 + 256 tokens, the model has 512
    assert "522 tokens" in refused(capsys, tmp_path / "out", "hf", "--model_path", tmp_path / "meta")
    (tmp_path / "meta" / "tokenizer.model").write_bytes(b"YQ== 0\nnonsense\n")
    assert "tokenizer.model:2" in refused(capsys, tmp_path / "out", "hf", "--model_path", tmp_path / "meta")
    (tmp_path / "meta" / "tokenizer.model").write_bytes(b"nothing of the kind")
    assert "neither a SentencePiece" in refused(capsys, tmp_path / "out", "hf", "--model_path", tmp_path / "meta")


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta_model(tmp_path / "meta", "llama-1 in two")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    words = ("hf", "--model_path", tmp_path / "meta", "--output_path", tmp_path / "out")
    assert run(*words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert run(*words, "--overwrite") == 0
    assert open_checkpoint(tmp_path / "meta").params.dim == 32
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert run("hf") == 2
    assert "--model_path" in capsys.readouterr().err
