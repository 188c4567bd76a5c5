"""What a memory plan must know of a model: its sizes and how many weights of which kind, from config.json alone.

The model is built by transformers itself on torch's meta device, where tensors have shapes and no bytes: exact for
every family that transformers knows, in well under a second at 80 layers. No weights are read and none downloaded.
It does not know bits, cards, batches or adapters: `estimate.py` does. Of a model that also sees or hears, it knows only
the text part.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from onecard.config.base_model import rope_scaling_of
from onecard.console import nearest
from onecard.errors import ModelError
from onecard.hub_errors import hub_problem
from onecard.model.files import HUB_ID, read_json
from onecard.model.memory_saving.tiled_mlp import plain_mlps
from onecard.model.model_config import CONFIG, HEAD_READ_DIRECTLY, OTHER_NAMES, ConfigSource, attempt, read_model_config
from onecard.model.model_layers import (
    UNQUANTISED_SHARE,
    expert_tensors,
    linear_layers,
    quantised_layers,
    text_part,
)
from onecard.model.rope_scaling import context_limit, scaled_json

KNOWN_MODELS = Path(__file__).with_name("known_models.json")


@dataclass(frozen=True)
class Linear:
    """One kind of linear layer, such as every q_proj of the model: `count` layers, each (n_out, n_in)."""

    name: str
    n_in: int
    n_out: int
    bias: bool
    count: int
    adapted: bool = True
    """Whether it can have an adapter, by the rule of `adapters.adaptable_layers`."""

    @property
    def n_weights(self) -> int:
        """Weights of all `count` layers, biases among them."""
        return self.count * self.n_out * (self.n_in + int(self.bias))


@dataclass(frozen=True)
class Architecture:
    """Sizes of a causal language model and its weights by kind; every weight is in exactly one kind.

    linears: what is quantised, by the rule of `model_layers.quantised_layers`; the head is not among them.
    experts: those of a layer that lie in one tensor, one entry for each of them; quantised in 4 bits only.
    n_embedding: input embeddings, learned positions among them. n_head: the output head, 0 where tied to the input.
    n_other: norms and all else that is never quantised. max_positions: 0 where the positions have no limit.
    n_heads: 0 without attention. stored_bits: bits per weight of a checkpoint that lies quantised already.
    notes: what a person should be told.

    checkpoints, tiles, small_head: whether its layers can be computed again, its MLPs run in tiles, its head lie in few
    bits.
    """

    name: str
    model_type: str
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    linears: tuple[Linear, ...]
    experts: tuple[Linear, ...]
    n_embedding: int
    n_head: int
    n_other: int
    checkpoints: bool = True
    tiles: bool = True
    small_head: bool = True
    stored_bits: int | None = None
    notes: tuple[str, ...] = ()
    source: ConfigSource = field(default_factory=lambda: ConfigSource("{}", ""))

    @property
    def tied(self) -> bool:
        """Whether the head is the transposed input embedding."""
        return self.n_head == 0

    @property
    def n_linear(self) -> int:
        """Weights of all linear layers but the head."""
        return sum(linear.n_weights for linear in self.linears)

    @property
    def n_experts(self) -> int:
        """Weights of all experts."""
        return sum(expert.n_weights for expert in self.experts)

    @property
    def n_weights(self) -> int:
        """All weights, tied ones counted once."""
        return self.n_linear + self.n_experts + self.n_embedding + self.n_head + self.n_other


@dataclass(frozen=True)
class KnownModel:
    """A common open model whose config numbers are kept here; `n_parameters` as its publisher counts them.

    source: the address of its config.json. checked: the second place that says the same. note: what a plan should say.
    """

    name: str
    hub_ids: tuple[str, ...]
    source: str
    checked: str
    n_parameters: int
    config: dict[str, Any]
    note: str = ""


def known_models() -> dict[str, KnownModel]:
    """Every model of known_models.json by name, smallest first."""
    entries = json.loads(KNOWN_MODELS.read_text(encoding="utf-8"))["models"]
    models = [
        KnownModel(
            name, tuple(e["hub_ids"]), e["source"], e["checked"], e["parameters"], e["config"], e.get("note", "")
        )
        for name, e in entries.items()
    ]
    return {model.name: model for model in sorted(models, key=lambda model: (model.n_parameters, model.name))}


def find_known(name: str) -> KnownModel | None:
    """Return the known model of this name or Hub id, whatever the case; None if there is none.

    The part of a Hub id after the slash is enough: Qwen2.5-7B-Instruct means Qwen/Qwen2.5-7B-Instruct.
    """
    wanted = name.strip().lower()
    for model in known_models().values():
        ids = [hub_id.lower() for hub_id in model.hub_ids]
        if wanted in (model.name.lower(), *ids, *(hub_id.split("/")[-1] for hub_id in ids)):
            return model
    return None


def architecture_of(
    source: str | Path | dict[str, Any], *, name: str | None = None, trust_remote_code: bool = False,
    rope_scaling: str = "none",
) -> Architecture:  # fmt: skip
    """Return the architecture of a directory, a config.json, a config dict, a known model's name or a Hub id.

    A directory wins over a known name, and a known name over the Hub: then nothing is downloaded. From the Hub only
    config.json comes. `name` is what the result is called; by default the source's own. Raises ModelError: nothing
    there, not JSON, an unknown family (with the nearest name), no causal language model, numbers missing or absurd.
    """
    if isinstance(source, dict):
        named = name or str(source.get("_name_or_path") or source.get("model_type", "config"))
        return _from_dict(source, named, None, rope_scaling)
    text = str(source)
    path = Path(text).expanduser()
    if path.is_file():
        return _from_file(path, name or path.parent.name or text, trust_remote_code, rope_scaling)
    if path.is_dir():
        return _from_file(_config_in(path), name or text, trust_remote_code, rope_scaling)
    known = find_known(text)
    if known is not None and rope_scaling_of(rope_scaling) is not None:
        return replace(_from_dict(known.config, name or known.name, None, rope_scaling), notes=_notes_of(known))
    if known is not None:
        return replace(_known_architecture(known.name), name=name or known.name)
    raw = read_json(_from_hub(text))
    return _from_dict(raw, name or text, text if trust_remote_code and "auto_map" in raw else None,
                      rope_scaling)  # fmt: skip


@cache
def _known_architecture(name: str) -> Architecture:
    known = known_models()[name]
    return replace(_from_dict(known.config, name, None), notes=_notes_of(known))


def _notes_of(known: KnownModel) -> tuple[str, ...]:
    return (known.note,) if known.note else ()


def _config_in(directory: Path) -> Path:
    if (directory / CONFIG).is_file():
        return directory / CONFIG
    if (directory / "adapter_config.json").is_file():
        raise ModelError(f"{directory} holds a LoRA adapter; give the directory or Hub id of its base")
    raise ModelError(f"{directory} holds no model in Hugging Face form ({CONFIG} is missing)")


def _from_hub(name: str) -> Path:
    """Download config.json alone, or find it in the cache."""
    known = [*known_models(), *(hub_id for model in known_models().values() for hub_id in model.hub_ids)]
    hint = nearest(name, known)
    if not HUB_ID.fullmatch(name) or (hint and "/" not in name):  # a slip of the pen need not wait for the Hub
        raise ModelError(f"no model {name}{hint}; give a directory, a {CONFIG}, a Hub id or a known model's name")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(name, CONFIG))
    except RemoteEntryNotFoundError as reason:
        raise ModelError(f"{name} on the Hub has no {CONFIG}; give its form for transformers") from reason
    except (HfHubHTTPError, OSError) as reason:
        elsewhere = f"a directory here, a known model{hint},"
        raise ModelError(hub_problem(reason, name, name, elsewhere=elsewhere)) from reason


def _from_file(path: Path, name: str, trust_remote_code: bool, rope_scaling: str) -> Architecture:
    raw = read_json(path)
    code_source = str(path.parent) if trust_remote_code and "auto_map" in raw else None
    return _from_dict(raw, name, code_source, rope_scaling)


def _from_dict(raw: dict[str, Any], name: str, code_source: str | None, rope_scaling: str = "none") -> Architecture:
    """`code_source`: where the model's own Python code is, if it may run; None: families of transformers only."""
    raw = scaled_json(raw, name, rope_scaling, code_source)
    whole = read_model_config(raw, name, code_source)
    config, notes = _text_config(whole, name)
    _check_numbers(config, name)
    model = _on_meta(whole if type(whole) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING else config, name, code_source)
    linears, experts = _linears(model), _experts(model)
    inside = text_part(model)
    tables = _unique(
        module for path, module in model.named_modules() if isinstance(module, nn.Embedding) and path.startswith(inside)
    )
    head = _head(model)
    head_weights = [weight for weight in _unique([head] if head is not None else []) if _absent(weight, tables)]
    n_all = sum(weight.numel() for weight in _unique([model]))
    n_embedding, n_head = (sum(weight.numel() for weight in weights) for weights in (tables, head_weights))
    if head is None and not _is_tied(raw, config):
        n_head = config.vocab_size * config.hidden_size  # a text part that transformers builds without its head
        n_all += n_head
    n_small = sum(kind.n_weights for kind in (*linears, *experts))
    n_other = n_all - n_small - n_embedding - n_head
    if experts:
        count = sum(kind.n_weights for kind in experts)
        notes += (f"{count:,} weights lie in experts: quantised with --bits 4 only, trained with "
                  "--lora_target_parameters",)  # fmt: skip
    if n_other > UNQUANTISED_SHARE * (n_small + n_other):
        notes += (f"{n_other:,} weights are never quantised, whatever --bits says",)
    n_heads = _number(config, "num_attention_heads")
    return Architecture(
        name=name,
        model_type=str(config.model_type),
        n_layers=_number(config, "num_hidden_layers"),
        hidden_size=_number(config, "hidden_size"),
        intermediate_size=_number(config, "intermediate_size") or max((linear.n_out for linear in linears), default=0),
        n_heads=n_heads,
        n_kv_heads=_number(config, "num_key_value_heads") or n_heads,
        head_dim=_number(config, "head_dim") or (_number(config, "hidden_size") // n_heads if n_heads else 0),
        vocab_size=_number(config, "vocab_size"),
        max_positions=context_limit(config) or 0,
        linears=linears,
        experts=experts,
        n_embedding=n_embedding,
        n_head=n_head,
        n_other=n_other,
        checkpoints=bool(getattr(model, "supports_gradient_checkpointing", True)),
        tiles=bool(plain_mlps(model)),
        small_head=config.model_type not in HEAD_READ_DIRECTLY,
        stored_bits=_stored_bits(raw),
        notes=notes,
        source=ConfigSource(json.dumps(raw, default=str), name, code_source),
    )


def _text_config(config: PretrainedConfig, name: str) -> tuple[PretrainedConfig, tuple[str, ...]]:
    text: Any = config.get_text_config()
    if text is config:
        return config, ()
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return text, (f"{name} is a {config.model_type}: only its text part is trained",)
    return text, (f"{name} is a {config.model_type}: only its text part ({text.model_type}) is counted",)


def _check_numbers(config: PretrainedConfig, name: str) -> None:
    for size in OTHER_NAMES:
        number = getattr(config, size, None)
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ModelError(f"the {CONFIG} of {name} says {size} {number!r}; a model needs a whole number above 0")


def _on_meta(config: PretrainedConfig, name: str, code_source: str | None) -> nn.Module:
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or code_source is not None
    own_code: dict[str, Any] = {"trust_remote_code": True} if code_source is not None else {}
    builder: Any = AutoModelForCausalLM if causal else AutoModel

    def build() -> nn.Module:
        with torch.device("meta"):
            return builder.from_config(config, **own_code)

    return attempt(name, build)


def _linears(model: nn.Module) -> tuple[Linear, ...]:
    """The linear layers that are quantised, by kind, in the model's order."""
    adapted: Any = linear_layers(model)
    if get_checkpoint_conversion_mapping(model.config.model_type):  # type: ignore[union-attr]
        from onecard.model.lora.peft_model import adaptable_layers  # only here: peft takes seconds

        adapted = adaptable_layers(model)
    kinds: Counter[tuple[str, int, int, bool, bool]] = Counter()
    seen: set[int] = set()
    for full_name, layer in quantised_layers(model).items():
        # Zamba's layers share their weights: what is held once is counted once.
        if id(layer.weight) in seen:
            continue
        seen.add(id(layer.weight))
        # Conv1D keeps its weight the other way round, (in, out).
        n_out, n_in = layer.weight.shape if isinstance(layer, nn.Linear) else reversed(layer.weight.shape)
        kinds[full_name.rsplit(".", 1)[-1], n_in, n_out, layer.bias is not None, full_name in adapted] += 1
    return tuple(Linear(name, n_in, n_out, bias, count, is_adapted)
                 for (name, n_in, n_out, bias, is_adapted), count in kinds.items())  # fmt: skip


def _experts(model: nn.Module) -> tuple[Linear, ...]:
    kinds: Counter[tuple[str, int, int]] = Counter()
    for name, weight in expert_tensors(model).items():
        *n_experts, n_out, n_in = weight.shape
        kinds[".".join(name.rsplit(".", 2)[1:]), n_in, n_out] += n_experts[0] if n_experts else 1
    return tuple(Linear(name, n_in, n_out, False, count) for (name, n_in, n_out), count in kinds.items())


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]


def _unique(modules: Any) -> list[nn.Parameter]:
    """The parameters inside these modules, each once."""
    return list({id(weight): weight for module in modules for weight in module.parameters()}.values())


def _absent(weight: nn.Parameter, others: list[nn.Parameter]) -> bool:
    return all(weight is not other for other in others)


def _is_tied(raw: dict[str, Any], config: PretrainedConfig) -> bool:
    """Multimodal configs write it beside their text part or inside it."""
    return bool(raw.get("tie_word_embeddings", getattr(config, "tie_word_embeddings", False)))


def _number(config: PretrainedConfig, name: str) -> int:
    """A size of the config, the largest where each layer has its own, 0 where the family has no such size."""
    try:
        value: Any = getattr(config, name, None)
    except RuntimeError:  # Gemma 4 refuses to name one number for layers that differ
        value = [getattr(layer, name, None) or 0 for layer in config.per_layer_config]
    if isinstance(value, (list, tuple)):
        value = max(value, default=0)
    return int(value or 0)


def _stored_bits(raw: dict[str, Any]) -> int | None:
    """Bits per weight of a checkpoint that is quantised already, or None for one that is not."""
    stored = raw.get("quantization_config")
    if not isinstance(stored, dict):
        return None
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return 4 if stored.get("load_in_4bit") else 8
    if isinstance(stored.get("bits"), int):
        return stored["bits"]
    return {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4}.get(str(stored.get("quant_method")), 16)
