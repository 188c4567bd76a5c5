"""LLaMA's original files (consolidated.00.pth ..., params.json) to Hugging Face and back, and from N shards to M.

Tensors pass one at a time: reading maps the .pth files from the disk. A Hugging Face output holds one of its shards in
memory, a .pth output one of its own, because torch.save writes a file in one piece. Every output is opened again and
compared with its source bit for bit. What names and shapes mean is in `llama_layout`, tokenizers in `llama_tokenizer`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from onecard.console import few, warn
from onecard.errors import ModelError
from onecard.export.io.left_out import left_out
from onecard.export.io.output import progress
from onecard.export.io.weights import ShardWriter, Weights, open_weights, read_pickled, same_bits
from onecard.export.llama_pth import layout
from onecard.export.llama_pth.layout import LlamaParams
from onecard.export.llama_pth.tokenizer import copy_tokenizer_model, tokenizer_model, write_hf_tokenizer
from onecard.export.vocabulary.corpus import is_tiktoken
from onecard.model.files import read_json, write_json

Shards: TypeAlias = list[dict[str, Tensor]]  # by Meta's name, one for each .pth file
SHARD_NAME = re.compile(r"consolidated\.(\d+)\.pth")


class LlamaCheckpoint:
    """A LLaMA in Meta's files: its params, and each tensor whole by Meta's name, joined from the shards as it is read.

    `embeddings_dim` is the dimension along which the shards cut the token embeddings.
    """

    def __init__(self, directory: Path, params: LlamaParams, shards: Shards, tokenizer: Path | None) -> None:
        self.directory, self.params, self.shards, self.tokenizer = directory, params, shards, tokenizer
        self.embeddings_dim = _embeddings_dim(params, shards, tokenizer)
        self.names = [name for name in layout.meta_names(params.n_layers) if name in shards[0]]
        self.has_rope_table = layout.ROPE_TABLE in shards[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.shards[0]["layers.0.attention.wq.weight"].dtype

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for shard in self.shards for tensor in shard.values())

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embeddings again, as in LLaMA-3.2 1B and 3B."""
        return layout.HEAD not in self.names or same_bits(self.read(layout.HEAD), self.read(layout.EMBEDDINGS))

    def read(self, name: str) -> Tensor:
        """One whole tensor in its own memory."""
        dim = layout.split_dim(name, self.embeddings_dim)
        if dim is None:
            return self.shards[0][name].clone()
        step = len(self.shards) // layout.n_parts(name, len(self.shards), self.params)
        return torch.cat([shard[name] for shard in self.shards[::step]], dim=dim)


def directory_of(name: str) -> Path:
    """The directory that the person typed. Raises ModelError when there is none; no Hub id stands for Meta's files."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    hint = f"; give the directory that holds it: {path.parent}" if path.is_file() else ""
    raise ModelError(f"{name} is no directory here{hint}")


def open_checkpoint(directory: Path) -> LlamaCheckpoint:
    """Look at a directory of Meta's files without loading them, and check every tensor's name and shape.

    Raises ModelError: no params.json or shards, a shard missing, damaged, of another split or with code in it, params
    that disagree with the tensors, quantised weights.
    """
    params_file = directory / "params.json"
    if not params_file.is_file():
        held = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{directory} is no original LLaMA: it has no params.json beside consolidated.00.pth; it holds: {held}"
        )
    params = layout.read_params(read_json(params_file), str(params_file))
    files = _shard_files(directory)
    shards = [read_pickled(file) for file in files]
    n_tokens = _vocabulary_size(files, shards)
    if params.vocab_size not in (-1, n_tokens):
        raise ModelError(f"{params_file} says vocab_size {params.vocab_size}, but the head has {n_tokens} rows")
    params = replace(params, vocab_size=n_tokens)
    checkpoint = LlamaCheckpoint(directory, params, shards, tokenizer_model(directory))
    for file, shard in zip(files, shards, strict=True):
        _check_shard(file, shard, checkpoint)
    _check_copies(checkpoint)
    return checkpoint


@dataclass(frozen=True)
class HfConfigChoices:
    """What params.json does not say and config.json needs. 0 positions: what the params point to."""

    max_positions: int = 0
    instruct: bool = False


def pth_to_hf(source: Path, directory: Path, max_shard_bytes: int, choices: HfConfigChoices | None = None) -> list[str]:
    """Write Meta's files at `source` as a Hugging Face model into the existing empty `directory`.

    Returns what was done, in lines for the reader. RAM: one output shard and two tensors. Raises ModelError as
    `open_checkpoint` does, and for NaN in the weights.
    """
    choices = choices or HfConfigChoices()
    checkpoint = open_checkpoint(source)
    params, tied = checkpoint.params, checkpoint.is_tied
    names = [name for name in checkpoint.names if not (tied and name == layout.HEAD)]
    writer = ShardWriter(directory, max_shard_bytes)
    with progress("converting", len(names)) as moved:
        for name in names:
            tensor = _finite(checkpoint.read(name), name, source)
            writer.add(layout.hf_name(name), layout.to_half_split(name, tensor, params))
            moved(1)
    files = writer.finish()
    ids, remarks = write_hf_tokenizer(checkpoint.tokenizer, directory, params, instruct=choices.instruct)
    positions, why = _max_positions(params, choices.max_positions)
    config = layout.config_of(params, checkpoint.dtype, tied=tied, max_positions=positions, ids=ids)
    write_json(directory / "config.json", config)
    # What stops an answer is read from here; without the file, programs fall back to config.json.
    write_json(directory / "generation_config.json", {"bos_token_id": ids.bos, "eos_token_id": ids.eos})
    dropped = left_out(source, checkpoint.shards[0], names, checkpoint.read, remedy="")
    proven = _compare(names, checkpoint.read, hf_reader(open_weights(directory), params), directory, len(files))
    _check_loads(directory, {layout.hf_name(name) for name in names})
    return [
        f"{proven}; transformers expects the same names and shapes",
        *dropped,
        f"max_position_embeddings {positions}: {why}",
        *remarks,
    ]


def hf_to_pth(source: Path, directory: Path, *, n_shards: int | None = None) -> list[str]:
    """Write the Hugging Face LLaMA at `source` as consolidated.0x.pth, params.json and tokenizer.model.

    Returns what was done, in lines for the reader.

    Args:
        directory: exists and is empty.
        n_shards: how many GPUs Meta's code would run it on; None takes what Meta ships for this size, else 1.

    RAM: one .pth shard and one tensor. The result is opened again and compared bit for bit. Raises ModelError: another
    family, something that the layout cannot hold, quantised or missing weights, NaN.
    """
    weights = open_weights(source)
    params = layout.params_of_config(read_json(source / "config.json"), str(source / "config.json"))
    dropped = _check_hf(weights, params)
    remark = copy_tokenizer_model(source, directory)
    if remark:
        warn(remark)
    n_shards = n_shards or layout.SHIPPED_SHARDS.get((params.dim, params.n_layers), 1)
    dim = _embeddings_dim(params, [], tokenizer_model(directory, look_above=False))
    read = hf_reader(weights, params)
    names = layout.meta_names(params.n_layers)

    def finite(name: str) -> Tensor:
        return _finite(read(name), name, source)

    write_checkpoint(directory, params, names, finite, n_shards, dim)
    weights.close()
    return [_compare(names, read, open_checkpoint(directory).read, directory, n_shards), *dropped]


def reshard(source: Path, directory: Path, n_shards: int) -> list[str]:
    """Write Meta's files at `source` with another number of shards; every tensor stays what it is, bit for bit.

    RAM: one .pth shard and one tensor. Raises ModelError as `open_checkpoint` does, or when the number does not divide.
    """
    checkpoint = open_checkpoint(source)
    names = checkpoint.names + [layout.ROPE_TABLE] * checkpoint.has_rope_table
    copy_tokenizer_model(source, directory)
    params_text = (source / "params.json").read_text(encoding="utf-8")
    write_checkpoint(directory, checkpoint.params, names, checkpoint.read, n_shards, checkpoint.embeddings_dim)
    (directory / "params.json").write_text(params_text, encoding="utf-8")
    return [_compare(names, checkpoint.read, open_checkpoint(directory).read, directory, n_shards)]


def write_checkpoint(
    directory: Path,
    params: LlamaParams,
    names: list[str],
    read: Callable[[str], Tensor],
    n_shards: int,
    embeddings_dim: int,
) -> None:
    """Write params.json and `n_shards` files of what `read` gives by Meta's name."""
    layout.check_shards(params, n_shards, embeddings_dim, f"a LLaMA of width {params.dim}")
    write_json(directory / "params.json", layout.write_params(params))
    with progress("writing", n_shards * len(names)) as moved:
        for rank in range(n_shards):
            shard: dict[str, Tensor] = {}
            for name in names:
                shard[name] = _part(name, read(name), rank, n_shards, params, embeddings_dim)
                moved(1)
            torch.save(shard, directory / f"consolidated.{rank:02d}.pth")


def hf_reader(weights: Weights, params: LlamaParams) -> Callable[[str], Tensor]:
    """A function from Meta's name to the tensor in Meta's order of rows; a tied head is the embeddings."""

    def read(name: str) -> Tensor:
        hf_name = layout.hf_name(name)
        if name == layout.HEAD and hf_name not in weights.entries:
            hf_name = layout.hf_name(layout.EMBEDDINGS)
        return layout.to_pairs(name, weights.read(hf_name), params)

    return read


def _part(name: str, tensor: Tensor, rank: int, n_shards: int, params: LlamaParams, embeddings_dim: int) -> Tensor:
    dim = layout.split_dim(name, embeddings_dim)
    if dim is None:
        return tensor
    n_parts = layout.n_parts(name, n_shards, params)
    # A copy: torch.save writes the whole tensor behind a slice of it.
    return tensor.chunk(n_parts, dim=dim)[rank * n_parts // n_shards].clone(memory_format=torch.contiguous_format)


def _embeddings_dim(params: LlamaParams, shards: Shards, tokenizer: Path | None) -> int:
    """Where several shards are there, their shapes tell; else LLaMA-3 cuts the tokens, LLaMA-1 and -2 the columns."""
    if len(shards) > 1:
        return 1 if shards[0][layout.EMBEDDINGS].shape[-1] != params.dim else 0
    is_llama_3 = params.use_scaled_rope or params.vocab_size > layout.LLAMA_3_VOCABULARY
    return 0 if is_llama_3 or (tokenizer is not None and is_tiktoken(tokenizer)) else 1


def _shard_files(directory: Path) -> list[Path]:
    numbered = {int(m[1]): path for path in directory.iterdir() if (m := SHARD_NAME.fullmatch(path.name))}
    if not numbered:
        held = ", ".join(sorted(path.name for path in directory.iterdir())[:8])
        raise ModelError(f"{directory} holds no consolidated.00.pth; it holds: {held}")
    missing = [f"consolidated.{i:02d}.pth" for i in range(max(numbered)) if i not in numbered]
    if missing:
        raise ModelError(f"{directory} lacks {', '.join(missing)}; copy or download it again")
    return [numbered[i] for i in sorted(numbered)]


def _vocabulary_size(files: list[Path], shards: Shards) -> int:
    for file, shard in zip(files, shards, strict=True):
        if layout.EMBEDDINGS not in shard or "layers.0.attention.wq.weight" not in shard:
            names = ", ".join(list(shard)[:3]) or "nothing"
            raise ModelError(f"{file} is no shard of an original LLaMA; its first tensors are: {names}")
    if layout.HEAD in shards[0]:
        return shards[0][layout.HEAD].shape[0] * len(shards)
    return shards[0][layout.EMBEDDINGS].shape[0]


def _check_shard(file: Path, shard: dict[str, Tensor], checkpoint: LlamaCheckpoint) -> None:
    params, n_shards = checkpoint.params, len(checkpoint.shards)
    quantised = [name for name, tensor in shard.items() if tensor.dtype not in layout.DTYPE_NAMES]
    if quantised:
        kind = shard[quantised[0]].dtype
        raise ModelError(f"{file} holds {quantised[0]} as {kind}: quantised weights are not converted")
    rows, columns = shard["layers.0.attention.wq.weight"].shape
    if columns == params.dim and rows * n_shards != columns and columns % rows == 0:
        raise ModelError(f"{file} is one of {params.dim // rows} shards, but {n_shards} are here; copy the others too")
    expected = set(layout.meta_names(params.n_layers))
    optional = {layout.HEAD} if layout.HEAD not in checkpoint.names else set()
    lacking = sorted(expected - shard.keys() - optional)
    foreign = sorted(shard.keys() - expected - {layout.ROPE_TABLE})
    if lacking or foreign:
        what = f"lacks {few(lacking)}" if lacking else f"holds {few(foreign)} besides"
        raise ModelError(f"{file} does not fit params.json ({params.n_layers} layers): it {what}")
    for name in (name for name in layout.meta_names(params.n_layers) if name in shard):
        shape = list(layout.full_shape(name, params))
        dim = layout.split_dim(name, checkpoint.embeddings_dim)
        if dim is not None:
            shape[dim] //= layout.n_parts(name, n_shards, params)
        if list(shard[name].shape) != shape:
            raise ModelError(
                f"{file} does not fit params.json: {name} is {tuple(shard[name].shape)}, not {tuple(shape)} "
                f"({n_shards} shard(s), dim {params.dim}, {params.n_heads} heads, {params.n_kv_heads} key-value heads)"
            )
    table = shard.get(layout.ROPE_TABLE)
    if table is not None and table.numel() != params.head_dim // 2:
        raise ModelError(
            f"{file} does not fit params.json: its rope.freqs are those of heads of {2 * table.numel()} columns, and "
            f"n_heads {params.n_heads} gives {params.head_dim}"
        )


def _check_copies(checkpoint: LlamaCheckpoint) -> None:
    """What stands in several shards (norms, key-value heads fewer than shards) must be the same in each of them."""
    n_shards = len(checkpoint.shards)
    for name in checkpoint.names:
        dim = layout.split_dim(name, checkpoint.embeddings_dim)
        step = n_shards // (layout.n_parts(name, n_shards, checkpoint.params) if dim is not None else 1)
        for rank in (rank for rank in range(n_shards) if rank % step):
            if not same_bits(checkpoint.shards[rank - rank % step][name], checkpoint.shards[rank][name]):
                raise ModelError(
                    f"{checkpoint.directory}: {name} differs between shards {rank - rank % step} and {rank}, which "
                    "should hold the same; params.json or one of the shards is another model's"
                )


def _check_hf(weights: Weights, params: LlamaParams) -> list[str]:
    """Every tensor that the config calls for, in its shape; returns lines about those that are left out."""
    expected = {layout.hf_name(name): layout.full_shape(name, params) for name in layout.meta_names(params.n_layers)}
    head = layout.hf_name(layout.HEAD)
    is_tied = read_json(weights.directory / "config.json").get("tie_word_embeddings", False)
    lacking = sorted(expected.keys() - weights.entries.keys() - ({head} if is_tied else set()))
    if lacking:
        raise ModelError(f"{weights.directory}: the weights do not fit config.json; they lack {few(lacking)}")
    dropped = left_out(
        weights.directory, weights.entries, expected, weights.read,
        remedy=": the weights hold it besides what config.json calls for, and the original layout cannot",
    )  # fmt: skip
    for name, entry in weights.entries.items():
        if name in expected and entry.shape != expected[name]:
            raise ModelError(
                f"{entry.file} does not fit config.json: {name} is {entry.shape}, not {expected[name]}; copy both again"
            )
        if name in expected and entry.dtype not in layout.DTYPE_NAMES:
            raise ModelError(f"{entry.file} holds {name} as {entry.dtype}: quantised weights are not converted")
    return dropped


def _finite(tensor: Tensor, name: str, source: Path) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ModelError(f"{source}: {name} holds NaN or infinity; the model is damaged, copy or train it again")
    return tensor


def _compare(
    names: list[str], one: Callable[[str], Tensor], other: Callable[[str], Tensor], place: Path, n_files: int
) -> str:
    """Read every tensor of both again; what was written must be what was read. Returns that, in words."""
    with progress("comparing", len(names)) as moved:
        for name in names:
            if not same_bits(one(name), other(name)):
                raise ModelError(
                    f"{place}: {name} was not written as it was read; the disk may be failing, start again"
                )
            moved(1)
    return f"{len(names)} tensors in {n_files} file(s), opened again: equal to the source bit for bit"


def _check_loads(directory: Path, names: set[str]) -> None:
    """Build the model from its config.json alone, without memory for weights; its tensors must be those written."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    written = {name: entry.shape for name, entry in open_weights(directory).entries.items()}
    tied = set() if "lm_head.weight" in names else {"lm_head.weight"}
    wrong = sorted(n for n in shapes.keys() | written.keys() if n not in tied and shapes.get(n) != written.get(n))
    if wrong:
        raise ModelError(f"{directory}: transformers expects other tensors than were written: {few(wrong)}")


def _max_positions(params: LlamaParams, asked: int) -> tuple[int, str]:
    """params.json does not say how long a text may be; what it says points to a generation, and that to a length."""
    if asked:
        return asked, "as asked for"
    if params.use_scaled_rope:
        return 131072, "LLaMA-3.1 or later"
    if params.vocab_size > layout.LLAMA_3_VOCABULARY:
        return 8192, "LLaMA-3"
    if params.rope_theta > 10000.0:
        return 16384, "CodeLlama"
    if params.n_kv_heads != params.n_heads:
        return 4096, "LLaMA-2"
    return 2048, "LLaMA-1; params.json looks the same for LLaMA-2 7B and 13B: add --max_positions 4096 for those"
