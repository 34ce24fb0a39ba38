"""quantal's functions on tensors beside optimum-quanto's of the same names, in fp32 bit for bit."""

from typing import Any

import pytest
import quantal
import reference_quanto
import torch
from optimum import quanto
from quantized import EIGHT_BITS, QTYPES

SHAPES = [(8, 64), (6, 96), (16, 4, 3, 3), (5, 32, 2, 2), (32, 3, 2)]
OPTIMIZERS = {"absmax": quantal.AbsmaxOptimizer, "max": quantal.MaxOptimizer}
NARROW = ("qint2", "qint4")


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return (actual.shape, actual.dtype) == (expected.shape, expected.dtype) and torch.equal(
        bits(actual), bits(expected)
    )


def unpacked(data: torch.Tensor, qtype: str) -> torch.Tensor:
    """One code a byte, of bytes that are packed along the first dimension."""
    width = quantal.qtypes[qtype].bits
    return torch.cat([(data >> s) & (2**width - 1) for s in range(0, 8, width)])


# ---- scales of the optimizers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("qtype", EIGHT_BITS)
def test_absmax_optimizer(qtype: str, axis: int | None, shape: tuple[int, ...]) -> None:
    base = torch.randn(shape)
    actual = quantal.AbsmaxOptimizer()(base, quantal.qtypes[qtype], axis)
    assert same(actual, quanto.AbsmaxOptimizer()(base, quanto.qtypes[qtype], axis))


@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((8, 64), None), ((64, 64), 32), ((16, 4, 3, 3), 12), ((32, 6, 4), 8)],
)
@pytest.mark.parametrize("zeropoint", [False, True])
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("qtype", NARROW)
def test_max_optimizer(qtype, axis, zeropoint, shape, group_size) -> None:
    base = torch.randn(shape)
    arguments = (axis, group_size, zeropoint)
    scale, shift = quantal.MaxOptimizer()(base, quantal.qtypes[qtype], *arguments)
    expected = quanto.MaxOptimizer()(base, quanto.qtypes[qtype], *arguments)
    assert same(scale, expected[0])
    assert same(shift, expected[1])


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("qtype", NARROW)
def test_hqq_optimizer(qtype: str, group_size: int | None) -> None:
    base = torch.randn(8, 128)
    scale, shift = quantal.HqqOptimizer()(base, quantal.qtypes[qtype], 0, group_size)
    expected = quanto.HqqOptimizer()(base, quanto.qtypes[qtype], 0, group_size)
    assert same(scale, expected[0])
    assert same(shift, expected[1])


def test_optimizers_check_the_axis() -> None:
    base = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"axis parameter must be None, 0 .* or -1"):
        quantal.AbsmaxOptimizer()(base, quantal.qint8, 1)
    for axis in (None, 1):
        with pytest.raises(ValueError, match=r"axis parameter must be 0 .* or -1"):
            quantal.MaxOptimizer()(base, quantal.qint4, axis)


# ---- quantize_weight


@pytest.mark.parametrize("shape", [*SHAPES, (1, 16), (16, 1)], ids=str)
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("qtype", EIGHT_BITS)
def test_8_bit_weight(qtype: str, axis: int, shape: tuple[int, ...]) -> None:
    t = torch.randn(shape)
    theirs, ours = quanto.qtypes[qtype], quantal.qtypes[qtype]
    scale = quanto.AbsmaxOptimizer()(t, theirs, axis)
    expected = quanto.quantize_weight(t, theirs, axis, scale, optimized=False)
    actual = quantal.quantize_weight(t, ours, axis, scale)
    assert same(actual.dequantize(), expected.dequantize())
    assert torch.equal(bits(actual._data), bits(expected._data))
    assert actual._scale.flatten().equal(expected._scale.flatten())
    assert actual.shape == t.shape
    if t.shape[axis] > 1:
        assert actual.axis == axis
        if t.ndim == 2:
            assert same(actual._data, expected._data)
            assert same(actual._scale, expected._scale)


GROUPED = [
    ((8, 64), 0, None),
    ((8, 64), 0, 32),
    ((8, 64), 0, 16),
    ((6, 96), 0, 48),
    ((16, 4, 3, 3), 0, 12),
    ((5, 32, 2, 2), 0, 128),
    ((64, 8), -1, None),
    ((64, 8), -1, 32),
    ((96, 12), -1, 16),
    ((16, 4, 3, 12), -1, 96),
    ((4, 8, 2, 6), -1, 16),
]


@pytest.mark.parametrize("zeropoint", [False, True])
@pytest.mark.parametrize(("shape", "axis", "group_size"), GROUPED)
@pytest.mark.parametrize("qtype", NARROW)
def test_narrow_weight(qtype, shape, axis, group_size, zeropoint) -> None:
    t = torch.randn(shape)
    theirs, ours = quanto.qtypes[qtype], quantal.qtypes[qtype]
    scale, shift = quanto.MaxOptimizer()(t, theirs, axis, group_size, zeropoint)
    expected = quanto.quantize_weight(t, theirs, axis, scale, shift, group_size, optimized=False)
    actual = quantal.quantize_weight(t, ours, axis, scale, shift, group_size)
    assert (actual.shape, actual.axis, actual._group_size) == (t.shape, axis, group_size)
    codes = expected._data.unpack()
    assert torch.equal(actual._data, expected._data._data)
    assert torch.equal(unpacked(actual._data, qtype)[: len(codes)], codes)
    assert same(actual._scale.reshape(expected._scale.shape), expected._scale)
    if not zeropoint:
        assert same(actual._shift.reshape(expected._shift.shape), expected._shift)
        assert same(actual.dequantize(), expected.dequantize())
    else:
        # scale * code - scale * zero here, scale * (code - zero) there: two roundings of terms of
        # at most 16 steps.
        error = (actual.dequantize() - expected.dequantize()).abs().max()
        assert error <= 2 * 16 * scale.max() * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("qtype", NARROW)
def test_zeropoint_represents_zero_exactly(qtype: str) -> None:
    t = torch.randn(4, 64).abs() - 0.3
    t[:, ::5] = 0
    scale, shift = quantal.MaxOptimizer()(t, quantal.qtypes[qtype], 0, 32, zeropoint=True)
    quantized = quantal.quantize_weight(t, quantal.qtypes[qtype], 0, scale, shift, 32)
    assert not quantized.dequantize()[:, ::5].any()


def test_one_scale_for_all() -> None:
    t = torch.randn(4, 8)
    scale = quantal.absmax_scale(t)
    quantized = quantal.quantize_weight(t, quantal.qint8, 0, scale)
    codes = (t / scale).round().clamp(-127, 127)
    assert torch.equal(quantized._data.float(), codes)
    assert torch.equal(quantized.dequantize(), codes * scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axis": 1}, r"axis parameter must be 0 \(first axis\) or -1 \(last axis\)"),
        ({"shift": torch.zeros(4, 1)}, "shift cannot be specified for 8-bit qtypes"),
        ({"group_size": 4}, "group_size cannot be specified for 8-bit qtypes"),
        ({"qtype": quantal.qint4}, "shift must be specified for qtypes lower than 8-bit"),
        ({"scale": torch.ones(3, 1)}, r"expected 4 values, got shape \(3, 1\)"),
        ({"scale": torch.zeros(4, 1)}, "expected scale to be positive"),
        (
            {"qtype": quantal.qint4, "shift": torch.zeros(4, 1), "group_size": 5},
            r"Group size \(5\) must be a divisor of \(8\)",
        ),
        (
            {"qtype": quantal.qint4, "shift": torch.zeros(4, 1), "group_size": 16},
            r"Group size \(16\) must be a divisor of \(8\)",
        ),
        (
            {"qtype": quantal.qint4, "shift": torch.zeros(4, 1), "group_size": 3, "axis": -1},
            r"Group size \(3\) must be a divisor of \(4\)",
        ),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    given = {"qtype": quantal.qint8, "axis": 0, "scale": torch.ones(4, 1)} | arguments
    with pytest.raises(ValueError, match=message):
        quantal.quantize_weight(torch.randn(4, 8), **given)


def test_gradient_passes_straight_through() -> None:
    t = torch.randn(4, 8, requires_grad=True)
    seed = torch.randn(4, 8)
    scale = quantal.AbsmaxOptimizer()(t.detach(), quantal.qint8, 0)
    quantal.quantize_weight(t, quantal.qint8, 0, scale).dequantize().backward(seed)
    assert torch.equal(t.grad, seed)


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("axis", [0, -1])
def test_weights_in_torch_functions(qtype: str, axis: int) -> None:
    t, chosen = torch.randn(8, 32), quantal.qtypes[qtype]
    if chosen.is_affine:
        parts = quantal.MaxOptimizer()(t, chosen, axis)
    else:
        parts = (quantal.AbsmaxOptimizer()(t, chosen, axis),)
    quantized = quantal.quantize_weight(t, chosen, axis, *parts)
    value = quantized.dequantize()
    x = torch.randn(3, 32)
    y = torch.nn.functional.linear(x, quantized)
    torch.testing.assert_close(y, x @ value.t(), rtol=1e-5, atol=1e-5)
    assert torch.equal(quantized + 1, value + 1)
    assert torch.equal(torch.cat([quantized, quantized]), torch.cat([value, value]))
    assert torch.equal(quantized[2], value[2])
    assert len(quantized) == 8


# ---- activations


@pytest.mark.parametrize("qtype", EIGHT_BITS)
def test_quantize_activation(qtype: str) -> None:
    t = torch.randn(3, 5, 7)
    scale = quanto.absmax_scale(t, quanto.qtypes[qtype])
    assert same(quantal.absmax_scale(t, quantal.qtypes[qtype]), scale)
    expected = quanto.quantize_activation(t, quanto.qtypes[qtype], scale)
    actual = quantal.quantize_activation(t, quantal.qtypes[qtype], scale)
    assert same(actual.dequantize(), expected.dequantize())
    assert same(actual._data, expected._data)
    assert isinstance(actual, quantal.ActivationQBytesTensor)
    assert actual.axis is None
    with pytest.raises(ValueError, match="scale must be a scalar"):
        quantal.quantize_activation(t, quantal.qtypes[qtype], torch.ones(3))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_absmax_scale(axis: int) -> None:
    t = torch.randn(4, 5, 6)
    assert same(quantal.absmax_scale(t, axis=axis), quanto.absmax_scale(t, axis=axis))


# ---- groups


@pytest.mark.parametrize(("shape", "axis", "group_size"), [g for g in GROUPED if g[2]])
def test_group(shape: tuple[int, ...], axis: int, group_size: int) -> None:
    t = torch.randn(shape)
    grouped = quantal.group(t, axis, group_size)
    assert same(grouped, quanto.group(t, axis, group_size))
    assert grouped.shape == quantal.grouped_shape(shape, axis, group_size)
    assert same(quantal.ungroup(grouped, axis, t.shape), t)


def test_group_arguments() -> None:
    with pytest.raises(ValueError, match="Axis must be 0 or -1"):
        quantal.group(torch.randn(4, 8), 1, 4)
    with pytest.raises(ValueError, match=r"Group size \(3\) must be a divisor of \(8\)"):
        quantal.group(torch.randn(4, 8), 0, 3)
    assert quantal.axis_to_dim(torch.randn(2, 3, 4), -1) == [0, 1]


# ---- QTensor


@pytest.mark.parametrize("qtype", QTYPES)
def test_classes_and_attributes(qtype: str) -> None:
    layer = quantal.QLinear(64, 8, weights=qtype)
    live = layer.qweight
    layer.freeze()
    narrow = qtype in NARROW
    for value in (live, layer.weight, layer.qweight):
        assert isinstance(value, quantal.QTensor)
        assert isinstance(value, quantal.QBitsTensor) == narrow
        assert isinstance(value, quantal.QBytesTensor) != narrow
        assert isinstance(value, quantal.WeightQBitsTensor) == narrow
        assert isinstance(value, quantal.WeightQBytesTensor) != narrow
        assert not isinstance(value, quantal.ActivationQBytesTensor)
        assert (value.qtype.name, value.axis, value.shape) == (qtype, 0, (8, 64))
    assert not isinstance(torch.randn(2), quantal.QTensor)
    assert torch.equal(quantal.qfallback(torch.add, live, 1), live.dequantize() + 1)


def test_what_operations_return_has_the_attributes_too() -> None:
    x = quantal.quantize_activation(torch.randn(4, 6), quantal.qint8, torch.tensor(0.02))
    for value in (x.view(2, 12), x.t(), x[1], x.relu(), x.half(), *x.split(2), x.detach()):
        assert type(value) is quantal.ActivationQBytesTensor
        assert (value.qtype, value.axis) == (quantal.qint8, None)
        assert value._scale.item() == pytest.approx(0.02, rel=1e-3)
    assert type(x + 1) is torch.Tensor
    bases = [x.view(2, 12)]
    while bases[-1]._base is not None:  # ends
        bases.append(bases[-1]._base)
        assert len(bases) < 5
    scale = torch.rand(4, 1) + 0.1
    weight = quantal.quantize_weight(torch.randn(4, 6), quantal.qint8, 0, scale)
    for value in (weight.half(), weight.detach(), weight.clone()):
        assert type(value) is quantal.WeightQBytesTensor
        assert torch.equal(value._data, weight._data)
    # Views of a part have no parts of their own.
    for value, axis in ((weight.t(), -1), (weight[1:3], 0)):
        assert isinstance(value, quantal.WeightQBytesTensor)
        assert (value.qtype, value.axis) == (quantal.qint8, axis)
        assert "qint8" in repr(value)


@pytest.mark.parametrize("theirs", list(quanto.qtypes.values()), ids=str)
def test_qtypes(theirs: Any) -> None:
    ours = quantal.qtypes[theirs.name]
    fields = ("name", "is_floating_point", "bits", "dtype", "qmin", "qmax")
    for field in fields:
        assert getattr(ours, field) == getattr(theirs, field)


def test_reference_is_the_real_one() -> None:
    assert reference_quanto.quanto.__name__ == "optimum.quanto"
