"""What the C++ library registers as ``torch.ops.quantal``, for type checkers."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Operators"]


class Operators(Protocol):
    """docs/architecture.md says what they are for; src/ops/plain_ops.cc, src/ops/plain_conv.cc and
    src/tensor/library.cc define them."""

    def bind_weight(
        self,
        data: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        qtype: str,
        group_size: int,
        sizes: Sequence[int],
        dtype: torch.dtype,
        activations: str = "",
        input_scale: Tensor | None = None,
    ) -> Tensor: ...
    def check_finite(self, weight: Tensor, name: str) -> None: ...
    def conv_dynamic(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> Tensor: ...
    def convolution(
        self,
        x: Tensor,
        data: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        bias: Tensor | None,
        qtype: str,
        group_size: int,
        sizes: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        latent: Tensor | None = None,
        activations: str = "",
        input_scale: Tensor | None = None,
    ) -> Tensor: ...
    def decode(
        self,
        data: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        qtype: str,
        group_size: int,
        sizes: Sequence[int],
        dtype: torch.dtype,
        latent: Tensor | None = None,
    ) -> Tensor: ...
    def default_group_size(self, qtype: str, row_length: int) -> int: ...
    def dequantize(self, t: Tensor) -> Tensor: ...
    def embedding(
        self,
        indices: Tensor,
        data: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        qtype: str,
        group_size: int,
        sizes: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor: ...
    def encode(
        self,
        weight: Tensor,
        qtype: str,
        group_size: int,
        quantizer: str = "",
        options: Sequence[float] = (),
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def encode_with(
        self, weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, group_size: int
    ) -> Tensor: ...
    def fake_quantize(
        self, x: Tensor, qtype: str, scale: Tensor | None = None, per_sample: bool = False
    ) -> Tensor: ...
    def fallback_count(self) -> int: ...
    def fallback_counts(self) -> dict[str, int]: ...
    def freeze(self, weight: Tensor) -> None: ...
    def group_size(self, t: Tensor) -> int: ...
    def is_activation(self, t: Tensor) -> bool: ...
    def is_frozen(self, t: Tensor) -> bool: ...
    def is_live(self, t: Tensor) -> bool: ...
    def is_quantized(self, t: Tensor) -> bool: ...
    def isa(self) -> str: ...
    def latent(self, weight: Tensor) -> Tensor: ...
    def linear(
        self,
        x: Tensor,
        data: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        bias: Tensor | None,
        qtype: str,
        group_size: int,
        latent: Tensor | None = None,
        activations: str = "",
        input_scale: Tensor | None = None,
    ) -> Tensor: ...
    def linear_dynamic(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...
    def linear_input_grad(
        self,
        grad: Tensor,
        data: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        qtype: str,
        group_size: int,
        columns: int,
    ) -> Tensor: ...
    def live_weight(
        self,
        weight: Tensor,
        qtype: str,
        group_size: int | None = None,
        allow_short_group: bool = False,
        quantizer: str = "",
    ) -> Tensor: ...
    def parts(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]: ...
    def qtype_name(self, t: Tensor) -> str: ...
    def quantize_activation(self, x: Tensor, qtype: str, scale: Tensor) -> Tensor: ...
    def quantize_weight(
        self,
        weight: Tensor,
        qtype: str,
        group_size: int | None = None,
        allow_short_group: bool = False,
        quantizer: str = "",
    ) -> Tensor: ...
    def quantize_weight_with(
        self, weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, group_size: int
    ) -> Tensor: ...
    def refresh_operators(self) -> int: ...
    def reset_fallback_counts(self) -> None: ...
    def scales_fit(
        self, scale: Tensor, shift: Tensor | None, qtype: str, dtype: torch.dtype
    ) -> bool: ...
    def supported_isas(self) -> list[str]: ...
    def weight_from_parts(
        self,
        data: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        qtype: str,
        group_size: int,
        sizes: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor: ...
