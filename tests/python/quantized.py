"""The C++ library's operators, and quantized tensors of each kind."""

import os
from pathlib import Path

import torch

_BUILT = Path(__file__).parents[2] / "build" / "release" / "src" / "libquantal.so"
# Where `import quantal` looks, too.
torch.ops.load_library(os.environ.setdefault("QUANTAL_LIBRARY", str(_BUILT)))

ops = torch.ops.quantal

QTYPES = ("qint2", "qint4", "qint8", "qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2")
EIGHT_BITS = QTYPES[2:]


def weight(rows: int = 6, columns: int = 8) -> torch.Tensor:
    """A random float matrix."""
    return torch.randn(rows, columns)


def activation_scale(x: torch.Tensor) -> torch.Tensor:
    """The scale that maps the largest number of `x` to the largest code of qint8."""
    return (x.detach().abs().max() / 127).clamp_min(1e-6)


def quantize(kind: str, x: torch.Tensor) -> torch.Tensor:
    """`x` as a frozen weight, a live weight over a copy of it, or an activation, of qint8."""
    if kind == "frozen":
        return ops.quantize_weight(x, "qint8")
    if kind == "live":
        copy = x.detach().clone(memory_format=torch.contiguous_format)
        return ops.live_weight(copy.requires_grad_(x.requires_grad), "qint8")
    assert kind == "activation"
    return ops.quantize_activation(x, "qint8", activation_scale(x))


def float_value(x: torch.Tensor) -> torch.Tensor:
    """What operations without quantized arithmetic read of `x`: the latent of live weights."""
    return ops.latent(x) if ops.is_live(x) else ops.dequantize(x)
