"""--rope_scaling: the rotary positions of a model stretched, so that it reads longer texts than it was trained on.

linear: positions divided by the factor (https://arxiv.org/abs/2306.15595). dynamic: NTK, by the longest row so far.
yarn: each frequency by its wavelength (https://arxiv.org/abs/2309.00071). transformers computes all three from the
`rope_parameters` of a configuration (ROPE_INIT_FUNCTIONS); here they are set. Knows configurations; no weights.
"""

from __future__ import annotations

from typing import Any

from onecard.config.base_model import rope_scaling_of
from onecard.console import first_line
from onecard.errors import ConfigError
from onecard.model.model_config import read_model_config

FLAG = "--rope_scaling"
MARK = "onecard_rope_scaling"
"""Its value, in a configuration that was scaled and in adapter_config.json, where plain peft warns of it by name."""
LONG_RANGE = "full_attention"  # of families with several kinds of layers; those with a window never look further back


def scale_rope(config: Any, value: str) -> None:
    """Set the rotary positions of a configuration of transformers as --rope_scaling says, in place.

    yarn and linear raise max_position_embeddings to what is then read; dynamic leaves it, which its formula needs.
    Raises ConfigError for a family without rotary positions that can be scaled, and for one that is scaled already.
    """
    scaling = rope_scaling_of(value)
    if scaling is None:
        return
    kind, factor = scaling
    text = config.get_text_config()
    name, group = _group(text, value)
    n_positions = int(getattr(text, "max_position_embeddings", 0) or 0)
    if not n_positions:
        raise ConfigError(FLAG, f"{value} needs the model's number of positions, which its config.json does not say")
    scaled = {**group, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = n_positions
    changes: dict[str, Any] = {"rope_parameters": {**text.rope_parameters, name: scaled} if name else scaled}
    if kind != "dynamic":
        changes["max_position_embeddings"] = int(n_positions * factor)
    text.update(changes)
    try:
        text.validate_rope()  # a family may take other kinds: Phi 3 has longrope alone
    except ValueError as reason:
        raise ConfigError(FLAG, f"{value} does not go with {text.model_type} models: {first_line(reason)}") from reason
    config.update({MARK: value})


def scaled_json(raw: dict[str, Any], name: str, value: str, code_source: str | None = None) -> dict[str, Any]:
    """The content of a config.json as `scale_rope` makes it, in the form of transformers 4 where the file has that.

    name and code_source as in `read_model_config`. Raises ModelError and ConfigError.
    """
    if rope_scaling_of(value) is None:
        return raw
    config = read_model_config(raw, name, code_source)
    scale_rope(config, value)
    text: Any = config.get_text_config()
    inside = next((key for key, part in vars(config).items() if part is text and isinstance(raw.get(key), dict)), "")
    part = dict(raw[inside] if inside else raw)
    part["max_position_embeddings"] = text.max_position_embeddings
    is_old = "rope_parameters" not in part and "rope_type" in text.rope_parameters
    if is_old:  # https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/modeling_rope_utils.py
        part["rope_theta"] = text.rope_parameters["rope_theta"]
        of_the_model = ("rope_theta", "partial_rotary_factor")
        part["rope_scaling"] = {key: each for key, each in text.rope_parameters.items() if key not in of_the_model}
    else:
        part.pop("rope_scaling", None)
        part["rope_parameters"] = text.rope_parameters
    return {**raw, inside: part} if inside else part


def check_scaled(model: Any, value: str) -> None:
    """Raise ConfigError for a loaded model that computes its positions without regard to its rope_parameters."""
    scaling = rope_scaling_of(value)
    if scaling is None:
        return
    types = [getattr(module, "rope_type", None) for module in model.modules()]
    if not any(scaling[0] in (each.values() if isinstance(each, dict) else (each,)) for each in types):
        raise ConfigError(FLAG, f"{value} does not reach the positions of {model.config.model_type} models, which "
                          "transformers computes in a way of their own; leave it out")  # fmt: skip


def context_limit(config: Any) -> int | None:
    """The most tokens that a configuration is made for, with its scaling; None where it sets no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get(LONG_RANGE) or rope
    kind, factor = rope.get("rope_type"), float(rope.get("factor") or 1)
    if kind == "dynamic":
        return int(limit * factor)
    original = int(rope.get("original_max_position_embeddings") or 0) if kind == "yarn" else 0
    return max(limit, int(original * factor))


def trained_positions(config: Any) -> int | None:
    """The tokens up to which a scaled configuration reads as its base does without scaling; None: it is not scaled."""
    scaling = rope_scaling_of(str(getattr(config, MARK, "none")))
    limit = context_limit(config)
    return None if scaling is None or limit is None else round(limit / scaling[1])


def check_same_positions(config: Any, record: str, n_tokens: int) -> None:
    """Raise ConfigError for a row to train on by whose length `dynamic` would change the positions of other rows."""
    scaling, limit = rope_scaling_of(str(getattr(config, MARK, "none"))), trained_positions(config)
    if scaling is not None and scaling[0] == "dynamic" and limit is not None and n_tokens > limit:
        raise ConfigError(FLAG, f"dynamic scales all rows of a pass by its longest one, and {record} has {n_tokens:,} "
                          f"tokens: what a step learns would depend on how it is cut. Keep to --cutoff_len {limit} and "
                          f"answer with dynamic, or train with yarn:{scaling[1]:g}")  # fmt: skip


def other_scaling(config: Any, adapter: dict[str, Any]) -> str:
    """What to tell of an adapter's configuration that was trained under another scaling; empty where it was not."""
    here, then = str(getattr(config, MARK, "none")), str(adapter.get(MARK) or "none")
    return "" if here == then else (
        f"the adapter was trained under {FLAG} {then}, and answers under {here} here: positions are others than those "
        f"that it learned; {FLAG} {then} gives them back"
    )  # fmt: skip


def _group(text: Any, value: str) -> tuple[str, dict[str, Any]]:
    """The plain rotary positions to scale: (their name among several or "", their settings)."""
    family, rope = text.model_type, getattr(text, "rope_parameters", None) or {}
    if not rope:
        raise ConfigError(FLAG, f"{value} does not go with {family} models: they have no rotary positions that "
                          "transformers scales; leave it out")  # fmt: skip
    nested = {name: inner for name, inner in rope.items() if isinstance(inner, dict)}
    name = LONG_RANGE if nested else ""
    if nested and name not in nested:
        raise ConfigError(FLAG, f"{value} does not go with {family} models: their positions are of the kinds "
                          f"{', '.join(nested)}, and only {LONG_RANGE} is known here")  # fmt: skip
    group = nested[name] if nested else rope
    kind = str(group.get("rope_type") or "default")
    if kind != "default":
        raise ConfigError(FLAG, f"{value} does not go with this model: its positions are scaled already ({kind}, "
                          f"factor {group.get('factor', 'its own')}), and its weights were trained under that; "
                          f"leave the flag out, or give {FLAG} none")  # fmt: skip
    return name, group
