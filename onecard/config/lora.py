"""Options of adapters: LoRA's own, and the other methods of PEFT. A field's docstring is its help text."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from onecard.config.problems import Problem
from onecard.console import nearest

# PEFT's own names, in small letters (model/lora/methods.py), and LoRA's forms by the names they are known under.
PeftMethodName = Literal[
    "lora", "rslora", "dora", "pissa", "loftq", "olora", "adalora", "ia3", "vera", "oft", "miss", "shira", "randlora",
    "loha", "lokr", "prompt_tuning", "p_tuning", "prefix_tuning", "bottleneck",
]  # fmt: skip
SHORT_NAMES = {"prompt": "prompt_tuning", "prefix": "prefix_tuning"}
# Trained vectors stand in front of every text, and no layer has an adapter.
VIRTUAL_TOKENS = ("prompt_tuning", "p_tuning", "prefix_tuning")
LORA_FORMS: dict[str, tuple[str, Any]] = {
    "rslora": ("use_rslora", True), "dora": ("use_dora", True), "pissa": ("lora_init", "pissa"),
    "loftq": ("lora_init", "loftq"), "olora": ("lora_init", "olora"),
}  # fmt: skip
# Bottleneck adapters by where they stand: --peft_option form=..., and names of the method by themselves.
BOTTLENECK_FORMS = ("houlsby", "pfeiffer", "parallel")
# Without an adapter: all weights of the base, or those of its last N layers.
FULL, FREEZE = "full", "freeze:"
# What PEFT calls those of LoRA's settings that a method has; all others are its own, by --peft_option.
METHOD_SETTINGS: dict[str, dict[str, str]] = {
    "lora": {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
    "adalora": {"lora_r": "target_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
    "ia3": {}, "vera": {"lora_dropout": "vera_dropout"}, "oft": {}, "miss": {"lora_dropout": "miss_dropout"},
    "shira": {"lora_r": "r"}, "randlora": {"lora_dropout": "randlora_dropout"},
    "loha": {"lora_r": "r", "lora_alpha": "alpha"}, "lokr": {"lora_r": "r", "lora_alpha": "alpha"},
    "prompt_tuning": {}, "p_tuning": {}, "prefix_tuning": {}, "bottleneck": {"lora_dropout": "dropout"},
}  # fmt: skip
# Their products have the shape of the stored weights, which 4 bits pack otherwise.
NOT_IN_4_BITS = ("loha", "lokr")


@dataclass
class LoraOptions:
    """The adapter that is trained while the base stays frozen, or which weights of the base are trained instead."""

    peft_method: str = "lora"
    """Kind of adapter: lora; rslora, dora, pissa, loftq and olora, which are --use_rslora, --use_dora and --lora_init;
    adalora, ia3, vera, oft, miss, shira, randlora, loha, lokr; prompt, p_tuning and prefix, which train what stands in
    front of every text; houlsby, pfeiffer and parallel, which are bottleneck adapters. No adapter, in 16 or 32 bits:
    full trains all weights, freeze:2 those of the last 2 layers.
    What each is for: docs/en/training.md."""
    peft_option: str = field(default="", metadata={"several": True})
    """Settings of the method itself as PEFT calls them: r=128 d_initial=0.1 (vera), num_virtual_tokens=50 (prompt)."""
    lora_r: int = 8
    """Rank of the adapter matrices."""
    lora_alpha: int = 16
    """Scale of the adapter: its output is multiplied by alpha / r (rsLoRA: alpha / sqrt(r))."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapter. Above 0 the random masks depend on how a step is cut into micro-batches."""
    lora_target_modules: str = field(default="all-linear", metadata={"several": True})
    """Layers that get an adapter: all-linear, or names with commas or spaces between them (q_proj,v_proj)."""
    lora_target_parameters: str = field(default="", metadata={"several": True})
    """Experts of a mixture that get adapters, too: experts, or names (experts.gate_up_proj,experts.down_proj)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r): keeps high ranks trainable (arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters: better at low rank, slower (arXiv:2402.09353)."""
    lora_init: Literal["default", "pissa", "loftq", "olora"] = "default"
    """Start of the adapter: default (B is zero), pissa (arXiv:2404.02948), loftq (arXiv:2310.08659) or olora
    (arXiv:2406.01775)."""
    train_new_tokens: Literal[True, False, "only"] = field(default=False, metadata={"bare": "true"})
    """Train the rows of new tokens as well, in embeddings and head (a base made by `onecard expand-vocab apply`); only:
    these rows alone, while the adapter waits for a later run (--stages, --init_adapter)."""
    train_embeddings: Literal[True, False, "only"] = field(default=False, metadata={"bare": "true"})
    """Train embeddings and head in full, in fp32: 16 bytes more for each of their weights, 10 with 8-bit Adam; only:
    these alone."""

    def __post_init__(self) -> None:
        """A form of LoRA becomes LoRA with the option that it is, so that both spellings are one run."""
        self.peft_method = SHORT_NAMES.get(self.peft_method, self.peft_method)
        name, value = LORA_FORMS.get(self.peft_method, ("", None))
        if name and getattr(self, name) in (getattr(type(self), name), value):
            setattr(self, name, value)
            self.peft_method = "lora"
        if self.peft_method in BOTTLENECK_FORMS:
            form = f"form={self.peft_method}"
            if "form=" not in self.peft_option:
                self.peft_option = f"{form},{self.peft_option}".strip(",")
            if form in self.peft_option:
                self.peft_method = "bottleneck"

    @property
    def peft_options(self) -> dict[str, str]:
        """--peft_option by name. Raises ValueError where it is not of the form name=value."""
        pairs = [part.split("=", 1) for part in self.peft_option.replace(" ", "").split(",") if part]
        return {name: value.strip() for name, value in pairs}

    @property
    def tunes_base(self) -> bool:
        """Whether weights of the base itself are trained, and there is no adapter."""
        return self.peft_method == FULL or self.n_last_layers > 0

    @property
    def n_last_layers(self) -> int:
        """N of freeze:N; 0 for every other method."""
        number = self.peft_method.removeprefix(FREEZE)
        return int(number) if self.peft_method.startswith(FREEZE) and number.isdecimal() else 0

    @property
    def has_virtual_tokens(self) -> bool:
        """Whether what is trained stands in front of every text, and no layer has an adapter."""
        return self.peft_method in VIRTUAL_TOKENS

    @property
    def sized_by_model(self) -> bool:
        """Whether how much is trained follows from the model as a whole, and not from its linear layers."""
        return self.has_virtual_tokens or self.peft_method == "bottleneck"

    @property
    def may_recompute(self) -> bool:
        """Whether layers can be computed again in the backward pass: there transformers gives them no cache, in which
        prefix tuning has its keys and values."""
        return self.peft_method != "prefix_tuning"

    @property
    def trains_vocabulary(self) -> str:
        """The flag of what trains embeddings and head, or an empty text."""
        if self.peft_method == FULL:
            return "--peft_method full"
        return "--train_new_tokens" if self.train_new_tokens else "--train_embeddings" if self.train_embeddings else ""

    @property
    def only_vocabulary(self) -> bool:
        """Whether the adapter itself stays as it is."""
        return "only" in (self.train_new_tokens, self.train_embeddings)

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if self.lora_r < 1:
            found.append(("--lora_r", f"{self.lora_r} would train nothing; use 1 or more"))
        if self.lora_alpha < 1:
            found.append(("--lora_alpha", f"{self.lora_alpha} would switch the adapter off; use 1 or more"))
        if not 0 <= self.lora_dropout < 1:
            found.append(("--lora_dropout", f"{self.lora_dropout} is not a probability below 1"))
        if not self.lora_target_modules.strip(", "):
            found.append(("--lora_target_modules", "is empty; use all-linear or names such as q_proj,v_proj"))
        if self.lora_target_parameters:
            # peft computes W + BA for all experts at once: nothing stands between A and its input.
            asked = {
                "--lora_dropout": self.lora_dropout > 0, "--use_dora": self.use_dora,
                "--lora_init": self.lora_init != "default",
            }  # fmt: skip
            found += [(flag, "does not go with --lora_target_parameters") for flag, is_on in asked.items() if is_on]
        if self.train_new_tokens and self.train_embeddings:
            found.append(("--train_new_tokens", "is contained in --train_embeddings; give only one of them"))
        try:
            self.peft_options  # noqa: B018
        except ValueError:
            found.append(("--peft_option", f"{self.peft_option!r} is not of the form name=value,name=value"))
        return [*found, *self._method_problems()]

    def _method_problems(self) -> list[Problem]:
        """What of LoRA's settings was given for a method that has no such thing."""
        method = self.peft_method
        if method in LORA_FORMS:
            name, value = LORA_FORMS[method]
            return [("--peft_method", f"{method} is --{name} {value}, and contradicts --{name} {getattr(self, name)}")]
        if method in BOTTLENECK_FORMS:
            return [("--peft_method", f"{method} contradicts --peft_option {self.peft_option}")]
        if method == "lora":
            return []
        if method not in METHOD_SETTINGS and not self.tunes_base:
            known = (*get_args(PeftMethodName), *SHORT_NAMES, *BOTTLENECK_FORMS, FULL, f"{FREEZE}N (N of 1 and more)")
            return [("--peft_method", f"{method!r} is not one of {', '.join(known)}{nearest(method, known)}")]
        kept: tuple[str, ...] = ("peft_method",)
        hint = "; it has no adapter"
        if not self.tunes_base:
            layers = () if self.sized_by_model else ("lora_target_modules",)
            kept = ("peft_method", "peft_option", *layers, *METHOD_SETTINGS[method])
            hint = "; its own settings are given by --peft_option"
        given = [f.name for f in fields(self) if f.name not in kept and getattr(self, f.name) != f.default]
        return [(f"--{name}", f"does not go with --peft_method {method}{hint}") for name in given]
