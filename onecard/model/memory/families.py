"""How the families of decoder layers differ in what they keep for their gradients, besides their sizes.

By the model_type of config.json. Knows words and numbers alone; what they cost is `layer_memory.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """What distinguishes the families, besides sizes; the Llama family has none of it."""

    norm: str = "llama"
    """llama; gemma: multiplied by its weight in fp32; cohere: a LayerNorm written out."""
    norms_in: bool = True
    norms_out: bool = False
    """Norms before attention and MLP, and after them: Gemma 2, Gemma 3 and GLM 4 have both, OLMo 2 the latter."""
    qk_norm: int = 0
    """Queries and keys are normed: 1 for each head, 2 all heads as one."""
    parallel: bool = False
    """Attention and MLP read the same hidden state, after one norm (Cohere)."""
    rotary: str = "half"
    """half; partial: of a part of each head, joined with the rest; interleaved: in fp32 (Cohere)."""
    rotary_share: float = 1.0
    scales_residual: bool = False
    """What is added to the hidden state is multiplied first (Granite)."""
    caps_scores: bool = False
    caps_logits: bool = False
    """Attention scores and logits are bent by a tanh (Gemma 2)."""


LLAMA = Style()
# Counted against real steps in tests/model/memory/test_estimate.py; of all others the real layers run (`simulate.py`).
STYLES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "gemma": Style(norm="gemma"),
    "gemma2": Style(norm="gemma", norms_out=True, caps_scores=True, caps_logits=True),
    "gemma3_text": Style(norm="gemma", norms_out=True, qk_norm=1),
    "qwen3": Style(qk_norm=1),
    "olmo2": Style(norm="gemma", norms_in=False, norms_out=True, qk_norm=2),
    "granite": Style(scales_residual=True),
    "cohere": Style(norm="cohere", parallel=True, rotary="interleaved"),
    "phi3": Style(rotary="partial"),
    "glm4": Style(norms_out=True, rotary="partial", rotary_share=0.5),
}
# Multiplied, so that the first layer's input is another tensor.
CHANGED_EMBEDDINGS = ("granite",)
ALWAYS_EAGER = ("gemma2",)
