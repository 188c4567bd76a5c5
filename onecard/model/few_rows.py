"""Linear layers that are quick where few rows come at once, as in a step of a batch of answers on a CPU.

With 2 to 8 rows in fp32, MKL takes up to half as long again for `x @ W.T`, which torch asks it for, as for `W @ x.T`.
The same sums in another order: results differ by rounding. Knows modules; it does not know models or answers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onecard.model.lora.methods import is_adapter_weight

# CPU milliseconds of all products of a model of 135M weights (30 layers of 576 and a head of 49,152), one thread of an
# AMD EPYC: 2 rows 93 -> 62, 4 rows 100 -> 79, 8 rows 110 -> 103, 12 rows 119 -> 180, 16 rows 147 -> 144.
MOST_ROWS = 8


class FewRowsLinear(nn.Linear):
    """As nn.Linear, whose weight it shares."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        n_rows = input.numel() // self.in_features
        if not 2 <= n_rows <= MOST_ROWS:
            return super().forward(input)
        out = torch.mm(self.weight, input.reshape(n_rows, self.in_features).t()).t().contiguous()
        if self.bias is not None:
            out += self.bias
        return out.view(*input.shape[:-1], self.out_features)


def quicken_few_rows(model: nn.Module) -> int:
    """Let the linear layers of a model in fp32 on a CPU be such ones; how many. Adapters' own stay as they are."""
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not is_adapter_weight(f"{name}.weight")
        and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
    ]  # fmt: skip
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, FewRowsLinear(layer))
    return len(names)
