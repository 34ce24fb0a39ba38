"""torch.nn.Linear with a quantized weight."""

from typing import Any

import torch

from .._library import ops
from .qmodule import QModuleMixin, register_qmodule

__all__ = ["QLinear"]


@register_qmodule(torch.nn.Linear)
class QLinear(QModuleMixin, torch.nn.Linear):
    """``y = x · wᵀ + bias``; int8 activations and integer weights multiply as integers."""

    @classmethod
    def qcreate(
        cls, module: Any, weights: Any, activations: Any = None, optimizer: Any = None,
        device: Any = None,
    ) -> "QLinear":  # fmt: skip
        """For `module`, without copying its weights."""
        return cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            dtype=module.weight.dtype,
            device=device,
            weights=weights,
            activations=activations,
            optimizer=optimizer,
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x (…, in) to (…, out), in x's dtype."""
        if self.weight_qtype is None:
            return torch.nn.functional.linear(self.fake_quantized(input), self.weight, self.bias)
        data, scale, shift, latent = self.weight_parts()
        activations, input_scale = self.activation_arguments()
        return ops.linear(
            input, data, scale, shift, self.bias, self.weight_qtype.name,
            self.weight_group_size or 0, latent, activations, input_scale,
        )  # fmt: skip
