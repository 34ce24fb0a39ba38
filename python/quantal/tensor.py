"""Quantized tensors: `QTensor` and its kinds, and the functions that make them."""

from collections.abc import Sequence
from typing import Any

import torch

from ._library import ops
from .grouped import group, grouped_shape, ungroup
from .qtype import qint8, qtypes
from .qtype import qtype as QType  # noqa: N812

__all__ = [
    "ActivationQBytesTensor",
    "QBitsTensor",
    "QBytesTensor",
    "QTensor",
    "WeightQBitsTensor",
    "WeightQBytesTensor",
    "absmax_scale",
    "dtype_info",
    "qfallback",
    "quantize_activation",
    "quantize_weight",
]


def _is_quantized(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return ops.is_quantized(value)
    return hasattr(type(value), "_quantal_tensor")


def _has_bits(value: Any, below_8: bool) -> bool:
    return (value.qtype.bits < 8) == below_8


_BASE_OF_VIEW: Any = torch.Tensor._base.__get__  # type: ignore[union-attr]


class _QTensorMeta(torch._C._TensorMeta):
    """isinstance() asks what the value is, not how it was made: tensors that operations return, and
    the weights of frozen modules, count as well."""

    _describes: Any

    def __instancecheck__(self, value: object) -> bool:
        if type.__instancecheck__(self, value) and self is QTensor:
            return True
        return _is_quantized(value) and self._describes(wrap(value))


class _Saved:
    """What optimum-quanto's weights have for state dicts."""

    def save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Puts codes, scale and shift into `destination`, under the keys of a module's weight."""
        key = "_data._data" if self.qtype.is_affine else "_data"
        parts = {key: getattr(self._data, "_data", self._data), "_scale": self._scale}
        for name, part in (parts | {"_shift": self._shift}).items():
            if part is not None:
                destination[prefix + name] = part if keep_vars else part.detach()

    def optimize(self) -> Any:
        """Itself: kernels are chosen per call."""
        return self


class QTensor(_Saved, torch.Tensor, metaclass=_QTensorMeta):
    """A tensor of floating-point dtype that holds codes and scales. Any torch operation takes it;
    those without a quantized kernel see its float value."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            value = func(*args, **(kwargs or {}))
        if type(value) in (list, tuple):  # split, chunk, unbind
            return type(value)(_wrapped(item) for item in value)
        # What is wrapped is a view of what it wraps: bases of bases would have no end.
        return value if func == _BASE_OF_VIEW else _wrapped(value)

    @staticmethod
    def _describes(value: Any) -> bool:
        return True

    @property
    def qtype(self) -> QType:
        """The type of the codes."""
        return qtypes[ops.qtype_name(self)]

    @property
    def axis(self) -> int | None:
        """0 for weights (one scale a row, or a group of one), -1 for transposes of them, None for
        activations."""
        if ops.is_activation(self):
            return None
        return -1 if self.ndim == 2 and self.stride(1) != 1 else 0

    @property
    def _group_size(self) -> int | None:
        return ops.group_size(self) or None

    @property
    def _data(self) -> torch.Tensor:
        return ops.parts(self)[0]

    @property
    def _scale(self) -> torch.Tensor:
        return ops.parts(self)[1]

    @property
    def _shift(self) -> torch.Tensor | None:
        return ops.parts(self)[2]

    def dequantize(self) -> torch.Tensor:
        """The float value, a plain tensor. Differentiable."""
        return ops.dequantize(self).as_subclass(torch.Tensor)

    def numpy(self, *, force: bool = False) -> Any:
        """The float value."""
        return self.dequantize().numpy(force=force)

    def tolist(self) -> list:
        """The float value."""
        return self.dequantize().tolist()

    def __array__(self, dtype: Any = None) -> Any:
        return self.dequantize().detach().cpu().__array__(dtype)

    def __deepcopy__(self, memo: dict) -> "QTensor":
        return wrap(self.detach().clone())

    def __reduce_ex__(self, protocol: Any) -> tuple:
        data, scale, shift = ops.parts(self)
        if self.qtype.is_floating_point:  # whose storages torch cannot pickle
            data = data.view(torch.uint8)
        if ops.is_activation(self):
            return _rebuild_activation, (data, scale, self.qtype.name, self.dtype)
        sizes = list(self.shape)
        return _rebuild_weight, (
            data, scale, shift, self.qtype.name, self._group_size or 0, sizes, self.dtype,
        )  # fmt: skip

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"qtype={self.qtype.name}, group_size={self._group_size})"
        )


class QBytesTensor(QTensor):
    """A QTensor of 8-bit codes."""

    @staticmethod
    def _describes(value: Any) -> bool:
        return _has_bits(value, below_8=False)


class QBitsTensor(QTensor):
    """A QTensor of 2- or 4-bit codes."""

    @staticmethod
    def _describes(value: Any) -> bool:
        return _has_bits(value, below_8=True)


class WeightQBytesTensor(QBytesTensor):
    """A weight of 8-bit codes. Its constructor is `create`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.create(*args, **kwargs)

    @staticmethod
    def _describes(value: Any) -> bool:
        return _has_bits(value, below_8=False) and value.axis is not None

    @staticmethod
    def create(
        qtype: QType,
        axis: int | None,
        size: Sequence[int],
        stride: Any,
        data: torch.Tensor,
        scale: torch.Tensor,
        activation_qtype: QType | None = None,
        requires_grad: bool = False,
    ) -> Any:
        """Over codes of `size`, with one scale for each index of `axis` (None: one for all), of the
        scale's dtype. The other arguments are as optimum-quanto has them: kernels are chosen per
        call, and codes need no gradient."""
        return _weight_of_codes(qtype, axis, None, size, data, scale)

    @classmethod
    def quantize(
        cls,
        base: torch.Tensor,
        qtype: QType,
        axis: int | None,
        scale: torch.Tensor,
        activation_qtype: QType | None = None,
        optimized: bool = True,
    ) -> Any:
        """`quantize_weight`; with axis None one scale is for all."""
        if qtype.bits != 8:
            raise ValueError("QBytesTensor can only be of 8-bit qtype")
        return quantize_weight(base, qtype, 0 if axis is None else axis, scale)

    @staticmethod
    def load_from_state_dict(
        state_dict: Any,
        prefix: str,
        qtype: QType,
        axis: int | None,
        size: Sequence[int],
        stride: Any,
        activation_qtype: QType | None,
        missing_keys: list[str],
    ) -> Any:
        """Of the parts that `save_to_state_dict` puts, which it takes out; None where one is
        missing."""
        parts = _taken_out(state_dict, prefix, ("_data", "_scale"), missing_keys)
        return None if parts is None else _weight_of_codes(qtype, axis, None, size, *parts)


class WeightQBitsTensor(QBitsTensor):
    """A weight of 2- or 4-bit codes. Its constructor is `create`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.create(*args, **kwargs)

    @staticmethod
    def create(
        qtype: QType,
        axis: int,
        group_size: int | None,
        size: Sequence[int],
        stride: Any,
        data: Any,
        scale: torch.Tensor,
        shift: torch.Tensor,
        requires_grad: bool = False,
    ) -> Any:
        """Over codes of `size`, or grouped as by `group`: one a byte or packed. Scale and shift are
        as of `quantize_weight`."""
        return _weight_of_codes(qtype, axis, group_size, size, data, scale, shift)

    @classmethod
    def quantize(
        cls,
        base: torch.Tensor,
        qtype: QType,
        axis: int,
        group_size: int | None,
        scale: torch.Tensor,
        shift: torch.Tensor,
        optimized: bool = True,
    ) -> Any:
        """`quantize_weight`."""
        if not qtype.is_affine:
            raise ValueError("WeightQBitsTensor can only be of qint2 or qint4 qtype")
        return quantize_weight(base, qtype, axis, scale, shift, group_size)

    @staticmethod
    def load_from_state_dict(
        state_dict: Any,
        prefix: str,
        qtype: QType,
        axis: int,
        group_size: int | None,
        size: Sequence[int],
        stride: Any,
        missing_keys: list[str],
    ) -> Any:
        """Of the parts that `save_to_state_dict` puts, which it takes out; None where one is
        missing."""
        names = ("_data._data", "_scale", "_shift")
        parts = _taken_out(state_dict, prefix, names, missing_keys)
        return None if parts is None else _weight_of_codes(qtype, axis, group_size, size, *parts)


class ActivationQBytesTensor(QBytesTensor):
    """An activation: 8-bit codes and one scale."""

    def __new__(
        cls,
        qtype: QType,
        size: Sequence[int],
        stride: Any,
        data: torch.Tensor,
        scale: torch.Tensor,
        requires_grad: bool = False,
    ) -> Any:
        return _rebuild_activation(data.reshape(size), scale, qtype.name, scale.dtype)

    @staticmethod
    def _describes(value: Any) -> bool:
        return value.axis is None

    @classmethod
    def quantize(cls, base: torch.Tensor, qtype: QType, scale: torch.Tensor) -> QTensor:
        """`quantize_activation`."""
        return quantize_activation(base, qtype, scale)


def _taken_out(
    state_dict: Any, prefix: str, names: tuple[str, ...], missing_keys: list[str]
) -> list[torch.Tensor] | None:
    missing = [prefix + name for name in names if prefix + name not in state_dict]
    missing_keys += missing
    parts = [state_dict.pop(prefix + name, None) for name in names]
    return None if missing else parts


def _weight_of_codes(qtype, axis, group_size, size, data, scale, shift=None) -> Any:
    rows = size[0] if group_size is None else grouped_shape(size, axis, group_size)[0]
    codes = getattr(data, "_data", data)
    if codes.shape[0] != rows:
        codes = unpacked_codes(codes, qtype.bits)[:rows]
    if axis == -1:
        codes = codes.reshape(-1, codes.shape[-1]).t().contiguous()
        columns = _weight_of_codes(qtype, 0, None, codes.shape, codes, scale, shift)
        return LastAxisWeight(columns, torch.Size(size), group_size)
    shape = [rows] + [1] * (codes.ndim - 1)
    steps = _expanded(scale, rows).reshape(shape)
    offsets = None if shift is None else _expanded(shift, rows).reshape(shape)
    if qtype.is_affine:
        codes = packed_codes(codes, qtype.bits)
    return _rebuild_weight(
        codes, steps, offsets, qtype.name, group_size or 0, list(size), scale.dtype
    )


def wrap(value: Any) -> Any:
    """A quantized torch.Tensor as the QTensor class that shows what it holds."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return value
    if ops.is_activation(value):
        return value.as_subclass(ActivationQBytesTensor)
    narrow = ops.qtype_name(value) in ("qint2", "qint4")
    return value.as_subclass(WeightQBitsTensor if narrow else WeightQBytesTensor)


def _wrapped(value: Any) -> Any:
    """`wrap` of what may be quantized."""
    is_tensor = isinstance(value, torch.Tensor)
    return wrap(value) if is_tensor and ops.is_quantized(value) else value


def _codes(data: torch.Tensor, qtype: str) -> torch.Tensor:
    return data.view(qtypes[qtype].dtype) if qtypes[qtype].is_floating_point else data


def _rebuild_weight(data, scale, shift, qtype, group_size, sizes, dtype) -> QTensor:
    codes = _codes(data, qtype)
    return wrap(ops.weight_from_parts(codes, scale, shift, qtype, group_size, sizes, dtype))


def _rebuild_activation(data, scale, qtype, dtype) -> QTensor:
    value = _codes(data, qtype).to(torch.float32) * scale
    return wrap(ops.quantize_activation(value.to(dtype), qtype, scale))


torch.serialization.add_safe_globals([_rebuild_weight, _rebuild_activation])


class QuantizedLike(_Saved):
    """Base of objects that are no tensors but stand for a quantized one: torch functions take them,
    and attributes that they lack come from the tensor."""

    _quantal_tensor = True

    def tensor(self) -> torch.Tensor:
        """The QTensor that this stands for; or its float value, where no QTensor holds it."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # torch.nn.init passes keywords only.
        first = (*args[:1], *kwargs.values())[:1] if writes(name) else ()
        targets = [kwargs.get("out"), *first]
        for target in targets:
            if _holds_quantized(target):
                return written(target, name)(*args[1:], **kwargs)

        def unwrapped(value: Any) -> Any:
            if isinstance(value, QuantizedLike):
                return value.tensor()
            if isinstance(value, (list, tuple)):
                return type(value)(unwrapped(item) for item in value)
            return value

        return func(*unwrapped(tuple(args)), **{k: unwrapped(v) for k, v in kwargs.items()})


def writes(name: str) -> bool:
    """Whether a method or function of this name writes to its first argument."""
    return name.endswith("_") and not name.startswith("__")


def _holds_quantized(value: Any) -> bool:
    return isinstance(value, QuantizedLike) or (
        isinstance(value, (list, tuple)) and any(isinstance(v, QuantizedLike) for v in value)
    )


def written(target: Any, name: str) -> Any:
    """What writes to `target`: the method that it has itself. Its tensor is made anew each time: a
    write to that would be lost."""
    own = getattr(type(target), name, None) if writes(name) else None
    if own is None:
        raise RuntimeError(
            f"[quantal] {name} cannot write to a frozen weight, {target!r}: use copy_(), or "
            "quantize a float weight"
        )
    return own.__get__(target)


def _binary(name: str) -> Any:
    return lambda self, *args: getattr(self.tensor(), name)(*args)


def _in_place(name: str) -> Any:
    return lambda self, *args: written(self, name)


for _name in [
    "__matmul__",
    "__rmatmul__",
    "__add__",
    "__radd__",
    "__mul__",
    "__rmul__",
    "__sub__",
    "__rsub__",
    "__truediv__",
    "__neg__",
    "__getitem__",
    "__len__",
    "__array__",
]:
    setattr(QuantizedLike, _name, _binary(_name))
for _name in ["__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"]:
    setattr(QuantizedLike, _name, _in_place(_name))


def unpacked_codes(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes that are packed along the first dimension, one a byte; those of the low bits first."""
    return torch.cat([(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def packed_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Undoes `unpacked_codes`; codes of 0 fill the last bytes."""
    shifts = range(0, 8, bits)
    missing = -codes.shape[0] % len(shifts)
    padding = (0, 0) * (codes.ndim - 1) + (0, missing)
    parts = torch.nn.functional.pad(codes.to(torch.uint8), padding).chunk(len(shifts))
    packed = torch.zeros_like(parts[0])
    for part, shift in zip(parts, shifts, strict=True):
        packed |= part << shift
    return packed


class LastAxisWeight(QuantizedLike):
    """A weight with scales along the last axis: the transpose of a QTensor.

    ``_data``, ``_scale`` and ``_shift`` have optimum-quanto's shapes: grouped codes are
    (group_size, groups), packed along the first dimension, scales (1, groups).
    """

    axis = -1

    def __init__(self, rows: QTensor, shape: torch.Size, group_size: int | None) -> None:
        self._rows = rows
        self.shape = shape
        self._group_size = group_size
        self.qtype, self.dtype, self.device = rows.qtype, rows.dtype, rows.device

    @property
    def _data(self) -> torch.Tensor:
        if self.qtype.is_affine:
            bits = self.qtype.bits
            codes = unpacked_codes(self._rows._data, bits)[: self._rows.shape[0]]
            return packed_codes(self._as_stored(codes.t()), bits)
        return self._as_stored(self._rows._data.t())

    def _as_stored(self, columns: torch.Tensor) -> torch.Tensor:
        return columns if self._group_size is not None else columns.reshape(self.shape)

    @property
    def _scale(self) -> torch.Tensor:
        return self._of_columns(self._rows._scale)

    @property
    def _shift(self) -> torch.Tensor | None:
        shift = self._rows._shift
        return None if shift is None else self._of_columns(shift)

    def _of_columns(self, values: torch.Tensor) -> torch.Tensor:
        ones = 1 if self._group_size is not None else len(self.shape) - 1
        return values.reshape([1] * ones + [-1])

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dequantize(self) -> torch.Tensor:
        """The float value."""
        columns = self._rows.dequantize().t()
        if self._group_size is None:
            return columns.reshape(self.shape)
        return ungroup(columns, -1, self.shape)

    def tensor(self) -> torch.Tensor:
        """The float value: operations have no kernels for this axis."""
        return self.dequantize()

    def to(self, *args: Any, **kwargs: Any) -> "LastAxisWeight":
        """On another device, or of another dtype."""
        rows = wrap(self._rows.to(*args, **kwargs))
        return LastAxisWeight(rows, self.shape, self._group_size)

    def detach(self) -> "LastAxisWeight":
        """Itself: codes have no gradient."""
        return self

    def __repr__(self) -> str:
        return f"LastAxisWeight(shape={tuple(self.shape)}, qtype={self.qtype.name})"


def _check_weight_arguments(qtype, axis, shift, group_size) -> None:
    if axis not in (0, -1):
        raise ValueError("axis parameter must be 0 (first axis) or -1 (last axis)")
    if qtype.bits == 8:
        if shift is not None:
            raise ValueError("shift cannot be specified for 8-bit qtypes")
        if group_size is not None:
            raise ValueError("group_size cannot be specified for 8-bit qtypes.")
    elif shift is None:
        raise ValueError("shift must be specified for qtypes lower than 8-bit")


def quantize_weight(
    t: torch.Tensor,
    qtype: QType,
    axis: int,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
    group_size: int | None = None,
    activation_qtype: QType | None = None,
    optimized: bool = True,
) -> Any:
    """A quantized weight for a given scale (and shift, for qint2 and qint4).

    Args:
        t: float tensor of two dimensions or more.
        axis: 0 or -1: where each index has a scale of its own, or each of its groups.
        scale, shift: one value an index or group, as an `Optimizer` gives them. An integer shift is
            a zero-point.
        group_size: elements a group; must divide the elements that share an index.
        activation_qtype, optimized: as optimum-quanto has them; kernels are chosen per call.
    """
    _check_weight_arguments(qtype, axis, shift, group_size)
    if axis == -1:
        columns = t.reshape(-1, t.shape[-1]) if group_size is None else group(t, -1, group_size)
        rows = columns.t()
        quantized = quantize_weight(
            rows.contiguous(), qtype, 0, _row_scale(scale, rows),
            None if shift is None else _row_scale(shift, rows),
        )  # fmt: skip
        return LastAxisWeight(quantized, t.shape, group_size)
    length = t.numel() // t.shape[0]
    if group_size is not None and (group_size > length or length % group_size != 0):
        raise ValueError(f"Group size ({group_size}) must be a divisor of ({length})")
    per_row = 1 if group_size is None else length // group_size
    steps = _expanded(scale, t.shape[0] * per_row)
    offsets = None if shift is None else _expanded(shift, t.shape[0] * per_row)
    return wrap(ops.quantize_weight_with(t, steps, offsets, qtype.name, group_size or 0))


def _expanded(values: torch.Tensor, count: int) -> torch.Tensor:
    """One value for each of `count` groups; a single one is for all."""
    if values.numel() == 1:
        return values.reshape(1).expand(count)
    if values.numel() != count:
        raise ValueError(
            "When quantizing per-axis, the scale must be broadcastable to the base: "
            f"expected {count} values, got shape {tuple(values.shape)}"
        )
    return values


def _row_scale(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return _expanded(values, rows.shape[0]).reshape(-1, 1)


def quantize_activation(t: torch.Tensor, qtype: QType, scale: torch.Tensor) -> QTensor:
    """An activation of 8-bit codes with one scale: ``code = clamp(round(t / scale))``."""
    if scale.numel() != 1:
        raise ValueError(
            "Parameter scale must be a scalar because activations can only be quantized per-tensor"
        )
    return wrap(ops.quantize_activation(t, qtype.name, scale))


def dtype_info(dtype: torch.dtype) -> torch.finfo | torch.iinfo:
    """torch.finfo or torch.iinfo of a dtype."""
    return torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)


def absmax_scale(base: torch.Tensor, qtype: QType = qint8, axis: int | None = None) -> torch.Tensor:
    """``max|base| / (largest code)``, over everything or for each index of `axis`."""
    largest = dtype_info(qtype.dtype).max
    if axis is None:
        return base.abs().amax() / largest
    rest = [d for d in range(base.ndim) if d != axis % base.ndim]
    return base.abs().amax(dim=rest, keepdim=True) / largest


def qfallback(callable: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function with the float values of quantized arguments."""

    def value(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(value(item) for item in x)
        return x.dequantize() if _is_quantized(x) else x

    return callable(*value(tuple(args)), **{k: value(v) for k, v in kwargs.items()})
