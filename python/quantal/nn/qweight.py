"""The frozen weight of a module: a child module that behaves like a quantized tensor."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._library import ops
from ..qtype import qtype as QType  # noqa: N812
from ..tensor import QTensor, QuantizedLike, wrap, writes, written

__all__ = ["PackedCodes", "QWeight"]


class Part(torch.nn.Parameter):
    """A parameter that never trains: ``model.requires_grad_(True)`` passes it by, which an integer
    parameter would answer with an error."""

    #: Of codes: the bound weight, and with what it was bound (`QWeight._bound`). It does not keep
    #: the codes in memory, and copies and files have none.
    bound: tuple | None = None

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> "Part":
        return torch.Tensor._make_subclass(cls, data.detach(), False)

    def requires_grad_(self, requires_grad: bool = True) -> "Part":
        """Does nothing."""
        return self

    def __deepcopy__(self, memo: dict) -> "Part":
        copy = Part(self.data.clone(memory_format=torch.preserve_format))
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # torch cannot pickle float8 storages outside torch.save().
        data = self.data
        return _rebuild_part, (data.view(torch.uint8) if _is_float8(data) else data, data.dtype)


def _rebuild_part(data: torch.Tensor, dtype: torch.dtype) -> Part:
    return Part(data if data.dtype == dtype else data.view(dtype))


torch.serialization.add_safe_globals([Part, _rebuild_part])


def fits(scale: torch.Tensor, shift: torch.Tensor | None, qtype: QType, like: torch.Tensor) -> bool:
    """Whether scale and shift survive the dtype of `like`: fp16 would make small scales zeros."""
    if scale.dtype == like.dtype or scale.is_meta or like.is_meta or not isinstance(like, Part):
        return True
    return ops.scales_fit(scale, shift, qtype.name, like.dtype)


def _is_float8(t: torch.Tensor) -> bool:
    return t.is_floating_point() and t.element_size() == 1


class _Parts(torch.nn.Module):
    """A module of Parts. Codes in float8 are floating point: ``.half()`` must not convert them."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Loaders of checkpoints set plain tensors; FSDP's shards stay what they are.
        is_plain = type(value) in (torch.Tensor, torch.nn.Parameter)
        if is_plain and name in self.__dict__.get("_parameters", ()):
            value = Part(value)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable, recurse: bool = True) -> "_Parts":
        def keep_codes(t: torch.Tensor) -> torch.Tensor:
            return fn(t.view(torch.uint8)).view(t.dtype) if _is_float8(t) else fn(t)

        super()._apply(keep_codes, recurse)
        self._keep_parts()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._keep_parts()

    def _keep_parts(self) -> None:
        """What torch puts in the place of a Part is a plain Parameter; FSDP's shards stay."""
        for name, value in self._parameters.items():
            if type(value) is torch.nn.Parameter:
                self._parameters[name] = Part(value.data)


class PackedCodes(_Parts):
    """Codes of 2 or 4 bits, several a byte: optimum-quanto's key ``weight._data._data``."""

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__()
        self._data = Part(data)

    def forward(self) -> torch.Tensor:
        """The bytes."""
        return self._data

    @property
    def dtype(self) -> torch.dtype:
        """Of the bytes."""
        return self._data.dtype

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self._data.device


class QWeight(QuantizedLike, _Parts):
    """Codes, scale and shift of a weight as plain parameters that need no gradient: they are saved,
    copied, moved, offloaded and sharded like any other, under optimum-quanto's keys. Torch
    functions take it as a tensor; other attributes are those of its QTensor.

    Calling it returns the parts: so hooks that load them run first.
    """

    axis = 0
    grad = None
    #: Signal-to-noise ratio of the quantization, where it is known.
    snr_db: float | None = None

    def __init__(
        self,
        data: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor | None,
        qtype: QType,
        group_size: int,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.qtype = qtype
        self.group_size = group_size
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._data = PackedCodes(data) if qtype.is_affine else Part(data)
        self._scale = Part(scale)
        self.register_parameter("_shift", None if shift is None else Part(shift))

    @classmethod
    def of(cls, weight: QTensor) -> "QWeight":
        """Over the parts of a quantized tensor."""
        data, scale, shift = ops.parts(weight)
        group_size = ops.group_size(weight)
        return cls(data, scale, shift, weight.qtype, group_size, weight.shape, weight.dtype)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Data, scale and shift."""
        parts: dict[str, Any] = self._parameters
        packed: Any = self._modules.get("_data")
        data = parts["_data"] if packed is None else packed()
        return data, parts["_scale"], parts["_shift"]

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What calling gives, without what calls cost where no hook wants them."""
        return self._parts_without_hooks() or self()

    def _parts_without_hooks(self) -> tuple | None:
        """None where there are hooks. Every call of a quantized module comes by, which is why
        forward() is written out."""
        if self._forward_pre_hooks or self._forward_hooks or "forward" in self.__dict__:
            return None
        parts: dict[str, Any] = self._parameters
        modules = self._modules
        if not modules:
            return parts["_data"], parts["_scale"], parts["_shift"]
        packed: Any = modules["_data"]
        if packed._forward_pre_hooks or packed._forward_hooks or "forward" in packed.__dict__:
            return None
        return packed._parameters["_data"], parts["_scale"], parts["_shift"]

    def _bound(
        self, qtype: QType, group_size: int, activations: str, input_scale: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The bound weight (direct.py) for a module with those, which asks in every call; None
        where the operator has to be called: the first time that it asks with these parts, since
        parts may be replaced for every call."""
        # As _parts_without_hooks(), written out: see QLinear.forward().
        state = holder = self.__dict__
        if state["_forward_pre_hooks"] or state["_forward_hooks"] or "forward" in state:
            return None
        parts, modules = state["_parameters"], state["_modules"]
        if modules:
            holder = modules["_data"].__dict__
            if holder["_forward_pre_hooks"] or holder["_forward_hooks"] or "forward" in holder:
                return None
        data, scale, shift = holder["_parameters"]["_data"], parts["_scale"], parts["_shift"]
        if type(data) is not Part:  # FSDP and others put their own there
            return None
        known = data.bound
        if known is not None:
            bound, of_scale, of_shift, of_qtype, of_activations, of_input_scale = known
            if (
                of_scale is scale
                and of_shift is shift
                and of_qtype is qtype
                and of_activations == activations
                and of_input_scale is input_scale
            ):
                if bound is None:
                    bound = ops.bind_weight(
                        data, scale, shift, qtype.name, group_size, self.shape, self.dtype,
                        activations, input_scale,
                    )  # fmt: skip
                    data.bound = (bound, *known[1:])
                return bound
        data.bound = None, scale, shift, qtype, activations, input_scale
        return None

    def _unbind(self) -> None:
        packed: Any = self._modules.get("_data", self)
        data = packed._parameters.get("_data")
        if type(data) is Part:
            data.bound = None

    def tensor(self) -> torch.Tensor:
        """The parts as a QTensor."""
        data, scale, shift = self.parts()
        return wrap(
            ops.weight_from_parts(
                data, scale, shift, self.qtype.name, self.group_size, list(self.shape), self.dtype
            )
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The float value, of `dtype` or the weight's."""
        data, scale, shift = self.parts()
        return ops.decode(
            data, scale, shift, self.qtype.name, self.group_size, list(self.shape),
            dtype or self.dtype,
        )  # fmt: skip

    # What code that expects a Parameter asks for.
    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self._scale.device

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scale and shift."""
        return sum(part.nbytes for part in self.parameters())

    @property
    def data(self) -> "QWeight":
        """Itself."""
        return self

    @property
    def requires_grad(self) -> bool:
        """False; setting it does nothing."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass

    def size(self, dim: int | None = None) -> Any:
        """Of the weight."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Of the weight."""
        return len(self.shape)

    def numel(self) -> int:
        """Of the weight."""
        return self.shape.numel()

    def detach(self) -> "QWeight":
        """Itself."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "QWeight":
        """Does nothing."""
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(torch.Tensor, name):
                raise
            return written(self, name) if writes(name) else getattr(self.tensor(), name)

    @torch.no_grad()
    def copy_(self, source: Any, non_blocking: bool = False) -> "QWeight":
        """Takes the codes of a quantized weight of the same form over, and quantizes others."""
        weight = self.tensor()
        floats_or_codes = source.tensor() if isinstance(source, QuantizedLike) else source
        weight.copy_(floats_or_codes, non_blocking)
        self._take(ops.parts(weight))
        return self

    def _take(self, parts: tuple) -> None:
        """Writes new data, scale and shift into the parts."""
        self._widen_scales(*parts[1:])
        for own, new in zip(self.parts(), parts, strict=True):
            if own is not None:
                own.data.copy_(new)
        self.snr_db = None

    def _apply(self, fn: Callable, recurse: bool = True) -> "QWeight":
        # torch gives the very parameters other data, and swaps only those that nobody else has.
        self._unbind()
        parts = self._parameters["_scale"], self._parameters["_shift"]
        before = [None if part is None else part.data for part in parts]
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype = probe.dtype
        self._keep_scales(*before)
        return self

    def _keep_scales(self, scale: Any, shift: torch.Tensor | None) -> None:
        """Puts these back, on the parts' device, where the parts' dtype cannot hold them."""
        now: Any = self._parameters["_scale"]
        if not fits(scale, shift, self.qtype, now):
            self._parameters["_scale"] = Part(scale.to(now.device))
            self._parameters["_shift"] = None if shift is None else Part(shift.to(now.device))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        self._unbind()
        key = prefix + ("_data._data" if self.qtype.is_affine else "_data")
        data = self._data._data if isinstance(self._data, PackedCodes) else self._data
        given = state_dict.get(key)
        if given is not None and given.dtype != data.dtype:
            error_msgs.append(
                f"expected {key} of {data.dtype} for {self.qtype.name}, got {given.dtype}"
            )
            return
        if given is not None:
            self.snr_db = None
        self._widen_scales(state_dict.get(prefix + "_scale"), state_dict.get(prefix + "_shift"))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _widen_scales(self, scale: torch.Tensor | None, shift: torch.Tensor | None) -> None:
        """Makes place for scales that are about to be loaded and that this dtype cannot hold."""
        own: Any = self._parameters["_scale"]
        if scale is None or fits(scale, shift, self.qtype, own):
            return
        for name in ("_scale", "_shift"):
            part = self._parameters[name]
            if part is not None:
                self._parameters[name] = Part(torch.empty_like(part, dtype=scale.dtype))

    def __repr__(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size else ""
        return (
            f"{type(self).__name__}({self.qtype.name}, shape={tuple(self.shape)}, "
            f"dtype={self.dtype}{group})"
        )
