"""Frozen decoder layers that lie over several processes, a part on each, and are put together while they compute.

FSDP2, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html: only what is frozen is divided. Adapters
and all else that is trained stay whole on every process, so optimizer, clipping and checkpoints are those of one card.
Each pass through a layer is an exchange: every process has to make as many of them as the others.
"""

from __future__ import annotations

from typing import Any

import torch

from onecard.model.model_layers import decoder_layers


def shard_layers(model: Any, device: torch.device, n_processes: int) -> str:
    """Divide the frozen weights of each decoder layer, which lie in RAM, over all processes; returns what is said."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, layers = init_device_mesh(device.type, (n_processes,)), decoder_layers(model)
    for layer in layers:
        for module in layer.modules():
            constants = getattr(module, "quant_state", None)
            if constants is not None:  # of 4 bits: they stay whole, and do not move by themselves
                constants.to(device)
        trained = {weight for weight in layer.parameters() if weight.requires_grad}
        # After each forward pass, too, which is not the default: between passes nothing may depend on the process.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    own = sum(
        weight.to_local().nbytes for layer in layers for weight in layer.parameters() if hasattr(weight, "to_local")
    )
    return f"{len(layers)} layers lie over {n_processes} processes, {own / 2**30:.2f} GiB on each"
