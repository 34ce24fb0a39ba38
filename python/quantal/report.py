"""What was quantized, what was not, and why."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .nn import PackedCodes, QLayerNorm, QModuleMixin, QWeight
from .nn.qmodule import has_own_forward, has_quantized_kind
from .nn.weight_scheme import weight_snr_db
from .parameters import schemes_of

__all__ = ["LayerReport", "Report", "report"]


@dataclass
class LayerReport:
    """One module, or one parameter of a module without a quantized kind."""

    name: str
    kind: str
    weights: str | None = None
    group_size: int = 0
    activations: str | None = None
    frozen: bool = False
    input_scale: float | None = None
    output_scale: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    snr_db: float | None = None
    #: Why it is not quantized; empty where it is.
    left_alone: str = ""

    def cells(self) -> tuple[str, ...]:
        """The texts of its row."""
        activations = self.activations or "-"
        if self.input_scale is not None or self.output_scale is not None:
            activations += " static"
        elif self.activations and self.kind != QLayerNorm.__name__:
            activations += " dynamic"
        state = self.left_alone or (
            "float weight" if self.weights is None else "frozen" if self.frozen else "live"
        )
        group = "-" if self.weights is None else str(self.group_size or "row")
        snr = "-" if self.snr_db is None else f"{self.snr_db:.1f} dB"
        sizes = (str(self.bytes_before), str(self.bytes_after))
        return (self.name or "(root)", self.kind, self.weights or "-", group, activations, *sizes,
                snr, state)  # fmt: skip


@dataclass
class Report:
    """Of a model. str() is a table; bytes are those of all parameters and buffers, as floats and
    as they are now (weights that are not frozen yet: as they are once frozen)."""

    layers: list[LayerReport] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        head = ("layer", "kind", "weights", "group", "activations", "bytes before", "bytes after",
                "SNR", "state")  # fmt: skip
        rows = [head, *(layer.cells() for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        share = 100 * self.bytes_after / self.bytes_before if self.bytes_before else 100
        lines.append(
            f"all parameters and buffers: {self.bytes_before} bytes before, {self.bytes_after} "
            f"after ({share:.1f} %)"
        )
        return "\n".join(lines)


def report(model: torch.nn.Module, *, snr: bool = True) -> Report:
    """What of `model` is quantized and how, what is not and why, with bytes before and after.

    Args:
        snr: whether to compute the signal-to-noise ratio of weights that are not frozen; frozen
            ones know theirs, unless they were loaded from a file that does not tell.
    """
    result = Report()
    counted: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, (QWeight, PackedCodes)):
            continue
        for name, value in _entries(module):
            before, after = _bytes(module, name, value)
            if id(value) not in counted:
                counted.add(id(value))
                result.bytes_before += before
                result.bytes_after += after
        result.layers += _layers(prefix, module, snr)
    return result


def _entries(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in [*module._parameters.items(), *module._buffers.items()]:
        if value is not None:
            yield name, value
    for name, child in module._modules.items():
        if isinstance(child, QWeight):
            yield name, child


def _bytes(module: torch.nn.Module, name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, QWeight):
        return value.numel() * value.dtype.itemsize, value.nbytes
    parts: tuple = ()
    if isinstance(module, QModuleMixin) and name == "weight" and module.weight_qtype is not None:
        with torch.no_grad():
            parts = module._encode(torch.empty_like(value, device="meta"))
    elif (scheme := schemes_of(module).get(name)) is not None:
        parts = scheme.encode(torch.empty_like(value, device="meta"))
    after = sum(p.nbytes for p in parts if p is not None) if parts else value.nbytes
    return value.nbytes, after


def _layers(prefix: str, module: torch.nn.Module, snr: bool) -> Iterator[LayerReport]:
    kind = type(module).__name__
    if isinstance(module, QModuleMixin):
        yield _module_report(prefix, module, snr)
        return
    rest = LayerReport(prefix, kind)
    for name, value in _entries(module):
        before, after = _bytes(module, name, value)
        scheme = schemes_of(module).get(name)
        if scheme is not None:
            one = LayerReport(f"{prefix}.{name}" if prefix else name, kind, scheme.qtype.name)
            one.group_size, one.frozen = scheme.group_size, isinstance(value, QWeight)
            one.bytes_before, one.bytes_after = before, after
            if one.frozen:
                one.snr_db = value.snr_db
            elif snr:
                one.snr_db = weight_snr_db(value.detach(), getattr(module, name).detach())
            yield one
        elif name in module._parameters:
            rest.bytes_before += before
    if rest.bytes_before:
        rest.bytes_after = rest.bytes_before
        if has_own_forward(module):
            rest.left_alone = "its class has a forward of its own"
        else:
            known = has_quantized_kind(module)
            rest.left_alone = "not quantized" if known else "no quantized kind for its parameters"
        yield rest


def _module_report(prefix: str, module: QModuleMixin, snr: bool) -> LayerReport:
    one = LayerReport(prefix, type(module).__name__)
    weight = module.weight
    if weight is not None:
        one.bytes_before, one.bytes_after = _bytes(module, "weight", weight)
    if module.weight_qtype is not None:
        one.weights, one.group_size = module.weight_qtype.name, module.weight_group_size or 0
        one.frozen = module.frozen
        if module.frozen:
            one.snr_db = weight.snr_db
        elif snr:
            with torch.no_grad():
                one.snr_db = weight_snr_db(weight, module.float_weight(weight.dtype))
    if module.activation_qtype is not None:
        one.activations = module.activation_qtype.name
        if not module.dynamic:
            one.input_scale = module.input_scale.item() if module._input_calibrated else None
            one.output_scale = module.output_scale.item() if module._output_calibrated else None
    return one
