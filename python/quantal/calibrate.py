"""Calibration: finds the scales of activations from samples."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .nn import QModuleMixin
from .tensor import QTensor

__all__ = ["Calibration"]

# Functions through which quantized activations pass as codes.
_KEEPS_CODES = {
    *("relu", "relu_", "dropout", "detach", "clone", "contiguous"),
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("permute", "transpose", "t", "movedim", "__getitem__"),
    *("max_pool1d", "max_pool2d", "max_pool3d"),
}


class _Range:
    """An exponential moving average of max|x| over batches. Batches with a NaN or infinity, and
    batches of zeros, tell nothing and are left out."""

    def __init__(self) -> None:
        self.absmax: float | None = None

    def update(self, x: torch.Tensor, momentum: float) -> None:
        batch = x.detach().abs().amax().item() if x.numel() else 0.0
        if not 0 < batch < float("inf"):
            return
        old = self.absmax
        self.absmax = batch if old is None else momentum * old + (1 - momentum) * batch


class _Observer:
    """What is known of one module's activations."""

    def __init__(self) -> None:
        self.input = _Range()
        self.output = _Range()
        self.feeds_quantized = False


class Calibration(TorchFunctionMode):
    """Context manager. Models that run inside it compute with float activations, whose ranges set
    the scales of quantized modules when it ends; an error leaves the modules as they were.

    Args:
        model: the model to calibrate. None: every quantized module that runs inside.
        momentum: of the moving average of ranges over batches, inputs and outputs both.
        streamline: quantize only outputs that another quantized module reads, directly or through
            functions that keep codes (relu, view, pooling, …).
        debug: print what was decided for each module.
        group: process group of torch.distributed whose ranks calibrate the same model, each on
            samples of its own: every rank gets the widest of their ranges. Needs `model`; every
            rank must leave the context.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        *,
        momentum: float = 0.9,
        streamline: bool = True,
        debug: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"[quantal] expected 0 <= momentum < 1, got {momentum}")
        if group is not None and model is None:
            raise ValueError("[quantal] expected the model that the ranks of a group calibrate")
        self.model = model
        self.group = group
        self.momentum = momentum
        self.streamline = streamline
        self.debug = debug
        self._observers: dict[QModuleMixin, _Observer] = {}
        self._sources: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._handles: list[Any] = []

    def __enter__(self) -> "Calibration":
        super().__enter__()
        if self.model is None:
            hook = torch.nn.modules.module.register_module_forward_pre_hook(self._before)
            self._handles = [hook]
        else:
            self._handles = [
                module.register_forward_pre_hook(self._before, prepend=True)
                for module in self._modules_of(self.model)
            ]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        for module in self._observers:
            module._calibration = None
        if kind is None:
            if self.group is not None:
                self._merge_ranks()
            for module, observer in self._observers.items():
                self._set_scales(module, observer)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _KEEPS_CODES and args and isinstance(args[0], torch.Tensor):
            source = self._sources.get(args[0])
            if source is not None and isinstance(output, torch.Tensor):
                self._sources[output] = source
        return output

    def _merge_ranks(self) -> None:
        """Ranges become the widest of all ranks'; a module that only others ran counts too."""
        modules = [m for m in self._modules_of(self.model) if self._observer(m) is not None]
        if not modules:
            return
        device = modules[0].input_scale.device
        rows = []
        for module in modules:
            observer = self._observers[module]
            known = [observer.input.absmax or 0.0, observer.output.absmax or 0.0]
            rows.append([*known, float(observer.feeds_quantized)])
            module._calibration = None
        table = torch.tensor(rows, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(table, torch.distributed.ReduceOp.MAX, group=self.group)
        for module, (inputs, outputs, feeds) in zip(modules, table.tolist(), strict=True):
            observer = self._observers[module]
            observer.input.absmax, observer.output.absmax = inputs or None, outputs or None
            observer.feeds_quantized = feeds > 0

    @staticmethod
    def _modules_of(model: Any) -> Iterator[QModuleMixin]:
        for module in model.modules():
            if isinstance(module, QModuleMixin) and module.activation_qtype is not None:
                yield module

    def _observer(self, module: torch.nn.Module) -> _Observer | None:
        if (
            not isinstance(module, QModuleMixin)
            or module.activation_qtype is None
            or module.dynamic
        ):
            return None
        if module not in self._observers:
            self._observers[module] = _Observer()
            module._calibration = self  # from now on it computes in float
            self._handles.append(
                module.register_forward_hook(self._after, prepend=True, with_kwargs=True)
            )
        return self._observers[module]

    def _before(self, module: torch.nn.Module, args: tuple) -> None:
        self._observer(module)

    def _after(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        observer = self._observer(module)
        if observer is None:
            return
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, torch.Tensor):
            source = self._sources.get(x)
            if source is not None and module.weight_qtype is not None:
                self._observers[source].feeds_quantized = True
            x = x.dequantize() if isinstance(x, QTensor) else x
            observer.input.update(x, self.momentum)
        if isinstance(output, torch.Tensor):
            observer.output.update(output, self.momentum)
            self._sources[output] = module

    @torch.inference_mode(False)  # the scales outlive the caller's mode
    def _set_scales(self, module: QModuleMixin, observer: _Observer) -> None:
        quantizes_output = observer.feeds_quantized or not self.streamline
        outputs = observer.output.absmax if quantizes_output else None
        for name, absmax in (("input_scale", observer.input.absmax), ("output_scale", outputs)):
            setattr(module, name, _scale(absmax, module, getattr(module, name)))
        if self.debug:
            said = f"with scale {module.output_scale.item()}" if outputs else "to nothing"
            qtype = module.activation_qtype.name
            print(f"{module.name}({type(module).__name__}) output is quantized to {qtype} {said}.")


def _scale(absmax: float | None, module: QModuleMixin, old: torch.Tensor) -> torch.Tensor:
    """Absmax over the largest code; 1 where nothing is known, and never 1 otherwise. Of the old
    one's dtype, or fp32 where that has no such number."""
    if absmax is None:
        return torch.ones_like(old)
    largest = 127 if module.activation_qtype.name == "qint8" else module.activation_qtype.qmax
    single = torch.finfo(torch.float32)
    scale = min(max(absmax / largest, single.tiny), single.max)
    info = torch.finfo(old.dtype)
    dtype = old.dtype if info.tiny <= scale <= info.max else torch.float32
    made = torch.full_like(old, scale, dtype=dtype)
    return made if made.item() != 1 else made + info.eps
