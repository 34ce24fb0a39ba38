"""What every peer gives: named schemes, and copies of a linear layer in one of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Families: layers that do the same job, and so are compared with each other. w4 keeps the
# activations in floating point; w4a8 quantizes them to int8, and pays for that, in every call.
FAMILIES = ("float", "fp8", "w8", "w8a8", "w4", "w4a8", "w2", "w2a8")

# The largest relative error, ||y - y64|| / ||y64|| over normal weights and activations, with which
# a family's result can be right. A wrong layout or scale gives 1 and more. Two bits lose a lot.
MAX_ERROR = {
    "float": 0.02,
    "fp8": 0.06,
    "w8": 0.03,
    "w4": 0.2,
    "w2": 0.75,
    "w8a8": 0.06,
    "w4a8": 0.2,
    "w2a8": 0.75,
}

GROUP = 128  # columns that share a scale, where a peer lets us choose


class UnavailableError(Exception):
    """A scheme that this build or this machine cannot run: the message says why."""


@dataclass(frozen=True)
class Scheme:
    """A way to store the weight and to compute with it."""

    name: str
    family: str
    weight_bits: float  # without scales: decides how many copies exceed the caches


@dataclass(frozen=True)
class Run:
    """Layers that are bound to an activation and ready to be timed."""

    calls: Sequence[Callable[[], object]]  # called in turn, so that each meets cold weights
    output: Callable[[], Floats]  # of the first copy, (tokens, rows)
    layers_per_call: int = 1  # more for graphs, which compute all copies in one call


class Linears(Protocol):
    """Copies of one linear layer, each with a weight in memory of its own."""

    weight_bytes: int  # of one copy, with its scales

    def bind(self, x: Floats, copies: int) -> Run:
        """The first `copies` layers, over activations `x` of shape (tokens, columns)."""
        ...


def row_chunks(rows: int, size: int = 512) -> Iterator[slice]:
    """Slices that cover `rows`, small enough that what is computed of each stays in the caches."""
    return (slice(begin, min(begin + size, rows)) for begin in range(0, rows, size))


def quantize_symmetric(
    weight: Floats, bits: int, group: int | None
) -> tuple[NDArray[np.int8], Floats]:
    """Codes (rows, columns) and scales (rows, groups) with weight ≈ code * scale.

    Codes are in [-2^(bits-1), 2^(bits-1) - 1]; one group a row where `group` is None.
    """
    rows, columns = weight.shape
    group = group or columns
    top = 2 ** (bits - 1)
    codes = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // group), np.float32)
    for chunk in row_chunks(rows):
        grouped = weight[chunk].reshape(-1, columns // group, group)
        # Of two bits, the lone code -2 has to reach the largest weight.
        scale = np.abs(grouped).max(axis=2, keepdims=True) / (top if bits == 2 else top - 1)
        code = np.clip(np.rint(grouped / scale), -top, top - 1)
        codes[chunk] = code.reshape(-1, columns)
        scales[chunk] = scale[:, :, 0]
    return codes, scales


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Codes plus 2^(bits-1), packed along the columns, the first in the lowest bits."""
    per_byte = 8 // bits
    rows, columns = codes.shape
    packed = np.zeros((rows, columns // per_byte), np.uint8)
    for chunk in row_chunks(rows):
        unsigned = (codes[chunk].astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
        for i in range(per_byte):
            packed[chunk] |= unsigned[:, i::per_byte] << (bits * i)
    return packed


def make_distinct(codes: NDArray[np.uint8] | NDArray[np.int8], copy: int) -> NDArray[np.generic]:
    """A copy of `codes` that differs from every other: compilers of graphs merge equal constants.

    The first copy, whose result is checked, is as it was.
    """
    changed = codes.copy()
    if copy > 0:
        flat = changed.reshape(-1)
        flat[:2] ^= np.array([copy & 0x7F, copy >> 7], flat.dtype)
    return changed
