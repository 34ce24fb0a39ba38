"""torch.nn.Embedding with a quantized weight."""

from typing import Any

import torch

from .._library import ops
from .qmodule import QModuleMixin, register_qmodule

__all__ = ["QEmbedding"]


@register_qmodule(torch.nn.Embedding)
class QEmbedding(QModuleMixin, torch.nn.Embedding):  # type: ignore[misc]  # torch has a freeze
    """Rows are decoded as they are looked up; the whole weight never is."""

    @classmethod
    def qcreate(
        cls, module: Any, weights: Any, activations: Any = None, optimizer: Any = None,
        device: Any = None,
    ) -> "QEmbedding | None":  # fmt: skip
        """For `module`; None for max_norm, which writes to the weight as it reads."""
        if weights is None or module.max_norm is not None:
            return None
        return cls(
            module.num_embeddings,
            module.embedding_dim,
            module.padding_idx,
            scale_grad_by_freq=module.scale_grad_by_freq,
            sparse=module.sparse,
            dtype=module.weight.dtype,
            device=device,
            weights=weights,
            optimizer=optimizer,
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Indices (…) to (…, embedding_dim), in the weight's dtype."""
        dtype = self.weight.dtype
        if not self.frozen:
            return torch.nn.functional.embedding(
                input, self.float_weight(dtype), self.padding_idx, None, 2.0,
                self.scale_grad_by_freq, self.sparse,
            )  # fmt: skip
        data, scale, shift, _ = self.weight_parts()
        return ops.embedding(
            input, data, scale, shift, self.weight_qtype.name, self.weight_group_size or 0,
            list(self.weight.shape), dtype,
        )  # fmt: skip
