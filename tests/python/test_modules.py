"""Quantized modules: what they compute live and frozen, their gradients, and how they are made."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import quantal
import torch
from module_kinds import CONVOLUTIONS, KINDS, WEIGHTED
from quantal.nn.qmodule import _QMODULE_TABLE
from quantized import QTYPES, ops
from torch import nn
from torch.nn import functional as F  # noqa: N812

FLOAT_INPUTS = [name for name in WEIGHTED if name != "embedding"]
LINEARS = [name for name in WEIGHTED if name.startswith("linear")]


def quantized_model(kind: str, qtype: str | None, activations: str | None = None) -> nn.Sequential:
    model = KINDS[kind].model()
    quantal.quantize(model, weights=qtype, activations=activations)
    return model


def assert_live_equals_frozen(model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        live = model(x)
        quantal.freeze(model)
        frozen = model(x)
    assert live.isfinite().all()
    assert torch.equal(live, frozen)


# ---- live and frozen


@pytest.mark.parametrize("activations", [None, "dynamic-qint8", "qint8", "qfloat8"])
@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("kind", WEIGHTED)
def test_live_equals_frozen(kind: str, qtype: str, activations: str | None) -> None:
    model = quantized_model(kind, qtype, activations)
    x = KINDS[kind].input()
    if activations in ("qint8", "qfloat8"):
        with quantal.Calibration(streamline=False), torch.no_grad():
            model(x)
    assert_live_equals_frozen(model, x)
    assert model[0].frozen


@pytest.mark.parametrize("kind", ["layer_norm", "layer_norm without affine"])
def test_layer_norm_quantizes_its_output_only(kind: str) -> None:
    model = KINDS[kind].model()
    expected = model(x := KINDS[kind].input())
    quantal.quantize(model, weights="qint4", activations="qint8")
    assert torch.equal(model(x), expected)  # nothing is calibrated
    with quantal.Calibration(streamline=False):
        assert torch.equal(model(x), expected)
    quantal.freeze(model)
    output = model(x)
    assert isinstance(output, quantal.ActivationQBytesTensor)
    step = expected.abs().max() / 127
    assert (output.dequantize() - expected).abs().max() <= step / 2 * (1 + 1e-5)
    assert not model[0].frozen


def test_layer_norm_stays_where_activations_are_float() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    quantal.quantize(model, weights="qint8")
    assert type(model[0]) is nn.LayerNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", WEIGHTED)
def test_output_has_the_dtype_of_the_float_module(kind: str, dtype: torch.dtype) -> None:
    model = KINDS[kind].model().to(dtype)
    x = KINDS[kind].input()
    x = x.to(dtype) if x.is_floating_point() else x
    expected = model(x)
    quantal.quantize(model, weights="qint8")
    assert_live_equals_frozen(model, x)
    output = model(x)
    assert (output.dtype, output.shape) == (dtype, expected.shape)
    error = (output.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.02


# ---- gradients


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("kind", FLOAT_INPUTS)
def test_gradients_are_those_of_fake_quantization(kind: str, qtype: str) -> None:
    model = quantized_model(kind, qtype)
    x = KINDS[kind].input().requires_grad_()
    y = model(x)
    seed = torch.randn_like(y)
    y.backward(seed)

    plain = KINDS[kind].module()
    layer = model[0]
    value = layer.qweight.dequantize().detach()
    plain.weight.data = value
    if layer.bias is not None:
        plain.bias.data = layer.bias.detach()
    same_x = x.detach().clone().requires_grad_()
    expected = plain(same_x)
    expected.backward(seed)
    # Sums of at most 300 terms of size one, in another order.
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(x.grad, same_x.grad, **close)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, **close)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, **close)


@pytest.mark.parametrize("qtype", QTYPES)
def test_embedding_gradients(qtype: str) -> None:
    model = quantized_model("embedding", qtype)
    x = KINDS["embedding"].input()
    model(x).sum().backward()
    counts = torch.bincount(x.flatten(), minlength=20).float()
    counts[3] = 0  # padding
    assert torch.equal(model[0].weight.grad, counts[:, None].expand(20, 64))


@pytest.mark.parametrize("activations", ["qint8", "dynamic-qint8"])
def test_gradients_pass_through_quantized_activations(activations: str) -> None:
    model = quantized_model("linear", "qint8", activations)
    x = KINDS["linear"].input().requires_grad_()
    with quantal.Calibration():
        model(x.detach())
    y = model(x)
    seed = torch.randn_like(y)
    y.backward(seed)
    layer = model[0]
    weight = layer.qweight.dequantize()
    seen = layer.fake_quantized(x.detach())
    assert not torch.equal(seen, x)
    torch.testing.assert_close(x.grad, seed @ weight.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, seed.t() @ seen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FLOAT_INPUTS)
def test_frozen_modules_pass_gradients_to_their_input(kind: str) -> None:
    model = quantized_model(kind, "qint4")
    value = model[0].qweight.dequantize().detach()
    quantal.freeze(model)
    x = KINDS[kind].input().requires_grad_()
    model(x).sum().backward()
    plain = KINDS[kind].module()
    plain.weight.data = value
    same_x = x.detach().clone().requires_grad_()
    plain(same_x).sum().backward()
    torch.testing.assert_close(x.grad, same_x.grad, rtol=1e-5, atol=2e-5)
    assert all(p.grad is None for p in model[0].weight.parameters())


def test_training_reaches_what_fake_quantization_reaches() -> None:
    torch.manual_seed(1)
    model = quantized_model("conv2d", "qint4")
    plain = KINDS["conv2d"].module()
    plain.load_state_dict({k: model[0].state_dict()[k] for k in ("weight", "bias")})
    x = KINDS["conv2d"].input()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, plain)]
    for _ in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).square().sum().backward()
        quantized = ops.quantize_weight(plain.weight, "qint4", group_size=0)
        value = plain.weight + (ops.dequantize(quantized) - plain.weight).detach()
        F.conv2d(x, value, plain.bias, stride=2, groups=2).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    # The library's convolution rounds otherwise than torch's; a step of Adam moves by 1e-2.
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(model[0].weight, plain.weight, **close)
    torch.testing.assert_close(model[0].bias, plain.bias, **close)


# ---- calls


@pytest.mark.parametrize("activations", [None, "qint8", "dynamic-qint8"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_keyword_call(kind: str, activations: str | None) -> None:
    model = quantized_model(kind, "qint8", activations or ("qint8" if "norm" in kind else None))
    layer, x = model[0], KINDS[kind].input()
    if activations == "qint8":
        with quantal.Calibration(streamline=False):
            layer(input=x)
        if "norm" not in kind and kind != "embedding":
            assert layer.input_scale.item() == pytest.approx(x.abs().max().item() / 127)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("activations", [None, "dynamic-qint8"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", FLOAT_INPUTS)
def test_noncontiguous_input(kind: str, frozen: bool, activations: str | None) -> None:
    model = quantized_model(kind, "qint4", activations)
    if frozen:
        quantal.freeze(model)
    x = KINDS[kind].input()
    strided = torch.stack([x, torch.full_like(x, float("inf"))], -1)[..., 0]
    backwards = x.transpose(0, -1).contiguous().transpose(0, -1)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model(strided), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(backwards), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", [None, "dynamic-qint8", "dynamic-qfloat8"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution_without_batch(kind: str, activations: str | None) -> None:
    model = quantized_model(kind, "qint8", activations)
    x = KINDS[kind].input()
    with torch.no_grad():
        alone = model(x[0])
        torch.testing.assert_close(alone, model(x[:1])[0], rtol=1e-5, atol=1e-5)


def test_transposed_convolution_takes_an_output_size() -> None:
    model = quantized_model("conv_transpose1d", "qint8")
    x = KINDS["conv_transpose1d"].input()
    assert model[0](x, output_size=[11]).shape == (2, 4, 11)
    assert model[0](x, output_size=[12]).shape == (2, 4, 12)


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 1, 3)])
def test_leading_dimensions(kind: str, shape: tuple[int, ...]) -> None:
    model = quantized_model(kind, "qint4", "dynamic-qint8")
    layer = model[0]
    x = torch.randn(*shape, layer.in_features)
    with torch.no_grad():
        rows = layer(x.reshape(-1, layer.in_features))
        assert torch.equal(layer(x), rows.reshape(*shape, layer.out_features))


# ---- optimizers of one's own


class HalfRange(quantal.SymmetricOptimizer):
    """Clips at half of the largest value."""

    def optimize(self, base, qtype, axis=None):
        rest = [d for d in range(base.ndim) if d != axis]
        return base.abs().amax(rest, keepdim=True) / 2 / qtype.qmax


class WideRange(quantal.AffineOptimizer):
    """Leaves a margin on both sides."""

    def optimize(self, base, qtype, axis):
        rest = [d for d in range(base.ndim) if d != axis % base.ndim]
        low, high = base.amin(rest, keepdim=True) - 0.1, base.amax(rest, keepdim=True) + 0.1
        return (high - low) / (2**qtype.bits - 1), -low


@pytest.mark.parametrize(
    ("qtype", "optimizer"),
    [
        ("qint8", HalfRange()),
        ("qfloat8", HalfRange()),
        ("qint4", WideRange()),
        ("qint2", WideRange()),
        ("qint4", quantal.HqqOptimizer(iters=3)),
        ("qint4", quantal.HqqOptimizer()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d reflect", "embedding"])
def test_own_optimizer(kind: str, qtype: str, optimizer: quantal.Optimizer) -> None:
    model, standard = KINDS[kind].model(), KINDS[kind].model()
    standard.load_state_dict(model.state_dict())
    quantal.quantize(model, weights=qtype, optimizer=optimizer)
    quantal.quantize(standard, weights=qtype)
    weight = model[0].weight.detach().clone()
    assert not torch.equal(model[0].qweight.dequantize(), standard[0].qweight.dequantize())
    y = model(x := KINDS[kind].input())
    y.sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert_live_equals_frozen(model, x)
    if isinstance(optimizer, HalfRange):
        expected = weight.flatten(1).abs().amax(1) / 2 / model[0].weight_qtype.qmax
        expected[expected == 0] = 1  # the padding of an embedding
        assert torch.equal(model[0].weight._scale.flatten(), expected)


class OwnSymmetric(quantal.SymmetricOptimizer):
    def optimize(self, base: torch.Tensor, qtype: quantal.qtype, axis: int | None = None) -> Any:
        return quantal.absmax_scale(base, qtype, axis)


class OwnAffine(quantal.AffineOptimizer):
    def optimize(self, base: torch.Tensor, qtype: quantal.qtype, axis: int) -> Any:
        return quantal.MaxOptimizer().optimize(base, qtype, axis)


SYMMETRIC = [quantal.AbsmaxOptimizer, OwnSymmetric]
AFFINE = [quantal.MaxOptimizer, quantal.HqqOptimizer, OwnAffine]


@pytest.mark.parametrize(
    ("qtype", "optimizer"),
    [(q, cls()) for q in QTYPES for cls in (SYMMETRIC if q in ("qint2", "qint4") else AFFINE)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_optimizers_of_other_qtypes_are_errors(qtype: str, optimizer: quantal.Optimizer) -> None:
    """At the latest where a weight is first quantized; nothing is frozen then."""
    x = KINDS["linear"].input()

    def use(step: Callable[[nn.Module], object]) -> nn.Sequential:
        model = KINDS["linear"].model()
        with pytest.raises(ValueError, match=r"[Oo]ptimizer|quantizer|shift"):  # noqa: PT012
            quantal.quantize(model, weights=qtype, optimizer=optimizer)
            step(model)
        return model

    use(lambda model: model(x))
    model = use(quantal.freeze)
    assert isinstance(model[0].weight, nn.Parameter)
    with pytest.raises(ValueError, match=r"[Oo]ptimizer|quantizer|shift"):  # noqa: PT012
        layer = quantal.quantize_module(nn.Linear(8, 4), weights=qtype, optimizer=optimizer)
        layer.freeze()


def test_zeropoint_of_an_affine_optimizer() -> None:
    optimizer = quantal.MaxOptimizer()
    base = torch.randn(4, 64)
    scale, shift = optimizer(base, quantal.qint4, 0, 32)
    _, zero = optimizer(base, quantal.qint4, 0, 32, zeropoint=True)
    assert zero.dtype == torch.uint8
    assert torch.equal(zero, (shift / scale).round().clamp(0, 15).to(torch.uint8))


# ---- modules of one's own


class Scaled(nn.Linear):
    """A linear whose output is scaled: a module that Quantal does not know."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.fixture
def own_module():
    """Registers QScaled for the time of a test."""

    @quantal.register_qmodule(Scaled)
    class QScaled(quantal.QModuleMixin, Scaled):
        @classmethod
        def qcreate(cls, module, weights, activations=None, optimizer=None, device=None):
            return cls(
                module.in_features, module.out_features, module.bias is not None,
                dtype=module.weight.dtype, device=device, weights=weights,
                activations=activations, optimizer=optimizer, quantize_input=True,
            )  # fmt: skip

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * F.linear(input, self.qweight, bias=self.bias)

    yield QScaled
    del _QMODULE_TABLE[Scaled]


@pytest.mark.parametrize("activations", [None, "qint8"])
@pytest.mark.parametrize("qtype", QTYPES)
def test_register_qmodule(own_module: type, qtype: str, activations: str | None) -> None:
    model = nn.Sequential(Scaled(64, 8), nn.ReLU())
    expected = model(x := torch.randn(4, 64))
    quantal.quantize(model, weights=qtype, activations=activations)
    assert type(model[0]) is own_module
    if activations:
        with quantal.Calibration(streamline=False):
            model(x)
        assert model[0].input_scale.item() == pytest.approx(x.abs().max().item() / 127)
    y = model(x)
    (y.dequantize() if isinstance(y, quantal.QTensor) else y).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert_live_equals_frozen(model, x)
    if qtype == "qint8":
        torch.testing.assert_close(model(x) + 0.0, expected, rtol=0.05, atol=0.05)


def test_the_most_derived_registered_class_counts(own_module: type) -> None:
    model = nn.Sequential(Scaled(8, 8), nn.Linear(8, 8))
    quantal.quantize(model, weights="qint8")
    assert [type(m) for m in model] == [own_module, quantal.QLinear]


@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_own_modules_take_codes_of_another_type(own_module: type, kind: str) -> None:
    """As QLinear does: their value is quantized again."""
    module = quantal.quantize_module(Scaled(8, 8), "qint8", "qint8")
    module.input_scale = torch.tensor(0.03)
    given = quantal.qtypes["qint8" if kind == "int8" else "qfloat8"]
    codes = quantal.quantize_activation(torch.randn(2, 8), given, torch.tensor(0.02))
    value = codes.dequantize()
    if kind == "float8":  # codes of its own type are taken as they are
        value = ops.fake_quantize(value, "qint8", torch.tensor(0.03))
    expected = module.forward(value)
    torch.testing.assert_close(module(codes) + 0.0, expected)


@pytest.mark.parametrize("shape", [(2, 5), (5,), (2, 3, 16), ()])
@pytest.mark.parametrize("qtype", QTYPES)
def test_input_of_another_width(qtype: str, shape: tuple[int, ...]) -> None:
    """An error of the type of torch's, that says what the layer wants."""
    layer = quantal.QLinear(8, 4, weights=qtype)
    got = ", ".join(map(str, shape)) + "," * (len(shape) == 1)
    message = re.escape(
        f"[quantal.QLinear] expected input of shape (…, in_features) = (…, 8), got ({got})"
    )
    for _ in ("live", "frozen"):
        with pytest.raises(RuntimeError, match=message):
            layer(torch.randn(shape))
        layer.freeze()


def test_a_bias_of_another_size_is_an_error() -> None:
    weight, x = torch.randn(64, 32), torch.randn(1, 32)
    data, scale, _ = ops.encode(weight, "qint8", 0)
    for activations in ("", "qint8"):
        with pytest.raises(RuntimeError, match="size of tensor"):
            ops.linear(x, data, scale, None, torch.ones(3), "qint8", 0, None, activations)
        one = ops.linear(x, data, scale, None, torch.ones(1), "qint8", 0, None, activations)
        none = ops.linear(x, data, scale, None, None, "qint8", 0, None, activations)
        assert torch.equal(one, none + 1)
