"""Quantization for PyTorch: a thin layer over Quantal's C++ library.

import quantal

quantal.quantize(model, weights=quantal.qint4)
quantal.freeze(model)

QUANTAL_COMPAT=1 in the environment makes ``optimum.quanto`` resolve to this package, as
``import quantal.compat`` does.
"""

import os as _os
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from ._library import library_path
from .calibrate import Calibration
from .checkpoint import load, save
from .grouped import axis_to_dim, group, grouped_shape, ungroup
from .models import (
    QuantizedDiffusersModel,
    QuantizedModelForCausalLM,
    QuantizedPixArtTransformer2DModel,
    QuantizedTransformersModel,
)
from .nn import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QEmbedding,
    QLayerNorm,
    QLinear,
    QModuleMixin,
    QWeight,
    quantize_module,
    register_qmodule,
)
from .optimizers import (
    AbsmaxOptimizer,
    AffineOptimizer,
    HqqOptimizer,
    MaxOptimizer,
    Optimizer,
    SymmetricOptimizer,
)
from .parameters import QParameter, quantize_parameter
from .qtype import (
    qfloat8,
    qfloat8_e4m3fn,
    qfloat8_e4m3fnuz,
    qfloat8_e5m2,
    qint2,
    qint4,
    qint8,
    qtype,
    qtypes,
)
from .quantize import freeze, quantization_map, quantize, requantize
from .report import LayerReport, Report, report
from .tensor import (
    ActivationQBytesTensor,
    QBitsTensor,
    QBytesTensor,
    QTensor,
    WeightQBitsTensor,
    WeightQBytesTensor,
    absmax_scale,
    dtype_info,
    qfallback,
    quantize_activation,
    quantize_weight,
)

__version__ = "0.1.0"

__all__ = [
    "AbsmaxOptimizer",
    "ActivationQBytesTensor",
    "AffineOptimizer",
    "Calibration",
    "HqqOptimizer",
    "LayerReport",
    "MaxOptimizer",
    "Optimizer",
    "QBitsTensor",
    "QBytesTensor",
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
    "QParameter",
    "QTensor",
    "QWeight",
    "QuantizedDiffusersModel",
    "QuantizedModelForCausalLM",
    "QuantizedPixArtTransformer2DModel",
    "QuantizedTransformersModel",
    "Report",
    "SymmetricOptimizer",
    "WeightQBitsTensor",
    "WeightQBytesTensor",
    "absmax_scale",
    "axis_to_dim",
    "dtype_info",
    "freeze",
    "get_extension",
    "group",
    "grouped_shape",
    "is_diffusers_available",
    "is_extension_available",
    "is_transformers_available",
    "library_path",
    "load",
    "qfallback",
    "qfloat8",
    "qfloat8_e4m3fn",
    "qfloat8_e4m3fnuz",
    "qfloat8_e5m2",
    "qint2",
    "qint4",
    "qint8",
    "qtype",
    "qtypes",
    "quantization_map",
    "quantize",
    "quantize_activation",
    "quantize_module",
    "quantize_parameter",
    "quantize_weight",
    "register_qmodule",
    "report",
    "requantize",
    "save",
    "ungroup",
]


def is_transformers_available() -> bool:
    """Whether transformers is installed; it is not imported."""
    return _find_spec("transformers") is not None


def is_diffusers_available() -> bool:
    """Whether diffusers is installed; it is not imported."""
    return _find_spec("diffusers") is not None


def is_extension_available(extension_type: str) -> bool:
    """False: kernels are in the C++ library, and nothing is compiled at run time."""
    return False


def get_extension(extension_type: str) -> _Any:
    """KeyError: there are no extensions that would be compiled at run time."""
    raise KeyError(extension_type)


if _TYPE_CHECKING:  # where a name that is not there is an error
    from .integrations.transformers import QuantalConfig as QuantalConfig
else:

    def __getattr__(name: str) -> _Any:
        """QuantalConfig, which needs transformers, is imported when it is asked for."""
        if name == "QuantalConfig":
            from .integrations.transformers import QuantalConfig

            return QuantalConfig
        raise AttributeError(f"module 'quantal' has no attribute '{name}'")


if _os.environ.get("QUANTAL_COMPAT", "0") not in ("", "0"):
    from . import compat as compat
