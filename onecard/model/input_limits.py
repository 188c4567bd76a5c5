"""What a model can be fed: ids for which its embeddings have a row, and as many positions as its tables have.

Beyond them a forward pass ends in a bare IndexError, and on a card in an assertion that ends the process.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from onecard.installation import command
from onecard.model.output_head import positions_in_front
from onecard.model.rope_scaling import MARK, context_limit

ROTARY_TABLES = ("embed_positions", "pos_encoding")  # GPT-J, CodeGen, CTRL
OFFSET = 2  # rows that OPT, BioGPT and the BART family have beyond their positions


def embedding_rows(model: Any) -> int:
    """Rows of the input embeddings: ids from this number on cannot be read."""
    return int(model.get_input_embeddings().weight.shape[0])


def head_rows(model: Any) -> int:
    """Rows of the output head: ids from this number on cannot be learned. Those of the embeddings where it has none."""
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", 0)) or embedding_rows(model)


def no_row(tokenizer: Any, token_id: int, n_rows: int) -> str:
    """What is wrong with an id beyond the rows, and what to do."""
    return (
        f"the token {tokenizer.convert_ids_to_tokens(token_id)!r} has the id {token_id}, but the base has rows for "
        f"{n_rows:,} ids. Its tokenizer is that of a larger vocabulary: take the one that belongs to it, or give the "
        f"base rows for the new tokens ({command('expand-vocab')} apply)"
    )


def position_limit(model: Any) -> int | None:
    """The most tokens that a table of positions lets into one row; None for models that compute their positions.

    Virtual tokens take some of them. Held against every causal language model of transformers 5.23 that can be built
    small.
    """
    config, in_front = model.config.get_text_config(), positions_in_front(model)
    n_positions = int(getattr(config, "max_position_embeddings", 0) or 0)
    if config.model_type == "mpt":
        return int(config.max_seq_len) - in_front  # of its ALiBi biases
    if not n_positions:
        return None
    words = model.get_input_embeddings()
    tables = [
        module for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not words
        and n_positions <= module.num_embeddings <= n_positions + OFFSET
    ]  # fmt: skip
    # RoBERTa counts positions from the row after that of the padding.
    limits = [n_positions - (table.padding_idx + 1 if table.num_embeddings == n_positions and table.padding_idx else 0)
              for table in tables]  # fmt: skip
    limits += [n_positions for name, buffer in model.named_buffers()
               if name.rsplit(".", 1)[-1] in ROTARY_TABLES and len(buffer) == n_positions]  # fmt: skip
    return min(limits) - in_front if limits else None


def rotary_limit(model: Any) -> int | None:
    """The positions that a rotary model is made for; None where it has none, or where the base scales them itself."""
    config = model.config.get_text_config()
    limit = context_limit(config) if hasattr(model.config, MARK) else None
    if limit is not None:
        return limit - positions_in_front(model)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope.get("rope_type", "default")] if "rope_type" in rope or "rope_theta" in rope else [
        inner.get("rope_type", "default") for inner in rope.values() if isinstance(inner, dict)]  # fmt: skip
    is_plain = bool(kinds) and all(kind == "default" for kind in kinds)
    n_positions = int(getattr(config, "max_position_embeddings", 0) or 0)
    return n_positions - positions_in_front(model) if is_plain and n_positions else None
