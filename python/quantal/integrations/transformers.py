"""QuantalConfig: quantizing while transformers loads, and loading what was saved quantized.

    from quantal import QuantalConfig

    config = QuantalConfig("int4", activations="dynamic-int8", overrides={"*.down_proj": "int8"})
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
    model.save_pretrained(folder)

Importing this module registers the method "quantal" with transformers (4.57 or later), so it comes
before ``from_pretrained(folder)`` too.
"""

import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import torch
import transformers
from transformers import modeling_utils
from transformers.modeling_utils import _load_parameter_into_model
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..nn import PackedCodes, QModuleMixin, QWeight
from ..nn.qmodule import DYNAMIC, SCALES, quantize_module
from ..optimizers import AbsmaxOptimizer, HqqOptimizer, MaxOptimizer, Optimizer
from ..parameters import (
    float_of,
    freeze_parameter,
    live_names,
    matching_parameters,
    quantize_parameter,
    quantized_parameters,
    schemes_of,
    set_frozen,
)
from ..qtype import find_qtype, qfloat8_e4m3fnuz

__all__ = ["QuantalConfig", "QuantalHfQuantizer"]

METHOD = "quantal"
_IS_V5 = int(transformers.__version__.partition(".")[0]) >= 5

_OPTIMIZERS: dict[str, type[Optimizer]] = {
    "absmax": AbsmaxOptimizer,
    "hqq": HqqOptimizer,
    "max": MaxOptimizer,
}
_FIELDS = ("weights", "activations", "group_size", "optimizer")
# What is quantized where no pattern names it.
_DEFAULT_KINDS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)

Override = str | dict[str, Any] | None
Overrides = dict[str, Override] | list[list]

# Of a model's elements: what stays float without being asked to.
_LARGE_SHARE = 0.25


@register_quantization_config(METHOD)
class QuantalConfig(QuantizationConfigMixin):
    """How the layers of a model are quantized. JSON holds all of it.

    Args:
        weights: "int2", "int4", "int8", "float8", another name of `quantal.qtypes`, or None.
        activations: "int8" or "float8"; "dynamic-int8" for scales found at run time, as they are
            without a calibration too. None: float.
        group_size: elements a group, for int2 and int4. Default: 128, 96, 64 or 32.
        optimizer: "absmax", "max" or "hqq": who chooses scales.
        modules_to_not_convert: parts of names of layers that stay float. Default: the output
            embedding, and what shares its weight.
        overrides: name pattern (as in `fnmatch`) → a qtype's name, None (stays float), or a dict of
            the arguments above, which replaces them. The first pattern that matches decides, also
            for embeddings and for the layers above. A dict, or a list of pairs (JSON files sort the
            keys of dicts).
        parameters: name patterns of parameters of other modules to quantize, as the fused experts
            of transformers 5 ("*.experts.*_proj"); `overrides` choose theirs by their names.

    Raises ValueError for what no layer can be quantized to.
    """

    def __init__(
        self,
        weights: str | None = "int8",
        activations: str | None = None,
        group_size: int | None = None,
        optimizer: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        overrides: Overrides | None = None,
        quant_method: str = METHOD,
        parameters: str | list[str] | None = None,
    ) -> None:
        self.quant_method = quant_method
        self.weights = weights
        self.activations = activations
        self.group_size = group_size
        self.optimizer = optimizer
        self.modules_to_not_convert = modules_to_not_convert
        pairs = overrides.items() if isinstance(overrides, dict) else overrides or ()
        self.overrides = [[pattern, value] for pattern, value in pairs]
        self.parameters = [parameters] if isinstance(parameters, str) else parameters
        self.post_init()

    def post_init(self) -> None:
        """Checks every scheme."""
        for scheme in self.schemes():
            _check(scheme)

    def schemes(self) -> list[dict[str, Any]]:
        """The default and those of patterns."""
        named = [self._override(value) for _, value in self.overrides]
        return [self._default(), *(scheme for scheme in named if scheme is not None)]

    def _default(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIELDS}

    def _override(self, value: Override) -> dict[str, Any] | None:
        if value is None:
            return None
        if isinstance(value, str):
            return self._default() | {"weights": value, "group_size": None, "optimizer": None}
        unknown = set(value) - set(_FIELDS)
        if unknown:
            raise ValueError(
                f"[quantal.QuantalConfig] expected keys {', '.join(_FIELDS)}, got {sorted(unknown)}"
            )
        return self._default() | value

    def named_scheme(self, name: str) -> tuple[bool, dict[str, Any] | None]:
        """Whether a pattern names the layer, and how it is quantized (None: not)."""
        for pattern, value in self.overrides:
            if fnmatch(name, pattern):
                return True, self._override(value)
        return False, self._default()


def _check(scheme: dict[str, Any]) -> None:
    try:
        weights = find_qtype(scheme["weights"])
        activations = find_qtype((scheme["activations"] or "none").removeprefix(DYNAMIC))
    except KeyError as error:
        raise ValueError(error.args[0]) from error
    if weights is None and activations is None:
        raise ValueError("[quantal.QuantalConfig] expected weights, activations or both")
    if activations is not None and activations.bits < 8:
        raise ValueError(
            f"[quantal.QuantalConfig] expected activations of 8 bits, got {activations.name}"
        )
    optimizer = scheme["optimizer"]
    if optimizer is None:
        return
    fits = ("max", "hqq") if weights is not None and weights.is_affine else ("absmax",)
    if optimizer not in fits:
        raise ValueError(
            f"[quantal.QuantalConfig] expected optimizer {' or '.join(fits)} for weights of "
            f"{scheme['weights']}, got {optimizer}"
        )


def _optimizer(scheme: dict[str, Any]) -> Optimizer | None:
    return _OPTIMIZERS[scheme["optimizer"]]() if scheme["optimizer"] else None


def _names_of_codes(model: torch.nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, (QWeight, PackedCodes)):
            yield from (f"{name}.{part}" for part in module._parameters)


@register_quantizer(METHOD)
class QuantalHfQuantizer(HfQuantizer):
    """transformers' hooks into loading."""

    requires_calibration = False
    requires_parameters_quantization = True

    # ---- before the weights are loaded: every parameter is on the meta device

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        float_parts = self.get_modules_to_not_convert(
            model,
            config.modules_to_not_convert,
            kwargs.get("keep_in_fp32_modules") or model._keep_in_fp32_modules,
        )
        tied = _tied_names(model)
        for name, module in list(model.named_modules()):
            is_named, scheme = config.named_scheme(name)
            by_default = isinstance(module, _DEFAULT_KINDS) and not _is_listed(name, float_parts)
            if scheme is None or not (is_named or by_default):
                continue
            optimizer = _optimizer(scheme)
            try:
                quantized = quantize_module(
                    module, scheme["weights"], scheme["activations"], optimizer,
                    group_size=scheme["group_size"],
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if quantized is None:
                continue
            if f"{name}.weight" in tied:
                raise ValueError(
                    f"[quantal] '{name}' shares its weight: leave it float, or load with "
                    "tie_word_embeddings=False"
                )
            quantized.name = name
            quantized.requires_grad_(False)
            _fill_scales(quantized, "cpu")
            model.set_submodule(name, quantized)
            if self.pre_quantized:
                quantized.freeze()
        self._quantize_parameters(model)
        if config.parameters is None:
            _warn_of_floats(model)
        self._codes = set(_names_of_codes(model))
        return model

    def _quantize_parameters(self, model: Any) -> None:
        """Those of modules that have no quantized kind."""
        config = self.quantization_config
        for full, (module, name) in matching_parameters(model, config.parameters or []).items():
            _, scheme = config.named_scheme(full)
            qtype = None if scheme is None else find_qtype(scheme["weights"])
            if qtype is None:
                continue
            optimizer = _optimizer(scheme)
            try:
                quantize_parameter(module, name, qtype, optimizer, scheme["group_size"])
            except ValueError as error:
                raise ValueError(f"{full}: {error}") from error
            weight = float_of(module, name).requires_grad_(False)
            if self.pre_quantized:
                parts = schemes_of(module)[name].encode(weight)
                set_frozen(module, name, parts, weight.shape, weight.dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """transformers 5 saves fused parameters as it found them, apart; their codes stay whole."""
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            names = [full for full, *_ in quantized_parameters(model)]
            model._weight_conversions = [c for c in conversions if not _makes_any(c, names)]
        return model

    # ---- quantizing while loading

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Float weights of layers to quantize. In transformers 4 codes too, which it would cast."""
        if param_name in self._codes:
            return True
        module, tensor = get_module_from_name(model, param_name)
        if isinstance(module, QModuleMixin):
            return tensor == "weight" and not module.frozen
        return tensor in live_names(module)

    def create_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, target_device: Any, *_: Any
    ) -> None:
        """transformers 4: loads a tensor, and freezes its layer."""
        value = param_value.to(target_device)
        if param_name in self._codes:
            module, part = get_module_from_name(model, param_name)
            value = value.to(getattr(module, part).dtype)
            _load_parameter_into_model(model, param_name, value)
            return
        self.load_and_freeze(model, param_name, value)

    def load_and_freeze(self, model: Any, name: str, value: torch.Tensor) -> None:
        """Gives a layer its float weight and replaces it by codes."""
        _load_parameter_into_model(model, name, value)
        module, tensor = get_module_from_name(model, name)
        if isinstance(module, QModuleMixin):
            _fill_scales(module, value.device)
            module.freeze()
        else:
            freeze_parameter(module, tensor)

    def get_quantize_ops(self) -> Any:
        """transformers 5: what turns a float weight into codes."""
        from ._conversion import QuantizeOnLoad

        return QuantizeOnLoad(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """transformers 5: codes in float8 are not cast to the model's dtype."""
        name = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        if name.startswith(("F8", "torch.float8")):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """transformers 4: float checkpoints have no scales of activations."""
        known = {
            f"{name}.{scale}"
            for name, module in model.named_modules()
            if isinstance(module, QModuleMixin)
            for scale in SCALES
        }
        return [key for key in missing_keys if self.pre_quantized or key not in known]

    # ---- sizes, for device maps

    @property
    def quantized_element_size(self) -> float | None:
        """transformers 5: bytes an element."""
        qtype = find_qtype(self.quantization_config.weights)
        return None if qtype is None else qtype.bits / 8

    def adjust_target_dtype(self, dtype: torch.dtype) -> Any:
        """transformers 4: what stands for a quantized element."""
        from accelerate.utils import CustomDtype

        qtype = find_qtype(self.quantization_config.weights)
        sizes = {2: CustomDtype.INT2, 4: CustomDtype.INT4, 8: torch.int8}
        return dtype if qtype is None else sizes[qtype.bits]

    def adjust_max_memory(self, max_memory: dict) -> dict:
        """Leaves room for scales."""
        return {device: size * 0.9 for device, size in max_memory.items()}

    # ---- what the model can do

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Yes: plain tensors. But transformers 4 cannot read float8 of kind e4m3fnuz."""
        known = _IS_V5 or "F8_E4M3FNUZ" in modeling_utils.str_to_torch_dtype
        qtypes = [find_qtype(scheme["weights"]) for scheme in self.quantization_config.schemes()]
        return known or qfloat8_e4m3fnuz not in qtypes

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """ValueError for a device map that transformers 5 cannot follow."""
        super().validate_environment(*args, device_map=device_map, **kwargs)
        places = device_map.values() if isinstance(device_map, dict) else ()
        if _IS_V5 and not self.pre_quantized and "disk" in places:
            raise ValueError(
                "[quantal] transformers 5 puts no weights on disk while it quantizes them: save "
                "the quantized model and load that, or map nothing to 'disk'"
            )

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through to adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Operators have Meta kernels."""
        return True


def _fill_scales(module: QModuleMixin, device: Any) -> None:
    for name in SCALES:
        setattr(module, name, torch.ones_like(getattr(module, name), device=device))


def _warn_of_floats(model: Any) -> None:
    """Fused experts are most of a model, and no layers."""
    total = sum(p.numel() for p in model.parameters())
    fused = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 3}
    share = sum(fused.values()) / max(total, 1)
    if share > _LARGE_SHARE:
        warnings.warn(
            f"[quantal] {len(fused)} parameters of three dimensions stay float, {share:.0%} of the "
            f"model, as '{next(iter(fused))}': name them with QuantalConfig(parameters=…)",
            stacklevel=2,
        )


def _makes_any(conversion: Any, names: list[str]) -> bool:
    """Whether it computes one of these parameters from others."""
    if not getattr(conversion, "operations", None):
        return False
    return any(target in name for target in conversion.target_patterns for name in names)


def _is_listed(name: str, parts: list[str]) -> bool:
    return any(
        name == part or name.startswith(part + ".") or f".{part}." in f".{name}." for part in parts
    )


def _tied_names(model: Any) -> set[str]:
    """The parameters that share a weight, by transformers' own lists."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is None:
        if not getattr(model.config, "tie_word_embeddings", False):
            return set()
        embedding = model.get_input_embeddings()
        names = [f"{n}.weight" for n, m in model.named_modules() if m is embedding]
        return {*names, *(getattr(model, "_tied_weights_keys", None) or ())}
    return {*tied, *tied.values()}
