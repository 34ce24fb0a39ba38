"""What a checkpoint says about its quantized weights (docs/formats.md, "The metadata")."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .container import NAMES, Container
from .nn import QModuleMixin, quantize_module
from .nn.qmodule import DYNAMIC
from .optimizers import AbsmaxOptimizer, HqqOptimizer, MaxOptimizer, Optimizer
from .parameters import quantize_parameter, schemes_of
from .qtype import find_qtype, qtypes
from .qtype import qtype as QType  # noqa: N812

__all__ = ["VERSION", "Record", "Records", "dtype_name", "quantize_by_records", "records_of_file"]

#: The version that is written, and the newest that is read.
VERSION = "1"

_OPTIMIZERS = {"absmax": AbsmaxOptimizer, "max": MaxOptimizer, "hqq": HqqOptimizer}


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls it."""
    return NAMES[dtype]


@dataclass
class Record:
    """One weight; None: the file does not say."""

    weights: QType | None
    activations: QType | None
    shape: list[int] | None = None
    dtype: str | None = None
    group_size: int | None = None
    live: bool = False
    quantizer: str | None = None
    snr_db: float | None = None
    input_calibrated: bool | None = None
    output_calibrated: bool | None = None
    quantize_output: bool = False
    row_dims: int | None = None
    dynamic: bool = False


@dataclass
class Records:
    """By key ("fc.weight"), with the keys of shared weights and where they are stored."""

    weights: dict[str, Record]
    aliases: dict[str, str] = field(default_factory=dict)

    def of(self, key: str) -> Record | None:
        """Of a weight or of what it shares."""
        return self.weights.get(self.aliases.get(key, key))


class _Fields:
    """Reads one object of the metadata; errors name the file and the place in it."""

    def __init__(self, file: Container, where: str, value: Any) -> None:
        self.file, self.where, self.value = file, where, value
        if not isinstance(value, dict):
            raise file.error(f"{where}: expected an object, got {type(value).__name__}")

    def get(self, name: str, kind: type, default: Any = ...) -> Any:
        """A field of that kind."""
        value = self.value.get(name, default)
        if value is ...:
            raise self.file.error(f"{self.where}: expected a field '{name}', got none")
        is_kind = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if value is not default and not is_kind:
            raise self.file.error(
                f"{self.where}: expected '{name}' to be of type {kind.__name__}, got {value!r}"
            )
        return value

    def qtype(self, name: str) -> QType | None:
        """The qtype that a field names."""
        text = self.get(name, str)
        if name == "activations":
            text = text.removeprefix(DYNAMIC)
        try:
            return find_qtype(text)
        except KeyError:
            raise self.file.error(
                f"{self.where}: expected '{name}' to name a qtype, got '{text}'"
            ) from None


def _parsed(file: Container, key: str) -> Any:
    text = file.metadata.get(key)
    if text is None:
        raise file.error(f"expected metadata '{key}', got none")
    return _json(file, f"metadata '{key}'", text)


def _json(file: Container, where: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise file.error(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise file.error(f"{where}: expected an object, got {type(value).__name__}")
    return value


def records_of_file(
    file: Container, model: torch.nn.Module, layers: Mapping[str, Any] | None
) -> Records:
    """The file's own records; or, of files from elsewhere, what a quantization map (`layers`, the
    metadata's, quanto_qmap.json beside the file) or else the tensors themselves tell."""
    version = file.metadata.get("quantal.format_version")
    if version is None:
        return Records(_foreign_records(file, model, layers))
    if version != VERSION:
        raise file.error(
            f"expected format version {VERSION}, got '{version}': a newer Quantal reads it"
        )
    weights = {
        key: _record(_Fields(file, f"weight '{key}'", value))
        for key, value in _parsed(file, "quantal.weights").items()
    }
    aliases = _parsed(file, "quantal.aliases")
    for key, target in aliases.items():
        if not isinstance(target, str):
            raise file.error(f"expected alias '{key}' to name a tensor, got {target!r}")
    found = Records(weights, aliases)
    # Layers without a weight have no record.
    for name, types in _parsed(file, "quantization_map").items():
        fields = _Fields(file, f"quantization map of '{name}'", types)
        if fields.qtype("weights") is None and fields.qtype("activations") is not None:
            key = f"{name}.weight" if name else "weight"
            if found.of(key) is None:
                calibrated = f"{name}.output_scale" in file.tensors
                weights[key] = Record(None, fields.qtype("activations"), quantize_output=calibrated)
    return found


def _record(fields: _Fields) -> Record:
    record = Record(fields.qtype("weights"), fields.qtype("activations"))
    record.shape = fields.get("shape", list)
    record.dtype = fields.get("dtype", str)
    record.row_dims = fields.get("row_dims", int, None)
    record.live = record.weights is None
    if record.weights is not None:
        record.group_size = fields.get("group_size", int)
        record.live = fields.get("state", str) == "live"
        record.quantizer = fields.get("quantizer", str)
        record.snr_db = fields.get("snr_db", float, None)
    if record.activations is not None:
        record.input_calibrated = fields.get("input_calibrated", bool)
        record.output_calibrated = fields.get("output_calibrated", bool)
        record.quantize_output = fields.get("quantize_output", bool)
        record.dynamic = fields.get("dynamic", bool, False)
    return record


def _foreign_records(
    file: Container, model: torch.nn.Module, layers: Mapping[str, Any] | None
) -> dict[str, Record]:
    beside = file.path.parent / "quanto_qmap.json"
    if layers is None and "quantization_map" in file.metadata:
        layers = _parsed(file, "quantization_map")
    elif layers is None and beside.exists():
        layers = _json(file, f"'{beside.name}' beside it", beside.read_text("utf-8"))
    if layers is None:
        return _inferred_records(file)
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name, types in layers.items():
        fields = _Fields(file, f"quantization map of '{name}'", types)
        key = name if name not in modules and _has_parameter(modules, name) else f"{name}.weight"
        key = key if name else "weight"
        record = Record(fields.qtype("weights"), fields.qtype("activations"))
        record.dynamic = types["activations"].startswith(DYNAMIC)
        codes = [k for k in (f"{key}._data", f"{key}._data._data") if k in file.tensors]
        record.live = not codes
        if codes and record.weights is None:
            raise file.error(f"tensor '{key}': the map says none, the parts are codes")
        found[key] = record
    return found


def _has_parameter(modules: dict[str, torch.nn.Module], name: str) -> bool:
    prefix, _, parameter = name.rpartition(".")
    return prefix in modules and hasattr(modules[prefix], parameter)


def _inferred_records(file: Container) -> dict[str, Record]:
    """Of a file without a map: what keys, dtypes and shapes of the parts tell."""
    by_code = {t.dtype: t for t in qtypes.values() if not t.is_affine}
    found = {}
    for key, data in file.tensors.items():
        if key.endswith("._data._data"):
            name = key.removesuffix("._data._data")
            found[name] = Record(_packed_qtype(file, name, data), None)
        elif key.endswith("._data"):
            if data.dtype not in by_code:
                raise file.error(f"tensor '{key}': expected int8 or float8 codes, got {data.dtype}")
            found[key.removesuffix("._data")] = Record(by_code[data.dtype], None)
    if found:
        for key, value in file.tensors.items():
            is_scale = key.endswith((".input_scale", ".output_scale")) and value.numel() == 1
            if is_scale and value.item() != 1:
                raise file.error(
                    f"'{key}' is {value.item()}, but nothing says what the activations are "
                    "quantized to: a quantization map is needed"
                )
    return found


def _packed_qtype(file: Container, name: str, data: torch.Tensor) -> QType:
    scale = file.tensors.get(f"{name}._scale")
    if scale is None:
        raise file.error(f"expected tensor '{name}._scale', got none")
    rows = scale.shape[0] if scale.ndim else 1
    fits = [b for b in (4, 2) if data.ndim and data.shape[0] == -(-rows * b // 8)]
    if len(fits) != 1:
        raise file.error(
            f"tensor '{name}': its parts do not tell qint4 from qint2: a quantization map is needed"
        )
    return qtypes[f"qint{fits[0]}"]


def quantize_by_records(model: torch.nn.Module, file: Container, records: Records) -> None:
    """Quantizes the modules and parameters of a float model that the records name."""
    from .quantize import _replace

    modules = dict(model.named_modules(remove_duplicate=False))
    made: dict[int, QModuleMixin] = {}
    for key in [*records.weights, *records.aliases]:
        record = records.of(key)
        if record is None:  # a float tensor that is shared
            continue
        prefix, _, name = key.rpartition(".")
        module = modules.get(prefix)
        if module is None:
            raise file.error(f"its quantization map names '{prefix}', which the model lacks")
        if id(module) in made or isinstance(module, QModuleMixin):
            continue
        if name == "weight" and (record.weights or record.activations):
            qmodule = _quantized(module, record)
            if qmodule is not None:
                qmodule.name = prefix
                made[id(module)] = qmodule
                continue
        if record.weights is not None:
            _quantize_parameter(file, module, key, record)
    if id(model) in made:
        raise file.error("the model is itself a module to replace: put it into a container")
    _replace(model, made)


def _quantized(module: torch.nn.Module, record: Record) -> QModuleMixin | None:
    weight = getattr(module, "weight", None)
    if weight is None and record.weights is not None:
        return None
    activations = None if record.activations is None else record.activations.name
    if activations and record.dynamic:
        activations = DYNAMIC + activations
    affine = record.weights is not None and record.weights.is_affine
    return quantize_module(
        module, record.weights, activations, _optimizer(record),
        group_size=record.group_size if affine else None,
    )  # fmt: skip


def _optimizer(record: Record) -> Optimizer | None:
    made = _OPTIMIZERS.get(record.quantizer or "")
    return made() if made else None


def _quantize_parameter(file: Container, module: torch.nn.Module, key: str, record: Record) -> None:
    name = key.rpartition(".")[2]
    weight = module._parameters.get(name)
    is_recurrent = isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase))
    if weight is None or weight.ndim < 2 or is_recurrent or record.activations is not None:
        raise file.error(
            f"tensor '{key}' is quantized, which {type(module).__name__} has no quantized kind for"
        )
    if name in schemes_of(module):
        return
    is_own = record.group_size is not None  # the record of a file of Quantal
    rows = record.row_dims or (1 if is_own else None)
    qtype: Any = record.weights
    size = record.group_size if qtype.is_affine else None
    quantize_parameter(module, name, qtype, _optimizer(record), size, rows)
