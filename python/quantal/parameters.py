"""Quantized parameters of modules that have no quantized kind: fused experts, own modules."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch

from ._library import ops
from .nn import QModuleMixin, QWeight
from .nn.straight_through import straight_through, transforms_active
from .nn.weight_scheme import check_optimizer, choose_group_size, freeze_for, weight_snr_db
from .optimizers import Optimizer, default_optimizer
from .qtype import qtype as QType  # noqa: N812

__all__ = [
    "ParameterScheme",
    "QParameter",
    "float_of",
    "quantize_parameter",
    "quantized_parameters",
    "schemes_of",
]


@dataclass
class ParameterScheme:
    """How one parameter is quantized.

    A weight of N dimensions is the matrix of its rows: the last dimension, or, with `row_dims` 1,
    all but the first. Each row has a scale of its own, or one for each of its groups.
    """

    qtype: QType
    group_size: int
    row_dims: int
    optimizer: Optimizer

    def matrix_shape(self, shape: torch.Size) -> tuple[int, int]:
        """Of a parameter of `shape`."""
        return math.prod(shape[: self.row_dims]), math.prod(shape[self.row_dims :])

    def encode(self, weight: torch.Tensor) -> tuple:
        """Codes, scale and shift of its matrix."""
        matrix = weight.detach().reshape(self.matrix_shape(weight.shape))
        return self.optimizer.encode(matrix, self.qtype, self.group_size)

    def decode(
        self, parts: tuple, shape: torch.Size, dtype: torch.dtype, latent: Any = None
    ) -> torch.Tensor:
        """Their value as floats; gradients go to `latent`."""
        rows, columns = self.matrix_shape(shape)
        by_python = latent is not None and transforms_active()
        floats = None if latent is None or by_python else latent.reshape(rows, columns)
        data, scale, shift = parts
        value = ops.decode(
            data, scale, shift, self.qtype.name, self.group_size, [rows, columns], dtype, floats
        )
        value = value.reshape(shape)
        return straight_through(latent, value) if by_python else value


class QParameter(QWeight):
    """A frozen parameter: a `QWeight` over the matrix of its rows. Indexing decodes just what is
    asked for; torch functions see the decoded value."""

    def __init__(self, parts: tuple, scheme: ParameterScheme, shape: Any, dtype: Any) -> None:
        data, scale, shift = parts
        super().__init__(data, scale, shift, scheme.qtype, scheme.group_size, shape, dtype)
        self.scheme = scheme

    def tensor(self) -> torch.Tensor:
        """The float value."""
        return self.dequantize()

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The float value, of `dtype` or the parameter's."""
        return self.scheme.decode(self.parts(), self.shape, dtype or self.dtype)

    @torch.no_grad()
    def copy_(self, source: Any, non_blocking: bool = False) -> "QParameter":
        """Quantizes `source` anew."""
        floats = source.dequantize() if isinstance(source, QWeight) else source
        floats = floats.to(self.device, self.dtype, non_blocking).expand(self.shape)
        ops.check_finite(floats, "source of copy_")
        self._take(self.scheme.encode(floats))
        return self

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Decodes the rows of chosen experts: an integer or a tensor of integers."""
        rows_each = self.scheme.matrix_shape(self.shape)[0] // max(self.shape[0], 1)
        is_number = isinstance(index, int)
        is_list = isinstance(index, torch.Tensor) and not index.is_floating_point()
        if not (is_number or is_list) or (is_list and index.dtype in (torch.bool, torch.uint8)):
            return self.tensor()[index]
        count = self.shape[0]
        if is_number and not -count <= index < count:
            raise IndexError(f"index {index} is out of bounds for {count} rows")
        data, scale, shift = self.parts()  # hooks bring those that are offloaded
        # Negative indices count from the end.
        chosen = (index if is_list else torch.tensor(index, device=scale.device)) % count
        rows = chosen.unsqueeze(-1) * rows_each + torch.arange(rows_each, device=scale.device)
        columns = self.scheme.matrix_shape(self.shape)[1]
        value = ops.embedding(
            rows, data, scale, shift, self.qtype.name, self.group_size,
            [count * rows_each, columns], self.dtype,
        )  # fmt: skip
        return value.reshape(*chosen.shape, *self.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))


class _HasLiveParameters:
    """What a module's class becomes while parameters of it are quantized and not frozen: reading
    one gives its quantized value, its entry stays the float parameter that trains."""

    _live_names: tuple[str, ...] = ()
    _float_class: Any = torch.nn.Module

    def _load_from_state_dict(self: Any, state_dict: Any, prefix: str, *rest: Any) -> None:
        plain = self._float_class
        for name in self._live_names:  # the class changes on the way
            _freeze_for_state(self, name, state_dict, prefix)
        plain._load_from_state_dict(self, state_dict, prefix, *rest)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (self._float_class, self._live_names), state


def _rebuild(cls: type, names: tuple[str, ...]) -> torch.nn.Module:
    made: Any = _live_class(cls, names)
    return made.__new__(made)


def schemes_of(module: torch.nn.Module) -> dict[str, ParameterScheme]:
    """Those of a module's quantized parameters, live or frozen."""
    return module.__dict__.get("_quantized_parameters", {})


def float_of(module: torch.nn.Module, name: str) -> Any:
    """The float parameter itself, of a live one."""
    return module._parameters[name]


_LIVE_CLASSES: dict[tuple, type] = {}


def _live_class(cls: type, names: tuple[str, ...]) -> type:
    if (cls, names) not in _LIVE_CLASSES:
        members: dict[str, Any] = {name: property(_reader(name)) for name in names}
        members |= {"_live_names": names, "_float_class": cls, "__module__": cls.__module__}
        _LIVE_CLASSES[cls, names] = type(cls.__name__, (_HasLiveParameters, cls), members)
    return _LIVE_CLASSES[cls, names]


def _reader(name: str) -> Callable[[torch.nn.Module], torch.Tensor]:
    def read(module: torch.nn.Module) -> torch.Tensor:
        weight, scheme = float_of(module, name), schemes_of(module)[name]
        if hasattr(weight, "full_tensor"):  # FSDP's shard, which it asks for between forwards
            return weight
        return scheme.decode(scheme.encode(weight), weight.shape, weight.dtype, weight)

    return read


def _set_live_names(module: torch.nn.Module, names: tuple[str, ...]) -> None:
    cls = type(module)
    plain = cls._float_class if issubclass(cls, _HasLiveParameters) else cls
    module.__class__ = _live_class(plain, names) if names else plain


def quantize_parameter(
    module: torch.nn.Module,
    name: str,
    qtype: QType,
    optimizer: Optimizer | None = None,
    group_size: int | None = None,
    row_dims: int | None = None,
) -> None:
    """Parameter `name` of `module` computes with its quantized value from now on, with
    straight-through gradients; `quantal.freeze` replaces it by codes.

    Args:
        group_size: elements a group, for qint2 and qint4. Default: as for modules.
        row_dims: how many leading dimensions count rows. Default: all but the last.
    """
    weight = float_of(module, name)
    if weight.ndim < 2 or not weight.is_floating_point():
        raise ValueError(
            f"[quantal.quantize] expected parameter '{name}' to be of floats in two dimensions or "
            f"more, got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    optimizer = optimizer or default_optimizer(qtype)
    check_optimizer(qtype, optimizer)
    if optimizer.quantizer is None:
        raise ValueError(
            f"[quantal.quantize] parameters take the optimizers of Quantal, got "
            f"{type(optimizer).__name__}"
        )
    rows = weight.ndim - 1 if row_dims is None else row_dims
    size = choose_group_size(qtype, math.prod(weight.shape[rows:]), group_size)
    schemes = module.__dict__.setdefault("_quantized_parameters", {})
    schemes[name] = ParameterScheme(qtype, size, rows, optimizer)
    _set_live_names(module, (*live_names(module), name))


def live_names(module: torch.nn.Module) -> tuple[str, ...]:
    return getattr(module, "_live_names", ())


def quantized_parameters(
    model: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Module, str, ParameterScheme]]:
    """Full name, module, name and scheme of every quantized parameter, live or frozen."""
    for prefix, module in model.named_modules():
        for name, scheme in schemes_of(module).items():
            yield f"{prefix}.{name}" if prefix else name, module, name, scheme


def matching_parameters(
    model: torch.nn.Module, patterns: list[str]
) -> dict[str, tuple[torch.nn.Module, str]]:
    """The parameters whose names match: by full name, their module and name. ValueError for a
    pattern that matches nothing, and for what is quantized already."""
    found: dict[str, tuple[torch.nn.Module, str]] = {}
    for pattern in patterns:
        before = len(found)
        for full, parameter in model.named_parameters():
            if not fnmatch(full, pattern):
                continue
            prefix, _, name = full.rpartition(".")
            module = model.get_submodule(prefix)
            is_taken = isinstance(module, (QModuleMixin, QWeight))
            if is_taken or name in schemes_of(module):
                raise ValueError(f"[quantal.quantize] parameter '{full}' is quantized already")
            if parameter.ndim >= 2 or pattern == full:
                found[full] = (module, name)
        if len(found) == before:
            raise ValueError(
                f"[quantal.quantize] no parameter of two dimensions or more matches '{pattern}'"
            )
    return found


def freeze_parameter(module: torch.nn.Module, name: str) -> None:
    """Replaces a live parameter by codes."""
    weight, scheme = float_of(module, name), schemes_of(module)[name]
    parts = scheme.encode(weight)
    snr = weight_snr_db(weight.detach(), scheme.decode(parts, weight.shape, weight.dtype))
    set_frozen(module, name, parts, weight.shape, weight.dtype).snr_db = snr


def set_frozen(module: torch.nn.Module, name: str, parts: tuple, shape, dtype) -> QParameter:
    """Puts codes in the place of a live parameter."""
    made = QParameter(parts, schemes_of(module)[name], shape, dtype)
    _set_live_names(module, tuple(n for n in live_names(module) if n != name))
    del module._parameters[name]
    module._modules[name] = made
    return made


def live_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Full name, module and name of those that are not frozen."""
    for full, module, name, _ in quantized_parameters(model):
        if name in live_names(module):
            yield full, module, name


def _freeze_for_state(module: torch.nn.Module, name: str, state_dict: dict, prefix: str) -> None:
    """Codes that are about to be loaded need a frozen parameter to go to."""
    weight, scheme = float_of(module, name), schemes_of(module)[name]
    matrix = torch.Size(scheme.matrix_shape(weight.shape))
    made = freeze_for(
        state_dict, f"{prefix}{name}.", scheme.qtype, scheme.group_size, matrix, weight
    )
    if made is not None:
        parts, scheme.group_size = made
        set_frozen(module, name, parts, weight.shape, weight.dtype)
