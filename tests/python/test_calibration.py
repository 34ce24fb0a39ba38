"""Calibration: which scales samples give, and what they may not change."""

import pytest
import quantal
import torch
from torch import nn

INT8 = 127
LARGEST = {
    "qint8": 127,
    "qfloat8_e4m3fn": 448,
    "qfloat8_e4m3fnuz": 240,
    "qfloat8_e5m2": 57344,
}


def model_of(*layers: nn.Module, activations: str = "qint8") -> nn.Sequential:
    model = nn.Sequential(*layers)
    quantal.quantize(model, weights="qint8", activations=activations)
    return model


def identity(size: int = 4) -> nn.Linear:
    """A linear that returns its input: its output's range is known."""
    layer = nn.Linear(size, size, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(size))
    return layer


def batch(largest: float, size: int = 4) -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * size).reshape(3, size) * largest


def scales(module: nn.Module) -> tuple[float, float]:
    return module.input_scale.item(), module.output_scale.item()


# ---- known values


@pytest.mark.parametrize("qtype", list(LARGEST))
@pytest.mark.parametrize("largest", [1e-3, 0.5, 3.0, 1e4])
def test_scale_is_absmax_over_the_largest_code(qtype: str, largest: float) -> None:
    model = model_of(identity(), activations=qtype)
    with quantal.Calibration(streamline=False):
        model(batch(largest))
    assert scales(model[0]) == pytest.approx((largest / LARGEST[qtype],) * 2, rel=1e-6)


def test_largest_of_either_sign() -> None:
    model = model_of(identity())
    with quantal.Calibration(streamline=False):
        model(torch.tensor([[1.0, -5.0, 2.0, 0.0]]))
    assert scales(model[0]) == pytest.approx((5 / INT8, 5 / INT8))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_momentum_of_inputs_and_outputs(momentum: float) -> None:
    model = model_of(identity())
    ranges = [2.0, 8.0, 1.0]
    with quantal.Calibration(momentum=momentum, streamline=False):
        for largest in ranges:
            model(batch(largest))
    expected = ranges[0]
    for largest in ranges[1:]:
        expected = momentum * expected + (1 - momentum) * largest
    assert scales(model[0]) == pytest.approx((expected / INT8,) * 2, rel=1e-6)


def test_every_calibration_starts_afresh() -> None:
    model = model_of(identity())
    for largest in (8.0, 2.0):
        with quantal.Calibration(streamline=False):
            model(batch(largest))
    assert scales(model[0]) == pytest.approx((2 / INT8,) * 2)


def test_range_that_gives_a_scale_of_one() -> None:
    """1 stands for "not calibrated": the scale is the next number."""
    model = model_of(identity())
    with quantal.Calibration(streamline=False):
        model(batch(127.0))
        model(batch(127.0))
    assert scales(model[0]) == pytest.approx((1, 1), rel=1e-6)
    assert model[0].input_scale != 1
    assert isinstance(model(batch(127.0)), quantal.ActivationQBytesTensor)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2.0])
def test_momentum_out_of_range(momentum: float) -> None:
    with pytest.raises(ValueError, match=f"expected 0 <= momentum < 1, got {momentum}"):
        quantal.Calibration(momentum=momentum)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    model = nn.Sequential(identity()).to(dtype)
    quantal.quantize(model, weights="qint8", activations="qint8")
    with quantal.Calibration(streamline=False):
        model(batch(4.0).to(dtype))
    assert model[0].input_scale.dtype == dtype
    assert scales(model[0]) == pytest.approx((4 / INT8,) * 2, rel=torch.finfo(dtype).eps)


# ---- batches that tell nothing


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_batches_that_are_not_finite_are_left_out(value: float) -> None:
    model = model_of(identity())
    bad = batch(1.0)
    bad[1, 2] = value
    with quantal.Calibration(streamline=False):
        model(bad)
        model(batch(2.0))
        model(bad)
    assert scales(model[0]) == pytest.approx((2 / INT8,) * 2)


def test_zeros_are_left_out() -> None:
    model = model_of(identity())
    with quantal.Calibration(momentum=0.5, streamline=False):
        model(torch.zeros(3, 4))
        model(batch(2.0))
        model(torch.zeros(3, 4))
        model(torch.zeros(0, 4))
    assert scales(model[0]) == pytest.approx((2 / INT8,) * 2)


def test_only_zeros() -> None:
    model = model_of(identity())
    with quantal.Calibration(streamline=False):
        model(torch.zeros(3, 4))
    assert scales(model[0]) == (1, 1)
    assert torch.equal(model(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_tiny_range() -> None:
    model = model_of(identity())
    with quantal.Calibration(streamline=False):
        model(batch(1e-44))
    assert all(s > 0 for s in scales(model[0]))
    assert model(batch(1e-44)).dequantize().isfinite().all()


# ---- while it runs, and after


def test_computes_in_float_while_it_runs() -> None:
    model = model_of(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    for index in (0, 2):
        plain[index].weight.data = model[index].qweight.dequantize().detach()
        plain[index].bias.data = model[index].bias.detach()
    x = batch(3.0)
    for _ in range(2):  # the second time, there are scales already
        with quantal.Calibration():
            y = model(x)
        assert type(y) is torch.Tensor
        torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-6)


def test_quantized_after_it() -> None:
    model = model_of(identity(), identity())
    with quantal.Calibration():
        model(batch(3.0))
    x = torch.full((1, 4), 1.01)
    step = 3 / INT8
    expected = round(1.01 / step) * step
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.full((1, 4), expected))
        # Beyond what was seen, codes saturate.
        torch.testing.assert_close(model(50 * x), torch.full((1, 4), 3.0))


def test_modules_without_quantized_activations_are_left_alone() -> None:
    model = nn.Sequential(identity(), identity())
    quantal.quantize(model, weights="qint8", include="0")
    quantal.quantize(model, weights="qint8", activations="dynamic-qint8", include="1")
    with quantal.Calibration(streamline=False):
        model(batch(3.0))
    assert scales(model[0]) == scales(model[1]) == (1, 1)


def test_an_exception_leaves_scales_as_they_were() -> None:
    model = model_of(identity(), identity())
    with quantal.Calibration(streamline=False):
        model(batch(2.0))
    before = [scales(layer) for layer in model]

    def calibrate_and_fail() -> None:
        with quantal.Calibration(streamline=False):
            model(batch(100.0))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        calibrate_and_fail()
    assert [scales(layer) for layer in model] == before
    assert isinstance(model(batch(2.0)), quantal.ActivationQBytesTensor)  # as before: quantized


def hooks(*modules: nn.Module) -> int:
    """How many there are: torch's own for all modules, and those of these."""
    every = vars(torch.nn.modules.module).items()
    count = sum(len(v) for k, v in every if k.startswith("_global_forward"))
    own = sum(len(m._quantize_hooks) for m in modules)  # what quantizes outputs
    return count - own + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


@pytest.mark.parametrize("named", [False, True])
def test_leaves_no_hooks(named: bool) -> None:
    model = model_of(identity(), identity())
    before = hooks(*model)
    with quantal.Calibration(model if named else None):
        model(batch(2.0))
        assert hooks(*model) > before
    assert hooks(*model) == before


def test_an_error_of_the_model_leaves_no_hooks() -> None:
    model = model_of(identity())
    with pytest.raises(RuntimeError, match=r"got \(3, 5\)"), quantal.Calibration(streamline=False):
        model(torch.randn(3, 5))
    model(batch(7.0))
    assert scales(model[0]) == (1, 1)


def test_frozen_modules_are_calibrated() -> None:
    model = model_of(identity())
    quantal.freeze(model)
    with quantal.Calibration(streamline=False):
        model(batch(2.0))
    assert scales(model[0]) == pytest.approx((2 / INT8,) * 2)


def test_inference_mode() -> None:
    model = model_of(identity(), identity())
    with torch.inference_mode(), quantal.Calibration():
        model(batch(2.0))
        quantal.freeze(model)
    assert scales(model[0]) == pytest.approx((2 / INT8,) * 2)
    x = batch(2.0).requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()
    assert not any(t.is_inference() for t in model.state_dict().values())


# ---- which outputs


def test_streamline_quantizes_what_a_quantized_module_reads() -> None:
    model = model_of(
        identity(), nn.ReLU(), nn.Flatten(), identity(), nn.Sigmoid(), identity(),
    )  # fmt: skip
    with quantal.Calibration():
        model(batch(2.0))
    first, second, third = model[0], model[3], model[5]
    assert scales(first) == pytest.approx((2 / INT8, 2 / INT8))
    assert second.output_scale == 1  # sigmoid reads it
    assert third.output_scale == 1  # nothing does
    assert second.input_scale == pytest.approx(2 / INT8)
    y = model(batch(2.0))
    assert type(y) is torch.Tensor


def test_streamline_follows_pooling_and_views() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)
    )
    quantal.quantize(model, weights="qint8", activations="qint8")
    with quantal.Calibration():
        model(torch.randn(3, 1, 4, 4))
    assert model[0].output_scale != 1
    assert model[4].output_scale == 1


def test_without_streamline_every_output_is_quantized() -> None:
    model = model_of(identity(), nn.Sigmoid(), identity())
    with quantal.Calibration(streamline=False):
        model(batch(2.0))
    assert model[0].output_scale != 1
    assert model[2].output_scale != 1
    assert isinstance(model(batch(2.0)), quantal.ActivationQBytesTensor)


def test_a_norm_does_not_make_its_producer_quantize() -> None:
    """Only modules with a quantized weight multiply codes."""
    model = model_of(identity(), nn.LayerNorm(4), identity())
    with quantal.Calibration():
        model(batch(2.0))
    assert model[0].output_scale == 1
    assert model[1].output_scale != 1
    assert model[2].output_scale == 1


def test_disable_output_quantization() -> None:
    model = model_of(identity())
    with quantal.Calibration(streamline=False):
        model(batch(2.0))
    model[0].disable_output_quantization()
    assert model[0].output_scale == 1
    assert type(model(batch(2.0))) is torch.Tensor


def test_debug_says_what_was_decided(capsys: pytest.CaptureFixture) -> None:
    model = model_of(identity(), identity())
    with quantal.Calibration(debug=True):
        model(batch(2.0))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("0(QLinear) output is quantized to qint8 with scale 0.0157")
    assert second == "1(QLinear) output is quantized to qint8 to nothing."


# ---- which models


class Nested(nn.Module):
    """Modules two levels down, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(identity(), nn.ReLU()) for _ in range(2))
        self.head = identity()

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        for block in [*self.blocks, self.blocks[0]]:
            x = block(x) * scale
        return self.head(x)


@pytest.mark.parametrize("named", [False, True])
def test_nested_models(named: bool) -> None:
    model = Nested()
    quantal.quantize(model, weights="qint8", activations="qint8")
    calibration = quantal.Calibration(model) if named else quantal.Calibration()
    with calibration:
        model(batch(4.0), scale=0.5)
    # The first block is called with ranges 4 and, two halvings later, 1.
    assert model.blocks[0][0].input_scale == pytest.approx((0.9 * 4 + 0.1 * 1) / INT8)
    assert model.blocks[1][0].input_scale == pytest.approx(2 / INT8)
    assert model.head.input_scale == pytest.approx(0.5 / INT8)


def test_only_the_named_model_is_calibrated() -> None:
    one, other = model_of(identity()), model_of(identity())
    with quantal.Calibration(one, streamline=False):
        one(batch(2.0))
        other(batch(3.0))
    assert scales(one[0]) == pytest.approx((2 / INT8,) * 2)
    assert scales(other[0]) == (1, 1)


def test_two_calibrations_at_once() -> None:
    one, other = model_of(identity()), model_of(identity())
    with quantal.Calibration(one, streamline=False), quantal.Calibration(other, streamline=False):
        other(one(batch(2.0)))
        other(batch(4.0))
    assert scales(one[0]) == pytest.approx((2 / INT8,) * 2)
    assert scales(other[0]) == pytest.approx(((0.9 * 2 + 0.1 * 4) / INT8,) * 2)


@pytest.mark.parametrize("named", [False, True])
def test_keyword_arguments(named: bool) -> None:
    model = model_of(identity())
    with quantal.Calibration(model if named else None, streamline=False):
        model[0](input=batch(2.0))
    assert scales(model[0]) == pytest.approx((2 / INT8,) * 2)
