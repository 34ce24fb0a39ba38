"""LoRA adapters of peft on quantized layers.

    import quantal.integrations.peft
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))

Importing this module makes peft take layers of its own for `QLinear`: adapters train as on float
layers; merging quantizes again what the sum is, with the layer's own optimizer and group size;
unmerging brings back the very codes from before.
"""

from functools import wraps
from typing import Any

import torch
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from ..nn import QLinear, QWeight

__all__ = ["QuantizedLoraLinear"]


class QuantizedLoraLinear(Linear):
    """peft's layer over a frozen `QLinear`."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weight, which is quantized again. ValueError where the sum has a NaN
        or infinity; then nothing has changed.

        Args:
            safe_merge: is always so.
            adapter_names: which; by default the active ones.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        for name in names:
            if name in self.lora_variant or self.lora_bias[name]:
                raise NotImplementedError(
                    f"[quantal.peft] adapter '{name}' is more than LoRA (a variant, or a bias): it "
                    "cannot be merged into a quantized layer"
                )
        if not names:
            return
        layer = self.get_base_layer()
        codes = layer.weight
        value = codes.dequantize(torch.float32)
        for name in names:
            value += self.get_delta_weight(name).float()
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
            if getattr(config, "use_dora", False):
                raise NotImplementedError("[quantal.peft] DoRA needs a float layer, got a QLinear")
            kwargs.pop("parameter_name", None)
            return QuantizedLoraLinear(target, adapter_name, config=config, **kwargs)
        return dispatch(target, adapter_name, config, **kwargs)

    return wrapper


lora_model.dispatch_default = _takes_quantized(lora_model.dispatch_default)
