"""Quantal itself, through the operators of the built library."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

from peers.peer import Floats, Linears, Scheme, UnavailableError
from peers.torch_layers import TorchLinears, nbytes, prepare_torch

_BUILT = Path(__file__).parents[2] / "build" / "release" / "src" / "libquantal.so"
torch.ops.load_library(os.environ.get("QUANTAL_LIBRARY", str(_BUILT)))

# Scheme names are qtype[-a8][-bf16]: a8 quantizes the activations to int8 in every call.
SCHEMES = (
    Scheme("qint8", "w8", 8),
    Scheme("qint4", "w4", 4),
    Scheme("qint2", "w2", 2),
    Scheme("qfloat8_e4m3fn", "fp8", 8),
    Scheme("qint8-bf16", "w8", 8),
    Scheme("qint4-bf16", "w4", 4),
    Scheme("qint2-bf16", "w2", 2),
    Scheme("qfloat8_e4m3fn-bf16", "fp8", 8),
    Scheme("qint8-a8", "w8a8", 8),
    Scheme("qint4-a8", "w4a8", 4),
    Scheme("qint2-a8", "w2a8", 2),
)


def version() -> str:
    """The version that is measured."""
    return "quantal (build)"


def _weight_only(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def _dynamic() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The layer that quantizes its activations to int8, one scale a token."""
    op = getattr(torch.ops.quantal, "linear_dynamic", None)
    if op is None:
        raise UnavailableError("this build has no operator for dynamic activations")
    return lambda weight, x: op(x, weight)


def make(scheme: Scheme, weight: Floats, copies: int, threads: int) -> Linears:
    """See `peers.peer`."""
    prepare_torch(threads)
    qtype, *traits = scheme.name.split("-")
    call = _dynamic() if "a8" in traits else _weight_only
    dtype = torch.bfloat16 if "bf16" in traits else torch.float32
    w = torch.from_numpy(weight).to(dtype)
    first = torch.ops.quantal.quantize_weight(w, qtype)
    layers = [first, *(first.clone() for _ in range(copies - 1))]
    # A weight is packed at its first call.
    sample = torch.zeros(1, weight.shape[1], dtype=dtype)
    for layer in layers:
        call(layer, sample)
    parts = [part for part in torch.ops.quantal.parts(layers[0]) if part is not None]
    return TorchLinears(layers, call, nbytes(*parts), dtype)
