"""The operators of ``torch.ops.quanto`` that have a plain meaning, with optimum-quanto's results.

Not here are those whose arguments only its own CUDA kernels can make or read: ``gemm_f16i4_awq``,
``gemm_f16i4_marlin``, ``gemm_f16f8_marlin`` and ``pack_fp8_marlin``.
"""

from collections.abc import Callable
from functools import cache

import torch

from quantal import group, qtype, qtypes
from quantal._library import ops
from quantal.tensor import dtype_info, unpacked_codes

__all__ = ["register"]


def quantize_symmetric(
    base: torch.Tensor, dtype: torch.dtype, axis: int | None, scale: torch.Tensor
) -> torch.Tensor:
    """Codes ``base / scale`` of `dtype`, with one scale (axis None) or one for each index."""
    if axis is None:
        if scale.ndim > 0:
            raise ValueError("Scale must be a scalar when quantizing per-tensor")
    else:
        _check_axis(base, axis, scale)
    codes = base / scale
    info = dtype_info(dtype)
    return (codes if dtype.is_floating_point else codes.round()).clamp(info.min, info.max).to(dtype)


def _check_axis(base: torch.Tensor, axis: int, scale: torch.Tensor) -> None:
    if base.ndim == 1:
        raise ValueError("1D Tensors cannot be quantized per-axis")
    if axis not in (0, -1, base.ndim - 1):
        raise ValueError("Quantization is only supported along the first or last axis.")
    if base.shape[axis] == 1:
        raise ValueError(
            f"Cannot quantize Tensor of shape {base.shape} along axis {axis} of size 1"
        )
    if sum(size != 1 for size in scale.shape) > 1:
        raise ValueError("Quantizing along multiple axis is not supported")
    if scale.ndim != base.ndim:
        raise ValueError(
            "When quantizing per-axis, the scale must be broadcastable to the base (Tip: try to "
            "add missing dims of length zero)."
        )


def quantize_affine(
    base: torch.Tensor,
    bits: int,
    axis: int,
    group_size: int | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    """Codes of `bits` bits, one a byte, grouped where there is a group size. An integer shift is a
    zero-point."""
    if axis not in (0, -1):
        raise ValueError("axis parameter must be 0 (first axis) or -1 (last axis)")
    if group_size is not None:
        base = group(base, axis, group_size)
    if shift.is_floating_point():
        codes = ((base + shift) / scale).round()
    else:
        codes = (base / scale).round() + shift
    return codes.clamp(0, 2**bits - 1).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, one a byte, of bytes that hold several: those of the low bits first."""
    if bits not in (2, 4):
        raise ValueError("Can only unpack 2-bit or 4-bit tensors.")
    if packed.dtype != torch.uint8:
        raise RuntimeError(f"Unsupported data type: expected torch.uint8, got {packed.dtype}")
    return unpacked_codes(packed, bits)


def qbytes_mm(
    activations: torch.Tensor, weights: torch.Tensor, output_scales: torch.Tensor
) -> torch.Tensor:
    """``activations · (scales · weights)ᵀ`` in the scales' dtype: 8-bit weights (out, in), scales
    (out, 1) or one of no dimension; activations (…, in) are floats or int8 codes."""
    scales, rows = output_scales, len(weights)
    per_row = scales.reshape(-1, 1).expand(rows, 1)
    if activations.dtype == weights.dtype == torch.int8 and not activations.is_cuda:
        sums = torch._int_mm(activations.reshape(-1, activations.shape[-1]), weights.t())
        value = (sums * per_row.t().float()).to(scales.dtype)
        return value.reshape(*activations.shape[:-1], rows)
    x = activations.to(scales.dtype)
    return ops.linear(x, weights, per_row, None, None, _qtype_of(weights.dtype).name, 0)


def _qtype_of(dtype: torch.dtype) -> qtype:
    for known in qtypes.values():
        if known.bits == 8 and known.dtype == dtype:
            return known
    raise ValueError(f"[quantal.compat] expected int8 or float8 weights, got {dtype}")


_SCHEMAS: dict[str, Callable[..., torch.Tensor]] = {
    "quantize_symmetric(Tensor base, ScalarType dtype, int? axis, Tensor scale) -> Tensor": (
        quantize_symmetric
    ),
    "quantize_affine(Tensor base, int bits, int axis, int? group_size, Tensor scale, "
    "Tensor shift) -> Tensor": quantize_affine,
    "unpack(Tensor self, int bits) -> Tensor": unpack,
    "qbytes_mm(Tensor A, Tensor B, Tensor scales) -> Tensor": qbytes_mm,
}


@cache  # operators go when their library does
def register() -> torch.library.Library:
    """Defines them. They have no gradients, as in optimum-quanto."""
    library = torch.library.Library("quanto", "DEF")
    for schema, kernel in _SCHEMAS.items():
        # Made of other operators: so it computes shapes of meta tensors, too.
        library.impl(library.define(schema), kernel, "CompositeExplicitAutograd")
    return library
