"""What may be trained beside LoRA: the rows of new tokens, or the embeddings and the head in full.

Knows which layers hold the vocabulary, which of their rows are new, and in which dtype they are trained. It imports no
peft: `adapter.py` hands the settings from here to it. A row counts twice, as what the model reads (input embeddings)
and as what it says (output head); where the two are tied they are one matrix, and stay one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onecard.config.lora import LoraOptions
from onecard.errors import ConfigError, ModelError
from onecard.installation import command
from onecard.model.files import locate, read_json
from onecard.model.lora.methods import is_adapter_weight
from onecard.model.output_head import innermost
from onecard.model.reward_head import SCORE

NEW_TOKENS = "new_tokens.json"  # written beside an enlarged base by onecard expand-vocab
FORMAT = 1
ROWS = "trainable_tokens_delta"
REMEDY = f"make the base with {command('expand-vocab')} apply, or train the whole matrices with --train_embeddings"


def read_new_tokens(model_path: str, vocab_size: int | None = None) -> list[int]:
    """Return the sorted ids of the tokens that were added to a base, as `new_tokens.json` in its directory says.

    vocab_size: rows of the base's embeddings, where they are known. Of a Hub id only this file is fetched.
    Raises ConfigError when there is no such list, or it is damaged, or speaks of ids that the base does not have.
    """

    def wrong(what: str) -> ConfigError:
        return ConfigError("--train_new_tokens", f"{what}; {REMEDY}")

    try:
        file = locate(model_path, what="list of new tokens", patterns=(NEW_TOKENS,)) / NEW_TOKENS
        if not file.is_file():
            raise wrong(f"{model_path} has no {NEW_TOKENS}, which says which tokens are new")
        content = read_json(file)
    except ModelError as reason:
        raise wrong(str(reason)) from reason
    ids = content.get("new_ids")
    if content.get("format") != FORMAT or not isinstance(ids, list) or not ids:
        raise wrong(f"{file} is no list of new tokens of format {FORMAT}")
    if any(type(token) is not int for token in ids) or ids != sorted(set(ids)):
        raise wrong(f"{file} is damaged: its new_ids are not whole numbers in rising order")
    if ids[0] < 0:
        raise wrong(f"{file} is damaged: it names the token {ids[0]}")
    if vocab_size is not None and ids[-1] >= vocab_size:
        raise wrong(f"{file} does not belong to this base: it names the token {ids[-1]} of {vocab_size}")
    return ids


def config_settings(model: Any, options: LoraOptions, new_ids: list[int] | None = None) -> dict[str, Any]:
    """The settings of a LoraConfig that say what is trained beside LoRA; none without the two options.

    Raises ConfigError (no list of new tokens, a quantised head) and ModelError for a family that peft would get wrong.
    """
    if not (options.train_new_tokens or options.train_embeddings):
        return {}
    flag = "--train_new_tokens" if options.train_new_tokens else "--train_embeddings"
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
        raise ConfigError(
            flag,
            f"needs embeddings and a head of plain weights; those of this {type(model).__name__} are "
            f"{type(embedding).__name__} and {type(head).__name__}",
        )
    tied = head.weight is embedding.weight
    if tied != bool(model.config.get_text_config().tie_word_embeddings):
        raise ModelError("config.json says of tie_word_embeddings what is not so in the weights; mend config.json")
    if head.bias is not None and (tied or options.train_new_tokens):
        # peft multiplies by the rows alone, and by a tied copy alone.
        hint = "use --train_embeddings" if not tied else "leave it out"
        raise ConfigError(flag, f"cannot be used: the head of {type(model).__name__} has a bias; {hint}")
    layers = [_short_name(model, layer) for layer in ([embedding] if tied else [embedding, head])]
    if options.train_embeddings:
        return {"modules_to_save": layers, "ensure_weight_tying": tied}
    ids = new_ids or read_new_tokens(model.config._name_or_path, embedding.num_embeddings)
    return {"trainable_token_indices": {layer: list(ids) for layer in layers}}


def train_in_fp32(peft_model: nn.Module) -> None:
    """Make peft's trained copies of whole modules fp32, while what they give out stays in the base's dtype.

    The copies start in the base's dtype, in which small steps of an optimizer would be lost. Their answer is rounded
    as that of the files will be, which others load in the base's dtype; and the layers keep their 16-bit inputs.
    """
    for copy in _trained_copies(peft_model):
        dtype = next(copy.parameters()).dtype
        if dtype == torch.float32 or not dtype.is_floating_point:
            continue
        copy.float()
        if not isinstance(copy, nn.Linear):  # autocast sees to those
            keep_output_dtype(copy, dtype)


def keep_output_dtype(layer: nn.Module, dtype: torch.dtype) -> None:
    """Let a layer whose weights became fp32 give out this dtype all the same."""
    with torch.no_grad():
        for constant in layer.buffers():  # such as the scale of Gemma 3's embeddings, which is rounded, too
            constant.copy_(constant.to(dtype))
    layer.register_forward_hook(partial(_in_dtype, dtype))


def freeze_adapter(peft_model: nn.Module) -> None:
    """Leave training to the vocabulary alone: the adapter's own weights stay as they are."""
    for name, parameter in peft_model.named_parameters():
        if is_adapter_weight(name):
            parameter.requires_grad_(False)


def check_both_ends(base: Any, options: LoraOptions) -> None:
    """Raise ConfigError unless what is read and what is said are trained alike: a tied matrix must not fall apart."""
    flag = options.trains_vocabulary
    if not flag:
        return
    embedding, head = (
        {id(weights) for weights in layer.parameters() if weights.requires_grad}
        for layer in (base.get_input_embeddings(), base.get_output_embeddings())
    )
    tied = bool(base.config.get_text_config().tie_word_embeddings)
    if not embedding or not head or (embedding == head) != tied:
        other = "--train_embeddings" if options.train_new_tokens else "--train_new_tokens"
        raise ConfigError(
            flag,
            f"cannot train embeddings and head of {type(base).__name__} alike: peft does not tie them; use {other}",
        )


def untouched_modules(base: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base that peft has set a trained copy in front of, by name."""
    return {name: module.original_module for name, module in base.named_modules() if _copies(module) is not None}


def check_indices(indices: Any, model: Any, adapter: object) -> None:
    """Raise ModelError for an adapter with rows of tokens that this base does not have."""
    lists = list(indices.values()) if isinstance(indices, dict) else [indices or []]
    highest = max((token for some in lists for token in some), default=-1)
    n_rows = model.get_input_embeddings().weight.shape[0]
    if highest >= n_rows:
        raise ModelError(
            f"{adapter} has trained the token {highest}, but this base has {n_rows}: take the enlarged base that it "
            f"was trained on ({command('expand-vocab')} apply makes it)"
        )


def vocabulary_hint(tensors: dict[str, Tensor], model: Any) -> str:
    """What to do where whole trained embeddings do not fit this base for their number of tokens; else nothing."""
    if not hasattr(model, "get_input_embeddings"):
        return ""
    n_rows, width = model.get_input_embeddings().weight.shape
    whole = [tensor for name, tensor in tensors.items() if not is_adapter_weight(name) and ROWS not in name]
    others = {tensor.shape[0] for tensor in whole if tensor.ndim == 2 and tensor.shape[1] == width} - {n_rows}
    if not others:
        return ""
    return (
        f"\nThe adapter was trained on a base with {max(others)} tokens, this one has {n_rows}: take that enlarged "
        f"base, or merge both into a model with the adapter's own rows: {command('merge')} --model_path BASE "
        "--lora_path ADAPTER --output_path MERGED"
    )


def is_trained_vocabulary(name: str) -> bool:
    """Whether this is the name of trained rows of tokens, or of a trained copy of a whole layer, in a model."""
    return ".token_adapter.trainable_tokens" in name or ".modules_to_save." in name


def rows_in(tensors: Mapping[str, Tensor], layer: str) -> set[int]:
    """Rows of vocabulary that an adapter's tensors for embeddings or head (its full name in the files) speak of."""
    axes = {".weight": 0, ".lora_embedding_A": 1, ".lora_embedding_A.weight": 1, ".lora_B.weight": 0}
    return {tensors[layer + end].shape[axis] for end, axis in axes.items() if layer + end in tensors}


def describe(model: nn.Module) -> str:
    """What is trained beside LoRA, for a line that a person reads; empty for nothing."""
    rows = [p for name, p in model.named_parameters() if ROWS in name and p.requires_grad]
    if rows:
        return f", and {rows[0].shape[0]} rows of new tokens"
    whole = [p for copy in _trained_copies(model) for p in copy.parameters() if p.requires_grad]
    if hasattr(innermost(model), SCORE):
        return ", and a scalar head"
    return f", and {len({id(p) for p in whole})} whole matrices of the vocabulary" if whole else ""


def _copies(module: nn.Module) -> nn.ModuleDict | None:
    found = getattr(module, "modules_to_save", None)
    return found if isinstance(found, nn.ModuleDict) else None


def _trained_copies(model: nn.Module) -> Iterable[nn.Module]:
    for module in model.modules():
        yield from (_copies(module) or {}).values()


def _in_dtype(dtype: torch.dtype, _module: nn.Module, _inputs: Any, output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) else output


def _short_name(model: nn.Module, layer: nn.Module) -> str:
    """The end of a layer's name that no other layer's name ends with; peft compares ends."""
    names = [name for name, _ in model.named_modules()]
    full = next(name for name, module in model.named_modules() if module is layer)
    short = full.rsplit(".", 1)[-1]
    return short if sum(name.endswith(short) for name in names) == 1 else full
