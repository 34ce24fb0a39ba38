"""LoRA adapters of peft on quantized layers.

    import quantal.integrations.peft
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))

Importing this module makes peft take layers of its own for `QLinear`: adapters train as on float
layers; merging quantizes again what the sum is, with the layer's own optimizer and group size;
unmerging brings back the very codes from before. DoRA (``use_dora=True``) takes the norms of the
decoded weight.
"""

from functools import wraps
from typing import Any

import torch
from peft.tuners.lora import dora, variants
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from ..nn import QLinear, QWeight

__all__ = ["QuantizedLoraLinear"]


class QuantizedLoraLinear(Linear):
    """peft's layer over a frozen `QLinear`."""

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weight, which is quantized again. ValueError where the sum has a NaN
        or infinity; then nothing has changed.

        Args:
            safe_merge: is always so.
            adapter_names: which; by default the active ones.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        for name in names:
            is_known = type(self.lora_variant.get(name)) in (type(None), DoraLinearVariant)
            if not is_known or self.lora_bias[name]:
                raise NotImplementedError(
                    f"[quantal.peft] adapter '{name}' is more than LoRA or DoRA (another variant, "
                    "or a bias): it cannot be merged into a quantized layer"
                )
        if not names:
            return
        layer = self.get_base_layer()
        codes = layer.weight
        value = codes.dequantize(torch.float32)
        unmerged = self.__dict__.get("_unmerged", codes).dequantize(torch.float32)
        for name in names:
            delta = self.get_delta_weight(name).float()
            value = value + delta
            if name in self.lora_variant:  # DoRA: rows of a magnitude of their own
                magnitude = self.lora_magnitude_vector[name].weight.float()
                value *= (magnitude / (unmerged + delta).norm(dim=1)).unsqueeze(1)
        layer.weight = torch.nn.Parameter(value.to(codes.dtype), requires_grad=False)
        try:
            layer.freeze()
        except ValueError:
            layer.weight = codes
            raise
        if not self.merged_adapters:
            self.__dict__["_unmerged"] = codes
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Brings back the weight without adapters."""
        if not self.merged:
            return
        self.merged_adapters.clear()
        self.get_base_layer().weight = self.__dict__.pop("_unmerged")


def _takes_quantized(dispatch: Any) -> Any:
    @wraps(dispatch)
    def wrapper(target: torch.nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        is_frozen = isinstance(base, QLinear) and isinstance(base._modules.get("weight"), QWeight)
        if is_frozen and kwargs.get("parameter_name") is None:
            kwargs.pop("parameter_name", None)
            return QuantizedLoraLinear(target, adapter_name, config=config, **kwargs)
        return dispatch(target, adapter_name, config, **kwargs)

    return wrapper


def _decodes_quantized(dequantize: Any) -> Any:
    @wraps(dequantize)
    def wrapper(module: torch.nn.Module) -> Any:
        weight = module._modules.get("weight")
        return weight.dequantize() if isinstance(weight, QWeight) else dequantize(module)

    return wrapper


for _module in (dora, variants):
    _module.dequantize_module_weight = _decodes_quantized(_module.dequantize_module_weight)
lora_model.dispatch_default = _takes_quantized(lora_model.dispatch_default)
