"""quantize → calibrate → train → freeze → save → requantize, for torch.nn models."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

import torch

from .nn import QModuleMixin, QWeight, quantize_module
from .nn.qmodule import has_own_forward
from .optimizers import Optimizer
from .parameters import (
    float_of,
    freeze_parameter,
    live_parameters,
    matching_parameters,
    quantize_parameter,
    quantized_parameters,
    schemes_of,
)
from .qtype import find_qtype
from .qtype import qtype as QType  # noqa: N812

__all__ = ["freeze", "quantization_map", "quantize", "requantize"]


def _patterns(value: str | list[str] | None) -> list[str] | None:
    return [value] if isinstance(value, str) else value


def _named_places(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every place that holds a module: one that is shared has several."""
    yield from model.named_modules(remove_duplicate=False)


def _replace(model: torch.nn.Module, replacements: dict[int, QModuleMixin]) -> None:
    for _, parent in list(model.named_modules()):
        if isinstance(parent, QModuleMixin):
            continue
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]


def quantize(
    model: torch.nn.Module,
    weights: QType | str | None = None,
    activations: QType | str | None = None,
    optimizer: Optimizer | None = None,
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    *,
    group_size: int | None = None,
    parameters: str | list[str] | None = None,
) -> None:
    """Replaces the modules of `model` that have a quantized kind, in place.

    Args:
        weights: qtype or name ("qint4", "int4"); None leaves weights float.
        activations: 8-bit qtype or name; "dynamic-int8" for scales that are found at run time. They
            are without a `Calibration` too.
        optimizer: who chooses the weights' scales.
        include, exclude: shell patterns of module names; exclude wins.
        group_size: elements a group, for qint2 and qint4.
        parameters: shell patterns of names of parameters of other modules ("*.experts.down_proj"),
            which are quantized along their last dimension. Modules keep their own rules;
            ``include=[]`` chooses none of them.

    Raises ValueError where `model` itself is a module to replace (use `quantize_module`), where it
    has quantized modules that would be quantized again, and where a pattern matches nothing.
    Modules whose class overrides the forward of torch's get a warning and stay float.
    """
    include, exclude = _patterns(include), _patterns(exclude)
    names = [name for name, _ in _named_places(model)]
    for pattern in (include or []) + (exclude or []):
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"[quantal.quantize] no module's name matches '{pattern}'")
    if weights is None and activations is None:
        raise ValueError("[quantal.quantize] expected weights, activations or both")
    if parameters is not None and weights is None:
        raise ValueError("[quantal.quantize] expected weights for the parameters, got None")
    made: dict[int, QModuleMixin] = {}
    own: list[str] = []
    for name, module in _named_places(model):
        if id(module) in made or not _is_chosen(name, include, exclude):
            continue
        if isinstance(module, QModuleMixin):
            raise ValueError(
                f"[quantal.quantize] '{name}' is quantized: exclude it, or start from floats"
            )
        qmodule = quantize_module(module, weights, activations, optimizer, group_size=group_size)
        if qmodule is None:
            is_norm = isinstance(module, torch.nn.LayerNorm)  # has no weights to quantize
            if has_own_forward(module) and (activations is not None or not is_norm):
                own.append(name)
            continue
        if module is model:
            raise ValueError(
                "[quantal.quantize] the model is itself a module to replace: call "
                "quantal.quantize_module(model, …) and use what it returns"
            )
        qmodule.name = name
        made[id(module)] = qmodule
    if own:
        warnings.warn(
            f"[quantal.quantize] left alone, for their classes have a forward of their own: {own}. "
            "Exclude them, or give the classes a quantized kind with register_qmodule()",
            stacklevel=2,
        )
    chosen = _chosen_parameters(model, parameters, made)
    qtype = find_qtype(weights)
    if qtype is not None:
        for module, name in chosen.values():
            quantize_parameter(module, name, qtype, optimizer, group_size)
    if not made and not chosen:
        warnings.warn(
            "[quantal.quantize] no module of the model has a quantized kind", stacklevel=2
        )
    _replace(model, made)


def _chosen_parameters(
    model: torch.nn.Module, patterns: str | list[str] | None, made: dict[int, QModuleMixin]
) -> dict[str, tuple[torch.nn.Module, str]]:
    """Those that the patterns name, without the ones of modules that are replaced."""
    if patterns is None:
        return {}
    found = matching_parameters(model, _patterns(patterns) or [])
    return {full: place for full, place in found.items() if id(place[0]) not in made}


def _is_chosen(name: str, include: list[str] | None, exclude: list[str] | None) -> bool:
    if include is not None and not any(fnmatch(name, pattern) for pattern in include):
        return False
    return exclude is None or not any(fnmatch(name, pattern) for pattern in exclude)


def freeze(model: torch.nn.Module) -> None:
    """Replaces the float weights of quantized modules by codes. Nothing is frozen where one of them
    has a NaN or infinity (ValueError). Weights that modules share stay shared."""
    from ._library import ops

    modules = [m for m in model.modules() if isinstance(m, QModuleMixin) and not m.frozen]
    for module in modules:
        if module.weight_qtype is not None and module.weight is not None:
            ops.check_finite(module.weight.detach(), f"{module.name}.weight")
    parameters = list(live_parameters(model))
    for full, owner, name in parameters:
        ops.check_finite(float_of(owner, name).detach(), full)
    shared: dict[tuple, torch.nn.Module] = {}
    for module in modules:
        key = (id(module.weight), module.weight_qtype, module.weight_group_size)
        if key in shared and module.weight_qtype is not None:
            module.weight = shared[key]
            continue
        module.freeze()
        if module.frozen:
            shared[key] = module.weight
    for _, owner, name in parameters:
        freeze_parameter(owner, name)


def quantization_map(model: torch.nn.Module) -> dict[str, dict[str, str]]:
    """``{module name: {"weights": qtype name or "none", "activations": …}}``, for JSON. Quantized
    parameters of other modules are there by their own names."""
    modules = {
        name: {
            "weights": "none" if m.weight_qtype is None else m.weight_qtype.name,
            "activations": "none" if m.activation_qtype is None else _activations(m),
        }
        for name, m in model.named_modules()
        if isinstance(m, QModuleMixin)
    }
    parameters = {
        full: {"weights": scheme.qtype.name, "activations": "none"}
        for full, _, _, scheme in quantized_parameters(model)
    }
    return modules | parameters


def _activations(module: QModuleMixin) -> str:
    return "dynamic-" * module.dynamic + module.activation_qtype.name


def _quantize_by_map(model: torch.nn.Module, quantization_map: Mapping[str, Any]) -> None:
    made: dict[int, QModuleMixin] = {}
    modules = dict(_named_places(model))
    for name, config in quantization_map.items():
        module = modules.get(name)
        if module is None and _quantize_named_parameter(modules, name, config):
            continue
        if module is None:
            raise ValueError(f"[quantal.requantize] the map names '{name}', which the model lacks")
        if isinstance(module, QModuleMixin) or id(module) in made:
            continue
        wanted = {k: None if config[k] == "none" else config[k] for k in ("weights", "activations")}
        qmodule = quantize_module(module, **wanted)
        if qmodule is None:
            raise ValueError(
                f"[quantal.requantize] the map names '{name}', a {type(module).__name__}, which "
                "has no quantized kind"
            )
        qmodule.name = name
        made[id(module)] = qmodule
    _replace(model, made)


def _quantize_named_parameter(
    modules: dict[str, torch.nn.Module], name: str, config: Mapping[str, Any]
) -> bool:
    """False where there is no such parameter."""
    prefix, _, parameter = name.rpartition(".")
    module = modules.get(prefix)
    if module is None or parameter in schemes_of(module):
        return module is not None
    if module._parameters.get(parameter) is None:
        return False
    qtype = find_qtype(config["weights"])
    if qtype is not None:
        quantize_parameter(module, parameter, qtype)
    return True


def requantize(
    model: torch.nn.Module,
    state_dict: Mapping[str, Any] | str | os.PathLike,
    quantization_map: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    *,
    strict: bool = True,
) -> None:
    """Loads quantized weights into a float model (which may be on the meta device).

    Args:
        state_dict: what a quantized model's ``state_dict()`` gave; or the path of a safetensors
            file, of an index of shards, or of a folder with one of them.
        quantization_map: what `quantization_map` gave. Files tell it themselves, or
            ``quanto_qmap.json`` beside them does.
        device: where the model goes; by default where it is (meta: the CPU).
        strict: every tensor must be there and fit, and none be left over (ValueError).

    After an error the model is as it was.
    """
    if isinstance(state_dict, (str, os.PathLike)):
        from .checkpoint import requantize_from

        return requantize_from(model, state_dict, quantization_map, device, strict=strict)
    if quantization_map is None:
        raise ValueError("[quantal.requantize] expected a quantization map beside a state_dict")
    with unchanged_on_error(model):
        _requantize(model, state_dict, quantization_map, device, strict)
    return None


@contextlib.contextmanager
def unchanged_on_error(model: torch.nn.Module) -> Iterator[None]:
    """Where the body fails, the tree of modules and what they hold is what it was before. Tensors
    that were written to in place are not restored."""
    tables = ("_modules", "_parameters", "_buffers")
    saved = [
        (m, type(m), dict(m.__dict__), {name: dict(m.__dict__[name]) for name in tables})
        for m in model.modules()
    ]
    trains = {p: p.requires_grad for p in model.parameters()}
    try:
        yield
    except BaseException:
        for module, cls, state, entries in saved:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(state)
            for name, values in entries.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(values)
        for parameter, flag in trains.items():
            parameter.requires_grad_(flag)
        raise


def _requantize(model, state_dict, quantization_map, device, strict: bool) -> None:
    _quantize_by_map(model, quantization_map)
    first = next(iter(model.parameters()), None)
    if device is None and first is not None:
        device = "cpu" if first.is_meta else first.device
    result = _load(model, dict(state_dict), device or "cpu")
    missing, unexpected = result
    left_on_meta = [n for n, t in _tensors(model) if t.is_meta]
    if strict and (missing or unexpected):
        raise ValueError(
            f"[quantal.requantize] missing tensors: {missing or 'none'}; unexpected ones: "
            f"{unexpected or 'none'}"
        )
    if left_on_meta:
        raise ValueError(f"[quantal.requantize] no values for {left_on_meta} on the meta device")


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _load(
    model: torch.nn.Module, state_dict: dict[str, Any], device: torch.device | str
) -> tuple[list[str], list[str]]:
    """Assigns the tensors, keeping ties, dtypes and what trains."""
    wanted = model.state_dict(keep_vars=True)
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    for key, value in state_dict.items():
        old = wanted.get(key)
        value = value.to(device)
        if old is not None and old.is_floating_point() and value.element_size() > 1:
            value = value.to(old.dtype)
        state_dict[key] = value
    ties = _ties(model)
    _fill_ties(ties, state_dict)
    try:
        result = model.load_state_dict(state_dict, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"[quantal.requantize] {error}") from error
    _retie(model, ties)
    for name, parameter in model.named_parameters():
        if name in trains and parameter.is_floating_point():
            parameter.requires_grad_(trains[name])
    missing = [key for key in result.missing_keys if key not in _tied_names(ties)]
    return missing, list(result.unexpected_keys)


def _ties(model: torch.nn.Module) -> list[list[tuple[torch.nn.Module, str, str]]]:
    """Parameters that several modules share, as (module, attribute, full name)."""
    places: dict[int, list] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{prefix}.{name}" if prefix else name
                places.setdefault(id(parameter), []).append((module, name, full))
    return [group for group in places.values() if len(group) > 1]


def _fill_ties(ties: list, state_dict: dict[str, Any]) -> None:
    """Files have what modules share under one of its names: the others get it, too."""
    for group in ties:
        given = {full: _entries(full, state_dict) for _, _, full in group}
        source = next((full for full, entries in given.items() if entries), None)
        for module, name, full in group:
            is_quantized = isinstance(module, QModuleMixin) or name in schemes_of(module)
            if source is None or given[full] or not (is_quantized or source in state_dict):
                continue
            state_dict |= {full + rest: state_dict[source + rest] for rest in given[source]}


def _entries(full: str, state_dict: dict[str, Any]) -> list[str]:
    """What follows a parameter's name in the keys of it and its parts."""
    starts = (key.removeprefix(full) for key in state_dict if key.startswith(full))
    return [rest for rest in starts if not rest or rest.startswith("._")]


def _tied_names(ties: list) -> set[str]:
    return {full for group in ties for _, _, full in group[1:]}


def _retie(model: torch.nn.Module, ties: list) -> None:
    for group in ties:
        first, name, _ = group[0]
        for module, other, _ in group[1:]:
            if other in module._parameters and name in first._parameters:
                module._parameters[other] = first._parameters[name]
            elif _same_codes(first._modules.get(name), module._modules.get(other)):
                module._modules[other] = first._modules[name]


def _same_codes(one: Any, other: Any) -> bool:
    """Frozen weights of the same codes: shared floats that were frozen apart."""
    if not isinstance(one, QWeight) or not isinstance(other, QWeight):
        return False
    parts, others = dict(one.named_parameters()), dict(other.named_parameters())
    return (one.qtype, one.group_size, parts.keys()) == (
        other.qtype,
        other.group_size,
        others.keys(),
    ) and all(
        part.shape == others[name].shape and bool((part == others[name]).all())
        for name, part in parts.items()
    )
