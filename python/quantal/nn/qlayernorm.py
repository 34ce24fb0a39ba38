"""torch.nn.LayerNorm whose output is quantized."""

from typing import Any

import torch

from .qmodule import QModuleMixin, register_qmodule

__all__ = ["QLayerNorm"]


@register_qmodule(torch.nn.LayerNorm)
class QLayerNorm(QModuleMixin, torch.nn.LayerNorm):
    """Its weight stays float: only the output is quantized, where activations are."""

    @classmethod
    def qcreate(
        cls, module: Any, weights: Any = None, activations: Any = None, optimizer: Any = None,
        device: Any = None,
    ) -> "QLayerNorm | None":  # fmt: skip
        """For `module`; None where activations are not quantized."""
        if activations is None:
            return None
        dtype = None if module.weight is None else module.weight.dtype
        return cls(
            module.normalized_shape,
            module.eps,
            module.elementwise_affine,
            module.bias is not None,
            dtype=dtype,
            device=device,
            activations=activations,
        )
