"""The operation by which transformers 5 quantizes a tensor that it loads."""

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..nn.qmodule import SCALES

__all__ = ["QuantizeOnLoad"]


class QuantizeOnLoad(ConversionOps):
    """Loads a float weight into its layer and freezes that."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        model: Any = None,
        full_layer_name: Any = None,
        missing_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Nothing is left for transformers to load."""
        (values,) = input_dict.values()
        value = values[0] if isinstance(values, (list, tuple)) else values
        self.hf_quantizer.load_and_freeze(model, full_layer_name, value)
        module, _ = get_module_from_name(model, full_layer_name)
        module._is_hf_initialized = True
        prefix, _, tensor = full_layer_name.rpartition(".")
        for name in (tensor, *SCALES):
            missing_keys.discard(f"{prefix}.{name}")
        return {}
