"""Views of a tensor with one quantization group a row (axis 0) or a column (axis -1)."""

import math
from collections.abc import Sequence

import torch

__all__ = ["axis_to_dim", "group", "grouped_shape", "ungroup"]


def axis_to_dim(t: torch.Tensor, axis: int) -> list[int]:
    """Every dimension of `t` but `axis`."""
    return [d for d in range(t.ndim) if d != axis % t.ndim]


def _check_axis(axis: int) -> None:
    if axis not in (0, -1):
        raise ValueError("Axis must be 0 or -1 for group-wise quantization")


def grouped_shape(shape: Sequence[int], axis: int, group_size: int) -> tuple[int, int]:
    """The shape that `group` gives a tensor of `shape`."""
    _check_axis(axis)
    groups = math.prod(shape) // group_size
    return (groups, group_size) if axis == 0 else (group_size, groups)


def group(base: torch.Tensor, axis: int, group_size: int) -> torch.Tensor:
    """`base` as a matrix with one group of `group_size` elements a row or, axis -1, a column."""
    _check_axis(axis)
    length = base.numel() // base.shape[axis]
    if group_size > length or length % group_size != 0:
        raise ValueError(f"Group size ({group_size}) must be a divisor of ({length})")
    if axis == 0:
        return base.reshape(-1, group_size)
    split = base.reshape(length // group_size, group_size, base.shape[-1])
    return split.permute(1, 2, 0).reshape(group_size, -1)


def ungroup(grouped: torch.Tensor, axis: int, orig_shape: Sequence[int]) -> torch.Tensor:
    """Undoes `group`."""
    if grouped.shape == torch.Size(orig_shape):
        return grouped
    if axis == 0:
        return grouped.reshape(orig_shape)
    split = grouped.reshape(grouped.shape[0], orig_shape[-1], -1)
    return split.permute(2, 0, 1).reshape(orig_shape)
