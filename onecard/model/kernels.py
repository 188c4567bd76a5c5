"""Triton kernels of liger-kernel for norms, rotary positions and MLPs, where a person asks for them.

The loss is not among them: `chunked_loss.py` chunks it on every card. Whether they help on a given card is for
`benchmarks/step_speed.py` to say. https://github.com/linkedin/Liger-Kernel
"""

from __future__ import annotations

from importlib.util import find_spec

from transformers import PreTrainedModel

from onecard.errors import ConfigError
from onecard.model.hardware import Hardware

FLAG = "--kernels"


def use_liger(model: PreTrainedModel, hardware: Hardware) -> None:
    """Replace the forward passes of `model` by liger-kernel's, through the way that transformers has for it.

    Raises ConfigError where the package is missing or unusable, the card is too old for Triton, or the family is not
    known to it.
    """
    if find_spec("liger_kernel") is None:
        raise ConfigError(FLAG, "liger needs the package liger-kernel (pip install liger-kernel); or use torch")
    if not hardware.is_gpu or not hardware.has_flash_attention:
        raise ConfigError(FLAG, f"liger needs a card of the Ampere generation or newer, not {hardware.name}; use torch")
    from transformers.integrations.liger import apply_liger_kernel

    wanted = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False,
              "fused_linear_cross_entropy": False}  # fmt: skip
    try:
        apply_liger_kernel(model, wanted)
    except ImportError as reason:
        raise ConfigError(FLAG, f"liger-kernel cannot be used: {reason}; or use torch") from reason
    except (ValueError, TypeError, KeyError) as reason:
        raise ConfigError(FLAG, f"liger does not know {model.config.model_type}: {reason}; use torch") from reason
    # For a family that it does not know it only writes to its log.
    if not any("liger" in (module.forward.__module__ or "") for module in model.modules()):
        raise ConfigError(FLAG, f"liger does not know {model.config.model_type}; use torch")
