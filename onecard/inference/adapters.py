"""One base model and its adapters, of which one at a time is active.

Each adapter brings the tokenizer and the prompt template that it was trained with. Knows run directories, and how an
adapter is deactivated and another one activated. It does not know requests or queues: `engine.py` sees to it that
nobody is talking while the adapter changes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onecard.config.base_model import ModelOptions
from onecard.config.given_paths import is_tuned_model, trained_weights_in
from onecard.config.inference import InferenceOptions
from onecard.console import nearest, warn
from onecard.data.built_in_templates import BUILT_IN
from onecard.data.chat_template import Template, load_template
from onecard.errors import ConfigError, ModelError
from onecard.inference.call import ModelBundle
from onecard.inference.load import base_path, load_bundle, load_tokenizer_and_template
from onecard.inference.run_files import adapters_in
from onecard.inference.sampling import CacheOptions
from onecard.inference.shared_adapters import SharedAdapters
from onecard.model.lora.formats import read_adapter
from onecard.model.lora.peft_model import remove_adapter
from onecard.model.trained import load_trained


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter (None: the base alone) with the tokenizer and the template that it was trained with."""

    lora_path: str | None
    tokenizer: Any
    template: Template


class AdapterManager:
    """The model of this card with its adapters; `paths` are adapters by name, the first one is active at once.

    `loaded`: what `load_bundle` would give for it, where it was made in memory and lies in no directory.
    """

    def __init__(
        self,
        options: ModelOptions,
        inference_options: InferenceOptions,
        paths: Mapping[str, str | None],
        loaded: tuple[ModelBundle, dict[str, Any]] | None = None,
    ) -> None:
        self._paths = dict(paths)
        first = next(iter(self._paths))
        base = base_path(options.model_path, self._paths[first])
        self._options, self._prompt_type = replace(options, model_path=base), inference_options.prompt_type
        self._thinking, self._scale = inference_options.thinking, inference_options.adapter_scale
        self._cache = CacheOptions(inference_options.static_cache, inference_options.compile)
        bundle, depends_on = loaded or load_bundle(
            self._options, self._paths[first], self._prompt_type, self._thinking, self._scale
        )
        self.model: Any = bundle.model
        self._fingerprint = depends_on["base"]
        self._on: str | None = first  # the name of what the model is now; None: the base, after an adapter failed
        self._adapters = {first: ServedAdapter(self._paths[first], bundle.tokenizer, bundle.template)}
        self._templates: dict[tuple[str, str], Template] = {}
        self._n_added: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._paths)

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary: ids are below it."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def get(self, name: str = "", prompt_type: str = "") -> ServedAdapter:
        """The adapter of this name ('': the first) with this built-in template ('': its own). Raises ConfigError."""
        name = name or self.names[0]
        if name not in self._paths:
            known = ", ".join(self.names)
            raise ConfigError("--adapter", f"no adapter is called {name!r}{nearest(name, self.names)}; known: {known}")
        with self._lock:
            if name not in self._adapters:
                self._adapters[name] = self._read(self._paths[name])
            served = self._adapters[name]
            return replace(served, template=self._template(name, prompt_type, served)) if prompt_type else served

    def use(self, name: str = "", prompt_type: str = "") -> ModelBundle:
        """Make this adapter the active one. Raises ModelError; the one that was active before then is again."""
        name = name or self.names[0]
        served = self.get(name, prompt_type)
        if name != self._on:
            self._switch(name, served.lora_path)
        return self.bundle(name, prompt_type)

    def add(self, name: str, path: str) -> None:
        """Let an adapter answer by this name. Raises ModelError where its files cannot be read."""
        read_adapter(path)
        served = self._read(path)
        with self._lock:
            self._paths[name] = path
            self._adapters[name] = served
            self._n_added[name] += 1

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises ConfigError for the first one and for the base."""
        with self._lock:
            if name == self.names[0] or self._paths.get(name) is None:
                raise ConfigError("--adapter", f"{name} belongs to what the server was started with, and stays")
            del self._paths[name]
            if self._on == name:  # another one may get its name
                self._on = None
            self._adapters.pop(name, None)
            self._templates = {key: one for key, one in self._templates.items() if key[0] != name}

    def bundle(self, name: str = "", prompt_type: str = "") -> ModelBundle:
        """The model as it is now, with the tokenizer and the template of this adapter."""
        served = self.get(name, prompt_type)
        key = f"{name or self.names[0]}#{self._n_added[name]}"
        return ModelBundle(self.model, served.tokenizer, served.template, self._cache, prefix_key=key)

    def share(self) -> SharedAdapters:
        """From now on the model is the base, and the adapters are beside each other. `use` still puts one on alone."""
        self.take_off()
        return SharedAdapters(self.model, self._paths, self._fingerprint, self._scale)

    def take_off(self) -> None:
        """Make the model the base alone."""
        self.model, self._on = remove_adapter(self.model), None

    def _read(self, path: str | None) -> ServedAdapter:
        tokenizer, template = load_tokenizer_and_template(self._options, path, self._prompt_type, self._thinking)
        return ServedAdapter(path, tokenizer, template)

    def _switch(self, name: str, lora_path: str | None) -> None:
        before = self._on
        self.model, self._on = remove_adapter(self.model), None
        try:
            self._put_on(name, lora_path)
        except ModelError:
            if before is not None:
                self._put_on(before, self._paths[before])
            raise

    def _put_on(self, name: str, lora_path: str | None) -> None:
        if lora_path is not None:
            adapter = load_trained(self.model, lora_path, self._fingerprint, self._scale)
            for note in adapter.notes:
                warn(f"{name}: {note}")
            self.model = adapter.model
            self.model.eval()
        self._on = name

    def _template(self, name: str, prompt_type: str, served: ServedAdapter) -> Template:
        # Only built-in names: a request must not be able to make the server open a file.
        if prompt_type not in BUILT_IN:
            raise ConfigError("--prompt_type", f"{prompt_type!r} is unknown; choose one of {', '.join(BUILT_IN)}")
        key = (name, prompt_type)
        if key not in self._templates:
            self._templates[key] = load_template(prompt_type, served.tokenizer)
        return self._templates[key]


def open_adapters(
    options: ModelOptions, inference_options: InferenceOptions, adapters_path: str | None, model_name: str | None
) -> AdapterManager:
    """Load the model, and find the adapters of a folder. Raises ConfigError and ModelError.

    The first name is the adapter that was typed, else the first of the folder, else the base; the others of the
    folder follow, and the base.
    """
    first = inference_options.lora_path
    found = adapters_in(adapters_path) if adapters_path else {}
    if first is None and found:
        first = next(iter(found.values()))
    if found and first is not None and (is_tuned_model(Path(first)) or trained_weights_in(Path(first))):
        raise ConfigError("--adapters_path", f"does not go with {first}, whose own weights were trained: the adapters "
                          "of the folder belong to another base")  # fmt: skip
    base = base_path(options.model_path, first)
    typed = {model_name or name_of(first or base): first}
    known = {str(Path(path).expanduser().resolve()) for path in typed.values() if path}
    others: dict[str, str | None] = {
        name: path for name, path in found.items() if str(Path(path).resolve()) not in known and name not in typed
    }
    if found and first is not None and name_of(base) not in {**typed, **others}:
        others[name_of(base)] = None
    return AdapterManager(replace(options, model_path=base), inference_options, {**typed, **others})


def name_of(path: str) -> str:
    """The name by which a model is known: the last part of its path or Hub id; a checkpoint keeps its run's name."""
    parts = [part for part in path.replace("\\", "/").rstrip("/").split("/") if part not in ("", ".", "..")]
    if len(parts) > 1 and parts[-1].startswith("checkpoint-"):
        return f"{parts[-2]}-{parts[-1]}"
    return parts[-1] if parts else "model"
