"""torch.nn.Linear with a quantized weight."""

from typing import Any, NoReturn

import torch

from .._library import ops, overload
from .direct import PLAIN, calls_directly
from .qmodule import QModuleMixin, register_qmodule
from .straight_through import transforms_active

__all__ = ["QLinear"]

_linear = overload(ops.linear)
# Not torch.nn.functional.linear, which others replace.
_torch_linear = torch._C._nn.linear


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
        """x (…, in) to (…, out), in x's dtype. RuntimeError, as torch's, for another width."""
        # Written out, not in functions: after a large weight has passed through the caches, each
        # of those costs microseconds.
        state = self.__dict__
        parameters, qtype = state["_parameters"], state["weight_qtype"]
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        frozen = state["_modules"].get("weight")
        if frozen is not None and calls_directly(input) and (bias is None or type(bias) in PLAIN):
            activations, input_scale = "", None
            if state["activation_qtype"] is not None:
                activations, input_scale = self.activation_arguments()
            group_size = state["weight_group_size"] or 0
            bound = frozen._bound(qtype, group_size, activations, input_scale)
            if bound is not None:
                try:
                    return _torch_linear(input, bound, bias)
                except ValueError as error:
                    self._explain(input, error)
        if qtype is None:
            return torch.nn.functional.linear(self.fake_quantized(input), self.weight, self.bias)
        if transforms_active():
            x = self.fake_quantized(input)
            return torch.nn.functional.linear(x, self.float_weight(x.dtype), self.bias)
        if frozen is None:
            data, scale, shift, latent = self.weight_parts()
        else:
            (data, scale, shift), latent = frozen.parts(), None
        activations, input_scale = "", None
        if self.activation_qtype is not None:
            activations, input_scale = self.activation_arguments()
        try:
            return _linear(
                input, data, scale, shift, bias, qtype.name, self.weight_group_size or 0, latent,
                activations, input_scale,
            )  # fmt: skip
        except ValueError as error:
            self._explain(input, error)

    def _explain(self, input: torch.Tensor, error: ValueError) -> NoReturn:
        """Raises torch's kind of error for another width: `error` speaks of the parts."""
        columns = self.weight.shape[1]
        if input.shape[-1:] == (columns,):
            raise error
        raise RuntimeError(
            f"[quantal.QLinear] expected input of shape (…, in_features) = (…, {columns}), got "
            f"{tuple(input.shape)}"
        ) from error
