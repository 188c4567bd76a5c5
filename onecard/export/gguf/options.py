"""What is exported as GGUF and what its Modelfile says, as typed and as carried out. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from onecard.config.given_paths import paths_in
from onecard.config.problems import Problem
from onecard.export.io.output import OutputOptions
from onecard.export.merge.options import scale_problems

# Kinds of number that only llama.cpp's own program writes.
LLAMA_QUANTIZE_KINDS = r"i?q\d_(k|k_[sml]|x*[sml]|nl|xs)|tq\d_\d"
LLAMA_QUANTIZE = (
    "llama.cpp makes it of a file of f16: llama-quantize model-f16.gguf model-Q4_K_M.gguf Q4_K_M (q4_0 needs nothing)"
)
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4"]


@dataclass
class ExportOptions(OutputOptions):
    """What is exported, and where to."""

    model_path: str = ""
    """Base or merged model: a directory or a Hub id. With --lora_path, the base that the run names, if not given."""
    lora_path: str = ""
    """Adapter to merge in first; several with commas between them, in this order."""
    adapter_scale: float = 1.0
    """How strongly the adapters are put on; 1 is what was trained. For LoRA, LoHa and LoKr."""
    output_path: str = ""
    """A new directory for model-TYPE.gguf and Modelfile."""
    gguf_type: GgufType = field(default="f16", metadata={"advice": (LLAMA_QUANTIZE_KINDS, LLAMA_QUANTIZE)})
    """Kind of number: q8_0 is half of f16, q4_0 a quarter. Norms and biases stay f32, and a 4-bit file's head q8_0."""
    prompt_type: str = "auto"
    """Chat template: a built-in name or a .jinja file; auto takes the one stored with the model, or none."""
    adapter_only: bool = False
    """Write the LoRA adapter alone, for llama.cpp and Ollama to put on, instead of merging it in."""
    accept_other_base: bool = False
    """Merge although the adapter was trained on another base."""

    @property
    def adapters(self) -> list[str]:
        """In the order in which they are merged."""
        return paths_in(self.lora_path)

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if not self.model_path:
            found.append(("--model_path", "is missing; give the directory or Hub id of a model"))
        if not self.output_path:
            found.append(("--output_path", "is missing; give a new directory"))
        elif self.output_path.lower().endswith(".gguf"):
            found.append(("--output_path", "names a file; give a new directory for it"))
        if self.adapter_only and not self.lora_path:
            found.append(("--adapter_only", "needs an adapter: give --lora_path"))
        wrong = scale_problems(self.adapter_scale)
        if not wrong and self.adapter_scale != 1 and not self.lora_path:
            wrong = [("--adapter_scale", "needs an adapter to scale: give --lora_path")]
        return found + wrong


@dataclass
class OllamaOptions:
    """What the Modelfile says; what is not given is left to Ollama."""

    modelfile: bool = True
    """Write a Modelfile beside the GGUF."""
    system: str = ""
    """System prompt."""
    num_ctx: int | None = None
    """Context length in tokens."""
    num_predict: int | None = None
    """Longest answer in tokens."""
    temperature: float | None = None
    """Sampling temperature; 0 is greedy."""
    top_p: float | None = None
    """Share of probability that is sampled from."""
    top_k: int | None = None
    """Number of tokens that is sampled from."""
    repeat_penalty: float | None = None
    """Penalty on tokens that were said already; 1 is none."""

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        for name in ("num_ctx", "num_predict", "repeat_penalty"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append((f"--{name}", f"{value} is not above 0"))
        for name in ("temperature", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 0:
                found.append((f"--{name}", f"{value} is negative"))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(("--top_p", f"{self.top_p} is no share; use a number above 0, at most 1"))
        return found

    def parameters(self) -> dict[str, float | int | None]:
        """The sampling settings by Ollama's names."""
        names = ("num_ctx", "num_predict", "temperature", "top_p", "top_k", "repeat_penalty")
        return {name: getattr(self, name) for name in names}
