"""Calls that optimum-quanto takes and few programs make; and those that it takes and then fails."""

import logging
import re
from typing import Any

import pytest
import quantal
import reference_quanto  # noqa: F401  spares the real one its compiler
import torch
from optimum import quanto

WEIGHTS = ["qint8", "qint4", "qfloat8"]


def scaled(layer: Any, x: torch.Tensor) -> Any:
    """`layer` with the scale of its input, `x`, as calibration sets it."""
    layer.input_scale = x.abs().max() / 127
    return layer


@pytest.mark.parametrize("quantize_input", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_linear_made_by_itself(weights: str, quantize_input: bool) -> None:
    """With its input quantized or not, as `QLinear.from_module` asks for."""
    x, layers = torch.randn(5, 64), []
    for package in (quantal, quanto):
        torch.manual_seed(1)
        layer = package.QLinear(
            64, 8, bias=True, weights=package.qtypes[weights], activations=package.qint8,
            quantize_input=quantize_input,
        )  # fmt: skip
        layers.append(scaled(layer, x))
    ours, theirs = layers
    assert torch.equal(ours.weight, theirs.weight)
    theirs.disable_output_quantization()  # which is with a scale of 1
    if not quantize_input:
        # Quantal's linear quantizes its input where activations are quantized, in any case.
        theirs.register_forward_pre_hook(theirs.quantize_input)
    expected = theirs(x)
    error = (ours(x) - expected).norm() / expected.norm()
    assert error < 1e-5
    assert ("input" in ours._quantize_hooks) == quantize_input


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_by_position(affine: bool) -> None:
    """As transformers makes it."""
    x, layers = torch.randn(3, 16), []
    for package in (quantal, quanto):
        layer = package.QLayerNorm((16,), 1e-3, affine, affine, activations=package.qint8)
        assert (layer.eps, layer.elementwise_affine) == (1e-3, affine)
        assert (layer.weight is None, layer.bias is None) == (not affine, not affine)
        assert layer.activation_qtype.name == "qint8"
        layer.output_scale = torch.tensor(0.03)
        layers.append(layer)
    ours, theirs = (layer(x) for layer in layers)
    assert torch.equal(ours._data, theirs._data)
    assert torch.equal(ours.dequantize(), theirs.dequantize())


ACTIVATIONS_ONLY = {
    "linear": (lambda: torch.nn.Linear(32, 8), (4, 32)),
    "conv2d": (lambda: torch.nn.Conv2d(4, 8, 3, padding=1, stride=2), (2, 4, 9, 7)),
    "grouped conv2d": (lambda: torch.nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 9, 7)),
}


@pytest.mark.parametrize("activations", ["qint8", "qfloat8"])
@pytest.mark.parametrize("name", ACTIVATIONS_ONLY)
def test_activations_without_weights(name: str, activations: str) -> None:
    """optimum-quanto replaces these modules as well, and then their forward fails."""
    make, shape = ACTIVATIONS_ONLY[name]
    layer, x = make(), torch.randn(shape)
    model = torch.nn.Sequential(layer)
    expected = layer(x)
    quantal.quantize(model, activations=activations)
    with quantal.Calibration(model):
        model(x)
    quantal.freeze(model)
    kind = {"weights": "none", "activations": quantal.qtypes[activations].name}
    assert quantal.quantization_map(model) == {"0": kind}
    assert model[0].weight is layer.weight
    # The module's own function of its input, which is rounded to a scale's multiples.
    scale = model[0].input_scale
    rounded = quantal.quantize_activation(x, quantal.qtypes[activations], scale).dequantize()
    actual = model(x)
    torch.testing.assert_close(actual, layer(rounded), rtol=1e-5, atol=1e-6)
    assert 0 < (actual - expected).norm() / expected.norm() < 0.05
    # It trains, and reloads.
    actual.sum().backward()
    assert layer.weight.grad.isfinite().all()
    again = torch.nn.Sequential(make())
    quantal.requantize(again, model.state_dict(), quantal.quantization_map(model))
    assert torch.equal(again(x), actual)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_activations_without_weights_fail_in_optimum_quanto(name: str) -> None:
    make, shape = ACTIVATIONS_ONLY[name]
    model = torch.nn.Sequential(make())
    quanto.quantize(model, activations=quanto.qint8)
    with pytest.raises(TypeError, match="NoneType"):
        model(torch.randn(shape))


def said(log: pytest.LogCaptureFixture) -> list[tuple[float, float]]:
    """Errors before and after, of every message."""
    number = r"([-+.e0-9]+)"
    found = [re.fullmatch(rf"\[quantal\] HQQ: mean error {number} before, {number} after", text)
             for text in log.messages]  # fmt: skip
    return [(float(match[1]), float(match[2])) for match in found if match]


@pytest.mark.parametrize("axis", [0, -1])
def test_verbose_hqq_says_what_it_gains(caplog: pytest.LogCaptureFixture, axis: int) -> None:
    caplog.set_level(logging.INFO, "quantal")
    base = torch.randn(64, 96)
    scale, shift = quantal.HqqOptimizer(verbose=True)(base, quantal.qint2, axis, 32)
    assert torch.equal(shift, quantal.HqqOptimizer()(base, quantal.qint2, axis, 32)[1])
    errors = []
    for offset in (quantal.MaxOptimizer()(base, quantal.qint2, axis, 32)[1], shift):
        weight = quantal.quantize_weight(base, quantal.qint2, axis, scale, offset, 32)
        errors.append((weight.dequantize() - base).abs().mean().item())
    assert errors[1] < errors[0]
    assert said(caplog) == [pytest.approx(tuple(errors), rel=1e-5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make", [lambda: torch.nn.Linear(256, 8), lambda: torch.nn.Conv2d(3, 8, 3)]
)
def test_verbose_hqq_of_modules(caplog: pytest.LogCaptureFixture, make: Any, dtype: Any) -> None:
    caplog.set_level(logging.INFO, "quantal")
    layer, states = make().to(dtype), []
    for verbose in (False, True):
        optimizer = quantal.HqqOptimizer(verbose=verbose)
        made = quantal.quantize_module(layer, "qint4", optimizer=optimizer)
        made.freeze()
        states.append(made.state_dict())
        assert len(said(caplog)) == verbose
    quiet, verbose = states
    assert quiet.keys() == verbose.keys()
    assert all(torch.equal(part, verbose[key]) for key, part in quiet.items())
