"""Who chooses the scale (and shift) of a weight's groups. The arithmetic is the C++ library's."""

import logging
from abc import ABC, abstractmethod
from typing import Any

import torch

from ._library import ops
from .grouped import group
from .qtype import qtype as QType  # noqa: N812

__all__ = [
    "AbsmaxOptimizer",
    "AffineOptimizer",
    "HqqOptimizer",
    "MaxOptimizer",
    "Optimizer",
    "SymmetricOptimizer",
]

_logger = logging.getLogger(__name__)


class Optimizer(ABC):
    """Base class. An own optimizer derives from SymmetricOptimizer or AffineOptimizer and
    overrides ``optimize``. Where it returns scale 0, as ``range / levels`` does for a group of one
    value, 1 is taken, which represents that value."""

    #: The C++ quantizer that gives the same result, where there is one.
    quantizer: str | None = None

    @property
    def options(self) -> list[float]:
        """Its options."""
        return []

    def encode(self, weight: torch.Tensor, qtype: QType, group_size: int) -> tuple:
        """Codes, scale and shift (None for 8-bit types) as that quantizer gives them: what modules
        use where there is one."""
        data, scale, shift = ops.encode(
            weight.detach(), qtype.name, group_size, self.quantizer or "", self.options
        )
        return data, scale, shift if qtype.is_affine else None

    @abstractmethod
    def __call__(self, base: torch.Tensor, qtype: QType, *args: Any, **kwargs: Any) -> Any:
        """The scale (and shift) of `base`, broadcastable to it."""


def _rows(base: torch.Tensor, axis: int | None) -> torch.Tensor:
    """`base` as a matrix with what shares a scale in each row."""
    if axis is None:
        return base.reshape(1, -1)
    if axis == 0:
        return base.reshape(base.shape[0], -1)
    return base.reshape(-1, base.shape[-1]).t().contiguous()


def _never_zero(scale: torch.Tensor) -> torch.Tensor:
    return scale.masked_fill(scale == 0, 1)


def _scale_shape(base: torch.Tensor, axis: int | None) -> list[int]:
    shape = [1] * base.ndim
    if axis is None:
        return []
    shape[axis] = base.shape[axis]
    return shape


class SymmetricOptimizer(Optimizer):
    """Scales alone, for 8-bit types."""

    def __call__(self, base: torch.Tensor, qtype: QType, axis: int | None = None) -> torch.Tensor:
        if axis not in (None, 0, -1):
            raise ValueError("axis parameter must be None, 0 (first axis) or -1 (last axis)")
        if axis is not None and base.shape[axis] == 1:
            axis = None
        return _never_zero(self.optimize(base, qtype, axis))

    def optimize(self, base: torch.Tensor, qtype: QType, axis: int | None = None) -> torch.Tensor:
        """The scale of `base`: 0-dim (axis None), or one for each index of the axis."""
        raise NotImplementedError


class AbsmaxOptimizer(SymmetricOptimizer):
    """``scale = max|x| / qmax``; a group of zeros gets scale 1."""

    quantizer = "absmax"

    def optimize(self, base: torch.Tensor, qtype: QType, axis: int | None = None) -> torch.Tensor:
        _, scale, _ = self.encode(_rows(base, axis), qtype, 0)
        return scale.reshape(_scale_shape(base, axis))


class AffineOptimizer(Optimizer):
    """Scales and shifts, for qint2 and qint4: ``value = scale * code - shift``."""

    def __call__(
        self,
        base: torch.Tensor,
        qtype: QType,
        axis: int,
        group_size: int | None = None,
        zeropoint: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift of every group; with `zeropoint` the shift is the code of zero."""
        if axis not in (0, -1):
            raise ValueError("axis parameter must be 0 (first axis) or -1 (last axis)")
        if group_size is not None:
            base = group(base, axis, group_size)
        scale, shift = self.optimize(base, qtype, axis)
        scale = _never_zero(scale)
        if zeropoint:
            shift = torch.clamp(torch.round(shift / scale), 0, 2**qtype.bits - 1).to(torch.uint8)
        return scale, shift

    def optimize(
        self, base: torch.Tensor, qtype: QType, axis: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift of `base`, one for each index of the axis."""
        raise NotImplementedError


class MaxOptimizer(AffineOptimizer):
    """``scale = (max - min) / (2^bits - 1)``, ``shift = -min``."""

    quantizer = "max"

    def optimize(
        self, base: torch.Tensor, qtype: QType, axis: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, scale, shift = self.encode(_rows(base, axis), qtype, 0)
        shape = _scale_shape(base, axis)
        return scale.reshape(shape), shift.reshape(shape)


class HqqOptimizer(MaxOptimizer):
    """MaxOptimizer, its shift refined by half-quadratic quantization (Badri and Shaji, 2023).

    `verbose` logs the mean error of a weight before and after, as information of the logger
    ``quantal.optimizers``.
    """

    quantizer = "hqq"

    def __init__(
        self,
        lp_norm: float = 0.7,
        beta: float = 1e1,
        kappa: float = 1.01,
        iters: int = 20,
        verbose: bool = False,
    ) -> None:
        self.lp_norm, self.beta, self.kappa, self.iters = lp_norm, beta, kappa, iters
        self.verbose = verbose

    @property
    def options(self) -> list[float]:
        """What the C++ quantizer takes."""
        return [self.lp_norm, float(self.beta), self.kappa, float(self.iters)]

    def encode(self, weight: torch.Tensor, qtype: QType, group_size: int) -> tuple:
        """As of every optimizer; `verbose` logs what the refinement gained."""
        parts = super().encode(weight, qtype, group_size)
        if self.verbose and not weight.is_meta:
            before = _mean_error(weight, qtype, group_size, MaxOptimizer().encode)
            after = _mean_error(weight, qtype, group_size, lambda *_: parts)
            _logger.info("[quantal] HQQ: mean error %.6g before, %.6g after", before, after)
        return parts


def _mean_error(weight: torch.Tensor, qtype: QType, group_size: int, encode: Any) -> float:
    data, scale, shift = encode(weight, qtype, group_size)
    value = ops.decode(
        data, scale, shift, qtype.name, group_size, list(weight.shape), torch.float32
    )
    return (value - weight.detach()).abs().mean().item()


def default_optimizer(qtype: QType) -> Optimizer:
    """Absmax for 8-bit types, max for qint2 and qint4."""
    return MaxOptimizer() if qtype.is_affine else AbsmaxOptimizer()
