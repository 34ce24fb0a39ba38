"""Quantized modules."""

from .qconv import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
)
from .qembedding import QEmbedding
from .qlayernorm import QLayerNorm
from .qlinear import QLinear
from .qmodule import QModuleMixin, quantize_module, register_qmodule
from .qweight import PackedCodes, QWeight

__all__ = [
    "PackedCodes",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QEmbedding",
    "QLayerNorm",
    "QLinear",
    "QModuleMixin",
    "QWeight",
    "quantize_module",
    "register_qmodule",
]
