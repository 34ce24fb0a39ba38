"""What every quantized module shares, and the table of modules that have a quantized kind."""

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .._library import ops
from ..optimizers import Optimizer, SymmetricOptimizer, default_optimizer
from ..qtype import find_qtype
from ..qtype import qtype as QType  # noqa: N812
from ..tensor import QTensor, quantize_weight, wrap
from .direct import PLAIN, calls_directly
from .qweight import QWeight
from .straight_through import straight_through, transforms_active
from .weight_scheme import check_optimizer, choose_group_size, freeze_for, weight_snr_db

__all__ = ["QModuleMixin", "quantize_module", "register_qmodule"]

_QMODULE_TABLE: dict[type, type["QModuleMixin"]] = {}

#: Buffers of every quantized module: one number each, 1 until they are calibrated.
SCALES = ("input_scale", "output_scale")
#: Name of activations that are always quantized with scales found at run time.
DYNAMIC = "dynamic-"


def register_qmodule(module_cls: type) -> Any:
    """Class decorator: instances of `module_cls` are quantized as the decorated class.

    It derives from QModuleMixin and `module_cls`, and has

    * ``qcreate(cls, module, weights, activations=None, optimizer=None, device=None)``, a class
      method that makes an instance for `module` without copying its weights (None: leave it);
    * ``forward``, which uses ``self.qweight``.
    """

    def wrapper(cls: type) -> type:
        _QMODULE_TABLE[module_cls] = cls
        return cls

    return wrapper


def quantize_module(
    module: torch.nn.Module,
    weights: QType | str | None = None,
    activations: QType | str | None = None,
    optimizer: Optimizer | None = None,
    group_size: int | None = None,
) -> "QModuleMixin | None":
    """The quantized kind of `module`, sharing its parameters; None where it has none, as a class
    has that is not registered and whose forward is not that of the class which is."""
    if isinstance(module, QModuleMixin) or has_own_forward(module):
        return None
    module_cls = _registered_class(module)
    if module_cls is None:
        return None
    # A `from_module` that was written for optimum-quanto takes no group size.
    options = {} if group_size is None else {"group_size": group_size}
    return _QMODULE_TABLE[module_cls].from_module(
        module, weights=weights, activations=activations, optimizer=optimizer, **options
    )


def _registered_class(module: torch.nn.Module) -> type | None:
    """The most derived of its classes that has a quantized kind."""
    return next((cls for cls in type(module).__mro__ if cls in _QMODULE_TABLE), None)


def has_quantized_kind(module: torch.nn.Module) -> bool:
    """Whether the table has a quantized kind for it."""
    return _registered_class(module) is not None


def has_own_forward(module: torch.nn.Module) -> bool:
    """Whether it computes something else than the registered class that it derives from: a
    quantized kind, whose forward is that class's, would leave that out."""
    module_cls = _registered_class(module)
    return module_cls is not None and any(
        getattr(type(module), name, None) is not getattr(module_cls, name, None)
        for name in ("forward", "_conv_forward")
    )


def _is_lost(scale: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether another dtype has made a scale zero, subnormal, infinite, or one that says nothing
    was calibrated."""
    if scale.dtype == now.dtype or scale.is_meta or now.is_meta or scale.numel() != 1:
        return False
    value, info = now.item(), torch.finfo(now.dtype)
    return not info.tiny <= value <= info.max or (value == 1) != (scale.item() == 1)


if TYPE_CHECKING:  # its subclasses derive from a module of torch, after it
    _Module = torch.nn.Module
else:
    _Module = object


class QModuleMixin(_Module):
    """A module with a quantized weight, quantized activations, or both.

    Unfrozen, ``weight`` is the float parameter: any optimizer trains it, and its quantized value is
    what computes, with straight-through gradients. ``freeze()`` replaces it by codes.

    Args (all keywords; the others go to the torch module):
        weights: qtype of the weight, or None.
        activations: 8-bit qtype, or None; "dynamic-qint8" for scales that are found at run time.
        optimizer: who chooses scales. Default: absmax for 8-bit types, max for qint2 and qint4.
        quantize_input: whether a hook quantizes the first argument of ``forward``.
        group_size: elements a group (qint2, qint4). Default: 128, 96, 64 or 32, whichever divides.
    """

    #: What a run-time scale spans: a token (the last dimension), or a whole sample.
    scale_per_sample: ClassVar[bool] = False
    #: The `Calibration` that watches this module.
    _calibration: Any = None

    #: A float parameter, or the QWeight of a frozen module.
    weight: Any
    bias: Any
    input_scale: torch.Tensor
    output_scale: torch.Tensor
    #: qtypes, or None where nothing is quantized.
    weight_qtype: Any
    activation_qtype: Any
    weight_group_size: int | None
    #: An Optimizer; None where the weight is not quantized.
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        weights: QType | str | None = None,
        activations: QType | str | None = None,
        optimizer: Optimizer | None = None,
        quantize_input: bool = False,
        device: Any = None,
        group_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        mro = type(self).__mro__
        if torch.nn.Module not in mro:
            raise TypeError("Quantized modules must inherit from a torch.nn.Module class")
        super().__init__(*args, device=device, **kwargs)
        self.dynamic = False
        if isinstance(activations, str):
            self.dynamic = activations.startswith(DYNAMIC)
            activations = activations.removeprefix(DYNAMIC)
        self.weight_qtype = find_qtype(weights)
        self.activation_qtype = find_qtype(activations)
        if self.activation_qtype is not None and self.activation_qtype.bits < 8:
            raise ValueError(
                f"[quantal] expected activations of 8 bits, got {self.activation_qtype.name}"
            )
        self.weight_group_size = None
        if self.weight_qtype is not None and self.weight is not None:
            rows = max(self.weight.shape[0], 1)
            size = choose_group_size(self.weight_qtype, self.weight.numel() // rows, group_size)
            self.weight_group_size = size or None
        if optimizer is None and self.weight_qtype is not None:
            optimizer = default_optimizer(self.weight_qtype)
        if self.weight_qtype is not None:
            check_optimizer(self.weight_qtype, optimizer)
        self.optimizer = optimizer
        self.name = ""
        self._quantize_hooks: dict[str, Any] = {}
        if self.activation_qtype is not None and quantize_input:
            self._quantize_hooks["input"] = self.register_forward_pre_hook(self.quantize_input)
        dtype = torch.float32 if self.weight is None else self.weight.dtype
        self._input_calibrated = self._output_calibrated = False
        self.register_buffer("input_scale", torch.ones((), dtype=dtype, device=device))
        self.register_buffer("output_scale", torch.ones((), dtype=dtype, device=device))

    @classmethod
    def qcreate(
        cls,
        module: torch.nn.Module,
        weights: QType | None,
        activations: QType | str | None = None,
        optimizer: Optimizer | None = None,
        device: Any = None,
    ) -> "QModuleMixin | None":
        """An instance for `module`, on `device`, with weights of its own."""
        raise NotImplementedError

    @classmethod
    def from_module(
        cls,
        module: Any,
        weights: QType | str | None = None,
        activations: QType | str | None = None,
        optimizer: Optimizer | None = None,
        group_size: int | None = None,
    ) -> "QModuleMixin | None":
        """The quantized kind of `module`: the very parameters, its mode and its hooks."""
        qmodule = cls.qcreate(module, find_qtype(weights), activations, optimizer, "meta")
        if qmodule is None:
            return None
        if (
            group_size is not None
            and qmodule.weight_qtype is not None
            and qmodule.weight_qtype.is_affine
        ):
            length = module.weight.numel() // max(module.weight.shape[0], 1)
            qmodule.weight_group_size = (
                choose_group_size(qmodule.weight_qtype, length, group_size) or None
            )
        if "weight" in qmodule._parameters or module.weight is None:
            qmodule.weight = module.weight
        if getattr(module, "bias", None) is not None:
            qmodule.bias = module.bias
        device = "cpu" if module.weight is None else module.weight.device
        qmodule.input_scale = torch.ones_like(qmodule.input_scale, device=device)
        qmodule.output_scale = torch.ones_like(qmodule.output_scale, device=device)
        qmodule._forward_pre_hooks.update(module._forward_pre_hooks)
        for key, hook in module._forward_hooks.items():
            qmodule._forward_hooks[key] = hook
        return qmodule.train(module.training)

    # ---- the weight

    @property
    def frozen(self) -> bool:
        """Whether the weight holds codes only."""
        return isinstance(self._modules.get("weight"), QWeight)

    def own_bias(self) -> torch.Tensor | None:
        """``self.bias``, without what a search costs: some tools make it a property."""
        parameters = self._parameters
        return parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401

    def weight_parts(self) -> tuple:
        """``(data, scale, shift, latent)``: what operators compute with; the latent is the float
        parameter of an unfrozen module."""
        frozen: Any = self._modules.get("weight")
        if frozen is not None:
            return (*frozen.parts(), None)
        weight = self.weight
        return (*self._encode(weight), weight)

    def _bound_weight(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The weight for torch's own function of `x` and `bias` (direct.py); None where the
        operator has to be called."""
        frozen: Any = self._modules.get("weight")
        if (
            frozen is None
            or not calls_directly(x)
            or (bias is not None and type(bias) not in PLAIN)
        ):
            return None
        qtype, group_size = self.weight_qtype, self.weight_group_size or 0
        if self.activation_qtype is None:
            return frozen._bound(qtype, group_size, "", None)
        return frozen._bound(qtype, group_size, *self.activation_arguments())

    def _encode(self, weight: torch.Tensor) -> tuple:
        qtype, group = self.weight_qtype, self.weight_group_size or 0
        optimizer = self.optimizer
        if optimizer.quantizer is not None:
            return optimizer.encode(weight, qtype, group)
        with torch.no_grad():
            scale, shift = self._own_scale(weight)
        return ops.parts(self._quantized(weight.detach(), scale, shift))

    def _own_scale(self, weight: torch.Tensor) -> tuple:
        """What an optimizer written in Python chooses."""
        if isinstance(self.optimizer, SymmetricOptimizer):
            return self.optimizer(weight, self.weight_qtype, 0), None
        return self.optimizer(weight, self.weight_qtype, 0, self.weight_group_size)

    def _quantized(self, weight, scale, shift) -> QTensor:
        return quantize_weight(weight, self.weight_qtype, 0, scale, shift, self.weight_group_size)

    @property
    def qweight(self) -> Any:
        """The quantized weight: a QTensor through which gradients pass to the float parameter, the
        QWeight of a frozen module, or None where the weight is not quantized."""
        if self.weight_qtype is None:
            return None
        if self.frozen:
            return self.weight
        qtype, weight = self.weight_qtype, self.weight
        if self.optimizer.quantizer is not None and not self.optimizer.options:
            return wrap(
                ops.quantize_weight(
                    weight, qtype.name, self.weight_group_size or 0, False,
                    self.optimizer.quantizer,
                )
            )  # fmt: skip
        with torch.no_grad():
            scale, shift = self._own_scale(weight)
        return self._quantized(weight, scale, shift)

    def float_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The quantized value of the weight as floats, for operators without quantized kernels."""
        if self.weight_qtype is None:
            return self.weight.to(dtype)
        data, scale, shift, latent = self.weight_parts()
        by_python = latent is not None and transforms_active()
        value = ops.decode(
            data, scale, shift, self.weight_qtype.name, self.weight_group_size or 0,
            list(self.weight.shape), dtype, None if by_python else latent,
        )  # fmt: skip
        return straight_through(latent, value) if by_python else value

    @torch.inference_mode(False)  # the codes outlive the caller's mode
    def freeze(self) -> None:
        """Replaces the float weight by codes, which need no gradient. ValueError where it has a NaN
        or infinity."""
        if self.weight_qtype is None or self.weight is None or self.frozen:
            return
        weight = self.weight
        ops.check_finite(weight.detach(), f"{self.name}.weight" if self.name else "weight")
        data, scale, shift = self._encode(weight)
        self._set_frozen(data, scale, shift, weight.shape, weight.dtype)
        self.weight.snr_db = weight_snr_db(weight.detach(), self.weight.dequantize())

    def _set_frozen(self, data, scale, shift, shape, dtype) -> None:
        qweight = QWeight(
            data, scale, shift, self.weight_qtype, self.weight_group_size or 0, shape, dtype
        )
        del self._parameters["weight"]
        self._modules["weight"] = qweight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, torch.Tensor) and not isinstance(value, QWeight):
            if ops.is_quantized(value):
                value = QWeight.of(wrap(value))
            elif "weight" in self._modules:
                # The weight of a frozen module is given floats again.
                del self._modules["weight"]
                if not isinstance(value, torch.nn.Parameter):
                    value = torch.nn.Parameter(value)
        if name == "weight" and isinstance(value, QWeight):
            self._parameters.pop("weight", None)
            self._modules["weight"] = value
            return
        if name == "_old_forward":  # accelerate's, which offloads buffers around it
            value = partial(self._forward_between_hooks, value)
        super().__setattr__(name, value)
        if name in SCALES and isinstance(value, torch.Tensor):
            self._note_scale(name)
        elif name == "forward":  # accelerate wraps it when it has loaded a checkpoint
            self._note_scales()

    # ---- the activations

    def _forward_between_hooks(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Where scales come with the weights and leave with them, they are there only here."""
        self._note_scales()
        output = forward(*args, **kwargs)
        quantized = None
        if "output" in self._quantize_hooks:
            quantized = self.quantize_output(self, args, output)
        return output if quantized is None else quantized

    def _note_scales(self) -> None:
        """Some loaders write to buffers, or put others in their place, behind the module's back."""
        for name in SCALES:
            self._note_scale(name)

    def _note_scale(self, name: str) -> None:
        """A scale of exactly 1 means that nothing was calibrated, as in optimum-quanto's files."""
        value = self._buffers.get(name)
        if value is not None and value.is_meta:
            return  # it tells nothing new
        flag = "_input_calibrated" if name == "input_scale" else "_output_calibrated"
        known = value is not None and value.numel() == 1 and value.item() != 1
        object.__setattr__(self, flag, known)
        if name == "output_scale":
            self._hook_output(known)

    def _hook_output(self, is_wanted: bool) -> None:
        """Quantizes the output in a hook, before other hooks see it: where it has a scale only,
        since a hook is dear."""
        is_wanted = is_wanted and self.activation_qtype is not None and not self.dynamic
        if is_wanted == ("output" in self._quantize_hooks):
            return
        if is_wanted:
            hook = self.register_forward_hook(self.quantize_output, prepend=True)
            self._quantize_hooks["output"] = hook
        else:
            self._quantize_hooks.pop("output").remove()

    def activation_arguments(self) -> tuple[str, torch.Tensor | None]:
        """The qtype's name and the calibrated scale of the input, as operators take them; no scale
        where it is found at run time."""
        if self.activation_qtype is None or self._calibration is not None:
            return "", None
        is_static = self._input_calibrated and not self.dynamic
        if not is_static:
            return self.activation_qtype.name, None
        buffers = self._buffers
        scale = buffers["input_scale"] if "input_scale" in buffers else self.input_scale  # noqa: SIM401
        return self.activation_qtype.name, scale

    def fake_quantized(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded as the input of this module is."""
        qtype, scale = self.activation_arguments()
        if not qtype:
            return x
        # Compiled code has no quantized tensors: it sees float values.
        if scale is None and not torch.compiler.is_compiling() and ops.is_quantized(x):
            return ops.dequantize(x)
        if transforms_active():
            rounded = ops.fake_quantize(x.detach(), qtype, scale, self.scale_per_sample)
            return straight_through(x, rounded)
        return ops.fake_quantize(x, qtype, scale, self.scale_per_sample)

    def quantize_input(self, module: torch.nn.Module, args: tuple) -> Any:
        """Forward pre-hook: quantizes the first argument. Codes of its type stay as they are, the
        value of others is quantized again."""
        if not args:
            return None
        x = args[0]
        is_activation = isinstance(x, torch.Tensor) and ops.is_activation(x)
        if is_activation and ops.qtype_name(x) == self.activation_qtype.name:
            return None
        return (self.fake_quantized(x), *args[1:])

    def quantize_output(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook: quantizes the output with its calibrated scale."""
        if not self._output_calibrated or self._calibration is not None:
            return None
        if torch.compiler.is_compiling():
            return ops.fake_quantize(output, self.activation_qtype.name, self.output_scale)
        if ops.is_activation(output):
            return None  # it was quantized between accelerate's hooks
        return wrap(ops.quantize_activation(output, self.activation_qtype.name, self.output_scale))

    def _apply(self, fn: Any, recurse: bool = True) -> "QModuleMixin":
        before = {name: self._buffers.get(name) for name in SCALES}
        super()._apply(fn, recurse)
        for name, scale in before.items():
            now: Any = self._buffers.get(name)
            if scale is not None and _is_lost(scale, now):
                self._buffers[name] = scale.to(now.device)
        self._note_scales()
        return self

    def train(self, mode: bool = True) -> "QModuleMixin":
        """As of any module. Scales that were written behind its back count from now on."""
        self._note_scales()
        return super().train(mode)

    def disable_output_quantization(self) -> None:
        """Outputs stay float from now on; saved with the module."""
        self.output_scale = torch.ones_like(self.output_scale)

    # ---- state

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        self._freeze_for(state_dict, prefix + "weight.")
        if not self._has_scales(state_dict, prefix):
            state_dict |= {prefix + name: self._buffers[name] for name in SCALES}
        for name in SCALES:
            given, own = state_dict.get(prefix + name), self._buffers[name]
            if given is not None and own is not None and _is_lost(given, given.to(own.dtype)):
                self._buffers[name] = own.to(given.dtype)  # a place for it
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._note_scales()

    def _has_scales(self, state_dict: dict, prefix: str) -> bool:
        """Whether it must have scales of activations: that of a float model has none."""
        keys: tuple[str, ...] = SCALES
        if self.activation_qtype is not None and not self.dynamic:
            keys += ("weight._data", "weight._data._data")
        return any(prefix + key in state_dict for key in keys)

    def _freeze_for(self, state_dict: dict, prefix: str) -> None:
        """Codes that are about to be loaded need a frozen weight to go to."""
        if self.weight_qtype is None or self.weight is None:
            return
        old_size = self.weight_group_size or 0
        made = freeze_for(
            state_dict, prefix, self.weight_qtype, old_size, self.weight.shape, self.weight
        )
        if made is None:
            return
        parts, group_size = made
        self.weight_group_size = group_size or None
        if self.frozen and self.weight.group_size == group_size:
            return
        shape, dtype = self.weight.shape, self.weight.dtype
        if self.frozen:
            del self._modules["weight"]
            self._parameters["weight"] = None
        data, scale, shift = parts
        self._set_frozen(data, scale, shift, shape, dtype)

    def extra_repr(self) -> str:
        """The torch module's text and what is quantized."""
        parts = [super().extra_repr()]
        if self.weight_qtype is not None:
            parts.append(f"weights={self.weight_qtype.name}")
            if self.weight_group_size:
                parts.append(f"group_size={self.weight_group_size}")
        if self.activation_qtype is not None:
            parts.append(f"activations={'dynamic-' * self.dynamic}{self.activation_qtype.name}")
        return ", ".join(part for part in parts if part)
