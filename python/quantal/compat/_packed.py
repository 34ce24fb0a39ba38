"""optimum-quanto's objects that hold codes of 2 or 4 bits, several a number."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch

from quantal.nn.qweight import PackedCodes
from quantal.tensor import packed_codes, unpacked_codes

from . import _layouts
from ._layouts import AWQPacking

__all__ = ["AWQPackedTensor", "MarlinInt4PackedTensor", "PackedTensor", "pack_weights"]


def _check_bits(bits: int) -> None:
    if bits not in (2, 4):
        raise ValueError(f"[quantal.compat] expected 2 or 4 bits, got {bits}")


def pack_weights(intweights: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 2 or 4 bits, one a byte, as several a byte along the first dimension."""
    _check_bits(bits)
    return packed_codes(intweights, bits)


class _Packed:
    """Codes that torch functions see unpacked, as uint8."""

    dtype = torch.uint8
    _data: torch.Tensor
    shape: torch.Size

    def unpack(self) -> torch.Tensor:
        """The codes, one a byte."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Of the packed codes."""
        return self._data.device

    def size(self, dim: int | None = None) -> Any:
        """Of the unpacked codes."""
        return self.shape if dim is None else self.shape[dim]

    def numpy(self) -> Any:
        """The codes, one a byte."""
        return self.unpack().cpu().numpy()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """On another device; ValueError for another dtype."""
        target = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if target.dtype != self.dtype:
            raise ValueError(
                f"{type(self).__name__} are torch.uint8 only and cannot be moved to {target.dtype}."
            )
        moved = copy(self)
        moved._data = self._data.to(target.device)
        return moved

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unpacked = [a.unpack() if isinstance(a, _Packed) else a for a in args]
        return func(*unpacked, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._data}, size={tuple(self.shape)})"


class _PackedMeta(type):
    """The packed codes of a frozen module count as PackedTensors."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, PackedCodes) or type.__instancecheck__(cls, value)


class PackedTensor(_Packed, metaclass=_PackedMeta):
    """Of 2 or 4 bits, several a byte, as in a state dict."""

    def __init__(
        self,
        data: torch.Tensor,
        bits: int,
        size: Sequence[int],
        stride: Any = None,
        requires_grad: bool = False,
    ) -> None:
        _check_bits(bits)
        self._data = data
        self._bits = bits
        self.shape = torch.Size(size)

    @property
    def bits(self) -> int:
        """Of a code."""
        return self._bits

    @classmethod
    def pack(cls, t: torch.Tensor, bits: int = 4) -> "PackedTensor":
        """From uint8 codes, one a byte."""
        return cls(pack_weights(t, bits), bits, t.shape)

    def unpack(self) -> torch.Tensor:
        """The codes, one a byte."""
        return unpacked_codes(self._data, self.bits)[: self.shape[0]]

    @staticmethod
    def load_from_state_dict(
        state_dict: Any,
        prefix: str,
        bits: int,
        size: Sequence[int],
        stride: Any,
        missing_keys: list[str],
    ) -> "PackedTensor | None":
        """Takes ``_data`` out; None, and a missing key, where there is none."""
        if prefix + "_data" not in state_dict:
            missing_keys.append(prefix + "_data")
            return None
        return PackedTensor(state_dict.pop(prefix + "_data"), bits, size)

    def __repr__(self) -> str:
        return f"PackedTensor({self._data}, bits={self.bits}, public_dtype={self.dtype})"


class AWQPackedTensor(_Packed):
    """4-bit codes in the order of AWQ's kernels, which Quantal has no use for."""

    def __init__(
        self,
        data: torch.Tensor,
        packing: AWQPacking,
        reorder: bool,
        size: Sequence[int],
        stride: Any,
        requires_grad: bool = False,
    ) -> None:
        self._data = data
        self._packing, self._reorder = packing, reorder
        self.shape = torch.Size(size)

    @classmethod
    def pack(
        cls, t: torch.Tensor, packing: AWQPacking = AWQPacking.V1, reorder: bool = False
    ) -> "AWQPackedTensor":
        """From (out, in) codes, one a byte. `reorder` is V1's."""
        is_v1 = packing == AWQPacking.V1
        data = _layouts.awq_pack(t, reorder) if is_v1 else _layouts.pack_v2(t)
        return cls(data, packing, reorder, t.shape, t.stride())

    def unpack(self) -> torch.Tensor:
        """The codes, one a byte."""
        if self._packing == AWQPacking.V1:
            return _layouts.awq_unpack(self._data, self._reorder)
        return _layouts.unpack_v2(self._data)


class MarlinInt4PackedTensor(_Packed):
    """4-bit codes in the order of Marlin's kernel, which Quantal has no use for."""

    def __init__(
        self, data: torch.Tensor, size: Sequence[int], stride: Any, requires_grad: bool = False
    ) -> None:
        self._data = data
        self.shape = torch.Size(size)

    @classmethod
    def pack(cls, t: torch.Tensor) -> "MarlinInt4PackedTensor":
        """From (out, in) codes, one a byte."""
        return cls(_layouts.marlin_pack(t), t.shape, t.stride())

    def unpack(self) -> torch.Tensor:
        """The codes, one a byte."""
        return _layouts.marlin_unpack(self._data, self.shape)
