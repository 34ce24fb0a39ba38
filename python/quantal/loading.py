"""Loads a checkpoint into a model that has its form, after checking all of it."""

import math
from typing import Any

import torch

from .container import Container
from .nn import QModuleMixin, QWeight
from .nn.qmodule import SCALES
from .parameters import _HasLiveParameters, quantized_parameters, schemes_of
from .qtype import qtype as QType  # noqa: N812
from .records import Record, Records, dtype_name

__all__ = ["load_into"]


def load_into(
    model: torch.nn.Module,
    file: Container,
    records: Records,
    *,
    device: torch.device | str | None,
    strict: bool,
    assign: bool,
) -> None:
    """Loads `file`. With `assign` the model gets new tensors on `device`, else its own are written
    to. `strict`: every tensor must have a place, and every place a tensor."""
    with torch.inference_mode(False), torch.no_grad():
        _check_forms(model, file, records)
        given = _expanded(file, records)
        places = _quantized_places(model)
        for key, (module, name) in places.items():
            _freeze(module, name, key, given)
            record = records.of(key)
            if record is not None and not record.live and record.weights is not None:
                _check_parts(file, key, record.weights, given)
        _set_scales(file, records, places, given)
        problems = _mismatches(model, file, given, strict)
        if not assign:
            problems += [
                f"the model's '{key}' is on the meta device and has no memory to load into"
                for key, value in _tensors(model).items()
                if value.is_meta
            ]
        if problems:
            more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise file.error("; ".join(problems[:10]) + more)
        _put(model, file, given, device, assign)
        for key, (module, _) in places.items():
            for name in SCALES if isinstance(module, QModuleMixin) else ():
                own = getattr(module, name)
                value = given[key.removesuffix("weight") + name]
                setattr(module, name, value.to(device or own.device))
        _tie(model, records, assign)
        for key, (module, name) in places.items():
            weight, record = module._modules.get(name), records.of(key)
            if isinstance(weight, QWeight):
                weight.snr_db = record.snr_db if record is not None else None


def _quantized_places(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    """Module and name of every quantized weight, by key."""
    found: dict[str, tuple[torch.nn.Module, str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QModuleMixin):
            found[f"{prefix}.weight" if prefix else "weight"] = (module, "weight")
    for full, module, name, _ in quantized_parameters(model):
        found[full] = (module, name)
    return found


def _check_forms(model: torch.nn.Module, file: Container, records: Records) -> None:
    """What the records say must be what the model is."""
    places = _quantized_places(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for key in [*records.weights, *records.aliases]:
        record = records.of(key)
        is_quantized = record is not None and (record.weights or record.activations)
        if key.rpartition(".")[0] not in modules:
            name = key.rpartition(".")[0]
            raise file.error(f"its quantization map names '{name}', which the model lacks")
        if is_quantized and key not in places:
            raise file.error(
                f"tensor '{key}' is quantized, the model's is not: quantize it the same way, or "
                "use requantize()"
            )
    for key, (module, name) in places.items():
        record = records.of(key)
        wanted = _form(module, name)
        if record is None:
            if wanted[0] is None and not isinstance(module, QModuleMixin):
                continue
            if any(form is not None for form in wanted[:2]):
                raise file.error(f"tensor '{key}' is float, the model's is quantized")
            continue
        _check_form(file, key, record, wanted, module, name)


def _form(module: torch.nn.Module, name: str) -> tuple:
    """qtype, activations and group size."""
    if isinstance(module, QModuleMixin):
        return module.weight_qtype, module.activation_qtype, module.weight_group_size or 0
    scheme = schemes_of(module)[name]
    return scheme.qtype, None, scheme.group_size


def _check_form(
    file: Container, key: str, record: Record, wanted: tuple, module: torch.nn.Module, name: str
) -> None:
    same = record.weights == wanted[0] and record.activations == wanted[1]
    if type(module).__name__ == "QEmbedding":  # has no activations of its own
        same = record.weights == wanted[0]
    same &= record.group_size is None or record.group_size == wanted[2]
    if not same:
        raise file.error(
            f"tensor '{key}' is quantized as {_name(record.weights)} with group size "
            f"{record.group_size} and activations {_name(record.activations)}, the model's as "
            f"{_name(wanted[0])} with {wanted[2]} and {_name(wanted[1])}"
        )
    weight = getattr(module, name, None)
    if record.live and isinstance(weight, QWeight):
        raise file.error(
            f"tensor '{key}' is not frozen, the model's is: load it into one that is not frozen"
        )
    if weight is None or record.shape is None:
        return
    if list(weight.shape) != record.shape:
        raise file.error(
            f"tensor '{key}' has shape {tuple(record.shape)}, the model wants {tuple(weight.shape)}"
        )
    if record.dtype != dtype_name(weight.dtype):
        raise file.error(
            f"tensor '{key}' has dtype {record.dtype}, the model wants {dtype_name(weight.dtype)}"
        )


def _name(qtype: Any) -> str:
    return "none" if qtype is None else qtype.name


def _expanded(file: Container, records: Records) -> dict[str, torch.Tensor]:
    """The tensors, those that are shared under every key."""
    given = dict(file.tensors)
    for key, target in records.aliases.items():
        for name, tensor in file.tensors.items():
            if name == target or name.startswith(f"{target}._"):
                given.setdefault(key + name.removeprefix(target), tensor)
    return given


def _freeze(module: torch.nn.Module, name: str, key: str, given: dict[str, torch.Tensor]) -> None:
    """Codes of the file need a frozen weight to go to."""
    from .parameters import _freeze_for_state

    if isinstance(module, QModuleMixin):
        module._freeze_for(given, f"{key}.")
    elif isinstance(module, _HasLiveParameters) and name in module._live_names:
        _freeze_for_state(module, name, given, key.removesuffix(name))


def _check_parts(file: Container, key: str, qtype: QType, given: dict[str, torch.Tensor]) -> None:
    names = ("_data._data", "_scale", "_shift") if qtype.is_affine else ("_data", "_scale")
    for name in names:
        if f"{key}.{name}" not in given:
            raise file.error(f"expected tensor '{key}.{name}' of the model, got none")


def _set_scales(file: Container, records: Records, places: dict, given: dict) -> None:
    """The scales of activations, 1 where nothing was calibrated. Those of layers that have none
    are left out where they say nothing."""
    wanted: set[str] = set()
    first_keys: dict[int, str] = {}
    for key, (module, _) in places.items():
        if not isinstance(module, QModuleMixin):
            continue
        first = first_keys.setdefault(id(module), key)
        if first != key:  # a second name of the same module
            for name in SCALES:
                scale_key = f"{key.removesuffix('weight')}{name}"
                wanted.add(scale_key)
                given[scale_key] = given[f"{first.removesuffix('weight')}{name}"]
            continue
        record = records.of(key)
        for name in SCALES:
            scale_key = f"{key.removesuffix('weight')}{name}"
            wanted.add(scale_key)
            stored = given.get(scale_key)
            value = 1.0 if stored is None else _checked_scale(file, scale_key, stored)
            known = record is not None and record.activations is not None
            if name == "input_scale":
                known &= record is None or record.input_calibrated is not False
                if record is not None and record.input_calibrated and stored is None:
                    raise file.error(f"expected tensor '{scale_key}' of the model, got none")
            else:
                known &= record is not None and record.quantize_output
            own = getattr(module, name)
            given[scale_key] = _as_scale(value if known else 1.0, own, known, record)
    for key, value in list(given.items()):
        is_scale = key.endswith((".input_scale", ".output_scale")) and key not in wanted
        if is_scale and value.numel() == 1 and value.item() == 1:
            del given[key]


def _checked_scale(file: Container, key: str, stored: torch.Tensor) -> float:
    if stored.numel() != 1 or not stored.is_floating_point():
        raise file.error(
            f"expected '{key}' to be one floating-point number, got shape {tuple(stored.shape)} of "
            f"{stored.dtype}"
        )
    value = stored.item()
    if not (math.isfinite(value) and value > 0):
        raise file.error(f"expected '{key}' to be a finite positive scale, got {value}")
    return value


def _as_scale(value: float, own: torch.Tensor, known: bool, record: Record | None) -> torch.Tensor:
    """In the module's dtype where that holds it, else in fp32. A module's scale of exactly 1 means
    that nothing was calibrated."""
    if known and value == 1 and record is not None and record.input_calibrated:
        value = 1 + torch.finfo(own.dtype).eps
    exact = torch.tensor(value, dtype=torch.float64)
    holds = exact.to(own.dtype).to(torch.float64) == exact
    return exact.to(own.dtype if holds else torch.float32)


def _mismatches(
    model: torch.nn.Module, file: Container, given: dict[str, torch.Tensor], strict: bool
) -> list[str]:
    """What of the file does not fit the model."""
    expected = _tensors(model)
    problems = []
    if strict:
        filled = {id(expected[key]) for key in given if key in expected}
        missing = [k for k, v in expected.items() if k not in given and id(v) not in filled]
        extra = [key for key in given if key not in expected]
        problems += [f"expected tensor '{key}' of the model, got none" for key in missing]
        problems += [f"the model has no place for tensor '{key}'" for key in extra]
    for key, value in given.items():
        own = expected.get(key)
        if own is None:
            continue
        if own.shape != value.shape:
            problems.append(
                f"tensor '{key}' has shape {tuple(value.shape)}, the model wants {tuple(own.shape)}"
            )
        elif own.dtype != value.dtype and not _may_be_wide(key, value):
            problems.append(f"tensor '{key}' has dtype {value.dtype}, the model wants {own.dtype}")
        elif key.endswith("._scale") and not _is_positive(value):
            problems.append(f"expected scales '{key}' to be finite and positive")
    return problems


def _may_be_wide(key: str, value: torch.Tensor) -> bool:
    """Scales that the model's dtype cannot hold are fp32."""
    return key.endswith(("._scale", "._shift", *SCALES)) and value.dtype == torch.float32


def _is_positive(scale: torch.Tensor) -> bool:
    return bool(scale.is_floating_point() and (scale.isfinite() & (scale > 0)).all())


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _put(model: torch.nn.Module, file: Container, given: dict, device: Any, assign: bool) -> None:
    if not assign:
        model.load_state_dict(given, strict=False)
        return
    from .quantize import _load, _tensors

    copies: dict[int, torch.Tensor] = {}  # the file's memory is not the model's
    for key, value in given.items():
        if id(value) not in copies:
            copies[id(value)] = value.clone() if torch.device(device).type == "cpu" else value
        given[key] = copies[id(value)]
    _load(model, given, device)
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if left:
        raise file.error(f"no values for {left} on the meta device")


def _tie(model: torch.nn.Module, records: Records, assign: bool) -> None:
    """What the file stores once, the model has once."""
    if not assign:
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    for key, target in records.aliases.items():
        entries = []
        for place in (key, target):
            prefix, _, name = place.rpartition(".")
            module = modules.get(prefix)
            for table in ("_parameters", "_modules"):
                if module is not None and module.__dict__[table].get(name) is not None:
                    entries.append((module.__dict__[table], name))
        if len(entries) == 2 and type(entries[0][0][entries[0][1]]) is type(
            entries[1][0][entries[1][1]]
        ):
            entries[0][0][entries[0][1]] = entries[1][0][entries[1][1]]
