"""What optimum.quanto has and Quantal has not, or has under other rules."""

import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from glob import escape
from importlib.util import find_spec
from typing import Any

import torch

import quantal
from quantal import models
from quantal.nn import qmodule
from quantal.nn.qweight import PackedCodes
from quantal.tensor import packed_codes, unpacked_codes

_QMODULE_TABLE = qmodule._QMODULE_TABLE

qint = quantal.qtype.qint
qfloat = quantal.qtype.qfloat

# What Quantal quantizes and optimum-quanto does not: files must stay readable by both.
_BEYOND = (
    quantal.QConv1d,
    quantal.QConv3d,
    quantal.QConvTranspose1d,
    quantal.QConvTranspose2d,
    quantal.QConvTranspose3d,
    quantal.QEmbedding,
)

Patterns = str | list[str] | None


def _is_beyond(module: torch.nn.Module) -> bool:
    for source, kind in _QMODULE_TABLE.items():
        if isinstance(module, source):
            return kind in _BEYOND
    return False


def _matching(patterns: Patterns, names: list[str]) -> list[str] | None:
    """Without the patterns that match nothing, which get a warning."""
    if patterns is None:
        return None
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    idle = [p for p in patterns if not any(fnmatch(name, p) for name in names)]
    if idle:
        warnings.warn(f"[quantal.compat] no module's name matches {idle}", stacklevel=3)
    return [p for p in patterns if p not in idle]


def quantize(
    model: torch.nn.Module,
    weights: quantal.qtype | str | None = None,
    activations: quantal.qtype | str | None = None,
    optimizer: quantal.Optimizer | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> None:
    """`quantal.quantize` for the kinds of modules that optimum-quanto knows, and those that were
    registered. A pattern that matches nothing gets a warning, not an error."""
    named = list(model.named_modules(remove_duplicate=False))
    names = [name for name, _ in named]
    include, exclude = _matching(include, names), _matching(exclude, names)
    beyond = [escape(name) for name, module in named if _is_beyond(module)]
    quantal.quantize(
        model, weights, activations, optimizer, include=include, exclude=(exclude or []) + beyond
    )


def _quantize_submodule(
    model: torch.nn.Module,
    name: str,
    module: torch.nn.Module,
    weights: quantal.qtype | str | None = None,
    activations: quantal.qtype | str | None = None,
    optimizer: quantal.Optimizer | None = None,
) -> None:
    """Replaces one module, where it has a quantized kind."""
    if _is_beyond(module):
        return
    replacement = quantal.quantize_module(module, weights, activations, optimizer)
    if replacement is not None:
        replacement.name = name
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)


class QuantizedTransformersModel(models.QuantizedTransformersModel):
    """As optimum-quanto writes and reads it: linear layers alone have quantized weights."""

    _quantize: Any = staticmethod(quantize)


class QuantizedModelForCausalLM(QuantizedTransformersModel, models.QuantizedModelForCausalLM):
    """A quantized causal language model."""


class QuantizedDiffusersModel(models.QuantizedDiffusersModel):
    """As optimum-quanto writes and reads it."""

    _quantize: Any = staticmethod(quantize)


class QuantizedPixArtTransformer2DModel(
    QuantizedDiffusersModel, models.QuantizedPixArtTransformer2DModel
):
    """A quantized PixArt transformer."""


def is_transformers_available() -> bool:
    """Whether transformers is installed; it is not imported."""
    return find_spec("transformers") is not None


def is_diffusers_available() -> bool:
    """Whether diffusers is installed; it is not imported."""
    return find_spec("diffusers") is not None


def is_extension_available(extension_type: str) -> bool:
    """False: kernels are in the C++ library, and nothing is compiled at run time."""
    return False


def get_extension(extension_type: str) -> Any:
    """KeyError: there are no extensions that would be compiled at run time."""
    raise KeyError(extension_type)


def _check_bits(bits: int) -> None:
    if bits not in (2, 4):
        raise ValueError(f"[quantal.compat] expected 2 or 4 bits, got {bits}")


def pack_weights(intweights: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 2 or 4 bits, one a byte, as several a byte along the first dimension."""
    _check_bits(bits)
    return packed_codes(intweights, bits)


class _PackedMeta(type):
    """The packed codes of a frozen module count as PackedTensors."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, PackedCodes) or type.__instancecheck__(cls, value)


class PackedTensor(metaclass=_PackedMeta):
    """uint8 codes of 2 or 4 bits, several a byte. Torch functions see them unpacked."""

    dtype = torch.uint8

    def __init__(self, data: torch.Tensor, bits: int, size: Any, stride: Any = None) -> None:
        _check_bits(bits)
        self._data = data
        self._bits = self.bits = bits
        self.shape = torch.Size(size)

    @classmethod
    def pack(cls, t: torch.Tensor, bits: int = 4) -> "PackedTensor":
        """From uint8 codes, one a byte."""
        return cls(pack_weights(t, bits), bits, t.shape)

    def unpack(self) -> torch.Tensor:
        """The codes, one a byte."""
        return unpacked_codes(self._data, self.bits)[: self.shape[0]]

    @property
    def device(self) -> torch.device:
        """Of the packed bytes."""
        return self._data.device

    def size(self, dim: int | None = None) -> Any:
        """Of the unpacked codes."""
        return self.shape if dim is None else self.shape[dim]

    def numpy(self) -> Any:
        """The codes, one a byte."""
        return self.unpack().cpu().numpy()

    def to(self, *args: Any, **kwargs: Any) -> "PackedTensor":
        """On another device; ValueError for another dtype."""
        moved = self._data.to(*args, **kwargs)
        if moved.dtype != torch.uint8:
            raise ValueError(
                f"PackedTensor are torch.uint8 only and cannot be moved to {moved.dtype}."
            )
        return PackedTensor(moved, self.bits, self.shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unpacked = [a.unpack() if isinstance(a, PackedTensor) else a for a in args]
        return func(*unpacked, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"PackedTensor({self._data}, bits={self.bits}, public_dtype={self.dtype})"


class _Layout:
    """A kernel's own layout in optimum-quanto. Quantal's weights keep one layout and are packed for
    kernels out of sight, so nothing is ever an instance."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"[quantal.compat] {type(self).__name__} is a layout of optimum-quanto's kernels, "
            "which Quantal has no use for: make weights with quantize_weight()"
        )


def _layouts() -> Iterator[tuple[str, type]]:
    for name in (
        *("AWQPackedTensor", "AWQWeightQBitsTensor"),
        *("MarlinF8PackedTensor", "MarlinF8QBytesTensor"),
        *("MarlinInt4PackedTensor", "MarlinInt4WeightQBitsTensor"),
        *("TinyGemmPackedTensor", "TinyGemmWeightQBitsTensor"),
    ):
        yield name, type(name, (_Layout,), {"__module__": __name__})


globals().update(_layouts())
