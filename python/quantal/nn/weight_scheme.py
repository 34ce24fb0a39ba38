"""What a weight is quantized to, whoever holds it: a module or a parameter of one."""

import math
from typing import Any

import torch

from .._library import ops
from ..optimizers import AffineOptimizer, SymmetricOptimizer
from ..qtype import qtype as QType  # noqa: N812

__all__ = ["check_optimizer", "choose_group_size", "freeze_for", "weight_snr_db"]


def choose_group_size(qtype: QType, row_length: int, wanted: int | None) -> int:
    """The wanted one, checked, or the default; 0: one group a row."""
    if wanted is None:
        return ops.default_group_size(qtype.name, row_length)
    if wanted < 0 or (wanted and (not qtype.is_affine or row_length % wanted)):
        raise ValueError(
            f"[quantal] expected a group size that divides rows of {row_length} elements (qint2 "
            f"and qint4 only), got {wanted} for {qtype.name}"
        )
    return wanted


def check_optimizer(qtype: QType, optimizer: Any) -> None:
    """ValueError for one of the other kind: symmetric ones give no shifts, which qint2 and qint4
    need."""
    wanted = AffineOptimizer if qtype.is_affine else SymmetricOptimizer
    if not isinstance(optimizer, wanted):
        raise ValueError(
            f"[quantal] expected {qtype.name} to come with a subclass of {wanted.__name__}, got "
            f"{type(optimizer).__name__}"
        )


def weight_snr_db(exact: torch.Tensor, decoded: torch.Tensor) -> float | None:
    """Signal-to-noise ratio of a quantization; None where there is no signal or no noise."""
    if exact.is_meta:
        return None
    norm = torch.linalg.vector_norm
    signal = norm(exact, dtype=torch.float64).item()
    noise = norm(decoded.float() - exact.float(), dtype=torch.float64).item()
    return 20 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def freeze_for(
    state_dict: dict[str, Any],
    prefix: str,
    qtype: QType,
    group_size: int,
    shape: torch.Size,
    like: torch.Tensor,
) -> tuple[tuple, int] | None:
    """Empty parts that take the codes of a state_dict, and the group size that their shapes tell;
    None where it has none. A scale without dimensions, optimum-quanto's form of a single row,
    becomes one of this shape."""
    data = state_dict.get(prefix + ("_data._data" if qtype.is_affine else "_data"))
    scale = state_dict.get(prefix + "_scale")
    if data is None or scale is None:
        return None
    if qtype.is_affine and data.ndim == 2 and scale.ndim == 2 and scale.shape[1] == 1:
        is_grouped = scale.shape[0] != shape[0] or group_size
        group_size = data.shape[1] if is_grouped else 0
    if scale.ndim == 0:
        state_dict[prefix + "_scale"] = scale.reshape([1] * len(shape))
    empty = torch.empty(shape, dtype=like.dtype, device="meta")
    parts = ops.encode(empty, qtype.name, group_size)
    codes, steps, offsets = (torch.empty_like(part, device=like.device) for part in parts)
    shift = offsets.to(scale.dtype) if qtype.is_affine else None
    return (codes, steps.to(scale.dtype), shift), group_size
