"""The orders that optimum-quanto's CUDA kernels want 4-bit and float8 codes in: they move codes and
compute nothing, on any device. Quantal's kernels use none of them."""

from collections.abc import Sequence
from enum import Enum

import torch

__all__ = [
    "AWQ_ORDER",
    "AWQ_REVERSE_ORDER",
    "AWQPacking",
    "awq_pack",
    "awq_unpack",
    "get_scale_perms",
    "marlin_pack",
    "marlin_permute",
    "marlin_unpack",
    "pack_fp8_as_int32",
    "pack_v2",
    "reorder",
    "reverse",
    "reverse_awq_order",
    "unpack_int32_to_fp8",
    "unpack_int32_to_uint8",
    "unpack_v2",
]

#: The column, of eight, whose code is in the i-th four bits of a reordered int32.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
#: Undoes it.
AWQ_REVERSE_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]

Permutation = torch.Tensor | Sequence[int]


def _joined(codes: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Codes of the last dimension in one integer, the first in the low bits."""
    shifts = torch.arange(codes.shape[-1], device=codes.device) * bits
    return (codes.to(torch.int64) << shifts).sum(-1).to(dtype)


def _split(words: torch.Tensor, bits: int, total_bits: int) -> torch.Tensor:
    """Undoes `_joined`."""
    shifts = torch.arange(0, total_bits, bits, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8)


def unpack_int32_to_uint8(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of each row of an int32 matrix, those of the low bits first."""
    return _split(packed, bits, 32).flatten(1)


def reorder(t: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """`t` with each run of as many elements permuted."""
    return t.reshape(-1, len(permutation))[:, permutation].reshape(t.shape).contiguous()


def reverse(permutation: Permutation) -> torch.Tensor:
    """What undoes a permutation."""
    return torch.as_tensor(permutation).argsort()


# ---- AWQ


class AWQPacking(Enum):
    """V1: eight codes of a row in an int32. V2: one of four rows each in an int16."""

    V1 = 1
    V2 = 2


def awq_pack(unpacked: torch.Tensor, reorder: bool = False) -> torch.Tensor:
    """(rows, columns) codes as int32 (rows, columns / 8)."""
    order = AWQ_ORDER if reorder else list(range(8))
    return _joined(unpacked.unflatten(1, (-1, 8))[..., order], 4, torch.int32)


def awq_unpack(packed: torch.Tensor, reorder: bool = False) -> torch.Tensor:
    """Undoes `awq_pack`."""
    codes = unpack_int32_to_uint8(packed, 4)
    return reverse_awq_order(codes) if reorder else codes


def reverse_awq_order(t: torch.Tensor) -> torch.Tensor:
    """Columns in their own order again."""
    return t.unflatten(1, (-1, 8))[..., AWQ_REVERSE_ORDER].flatten(1)


def pack_v2(unpacked: torch.Tensor) -> torch.Tensor:
    """(rows, columns) codes as int16 (rows / 4, columns); columns in multiples of 64."""
    rows, columns = unpacked.shape
    blocks = unpacked.reshape(rows, columns // 32, 4, 4, 2).permute(0, 1, 3, 4, 2)
    strips = blocks.reshape(rows // 4, 4, columns // 64, 64).transpose(1, 2)
    return _joined(strips.reshape(rows // 4, columns, 4), 4, torch.int16)


def unpack_v2(packed: torch.Tensor) -> torch.Tensor:
    """Undoes `pack_v2`."""
    quarter, columns = packed.shape
    strips = _split(packed, 4, 16).reshape(quarter, columns // 64, 4, 64).transpose(1, 2)
    blocks = strips.reshape(quarter * 4, columns // 32, 4, 2, 4).permute(0, 1, 4, 2, 3)
    return blocks.reshape(quarter * 4, columns)


# ---- Marlin


def _scale_order() -> list[int]:
    return [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def marlin_permute(t: torch.Tensor, reverse: bool = False) -> torch.Tensor:
    """Scales (groups, out), or (1, out), in the order of Marlin's 4-bit kernel; or back."""
    rows = _scale_order() if t.shape[0] == 1 else [i + 8 * j for i in range(8) for j in range(8)]
    order = torch.tensor(rows)
    return reorder(t, order.argsort() if reverse else order)


def get_scale_perms() -> torch.Tensor:
    """The order of the scales of Marlin's float8 kernel."""
    return torch.tensor(_scale_order())


def _tile_order() -> torch.Tensor:
    """Where the codes of four tiles of 16 x 16 are for the 32 threads of a warp: each has eight of
    each tile, in the order of the tensor core's fragments, interleaved as AWQ's."""
    thread = torch.arange(32).reshape(32, 1, 1)
    tile = torch.arange(4).reshape(1, 4, 1)
    code = torch.tensor(AWQ_ORDER)
    row = 2 * (thread % 4) + code % 2 + 8 * (code % 4 // 2)
    column = thread // 4 + 8 * (code // 4)
    return (256 * tile + 16 * row + column).flatten()


def marlin_pack(unpacked: torch.Tensor) -> torch.Tensor:
    """(out, in) codes as int32 (in / 16, 2 out); both in multiples of 64."""
    rows, columns = unpacked.shape
    tiles = unpacked.t().reshape(columns // 16, 16, rows // 16, 16).transpose(1, 2)
    codes = reorder(tiles.reshape(columns // 16, rows * 16), _tile_order())
    return _joined(codes.unflatten(1, (-1, 8)), 4, torch.int32)


def marlin_unpack(packed: torch.Tensor, orig_shape: Sequence[int]) -> torch.Tensor:
    """Undoes `marlin_pack`."""
    rows, columns = orig_shape
    codes = reorder(unpack_int32_to_uint8(packed, 4), reverse(_tile_order()))
    tiles = codes.reshape(columns // 16, rows // 16, 16, 16).transpose(1, 2)
    return tiles.reshape(columns, rows).t()


def pack_fp8_as_int32(fp8_tensor: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn (rows, columns) as int32 (rows / 4, columns), the first of four rows in the low
    bits. ValueError for other numbers of rows."""
    if fp8_tensor.shape[0] % 4 != 0:
        raise ValueError(
            f"[quantal.compat] expected a multiple of 4 rows, got {fp8_tensor.shape[0]}"
        )
    octets = fp8_tensor.view(torch.uint8).unflatten(0, (-1, 4))
    return _joined(octets.transpose(1, 2), 8, torch.int32)


def unpack_int32_to_fp8(int32_tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of an int32 matrix as float8_e4m3fn: all those of the low bits first."""
    octets = _split(int32_tensor, 8, 32).movedim(-1, 0)
    return octets.flatten(0, 1).view(torch.float8_e4m3fn)
