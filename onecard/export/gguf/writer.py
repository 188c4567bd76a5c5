"""GGUF files, written one tensor at a time and read back to be compared. The only file that imports gguf.

Norms, biases and other tensors of one dimension stay fp32, as llama.cpp wants. With 4-bit and 5-bit kinds the output
head is q8_0: llama.cpp's own tool keeps it at q6_K there, which this library cannot write. Knows the format, its kinds
of numbers and their errors. Does not know config.json (layout.py), tokenizers (tokenizer.py) or Ollama.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from onecard.errors import ConfigError, ModelError
from onecard.export.gguf.layout import (
    EMBEDDING,
    HEAD,
    GgufLayout,
    expected_shapes,
    permuted,
    rope_divisors,
)
from onecard.export.gguf.tokenizer import Vocabulary
from onecard.export.io.output import progress
from onecard.export.io.weights import Weights

FLAG = "--gguf_type"
# What is offered: of the kinds that the library can write, those of 4 bits and more.
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0, "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "mxfp4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
}  # fmt: skip
KINDS = {name: Kind[name.upper()] for name in FILE_TYPES}
SMALL_KINDS = ("q5_1", "q5_0", "q4_1", "q4_0", "mxfp4")
CHUNK_VALUES = 1 << 22
SAMPLED_ROWS = 128
ROUNDING = {Kind.F32: 0.0, Kind.F16: 2.0**-11, Kind.BF16: 2.0**-8}  # relative; values below 2^-14 lose more in f16
# Largest error of a value as a share of its block's largest one (q*_0, mxfp4) or of its block's range (q*_1): half a
# step, or a whole one where the far end of the range has no code of its own; 2^-10 for the fp16 scale and offset.
BLOCK_ERROR = {
    Kind.Q8_0: 0.5 / 127, Kind.Q5_0: 1 / 16, Kind.Q4_0: 1 / 8, Kind.Q5_1: 0.5 / 31, Kind.Q4_1: 0.5 / 15,
    Kind.MXFP4: 1 / 4,
}  # fmt: skip
RANGED = (Kind.Q5_1, Kind.Q4_1)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file: its name there, the source tensor ("" for one that is computed), shape and kind."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def n_bytes(self) -> int:
        block, n_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * n_bytes


@dataclass(frozen=True)
class KindReport:
    """What one kind of numbers holds in a file, and the largest relative error (root mean square) of a tensor."""

    kind: str
    n_tensors: int
    n_bytes: int
    error: float


def plan(layout: GgufLayout, names: list[str], gguf_type: str) -> list[PlannedTensor]:
    """The tensors of the file in the order they are written: that of the source files, so that each is read once."""
    kind = KINDS[gguf_type]
    to_gguf = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layout.architecture.upper()], layout.n_layers)
    shapes, planned = expected_shapes(layout), []
    if layout.rope_kind == "llama3":
        planned.append(PlannedTensor("rope_freqs.weight", "", (layout.head_dim // 2,), Kind.F32))
    for source in names:
        name = to_gguf.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(f"gguf has no name for {source} in {layout.architecture} models")
        planned.append(PlannedTensor(name, source, shapes[source], _kind_of(layout, source, shapes[source], kind)))
    return planned


def file_bytes(planned: list[PlannedTensor], vocabulary: Vocabulary) -> int:
    """About the size of the file."""
    texts = sum(len(text.encode()) + 16 for text in (*vocabulary.tokens, *vocabulary.merges))
    return sum(tensor.n_bytes + 32 for tensor in planned) + texts + (1 << 16)


def write(
    path: Path, model: tuple[GgufLayout, Vocabulary, Weights], planned: list[PlannedTensor], *, name: str,
    gguf_type: str, chat_template: str | None,
) -> None:  # fmt: skip
    """Write the file. In memory at once: one tensor as stored and as written, and a few 16 MiB pieces.

    Raises ModelError: NaN or Inf, values too large for f16; OSError when the disk is full.
    """
    layout, vocabulary, weights = model
    writer = gguf.GGUFWriter(path, layout.architecture)
    _add_numbers(writer, layout, name, gguf_type)
    _add_vocabulary(writer, vocabulary)
    if chat_template:
        writer.add_chat_template(chat_template)
    try:
        with progress(f"writing {gguf_type}", sum(tensor.n_bytes for tensor in planned), in_bytes=True) as move_on:
            _write_tensors(writer, planned, lambda tensor: _source(layout, weights, tensor), move_on)
    finally:
        weights.close()


def write_adapter(path: Path, layout: GgufLayout, alpha: float, factors: Mapping[str, Tensor], gguf_type: str) -> None:
    """A LoRA adapter as llama.cpp's convert_lora_to_gguf.py writes it; it is put on as alpha / rank.

    factors: lora_a (rank, in) and lora_b (out, rank) of each layer, under the names of `adapter_name`. What reads back
    differs by the rounding of the kind. Raises ModelError and ConfigError as `write` does.
    https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py
    """
    kind = KINDS[gguf_type]
    planned = [PlannedTensor(name, name, tuple(tensor.shape), kind) for name, tensor in factors.items()]
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(FILE_TYPES[gguf_type])
    _write_tensors(writer, planned, lambda tensor: factors[tensor.name])
    reader = _reopened(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    alpha_field = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    if (
        list(found) != list(factors)
        or alpha_field is None
        or not math.isclose(alpha_field.contents(), alpha, rel_tol=1e-6)
    ):
        raise ModelError(f"{path.name} does not hold what was written to it; try again")
    for tensor in planned:
        wanted = factors[tensor.name].double().numpy()
        back = gguf.quants.dequantize(np.asarray(found[tensor.name].data), kind).reshape(tensor.shape)
        if (np.abs(back - wanted) > _allowed(kind, wanted)).any():
            raise ModelError(f"{path.name}: {tensor.name} reads back wrong; try again")


def adapter_name(layout: GgufLayout, module: str) -> str | None:
    """The name of a layer's weight in a GGUF file, None where it has none."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layout.architecture.upper()], layout.n_layers)
    return names.get_name(f"{module}.weight", try_suffixes=(".weight",))


def verify(path: Path, model: tuple[GgufLayout, Vocabulary, Weights], planned: list[PlannedTensor]) -> list[KindReport]:
    """Reopen the file and compare: metadata, names, shapes, kinds, and rows of every tensor with its source.

    Each tensor's first, last and evenly spaced rows must be within the error of its kind. Returns one report per kind.
    Raises ModelError for the first thing that differs.
    """
    layout, vocabulary, weights = model
    reader = _reopened(path)
    _check_header(reader, layout, vocabulary, path)
    written = {tensor.name: tensor for tensor in reader.tensors}
    if list(written) != [tensor.name for tensor in planned]:
        raise ModelError(f"{path.name} does not hold the tensors that were written to it; try again")
    reports: dict[Kind, KindReport] = {}
    with progress("checking", len(planned)) as move_on:
        for tensor in planned:
            found = written[tensor.name]
            shape = tuple(int(n) for n in reversed(found.shape))
            if shape != tensor.shape or found.tensor_type != tensor.kind:
                raise ModelError(f"{path.name}: {tensor.name} reads back as {found.tensor_type.name} {list(shape)}")
            error = _compare(found.data, tensor, layout, weights)
            old = reports.get(tensor.kind, KindReport(tensor.kind.name.lower(), 0, 0, 0.0))
            reports[tensor.kind] = KindReport(
                old.kind, old.n_tensors + 1, old.n_bytes + tensor.n_bytes, max(old.error, error)
            )
            move_on(1)
    weights.close()
    return list(reports.values())


def _kind_of(layout: GgufLayout, source: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    if len(shape) == 1:
        return Kind.F32
    is_head = source == HEAD or (source == EMBEDDING and layout.tied)
    if is_head and kind.name.lower() in SMALL_KINDS:
        kind = Kind.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else Kind.F16  # a row must be whole blocks


def _add_numbers(writer: gguf.GGUFWriter, layout: GgufLayout, name: str, gguf_type: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[gguf_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(layout.vocab_size)
    writer.add_context_length(layout.context_length)
    writer.add_embedding_length(layout.hidden_size)
    writer.add_block_count(layout.n_layers)
    writer.add_feed_forward_length(layout.intermediate_size)
    writer.add_head_count(layout.n_heads)
    writer.add_head_count_kv(layout.n_kv_heads)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(layout.rms_eps)
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(layout.rope_theta)
    if layout.rope_kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(layout.rope_kind))
        writer.add_rope_scaling_factor(layout.rope_factor)
    if layout.rope_kind == "yarn":
        _add_yarn(writer, layout)


def _add_yarn(writer: gguf.GGUFWriter, layout: GgufLayout) -> None:
    original = layout.rope.get("original_max_position_embeddings")
    writer.add_rope_scaling_orig_ctx_len(int(original or layout.context_length))
    # llama.cpp multiplies by 1 + 0.1 ln(factor) itself, and by this. It reads yarn_attn_factor for a few other families
    # only. https://github.com/ggml-org/llama.cpp/blob/master/src/llama-context.cpp
    rest = layout.attention_factor / (1 + 0.1 * math.log(max(layout.rope_factor, 1.0)))
    if not math.isclose(rest, 1.0, rel_tol=1e-6):
        writer.add_rope_scaling_attn_factors(rest)
    write_beta = {
        "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
    }
    for name, value in layout.unusual_betas.items():
        write_beta[name](value)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    optional: list[tuple[int | None, Callable[[int], None]]] = [
        (vocabulary.eot_id, writer.add_eot_token_id),
        (vocabulary.unk_id, writer.add_unk_token_id),
        (vocabulary.pad_id, writer.add_pad_token_id),
    ]
    for token_id, add in optional:
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.model == "llama":
        writer.add_add_space_prefix(vocabulary.adds_space)


def _source(layout: GgufLayout, weights: Weights, tensor: PlannedTensor) -> Tensor:
    """The tensor with its rows in the order of the file."""
    if not tensor.source:
        return rope_divisors(layout)
    stored = weights.read(tensor.source)
    n_heads = layout.heads_of(tensor.source)
    return permuted(stored, n_heads) if n_heads else stored


def _encoded(source: Tensor, tensor: PlannedTensor) -> NDArray[np.generic]:
    """The bytes of a tensor, made piece by piece so that no fp32 copy of the whole is needed."""
    rows = source.reshape(-1, source.shape[-1])
    pieces: list[NDArray[np.generic]] = []
    for piece in _row_pieces(rows):
        values = piece.float()
        if not torch.isfinite(values).all():
            raise ModelError(f"{tensor.source} holds NaN or Inf; the model is broken, and so would be its export")
        if tensor.kind == Kind.F16:
            half = values.to(torch.float16)
            if not torch.isfinite(half).all():
                raise ConfigError(
                    FLAG, f"{tensor.source} holds {float(values.abs().max()):.3g}, too large for f16; use bf16 or f32"
                )
            pieces.append(half.numpy())
        else:
            pieces.append(gguf.quants.quantize(values.numpy(), tensor.kind))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _row_pieces(rows: Tensor) -> Iterator[Tensor]:
    step = max(1, CHUNK_VALUES // rows.shape[-1])
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step].contiguous()


def _write_tensors(
    writer: gguf.GGUFWriter, planned: list[PlannedTensor], source: Callable[[PlannedTensor], Tensor],
    move_on: Callable[[int], object] = lambda n_bytes: None,
) -> None:  # fmt: skip
    """Write what was added so far, and these tensors; the file is closed then."""
    for tensor in planned:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(_encoded(source(tensor), tensor))
            move_on(tensor.n_bytes)
    except OSError as reason:
        if reason.errno is None:  # numpy counts what it could write, and does not say why it stopped
            raise OSError(errno.ENOSPC, f"no space left on the device ({reason})") from reason
        raise
    finally:
        writer.close()


def _reopened(path: Path) -> gguf.GGUFReader:
    """The file as it is on the disk. Raises OSError for one that is shorter than what was written."""
    try:
        return gguf.GGUFReader(path)
    except ValueError as reason:  # numpy's tofile does not tell of the last bytes that found no room
        raise OSError(errno.ENOSPC, f"no space left on the device ({reason})") from reason


def _check_header(reader: gguf.GGUFReader, layout: GgufLayout, vocabulary: Vocabulary, path: Path) -> None:
    expected = {
        "general.architecture": layout.architecture,
        f"{layout.architecture}.block_count": layout.n_layers,
        f"{layout.architecture}.context_length": layout.context_length,
        f"{layout.architecture}.attention.head_count_kv": layout.n_kv_heads,
        "tokenizer.ggml.tokens": list(vocabulary.tokens),
        "tokenizer.ggml.token_type": list(vocabulary.types),
        "tokenizer.ggml.eos_token_id": vocabulary.eos_id,
        "tokenizer.ggml.add_bos_token": vocabulary.adds_bos,
    }
    for key, value in expected.items():
        field = reader.get_field(key)
        if field is None or field.contents() != value:
            raise ModelError(f"{path.name}: {key} does not read back as it was written; try again")


def _compare(data: NDArray[np.generic], tensor: PlannedTensor, layout: GgufLayout, weights: Weights) -> float:
    """Relative error (root mean square) over sampled rows. Raises ModelError where a value is off by too much."""
    n_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    rows = np.unique(np.linspace(0, n_rows - 1, min(n_rows, SAMPLED_ROWS)).astype(np.int64))
    stored = data.reshape(n_rows, -1)[rows]
    found = np.asarray(gguf.quants.dequantize(np.ascontiguousarray(stored), tensor.kind), dtype=np.float64)
    wanted = _expected_rows(tensor, layout, weights, rows)
    if not np.isfinite(found).all():
        raise ModelError(f"{tensor.name} reads back with NaN or Inf: its values are too large for this kind of number")
    off = np.abs(found - wanted)
    bad = off > _allowed(tensor.kind, wanted)
    if bad.any():
        worst = float(off[bad].max())
        raise ModelError(f"{tensor.name} reads back wrong: {int(bad.sum())} values differ by up to {worst:.3g}")
    scale = float(np.sqrt(np.mean(wanted**2)))
    return float(np.sqrt(np.mean(off**2))) / scale if scale else 0.0


def _expected_rows(
    tensor: PlannedTensor, layout: GgufLayout, weights: Weights, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The source's values for these rows of the file, found by counting and not by `permuted`, which is on trial."""
    if not tensor.source:
        return rope_divisors(layout).double().numpy().reshape(1, -1)
    source = weights.read(tensor.source)
    if not layout.heads_of(tensor.source):
        return source.reshape(-1, source.shape[-1])[torch.from_numpy(rows)].double().numpy()
    every = np.arange(source.shape[0]) if source.dim() == 1 else rows
    head, place = np.divmod(every, layout.head_dim)
    pair, half = np.divmod(place, 2)
    picked = source[torch.from_numpy(head * layout.head_dim + half * (layout.head_dim // 2) + pair)]
    return picked.reshape(len(rows), -1).double().numpy()


def _allowed(kind: Kind, wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest error that a kind of number may make, value by value."""
    if kind in ROUNDING:
        return ROUNDING[kind] * np.abs(wanted) + (2.0**-24 if kind == Kind.F16 else 1e-37 if kind == Kind.BF16 else 0)
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    blocks = wanted.reshape(-1, block)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    span = blocks.max(axis=1, keepdims=True) - blocks.min(axis=1, keepdims=True) if kind in RANGED else largest
    # A block of tiny values: its scale is an fp16 near or below the smallest normal one.
    bound = BLOCK_ERROR[kind] * span + 2.0**-10 * largest + 256 * 2.0**-24
    return np.broadcast_to(bound, blocks.shape).reshape(wanted.shape)
