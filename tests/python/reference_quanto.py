"""The real optimum-quanto, called as its modules call it."""

from types import SimpleNamespace

import torch
from optimum import quanto
from optimum.quanto.library import qbytes_mm
from optimum.quanto.library.extensions.cpp import ext


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


# Its own unpack is compiled at the first use, into site-packages.
ext._lib = SimpleNamespace(unpack=_unpack)
# For bfloat16 it calls torch._weight_int8pack_mm where columns are a multiple of 4. torch's kernel
# reads 16 of them at a time on AVX-512, past the end of other rows, and there it may crash.
qbytes_mm.qbytes_int8pack_mm = qbytes_mm.qbytes_mm

OPTIMIZERS = {
    "absmax": quanto.AbsmaxOptimizer,
    "max": quanto.MaxOptimizer,
    "hqq": quanto.HqqOptimizer,
}


def optimizers(qtype: str) -> tuple[str, ...]:
    """The names of the optimizers that fit a qtype."""
    return ("max", "hqq") if quanto.qtypes[qtype].bits < 8 else ("absmax",)


def group_size(weight: torch.Tensor, qtype: str) -> int | None:
    """The group size that optimum-quanto's modules choose for a weight of this shape."""
    layer = torch.nn.Linear(weight[0].numel(), 1, bias=False, device="meta")
    return quanto.QLinear.from_module(layer, weights=quanto.qtypes[qtype]).weight_group_size


def quantize(
    weight: torch.Tensor, qtype: str, optimizer: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Codes as they are stored, scale, shift and the value of a weight."""
    chosen = quanto.qtypes[qtype]
    if chosen.bits == 8:
        scale = OPTIMIZERS[optimizer]()(weight, qtype=chosen, axis=0)
        quantized = quanto.quantize_weight(weight, chosen, 0, scale, optimized=False)
        return quantized._data, quantized._scale, None, quantized.dequantize()
    groups = group_size(weight, qtype)
    scale, shift = OPTIMIZERS[optimizer]()(weight, qtype=chosen, axis=0, group_size=groups)
    quantized = quanto.quantize_weight(weight, chosen, 0, scale, shift, groups, optimized=False)
    return quantized._data._data, quantized._scale, quantized._shift, quantized.dequantize()
