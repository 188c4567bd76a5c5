"""From paths to a model that can answer: base, adapter, tokenizer and template, as the run stored them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from onecard.config.base_model import DEFAULT_BASE, ModelOptions, rope_scaling_of
from onecard.config.given_paths import is_tuned_model, trained_weights_in
from onecard.console import say, warn
from onecard.data.built_in_templates import first_version
from onecard.data.chat_template import Template, load_template
from onecard.errors import ConfigError
from onecard.inference.call import ModelBundle
from onecard.inference.run_files import has_tokenizer, run_directory, stored_template, trained_bits, trained_objective
from onecard.model.answer_bits import with_answer_bits, with_streaming
from onecard.model.hardware import detect
from onecard.model.load import load_base, load_tokenizer
from onecard.model.lora.formats import adapter_scaling, base_of_adapter
from onecard.model.lora.peft_model import trained_part
from onecard.model.memory_saving.streamed_layers import stream_layers
from onecard.model.trained import load_trained
from onecard.storage import sha256_of


def load_bundle(
    options: ModelOptions,
    lora_path: str | None,
    prompt_type: str,
    thinking: str = "auto",
    adapter_scale: float = 1.0,
) -> tuple[ModelBundle, dict[str, Any]]:
    """Load what answers, and what its answers depend on (for `inference/batch/results.py`).

    `options.model_path` "auto" is the base that the adapter names, or the embedded one where there is no adapter.
    The tokenizer and, for `prompt_type` "auto", the template are the run's own. Raises ModelError and ConfigError.
    """
    if lora_path is None and adapter_scale != 1:
        raise ConfigError("--adapter_scale", "needs an adapter to scale: give --lora_path")
    base = base_path(options.model_path, lora_path)
    options = replace(options, model_path=base, gradient_checkpointing=False)
    if options.rope_scaling == "auto" and lora_path is not None:
        options = replace(options, rope_scaling=adapter_scaling(lora_path))
    tokenizer, template = load_tokenizer_and_template(options, lora_path, prompt_type, thinking)
    hardware = detect(options.device)
    options = with_streaming(with_answer_bits(options, hardware, trained_bits(lora_path)), hardware)
    loaded = load_base(options, hardware, gptq=True)
    model: Any = loaded.model
    if lora_path is not None:
        adapter = load_trained(model, lora_path, loaded.fingerprint, adapter_scale)
        model = adapter.model
        for note in adapter.notes:
            warn(note)
    if options.stream_layers == "on":
        say(stream_layers(model, hardware.device).summary)
    model.eval()
    depends_on = {
        "base": loaded.fingerprint,
        "adapter": adapter_fingerprint(model) or _tuned_fingerprint(lora_path),
        "bits": options.bits,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "template": hashlib.sha256(first_version(template.jinja).encode("utf-8")).hexdigest(),
        **({"thinking": thinking} if thinking != "auto" else {}),
        **({"adapter_scale": adapter_scale} if adapter_scale != 1 else {}),
        **({"rope_scaling": options.rope_scaling} if rope_scaling_of(options.rope_scaling) else {}),
    }
    return ModelBundle(model, tokenizer, template, objective=trained_objective(lora_path)), depends_on


def load_tokenizer_and_template(
    options: ModelOptions, lora_path: str | None, prompt_type: str, thinking: str = "auto"
) -> tuple[Any, Template]:
    """The tokenizer and the template that go with an adapter, or with the base alone. Raises ConfigError."""
    run = run_directory(lora_path)
    tokenizer = load_tokenizer(
        str(run) if has_tokenizer(run) else options.model_path, trust_remote_code=options.trust_remote_code
    )
    template = load_template((prompt_type == "auto" and stored_template(run)) or prompt_type, tokenizer)
    return tokenizer, template.with_thinking(thinking)


def base_path(model_path: str, lora_path: str | None) -> str:
    """The base model to load. Raises ConfigError when neither the command nor the adapter names one."""
    if model_path != "auto":
        return model_path
    if lora_path is None:
        return DEFAULT_BASE
    named = base_of_adapter(lora_path)
    if named is None:
        raise ConfigError("--model_path", f"is needed: the adapter {lora_path} does not name its base model")
    return named


def adapter_fingerprint(model: Any) -> str | None:
    """SHA-256 over the adapter's tensors, wherever they came from; None for a base model alone."""
    digest, n_tensors = hashlib.sha256(), 0
    for name, parameter in trained_part(model):
        n_tensors += 1
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest() if n_tensors else None


def _tuned_fingerprint(lora_path: str | None) -> str | None:
    """SHA-256 of the trained weights of a checkpoint; None for a whole model, whose own fingerprint is the base's."""
    file = trained_weights_in(Path(lora_path)) if lora_path and not is_tuned_model(Path(lora_path)) else None
    return None if file is None else sha256_of(file)
