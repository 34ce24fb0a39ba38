"""The modules of optimum.quanto and the names in each, as data."""

from importlib import import_module
from typing import Any

import quantal

from . import _replacements

__all__ = ["MODULES", "resolve"]

_QTYPES = ["qint2", "qint4", "qint8", "qfloat8", "qfloat8_e4m3fn", "qfloat8_e4m3fnuz"]
_QTYPES += ["qfloat8_e5m2"]
_QTYPE = ["qtype", "qtypes", *_QTYPES]
_CORE = ["axis_to_dim", "dtype_info"]
_GROUPED = ["group", "grouped_shape", "ungroup"]
_OPTIMIZERS = {
    "absmax_optimizer": ["AbsmaxOptimizer"],
    "affine_optimizer": ["AffineOptimizer"],
    "hqq_optimizer": ["HqqOptimizer"],
    "max_optimizer": ["MaxOptimizer"],
    "optimizer": ["Optimizer"],
    "symmetric_optimizer": ["SymmetricOptimizer"],
}
_QMODULE = ["QModuleMixin", "quantize_module", "register_qmodule"]
_NN = {
    "qconv2d": ["QConv2d"],
    "qlayernorm": ["QLayerNorm"],
    "qlinear": ["QLinear"],
    "qmodule": [*_QMODULE, "_QMODULE_TABLE"],
}
_EXTENSIONS = ["get_extension", "is_extension_available"]
_TRANSFORMERS = ["QuantizedTransformersModel", "QuantizedModelForCausalLM"]
_DIFFUSERS = ["QuantizedDiffusersModel", "QuantizedPixArtTransformer2DModel"]
_MODELS = [*_TRANSFORMERS, *_DIFFUSERS, "is_diffusers_available", "is_transformers_available"]
_QUANTIZE = ["freeze", "quantization_map", "quantize", "requantize"]
_WEIGHTS = ["WeightQBitsTensor", "WeightQBytesTensor", "quantize_weight"]
_AWQ = {"packed": ["AWQPackedTensor"], "qbits": ["AWQWeightQBitsTensor"]}
_TINYGEMM = {"packed": ["TinyGemmPackedTensor"], "qbits": ["TinyGemmWeightQBitsTensor"]}
_MARLIN_INT4 = {"packed": ["MarlinInt4PackedTensor"], "qbits": ["MarlinInt4WeightQBitsTensor"]}
_MARLIN_FP8 = {"packed": ["MarlinF8PackedTensor"], "qbits": ["MarlinF8QBytesTensor"]}


def _all(table: dict[str, list[str]]) -> list[str]:
    return [name for names in table.values() for name in names if not name.startswith("_")]


def _inside(package: str, table: dict[str, list[str]]) -> dict[str, list[str]]:
    return {package: _all(table)} | {f"{package}.{name}": names for name, names in table.items()}


_TENSOR = [*_CORE, *_GROUPED, *_all(_OPTIMIZERS), *_QTYPE, *_WEIGHTS, "ActivationQBytesTensor"]
_TENSOR += ["QBitsTensor", "QBytesTensor", "QTensor", "qfallback", "quantize_activation"]

#: Module (without the prefix "optimum.quanto.") → what it exports. Names with an underscore are
#: there, but no star import brings them.
MODULES: dict[str, list[str]] = {
    "": ["Calibration", "absmax_scale", *_EXTENSIONS, *_MODELS, *_all(_NN), *_QUANTIZE, *_TENSOR],
    "calibrate": ["Calibration", "absmax_scale"],
    "library": _EXTENSIONS,
    "library.extensions": _EXTENSIONS,
    "library.extensions.extension": _EXTENSIONS,
    "models": _MODELS,
    "models.diffusers_models": _DIFFUSERS,
    "models.shared_dict": ["ShardedStateDict"],
    "models.transformers_models": _TRANSFORMERS,
    **_inside("nn", _NN),
    "quantize": [*_QUANTIZE, "_quantize_submodule"],
    "subpackage": [],  # where optimum-cli looks for commands
    "tensor": _TENSOR,
    "tensor.activations": ["ActivationQBytesTensor", "quantize_activation"],
    "tensor.activations.qbytes": ["ActivationQBytesTensor"],
    "tensor.activations.quantization": ["quantize_activation"],
    "tensor.core": _CORE,
    "tensor.grouped": _GROUPED,
    **_inside("tensor.optimizers", _OPTIMIZERS),
    "tensor.packed": ["PackedTensor", "pack_weights"],
    "tensor.qbits": ["QBitsTensor"],
    "tensor.qbytes": ["QBytesTensor"],
    "tensor.qtensor": ["QTensor", "qfallback"],
    "tensor.qtype": [*_QTYPE, "qfloat", "qint"],
    "tensor.weights": _WEIGHTS,
    **_inside("tensor.weights.awq", _AWQ),
    "tensor.weights.marlin": [*_all(_MARLIN_FP8), *_all(_MARLIN_INT4)],
    **_inside("tensor.weights.marlin.fp8", _MARLIN_FP8),
    **_inside("tensor.weights.marlin.int4", _MARLIN_INT4),
    "tensor.weights.qbits": ["WeightQBitsTensor"],
    "tensor.weights.qbytes": ["WeightQBytesTensor"],
    "tensor.weights.quantization": ["quantize_weight"],
    **_inside("tensor.weights.tinygemm", _TINYGEMM),
}


def resolve(name: str) -> Any:
    """What a name means: something of its own here, or the one of the package."""
    if hasattr(_replacements, name):
        return getattr(_replacements, name)
    if hasattr(quantal, name):
        return getattr(quantal, name)
    return getattr(import_module("quantal.models"), name)
