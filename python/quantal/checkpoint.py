"""Saving and loading whole models: docs/formats.md has the format, which the C++ library shares."""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from .container import NAMES, Container, write_container
from .loading import load_into
from .nn import QEmbedding, QModuleMixin, QWeight
from .nn.qmodule import SCALES
from .optimizers import Optimizer, default_optimizer
from .parameters import quantized_parameters
from .quantize import quantization_map, unchanged_on_error
from .records import VERSION, dtype_name, quantize_by_records, records_of_file

__all__ = ["load", "requantize_from", "save"]


def save(model: torch.nn.Module, path: str | os.PathLike) -> None:
    """Writes one safetensors file that this package, the C++ library and optimum-quanto read.

    A weight that several modules share is stored once. The file is replaced as a whole; on any
    error the old one stays. ValueError for tensors without data, for what is no tensor, and for
    unfrozen weights whose optimizer a file cannot name.
    """
    saving = _Saving(model)
    layers = {
        name: {k: v.removeprefix("dynamic-") for k, v in types.items()}
        for name, types in quantization_map(model).items()
    }
    metadata = {
        "format": "pt",
        "quantal.format_version": VERSION,
        "quantal.weights": _dump(saving.records),
        "quantal.aliases": _dump(saving.aliases),
        "quantization_map": _dump(layers),
    }
    write_container(path, saving.tensors, metadata)


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


class _Saving:
    """The tensors and records of a model's file."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.aliases: dict[str, str] = {}
        self._written: dict[int, str] = {}
        self._scaled: dict[tuple[int, str], str] = {}
        state = model.state_dict(keep_vars=True)
        schemes = {(id(m), name): s for _, m, name, s in quantized_parameters(model)}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for name, value in _entries(module):
                key = f"{prefix}.{name}" if prefix else name
                if isinstance(value, QWeight):
                    for part in value.state_dict():
                        state.pop(f"{key}.{part}")
                elif state.pop(key, None) is None:
                    continue  # not persistent
                if name in SCALES and isinstance(module, QModuleMixin):
                    self._add_scale(key, value, module)
                elif self._is_first(key, value):
                    self._add(key, name, value, module, schemes.get((id(module), name)))
                elif isinstance(module, QModuleMixin) and name == "weight":
                    self._add_activations(self.aliases[key], key, value, module)
        for key, value in state.items():  # what modules add in ways of their own
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"[quantal.save] '{key}': expected a tensor, got {type(value).__name__}"
                )
            if self._is_first(key, value):
                self._add_tensor(key, value)

    def _is_first(self, key: str, value: Any) -> bool:
        first = self._written.setdefault(id(value), key)
        if first != key:
            self.aliases[key] = first
        return first == key

    def _add_scale(self, key: str, value: torch.Tensor, module: QModuleMixin) -> None:
        """Of modules that share a weight, the first names the scales; others have theirs where
        they say more."""
        if isinstance(module, QEmbedding):
            return
        # A norm without a weight quantizes nothing but its output, and C++ knows none that does.
        says_nothing = key.endswith("input_scale") or value.item() == 1
        if module.weight is None and says_nothing:
            return
        weight = value if module.weight is None else module.weight
        name = key.rpartition(".")[2]
        is_first_of_weight = self._scaled.setdefault((id(weight), name), key) == key
        is_first_name = self._scaled.setdefault((id(module), name), key) == key
        if is_first_name and (is_first_of_weight or value.item() != 1):
            self._add_tensor(key, value.float())

    def _add(self, key: str, name: str, value: Any, module: Any, scheme: Any) -> None:
        owner = module if isinstance(module, QModuleMixin) and name == "weight" else None
        if owner is None and scheme is None:
            return self._add_tensor(key, value)
        self.records[key] = _record(key, value, owner, scheme)
        if not isinstance(value, QWeight):
            return self._add_tensor(key, value)
        for part, tensor in value.state_dict(keep_vars=True).items():
            self._add_tensor(f"{key}.{part}", tensor)
        return None

    def _add_activations(self, first: str, key: str, value: Any, module: QModuleMixin) -> None:
        """A weight that an embedding shares with a linear: the record is of both."""
        record = self.records.get(first, {"activations": "none"})
        if record["activations"] == "none" and module.activation_qtype is not None:
            self.records[first] = _record(key, value, module, None)

    def _add_tensor(self, key: str, tensor: torch.Tensor) -> None:
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(
                f"[quantal.save] '{key}': expected a dense tensor with data, got layout "
                f"{tensor.layout} on device {tensor.device}"
            )
        if tensor.dtype not in NAMES:
            raise ValueError(f"[quantal.save] '{key}': no file holds {tensor.dtype}")
        self.tensors[key] = tensor.detach()


def _entries(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """The tensors and quantized weights that a module itself holds."""
    if isinstance(module, QWeight) or type(module).__name__ == "PackedCodes":
        return []
    weights = [(k, m) for k, m in module._modules.items() if isinstance(m, QWeight)]
    tensors = [*module._parameters.items(), *module._buffers.items()]
    return weights + [(name, value) for name, value in tensors if value is not None]


def _record(key: str, value: Any, module: QModuleMixin | None, scheme: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "weights": "none",
        "shape": list(value.shape),
        "dtype": dtype_name(value.dtype),
        "activations": "none",
    }
    qtype = module.weight_qtype if module is not None else scheme.qtype
    is_live = not isinstance(value, QWeight)
    if qtype is not None:
        size = module.weight_group_size if module is not None else scheme.group_size
        optimizer = module.optimizer if module is not None else scheme.optimizer
        record |= {
            "weights": qtype.name,
            "axis": 0,
            "group_size": size or 0,
            "state": "live" if is_live else "frozen",
            "quantizer": _quantizer_name(key, optimizer, qtype, is_live),
        }
        if not is_live and value.snr_db is not None:
            record["snr_db"] = value.snr_db
    if scheme is not None:
        record["row_dims"] = scheme.row_dims
    if module is not None and module.activation_qtype is not None:
        record |= {
            "activations": module.activation_qtype.name,
            "input_calibrated": module._input_calibrated,
            "output_calibrated": module._output_calibrated,
            "quantize_output": module._output_calibrated and not module.dynamic,
        }
        if module.dynamic:
            record["dynamic"] = True
    return record


def _quantizer_name(key: str, optimizer: Optimizer | None, qtype: Any, is_live: bool) -> str:
    chosen = optimizer or default_optimizer(qtype)
    is_default = chosen.quantizer is not None and chosen.options == type(chosen)().options
    if is_live and not is_default:
        raise ValueError(
            f"[quantal.save] '{key}' is not frozen, and a file cannot name its "
            f"{type(chosen).__name__}: freeze() first"
        )
    return chosen.quantizer or "custom"


def load(path: str | os.PathLike, model: torch.nn.Module) -> None:
    """Loads a file into a model of the same form: float, or quantized in the same way. Frozen codes
    go into unfrozen modules too, which they freeze. Parameters keep their identity, so that an
    optimizer goes on with them.

    Args:
        path: a safetensors file, an index of shards, or a folder with one of them.

    Everything is checked before anything changes: ValueError names file and tensor for what is
    missing, left over, misshaped or of another dtype. `requantize` loads into a float model.
    """
    file = Container.open(path, "load")
    records = records_of_file(file, model, None)
    with unchanged_on_error(model):
        load_into(model, file, records, device=None, strict=True, assign=False)


def requantize_from(
    model: torch.nn.Module,
    path: str | os.PathLike,
    layers: Mapping[str, Any] | None,
    device: torch.device | str | None,
    *,
    strict: bool,
) -> None:
    """`requantize` from a file or folder."""
    file = Container.open(path, "requantize")
    records = records_of_file(file, model, layers)
    with unchanged_on_error(model):
        quantize_by_records(model, file, records)
        first = next(iter(model.parameters()), None)
        if device is None:
            device = "cpu" if first is None or first.is_meta else first.device
        load_into(model, file, records, device=device, strict=strict, assign=True)
