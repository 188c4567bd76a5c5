"""Tensors of model directories: every bit comes back, whatever the file kind; what is damaged is named in one line."""

from __future__ import annotations

import io
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from onecard.errors import ModelError
from onecard.export.io.weights import DTYPES, ShardWriter, copy_small_files, open_weights, read_pickled
from tests.tiny import tensors_of

REPOSITORY = Path(__file__).resolve().parents[2]
LIMITS = [1, 100, 400, 10**9]


def model() -> dict[str, torch.Tensor]:
    """A tensor of every dtype, of many shapes: random bits, so NaN, infinities and subnormals are among them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 3), (64,), (), (0, 4), (2, 1, 3, 5), (1,)]
    tensors = {}
    for i, (kind, dtype) in enumerate(DTYPES.items()):
        shape = shapes[i % len(shapes)]
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        bits = torch.randint(0, 2 if dtype == torch.bool else 256, (n_bytes,), dtype=torch.uint8, generator=generator)
        tensors[f"layers.{i}.{kind}"] = bits.view(dtype).reshape(shape)
    return tensors


def bits_of(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.contiguous().flatten()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def bits(tensors: Any) -> dict[str, Any]:
    return {name: bits_of(tensor) for name, tensor in (tensors.items() if isinstance(tensors, dict) else tensors)}


def write(directory: Path, tensors: dict[str, torch.Tensor], limit: int) -> list[Path]:
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, limit)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.finish()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write(tmp_path / "model", {f"t{i}": torch.full((10,), float(i)) for i in range(6)}, 80)
    return tmp_path / "model"


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", LIMITS)
def test_every_bit_of_every_dtype_comes_back(tmp_path: Path, limit: int) -> None:
    tensors = model()
    files = write(tmp_path / "a", tensors, limit)
    weights = open_weights(tmp_path / "a")
    assert bits(weights) == bits(tensors)
    assert len(tensors) == len(DTYPES) >= 12
    for name, entry in weights.entries.items():
        assert (entry.dtype, entry.shape, entry.n_bytes) == (*bits_of(tensors[name])[:2], tensors[name].nbytes)
    assert weights.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert weights.largest_file_bytes == max(file.stat().st_size for file in files)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted([file.name for file in files] + (["model.safetensors.index.json"] if len(files) > 1 else []))


@pytest.mark.parametrize("limit", LIMITS)
def test_shards_keep_to_their_size_and_the_index_tells_all(tmp_path: Path, limit: int) -> None:
    tensors = model()
    files = write(tmp_path, tensors, limit)
    held = [tensors_of(file) for file in files]
    assert sorted(name for one in held for name in one) == sorted(tensors)
    for one in held:
        assert sum(t.nbytes for t in one.values()) <= limit or sum(bool(t.nbytes) for t in one.values()) == 1
    if len(files) == 1:
        assert limit == max(LIMITS)
        assert files[0].name == "model.safetensors"
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == {name: f.name for f, one in zip(files, held, strict=True) for name in one}
    assert [file.name for file in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors"
                                             for i in range(1, len(files) + 1)]  # fmt: skip


def test_transformers_reads_what_is_written(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    files = write(tmp_path / "copy", dict(open_weights(tiny_base)), 50_000)
    copy_small_files(tiny_base, tmp_path / "copy")
    one, other = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny_base, tmp_path / "copy"))
    assert bits(one) == bits(other)
    assert len(files) > 3


def test_pieces_and_tied_tensors_are_written_in_full(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    tensors = {
        "q": whole[:2],
        "k": whole[2:4],
        "again": whole,
        "turned": whole.T,
        "tied": whole,
        "wide": whole[:1].expand(5, 4),
    }
    write(tmp_path, tensors, 10**9)
    assert bits(open_weights(tmp_path)) == bits(tensors)


def test_a_piece_does_not_keep_its_whole_in_memory(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10**9)
    writer.add("piece", torch.zeros(1000)[:10])
    assert [tensor.untyped_storage().nbytes() for tensor in writer._held.values()] == [40]


def test_one_name_is_written_once(tmp_path: Path) -> None:
    for limit in (1, 10**9):
        writer = ShardWriter(tmp_path, limit)
        writer.add("x", torch.zeros(3))
        with pytest.raises(ModelError, match="x would be written twice"):
            writer.add("x", torch.ones(3))


def test_nothing_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tensor to write"):
        ShardWriter(tmp_path, 100).finish()
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_read_is_ones_own(sharded: Path, tmp_path: Path) -> None:
    weights = open_weights(sharded)
    first = weights.read("t3")
    first.zero_()
    weights.close()
    assert torch.equal(weights.read("t3"), torch.full((10,), 3.0))
    torch.save({"x": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    pickled = open_weights(tmp_path)
    pickled.read("x").zero_()
    assert torch.equal(pickled.read("x"), torch.ones(3))
    with pytest.raises(ModelError, match="has no tensor t9"):
        weights.read("t9")


# --- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_pickled_weights_are_read(tmp_path: Path, zipped: bool) -> None:
    tensors = model() if zipped else {name: t for name, t in model().items() if "F8" not in name}  # younger than it
    tensors["tied"] = tensors["turned"] = tensors["layers.0.F64"].T
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    weights = open_weights(tmp_path)
    assert bits(weights) == bits(tensors)
    assert write(tmp_path / "copy", dict(weights), 10**9)
    assert bits(open_weights(tmp_path / "copy")) == bits(tensors)


def test_pickled_shards_and_parameters_are_read(tmp_path: Path) -> None:
    for i in range(2):
        torch.save({f"t{i}": torch.nn.Parameter(torch.full((3,), float(i)))}, tmp_path / f"pytorch_model-{i}.bin")
    weight_map = {f"t{i}": f"pytorch_model-{i}.bin" for i in range(2)}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    read = dict(open_weights(tmp_path))
    assert {name: tensor.tolist() for name, tensor in read.items()} == {"t0": [0.0] * 3, "t1": [1.0] * 3}
    assert not any(tensor.requires_grad for tensor in read.values())


class Code:
    """Unpickled, it writes a file: what a hostile download would do."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("how", ["torch", "before-1.6", "pickle"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, how: str) -> None:
    content = {"w": torch.zeros(2), "x": Code(tmp_path / "ran")}
    file = tmp_path / "pytorch_model.bin"
    if how == "pickle":
        file.write_bytes(pickle.dumps({"x": Code(tmp_path / "ran")}, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ModelError, match=r"is refused: .* Nothing in it was run") as caught:
        open_weights(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False) if how != "pickle" else pickle.loads(file.read_bytes())
    assert (tmp_path / "ran").exists(), "the trap itself does not work"


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"model": {"w": torch.zeros(2)}}, {"w": 1.0}, torch.zeros(2)])
def test_a_pickle_of_something_else_is_reported(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds something else than named tensors"):
        open_weights(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_any_cut_or_flipped_pickle_is_one_line(tmp_path: Path, zipped: bool) -> None:
    stream = io.BytesIO()
    torch.save({f"t{i}": torch.randn(4, 3) for i in range(3)}, stream, _use_new_zipfile_serialization=zipped)
    whole, dice, file = stream.getvalue(), random.Random(0), tmp_path / "x.bin"
    refused = 0
    for i in range(400):
        damaged = bytearray(whole)
        if i % 2:
            damaged = damaged[: dice.randrange(len(whole))]
        else:
            damaged[dice.randrange(600)] = dice.randrange(256)
        file.write_bytes(damaged)
        try:
            read_pickled(file)
        except ModelError as reason:
            refused += 1
            assert str(file) in str(reason)
            assert "\n" not in str(reason)
    assert refused > 200


# --- damage ----------------------------------------------------------------------------------------------------------


def test_any_cut_or_flipped_safetensors_is_one_line(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.randn(4, 3) for i in range(3)}, tmp_path / "model.safetensors")
    whole, dice = (tmp_path / "model.safetensors").read_bytes(), random.Random(0)
    refused = 0
    for i in range(600):
        damaged = bytearray(whole)
        if i % 2:
            damaged = damaged[: dice.randrange(len(whole))]
        else:
            damaged[dice.randrange(200)] = dice.randrange(32, 127)
        (tmp_path / "model.safetensors").write_bytes(damaged)
        try:
            list(open_weights(tmp_path))
        except ModelError as reason:
            refused += 1
            assert "\n" not in str(reason)
    assert refused > 500


def header_only(file: Path, header: dict[str, Any], n_bytes: int = 0) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(n_bytes))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [5], "data_offsets": [0, 8]},  # 20 bytes in 8
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 8]},
        {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]},
    ],
)
def test_a_header_that_lies_is_reported(tmp_path: Path, entry: dict[str, Any]) -> None:
    header_only(tmp_path / "model.safetensors", {"x": entry}, 8)
    with pytest.raises(ModelError, match="is damaged"):
        open_weights(tmp_path)


def test_numbers_of_a_kind_unknown_here_are_reported(tmp_path: Path) -> None:
    header_only(tmp_path / "model.safetensors", {"x": {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]}}, 8)
    with pytest.raises(ModelError, match="numbers of the kind U64"):
        open_weights(tmp_path)


def test_a_missing_shard_is_reported(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 3 weight files: model-00002-of-00003\.safetensors"):
        open_weights(sharded)


def test_a_shard_of_another_model_is_reported(sharded: Path) -> None:
    save_file({"other": torch.zeros(3)}, sharded / "model-00002-of-00003.safetensors")
    with pytest.raises(ModelError, match=r"lacks 2 tensors that model\.safetensors\.index\.json names, such as t2"):
        open_weights(sharded)


def test_one_name_in_two_files_is_reported(sharded: Path) -> None:
    first, second = (sharded / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match=r"holds t0 twice: in model-00001-of-00003.safetensors, model-00002"):
        open_weights(sharded)


def test_no_weights_at_all_are_reported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"holds no weights .* it holds: config\.json"):
        open_weights(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="without a tensor in them"):
        open_weights(tmp_path)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_what_lies_beside_the_weights_is_copied_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    target.mkdir()
    (source / "original").mkdir(parents=True)
    wanted = ["LICENSE", "chat_template.jinja", "config.json", "modeling_x.py", "tokenizer.model", "vocab.txt"]
    weights = [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "x.gguf",
    ]
    # A list of hashes is true of its own directory only.
    unwanted = [*weights, "manifest.json", "SHA256SUMS", ".gitattributes", "original/params.json"]
    for name in wanted + unwanted:
        (source / name).write_text(name, encoding="utf-8")
    assert copy_small_files(source, target) == wanted
    assert sorted(path.name for path in target.rglob("*")) == wanted
    assert all((target / name).read_text(encoding="utf-8") == name for name in wanted)


def test_memory_stays_at_about_one_shard(tmp_path: Path) -> None:
    """A model of 160 MB in files of 16 MB is rewritten in shards of 8 MB."""
    pytest.importorskip("resource")
    for i in range(10):
        save_file({f"t{i}.{k}": torch.zeros(1 << 20) for k in range(4)}, tmp_path / f"model-{i}.safetensors")
    weight_map = {f"t{i}.{k}": f"model-{i}.safetensors" for i in range(10) for k in range(4)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    program = """
import resource, sys
from pathlib import Path
import torch
from onecard.export.io.weights import ShardWriter, open_weights
source = Path(sys.argv[1])
(source / "out").mkdir()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1 / 1024)
torch.zeros(1 << 20).add_(1)
before = peak()
writer = ShardWriter(source / "out", 8 << 20)
for name, tensor in open_weights(source):
    writer.add(name, tensor)
print(len(writer.finish()), round((peak() - before) / 2**20))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    n_files, grown_mib = map(int, done.stdout.split())
    assert n_files == 20
    assert grown_mib < 64, "one file of 16 MiB, its pages, and a shard of 8 MiB were expected"
