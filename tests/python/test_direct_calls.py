"""Frozen modules that call torch's own functions with a bound weight (quantal/nn/direct.py): what
the operators compute, and only where nobody looks at those."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import quantal
import torch
from quantized import QTYPES
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ACTIVATIONS = (None, "dynamic-qint8", "qint8", "qfloat8_e4m3fn")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(32, 24), (5, 32)),
    "linear of many tokens": (lambda: nn.Linear(32, 7, bias=False), (2, 9, 32)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, stride=2, bias=False), (2, 8, 11)),
    "conv2d": (lambda: nn.Conv2d(8, 70, 3, padding="same", groups=2), (2, 8, 7, 6)),
    "conv2d of one sample": (lambda: nn.Conv2d(8, 5, (3, 2), padding_mode="reflect"), (8, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2, dilation=(1, 2, 1)), (1, 3, 4, 5, 4)),
}


def frozen(
    name: str = "linear", weights: str = "qint8", activations: str | None = None
) -> tuple[Any, torch.Tensor]:
    """A frozen module that was never called, calibrated where it wants that, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, x = nn.Sequential(make()), torch.randn(shape)
    quantal.quantize(model, weights=weights, activations=activations)
    if activations is not None and not activations.startswith("dynamic"):
        with quantal.Calibration(model):
            model(x)
    quantal.freeze(model)
    return model[0], x


def is_bound(module: Any) -> bool:
    bound = module._bound_weight(torch.empty(0), None)
    return bound is not None


def by_operators(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What a copy, which has no bound weight, gives."""
    other = copy.deepcopy(module)
    y = other(x)
    assert is_bound(other)  # it would be the second call
    return y


def bind(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What the module gives once its weight is bound."""
    for _ in range(2):
        module(x)
    assert is_bound(module)
    return module(x)


def plain(y: torch.Tensor) -> torch.Tensor:
    return y.dequantize() if isinstance(y, quantal.QTensor) else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("weights", QTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_gives_the_bits_of_the_operators(
    name: str, weights: str, activations: str | None, dtype: torch.dtype
) -> None:
    module, x = frozen(name, weights, activations)
    module, x = module.to(dtype), x.to(dtype)
    with torch.inference_mode():
        wanted = plain(by_operators(module, x))
        assert torch.equal(plain(bind(module, x)), wanted)
    assert torch.equal(plain(module(x)), wanted)


@pytest.mark.parametrize("activations", [None, "dynamic-qint8"])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_has_the_gradients_of_the_operators(name: str, activations: str | None) -> None:
    module, x = frozen(name, "qint4", activations)
    module.bias.requires_grad_(True)
    other, wanted = copy.deepcopy(module), x.clone().requires_grad_(True)
    with torch.no_grad():
        bind(module, x)
    x.requires_grad_(True)
    y = module(x)
    (y * y).sum().backward()
    y = other(wanted)
    (y * y).sum().backward()
    assert torch.equal(x.grad, wanted.grad)
    assert torch.equal(module.bias.grad, other.bias.grad)


def scaled_in_place(module: Any) -> None:
    module.weight._scale.data.mul_(2)


def other_data(module: Any) -> None:
    module.weight._scale.data = module.weight._scale.data * 2


def other_part(module: Any) -> None:
    module.weight._scale = module.weight._scale.data * 2


def loaded(module: Any) -> None:
    state = module.state_dict()
    module.load_state_dict(
        {key: value * 2 if key == "weight._scale" else value for key, value in state.items()}
    )


def assigned(module: Any) -> None:
    state = {key: value.clone() for key, value in module.state_dict().items()}
    state["weight._scale"] *= 2
    module.load_state_dict(state, assign=True)


def copied(module: Any) -> None:
    module.weight.copy_(module.weight.dequantize() * 2)


def given_floats(module: Any) -> None:
    module.weight = nn.Parameter(module.weight.dequantize() * 2)
    module.freeze()


@pytest.mark.parametrize(
    "change", [scaled_in_place, other_data, other_part, loaded, assigned, copied, given_floats]
)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_sees_what_happens_to_the_parts(name: str, change: Callable[[Any], None]) -> None:
    module, x = frozen(name)
    bias = module.bias.detach().reshape((-1, *[1] * (2 if name == "conv2d" else 0)))
    before = bind(module, x)
    change(module)
    for _ in range(3):
        torch.testing.assert_close(module(x) - bias, (before - bias) * 2)


def test_sees_another_scale_of_activations() -> None:
    module, x = frozen(activations="qint8")
    bind(module, x)
    module.input_scale.fill_(0.5)
    wanted = by_operators(module, x)
    for _ in range(3):
        assert torch.equal(plain(module(x)), plain(wanted))
    module.input_scale = torch.tensor(0.25)
    wanted = by_operators(module, x)
    for _ in range(3):
        assert torch.equal(plain(module(x)), plain(wanted))


def test_follows_the_dtype() -> None:
    module, x = frozen("conv2d", "qint4")
    bind(module, x)
    module.half()
    wanted = by_operators(module, x.half())
    for _ in range(3):
        y = module(x.half())
        assert y.dtype == torch.float16
        assert torch.equal(y, wanted)


def test_a_bound_weight_is_for_its_function_alone() -> None:
    module, x = frozen()
    bind(module, x)
    bound = module._bound_weight(x, None)
    assert torch.equal(nn.functional.linear(x, bound, module.bias), module(x))
    for use in (
        lambda: x @ bound.t(),
        lambda: bound + 1,
        lambda: nn.functional.linear(x, bound.detach()),
        lambda: torch.conv1d(x.t()[None], bound[..., None]),
        lambda: bound.copy_(torch.zeros(24, 32)),
        lambda: bound.zero_(),
        bound.clone,
        bound.half,
        bound.dequantize,
    ):
        with pytest.raises(RuntimeError, match="a bound weight is for linear and convolution"):
            use()
    module.weight._data = module.weight._data.data.clone()
    with pytest.raises(RuntimeError, match="codes of a bound weight are gone"):
        nn.functional.linear(x, bound)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, lambda *sizes, bias: nn.Conv1d(*sizes, 1, bias=bias)])
def test_takes_inputs_of_another_dtype(kind: Any, bias: bool) -> None:
    model = nn.Sequential(kind(8, 8, bias=bias))
    quantal.quantize(model, weights="qint8")
    quantal.freeze(model)
    x = torch.randn(2, 8, 8)
    bind(model[0], x)
    wanted = copy.deepcopy(model)(x.bfloat16())
    assert torch.equal(model(x.bfloat16()), wanted)
    assert wanted.dtype == torch.bfloat16


class Seen(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "operator"), [("linear", "quantal.linear"), ("conv2d", "quantal.convolution")]
)
def test_who_looks_sees_the_operators(name: str, operator: str) -> None:
    module, x = frozen(name)
    wanted = bind(module, x)
    with Seen() as seen:
        assert torch.equal(module(x), wanted)
    assert any(call.startswith(operator) for call in seen.names)
    with torch.no_grad():
        traced = torch.jit.trace(module, x, check_trace=False)
    assert operator.replace(".", "::") in str(traced.inlined_graph)
    program = torch.export.export(module.eval(), (x,))
    assert operator in str(program.graph)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    each = torch.func.vmap(module)(torch.stack([x, -x]))
    torch.testing.assert_close(each[0], wanted)
    functions = []

    class Watching(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            functions.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watching():
        module(x)
    assert any(call.startswith(operator) for call in functions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), copy.deepcopy(module)(x))
        assert module(x).dtype == torch.bfloat16


def test_copies_and_files_have_no_bound_weight() -> None:
    module, x = frozen("conv2d", "qint4")
    size = len(pickle.dumps(module))
    wanted = bind(module, x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        assert torch.equal(other(x), wanted)
        assert torch.equal(bind(other, x), wanted)
    assert not is_bound(copy.deepcopy(module))
    assert len(pickle.dumps(module)) == size


def moved_away(module: Any) -> None:
    module.to("meta")


def replaced(module: Any) -> None:
    module.weight._data = module.weight._data.data.clone()


@pytest.mark.parametrize("change", [moved_away, replaced, assigned, given_floats])
def test_codes_do_not_stay_in_memory(change: Callable[[Any], None]) -> None:
    module, x = frozen()
    with torch.no_grad():
        bind(module, x)
    codes = StorageWeakRef(module.weight._data.untyped_storage())
    assert not codes.expired()
    change(module)
    assert codes.expired()


def test_parameters_can_be_swapped() -> None:
    module, x = frozen()
    with torch.no_grad():
        wanted = bind(module, x)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(bind(module, x), wanted)


def test_takes_the_parts_of_some_rows() -> None:
    module, x = frozen()
    wanted = bind(module, x)[:, :8]
    for part in (module.weight._data, module.weight._scale, module.bias):
        part.data = part.data[:8].clone()
    for _ in range(3):
        assert torch.equal(module(x), wanted)


def test_two_modules_with_one_weight() -> None:
    module, x = frozen(activations="qint8")
    other = copy.deepcopy(module)
    other.weight = module.weight
    other.input_scale.fill_(0.5)
    wanted = [plain(by_operators(m, x)) for m in (module, other)]
    for _ in range(4):
        assert torch.equal(plain(module(x)), wanted[0])
        assert torch.equal(plain(other(x)), wanted[1])


def test_an_input_without_memory_gives_a_shape() -> None:
    module, x = frozen()
    bind(module, x)
    y = module(x.to("meta"))
    assert y.is_meta
    assert y.shape == (5, 24)


def test_hooks_of_a_weight_run_in_every_call() -> None:
    module, x = frozen("linear", "qint4")
    wanted, calls = bind(module, x), []
    hook = module.weight.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        assert torch.equal(module(x), wanted)
    assert len(calls) == 3
    hook.remove()
    assert torch.equal(bind(module, x), wanted)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_errors_are_those_of_the_operators(name: str) -> None:
    module, x = frozen(name)
    bind(module, x)
    with pytest.raises(RuntimeError, match=r"\[quantal\.Q.*expected input"):
        module(x[:, :-1])
    with pytest.raises(ValueError, match="float input"):
        module(x.long())
    if name == "conv2d":
        with pytest.raises(RuntimeError, match=r"QConv2d\] expected input of 4 dimensions"):
            module(x[0, 0])
    module.weight._scale.data = module.weight._scale.data[:-1]
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        module(x)
