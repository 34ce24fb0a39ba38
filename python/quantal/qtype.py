"""Quantization types: how one quantized value is stored."""

from dataclasses import dataclass

import torch

__all__ = [
    "qfloat8",
    "qfloat8_e4m3fn",
    "qfloat8_e4m3fnuz",
    "qfloat8_e5m2",
    "qint2",
    "qint4",
    "qint8",
    "qtype",
    "qtypes",
]


@dataclass(frozen=True)
class qtype:  # noqa: N801  (optimum-quanto's name)
    """A name, a width, the dtype of the codes and their nominal range.

    8-bit types are symmetric, ``value = scale * code``; ``qint2`` and ``qint4`` are affine,
    ``value = scale * code - shift``, several codes a byte.
    """

    name: str
    is_floating_point: bool
    bits: int
    dtype: torch.dtype
    qmin: float
    qmax: float

    def __str__(self) -> str:
        return f"quantal.{self.name}"

    @property
    def is_affine(self) -> bool:
        """True where a code needs a shift beside its scale."""
        return self.bits < 8

    @staticmethod
    def qint(bits: int) -> "qtype":
        """The integer type of 2, 4 or 8 bits."""
        half = 2 ** (bits - 1)
        return qtype(f"qint{bits}", False, bits, torch.int8, -half, half - 1)

    @staticmethod
    def qfloat(dtype: torch.dtype) -> "qtype":
        """The type of 8-bit floating-point codes of `dtype`."""
        info = torch.finfo(dtype)
        name = f"q{str(dtype).removeprefix('torch.')}"
        return qtype(name, True, 8, dtype, info.min, info.max)


qint2 = qtype.qint(2)
qint4 = qtype.qint(4)
qint8 = qtype.qint(8)
qfloat8_e4m3fn = qtype.qfloat(torch.float8_e4m3fn)
qfloat8_e4m3fnuz = qtype.qfloat(torch.float8_e4m3fnuz)
qfloat8_e5m2 = qtype.qfloat(torch.float8_e5m2)
qfloat8 = qfloat8_e4m3fn

#: Every qtype by name; "qfloat8" is qfloat8_e4m3fn.
qtypes: dict[str, qtype] = {
    t.name: t for t in (qint2, qint4, qint8, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2)
}
qtypes["qfloat8"] = qfloat8

# What configurations of transformers and command lines call them.
_SHORT = {"int2": qint2, "int4": qint4, "int8": qint8, "float8": qfloat8}


def find_qtype(value: "qtype | str | None") -> "qtype | None":
    """The qtype itself, or the one of that name ("qint4", "int4", "none"). KeyError: no such."""
    if value is None or isinstance(value, qtype):
        return value
    if value == "none":
        return None
    found = qtypes.get(value) or _SHORT.get(value)
    if found is None:
        raise KeyError(f"[quantal] expected one of {', '.join(qtypes)}, got '{value}'")
    return found
