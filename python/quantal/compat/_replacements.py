"""What optimum.quanto has and Quantal has not, or has under other rules."""

import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from glob import escape
from types import SimpleNamespace
from typing import Any

import torch

import quantal
from quantal import models
from quantal.nn import qmodule

from . import _operators

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


def set_module_by_name(
    parent_module: torch.nn.Module, name: str, child_module: torch.nn.Module
) -> None:
    """Puts a module in the place of this name, dots included."""
    parent, _, child = name.rpartition(".")
    setattr(parent_module.get_submodule(parent), child, child_module)


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
        set_module_by_name(model, name, replacement)


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


class _CpuExtension:
    """What optimum-quanto compiles for the CPU."""

    name = "quanto_cpp"
    lib = SimpleNamespace(unpack=_operators.unpack)


ext = _CpuExtension()


class QuantizedLinearFunction(torch.autograd.Function):
    """``linear``, whose weight may be quantized, by its `apply`."""

    @classmethod
    def apply(
        cls, input: torch.Tensor, other: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """With gradients for the input, the float weight behind `other` and the bias."""
        return torch.nn.functional.linear(input, other, bias)


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
        "AWQWeightQBitsTensor",
        *("MarlinF8PackedTensor", "MarlinF8QBytesTensor"),
        "MarlinInt4WeightQBitsTensor",
        *("TinyGemmPackedTensor", "TinyGemmWeightQBitsTensor"),
    ):
        yield name, type(name, (_Layout,), {"__module__": __name__})


globals().update(_layouts())
