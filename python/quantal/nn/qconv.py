"""torch.nn convolutions with quantized weights."""

from typing import Any, NoReturn

import torch
from torch.nn import functional as F  # noqa: N812

from .._library import ops, overload
from .qmodule import QModuleMixin, register_qmodule
from .straight_through import transforms_active

__all__ = [
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
]


_convolution = overload(ops.convolution)


class _QConv(QModuleMixin):
    """Inputs are quantized with one scale, or, at run time, with one a sample. Int8 activations and
    integer weights multiply as integers where that takes less time and the convolution is not
    transposed (docs/numerics.md); otherwise float values multiply."""

    scale_per_sample = True
    kernel_size: tuple[int, ...]

    def fake_quantized(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded as the input of this module is."""
        if x.ndim == len(self.kernel_size) + 1:  # one sample, without a batch's dimension
            return super().fake_quantized(x.unsqueeze(0)).squeeze(0)
        return super().fake_quantized(x)

    @classmethod
    def qcreate(
        cls, module: Any, weights: Any, activations: Any = None, optimizer: Any = None,
        device: Any = None,
    ) -> "_QConv":  # fmt: skip
        """For `module`, without copying its weights."""
        extra = {"output_padding": module.output_padding} if module.transposed else {}
        return cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
            dtype=module.weight.dtype,
            device=device,
            weights=weights,
            activations=activations,
            optimizer=optimizer,
            **extra,
        )


class _QPlainConv(_QConv):
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]
    _conv_forward: Any
    _function: Any

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the torch module's, in the input's dtype. RuntimeError, as torch's, for other
        channels."""
        qtype = self.weight_qtype
        if qtype is None or transforms_active():
            x = self.fake_quantized(input)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return self._conv_forward(x, self.float_weight(x.dtype), bias)
        is_batch = input.ndim != len(self.kernel_size) + 1
        x, padding = self._padded(input if is_batch else input.unsqueeze(0))
        bias, bound = self.own_bias(), None
        if bias is None or bias.dtype == x.dtype:  # torch refuses others, the operator does not
            bound = self._bound_weight(x, bias)
        if bound is not None:
            try:
                y = self._function(x, bound, bias, self.stride, padding, self.dilation, self.groups)
            except (RuntimeError, ValueError) as error:
                self._explain(input, x, error)
            return y if is_batch else y.squeeze(0)
        activations, input_scale = self.activation_arguments()
        data, scale, shift, latent = self.weight_parts()
        # Not self.weight, which torch searches for.
        weight: Any = self._modules["weight"] if latent is None else latent
        try:
            y = _convolution(
                x, data, scale, shift, bias, qtype.name, self.weight_group_size or 0,
                weight.shape, self.stride, padding, self.dilation, self.groups, latent,
                activations, input_scale,
            )  # fmt: skip
        except ValueError as error:
            self._explain(input, x, error)
        return y if is_batch else y.squeeze(0)

    def _explain(self, input: torch.Tensor, x: torch.Tensor, error: Exception) -> NoReturn:
        """Raises torch's kind of error for other channels: `error` speaks of the parts."""
        dims = len(self.kernel_size)
        if x.ndim == dims + 2 and x.shape[1] == self.in_channels:
            raise error
        raise RuntimeError(
            f"[quantal.{type(self).__name__}] expected input of {dims + 2} dimensions (one "
            f"sample: {dims + 1}) with {self.in_channels} channels, got {tuple(input.shape)}"
        ) from error

    def _padded(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The input and the zeros that are left to add on both sides of it."""
        around = self._reversed_padding_repeated_twice  # of the last dimension first
        if self.padding_mode != "zeros":
            return F.pad(x, around, mode=self.padding_mode), (0,) * len(self.kernel_size)
        if not isinstance(self.padding, str):
            return x, self.padding
        before, after = around[::2], around[1::2]
        pairs = zip(before, after, strict=True)
        if before != after:
            x = F.pad(x, [n for first, last in pairs for n in (0, last - first)])
        return x, tuple(reversed(before))


@register_qmodule(torch.nn.Conv1d)
class QConv1d(_QPlainConv, torch.nn.Conv1d):
    """Conv1d with a quantized weight."""

    _function = staticmethod(torch.conv1d)


@register_qmodule(torch.nn.Conv2d)
class QConv2d(_QPlainConv, torch.nn.Conv2d):
    """Conv2d with a quantized weight."""

    _function = staticmethod(torch.conv2d)


@register_qmodule(torch.nn.Conv3d)
class QConv3d(_QPlainConv, torch.nn.Conv3d):
    """Conv3d with a quantized weight."""

    _function = staticmethod(torch.conv3d)


class _QTransposedConv(_QConv):
    _function: Any
    _dims: int
    _output_padding: Any

    def forward(
        self,
        input: torch.Tensor,
        output_size: list[int] | None = None,
    ) -> torch.Tensor:
        """As the torch module's, in the input's dtype."""
        x = self.fake_quantized(input)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        output_padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, self._dims, self.dilation
        )
        return type(self)._function(
            x, self.float_weight(x.dtype), bias, self.stride, self.padding, output_padding,
            self.groups, self.dilation,
        )  # fmt: skip


@register_qmodule(torch.nn.ConvTranspose1d)
class QConvTranspose1d(_QTransposedConv, torch.nn.ConvTranspose1d):
    """ConvTranspose1d with a quantized weight."""

    _function, _dims = staticmethod(F.conv_transpose1d), 1


@register_qmodule(torch.nn.ConvTranspose2d)
class QConvTranspose2d(_QTransposedConv, torch.nn.ConvTranspose2d):
    """ConvTranspose2d with a quantized weight."""

    _function, _dims = staticmethod(F.conv_transpose2d), 2


@register_qmodule(torch.nn.ConvTranspose3d)
class QConvTranspose3d(_QTransposedConv, torch.nn.ConvTranspose3d):
    """ConvTranspose3d with a quantized weight."""

    _function, _dims = staticmethod(F.conv_transpose3d), 3
