"""The modules of optimum.quanto and the names in each, as data."""

from importlib import import_module
from typing import Any

__all__ = ["LAZY", "MODULES", "names_of"]

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
_QBYTES_MM = ["qbytes_mm", "qbytes_mm as qbytes_int_mm", "qbytes_mm as qbytes_int8pack_mm"]
_TRANSFORMERS = ["QuantizedTransformersModel", "QuantizedModelForCausalLM"]
_DIFFUSERS = ["QuantizedDiffusersModel", "QuantizedPixArtTransformer2DModel"]
_MODELS = [*_TRANSFORMERS, *_DIFFUSERS, "is_diffusers_available", "is_transformers_available"]
_QUANTIZE = ["freeze", "quantization_map", "quantize", "requantize"]
_WEIGHTS = ["WeightQBitsTensor", "WeightQBytesTensor", "quantize_weight"]
_AWQ_ORDERS = ["AWQ_ORDER", "AWQ_REVERSE_ORDER", "reverse_awq_order", "pack_v2", "unpack_v2"]
_AWQ = {"packed": ["AWQPackedTensor", "AWQPacking"], "qbits": ["AWQWeightQBitsTensor"]}
_TINYGEMM = {"packed": ["TinyGemmPackedTensor"], "qbits": ["TinyGemmWeightQBitsTensor"]}
_MARLIN_INT4 = {"packed": ["MarlinInt4PackedTensor"], "qbits": ["MarlinInt4WeightQBitsTensor"]}
_FP8_ORDERS = ["get_scale_perms", "pack_fp8_as_int32", "unpack_int32_to_fp8"]
_MARLIN_FP8 = {"packed": ["MarlinF8PackedTensor"], "qbits": ["MarlinF8QBytesTensor"]}


def _all(table: dict[str, list[str]]) -> list[str]:
    return [name for names in table.values() for name in names if not name.startswith("_")]


def _inside(package: str, table: dict[str, list[str]]) -> dict[str, list[str]]:
    return {package: _all(table)} | {f"{package}.{name}": names for name, names in table.items()}


_TENSOR = [*_CORE, *_GROUPED, *_all(_OPTIMIZERS), *_QTYPE, *_WEIGHTS, "ActivationQBytesTensor"]
_TENSOR += ["QBitsTensor", "QBytesTensor", "QTensor", "qfallback", "quantize_activation"]

#: Module (without the prefix "optimum.quanto.") → what it has: a name of Quantal, or "one as
#: another". No star import brings names with an underscore, nor those of `_BESIDE`.
MODULES: dict[str, list[str]] = {
    "": ["Calibration", "absmax_scale", *_EXTENSIONS, *_MODELS, *_all(_NN), *_QUANTIZE, *_TENSOR],
    "calibrate": ["Calibration", "absmax_scale"],
    "library": _EXTENSIONS,
    "library.extensions": _EXTENSIONS,
    "library.extensions.cpp": ["ext"],
    "library.extensions.extension": _EXTENSIONS,
    "library.qbytes_mm": _QBYTES_MM,
    "library.quantize": ["quantize_affine", "quantize_symmetric"],
    "library.unpack": ["unpack"],
    "models": _MODELS,
    "models.diffusers_models": _DIFFUSERS,
    "models.shared_dict": ["ShardedStateDict"],
    "models.transformers_models": _TRANSFORMERS,
    **_inside("nn", _NN),
    "quantize": [*_QUANTIZE, "set_module_by_name", "_quantize_submodule"],
    "subpackage": ["QuantoCommand"],  # where optimum-cli looks for commands
    "subpackage.commands": ["QuantoCommand"],
    "subpackage.commands.base": ["QuantoCommand"],
    "subpackage.commands.quantize": ["QuantizeCommand"],
    "tensor": _TENSOR,
    "tensor.activations": ["ActivationQBytesTensor", "quantize_activation"],
    "tensor.activations.qbytes": ["ActivationQBytesTensor"],
    "tensor.activations.quantization": ["quantize_activation"],
    "tensor.core": _CORE,
    "tensor.function": ["QuantizedLinearFunction"],
    "tensor.grouped": _GROUPED,
    **_inside("tensor.optimizers", _OPTIMIZERS),
    "tensor.packed": ["PackedTensor", "pack_weights"],
    "tensor.qbits": ["QBitsTensor"],
    "tensor.qbytes": ["QBytesTensor"],
    "tensor.qtensor": ["QTensor", "qfallback"],
    "tensor.qtype": [*_QTYPE, "qfloat", "qint"],
    "tensor.weights": _WEIGHTS,
    **_inside("tensor.weights.awq", _AWQ),
    "tensor.weights.marlin": [*_all(_MARLIN_FP8), *_all(_MARLIN_INT4), "marlin_permute"],
    **_inside("tensor.weights.marlin.fp8", _MARLIN_FP8),
    **_inside("tensor.weights.marlin.int4", _MARLIN_INT4),
    "tensor.weights.marlin.permutations": ["marlin_permute"],
    "tensor.weights.packing": ["unpack_int32_to_uint8"],
    "tensor.weights.qbits": ["WeightQBitsTensor"],
    "tensor.weights.qbytes": ["WeightQBytesTensor"],
    "tensor.weights.quantization": ["quantize_weight"],
    "tensor.weights.reordering": ["reorder", "reverse"],
    **_inside("tensor.weights.tinygemm", _TINYGEMM),
}


# What some modules have beside those.
_BESIDE = {
    "tensor.weights.awq.packed": [*_AWQ_ORDERS, "awq_pack as pack", "awq_unpack as unpack"],
    "tensor.weights.marlin": _FP8_ORDERS,
    "tensor.weights.marlin.fp8": _FP8_ORDERS,
    "tensor.weights.marlin.fp8.packed": _FP8_ORDERS,
    "tensor.weights.marlin.int4.packed": ["marlin_pack as pack", "marlin_unpack as unpack"],
}

#: Imported when they are asked for: they need optimum.
LAZY = "subpackage"

# Where names are looked up: what is Quantal's own comes after what is not.
_SOURCES = ["._replacements", "._packed", "._layouts", "._operators", "quantal", "quantal.models"]


def names_of(module: str) -> tuple[dict[str, Any], list[str]]:
    """What a module has, and what a star import brings of it."""
    sources = ["._commands"] if module.startswith(LAZY) else _SOURCES
    found: dict[str, Any] = {}
    for entry in MODULES[module] + _BESIDE.get(module, []):
        name, _, alias = entry.partition(" as ")
        found[alias or name] = _resolve(name, sources)
    exported = [entry.rpartition(" as ")[2] for entry in MODULES[module]]
    return found, [name for name in exported if not name.startswith("_")]


def _resolve(name: str, sources: list[str]) -> Any:
    for source in sources:
        module = import_module(source, __package__)
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"[quantal.compat] nothing has the name '{name}'")
