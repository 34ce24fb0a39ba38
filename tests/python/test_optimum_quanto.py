"""The same numbers as optimum-quanto 0.2.7, bit for bit, for fp32 weights of every qtype and shape.

The differences are deliberate; the second half of this file says what Quantal promises instead.
"""

import math

import pytest
import reference_quanto as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import EIGHT_BITS, QTYPES, ops

AFFINE = ("qint2", "qint4")
LINEAR_INPUTS = (1, 2, 3, 32, 64, 96, 100, 128, 129, 144, 160, 256, 320, 1000)
CONV_SHAPES = (
    (8, 3, 3, 3),
    (16, 16, 3, 3),  # rows of 144: no group size divides them
    (8, 32, 3, 3),  # rows of 288: groups of 96
    (32, 64, 1, 1),
    (4, 256, 1, 1),
    (6, 1, 5, 5),
    (5, 7, 2, 3),
)
QUANTIZERS = [(qtype, name) for qtype in QTYPES for name in reference.optimizers(qtype)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: NaN equals NaN, and 0 is not -0."""
    return tensor.reshape(-1).view(torch.uint8)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(bits(actual), bits(expected))


def assert_same_as_reference(weight: torch.Tensor, qtype: str, optimizer: str) -> None:
    quantized = ops.quantize_weight(weight, qtype, quantizer=optimizer)
    data, scale, shift = ops.parts(quantized)
    expected_data, expected_scale, expected_shift, value = reference.quantize(
        weight, qtype, optimizer
    )
    assert_same_bits(data, expected_data)
    assert_same_bits(scale, expected_scale)
    assert (shift is None) == (expected_shift is None)
    if shift is not None:
        assert_same_bits(shift, expected_shift)
    assert torch.equal(ops.dequantize(quantized), value)


# Affine rows of one element are constant: see test_constant_group.
@pytest.mark.parametrize(
    ("qtype", "optimizer", "inputs"),
    [(*choice, n) for choice in QUANTIZERS for n in LINEAR_INPUTS[choice[0] in AFFINE :]],
)
def test_linear_weight(qtype: str, optimizer: str, inputs: int) -> None:
    assert_same_as_reference(torch.randn(7, inputs), qtype, optimizer)


# For the others see test_hqq_of_ungrouped_conv_has_one_shift_a_row.
@pytest.mark.parametrize(
    ("qtype", "optimizer", "shape"),
    [
        (qtype, optimizer, shape)
        for qtype, optimizer in QUANTIZERS
        for shape in CONV_SHAPES
        if optimizer != "hqq" or reference.group_size(torch.empty(shape), qtype)
    ],
    ids=str,
)
def test_conv_weight(qtype: str, optimizer: str, shape: tuple[int, ...]) -> None:
    assert_same_as_reference(torch.randn(shape), qtype, optimizer)


@pytest.mark.parametrize("inputs", range(1, 1100))
def test_group_rule(inputs: int) -> None:
    weight = torch.zeros(2, inputs)
    expected = reference.group_size(weight, "qint4") or inputs
    _, scale, _ = ops.parts(ops.quantize_weight(weight, "qint4"))
    assert scale.shape == (2 * inputs // expected, 1)


@pytest.mark.parametrize("magnitude", [1e-20, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize(("qtype", "optimizer"), QUANTIZERS)
def test_magnitudes(qtype: str, optimizer: str, magnitude: float) -> None:
    assert_same_as_reference(torch.randn(5, 256) * magnitude, qtype, optimizer)


@pytest.mark.parametrize(("qtype", "optimizer"), QUANTIZERS)
def test_outliers_and_one_sided_rows(qtype: str, optimizer: str) -> None:
    weight = torch.randn(6, 192)
    weight[0, 3] = 1000
    weight[1] = weight[1].abs() + 1  # a range without zero is not widened
    weight[2] = -weight[2].abs() - 1
    weight[3, ::2] = 0
    weight[4, 1:-1] = 0
    assert_same_as_reference(weight, qtype, optimizer)


@pytest.mark.parametrize(("qtype", "optimizer"), QUANTIZERS)
def test_noncontiguous_weight(qtype: str, optimizer: str) -> None:
    transposed = torch.randn(192, 8).t()
    quantized = ops.quantize_weight(transposed, qtype, quantizer=optimizer)
    expected = ops.quantize_weight(transposed.contiguous(), qtype, quantizer=optimizer)
    for part, same in zip(ops.parts(quantized), ops.parts(expected), strict=True):
        assert part is same is None or torch.equal(bits(part), bits(same))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(2, 9),
    columns=st.integers(2, 400),
    spread=st.floats(0.01, 3),
    seed=st.integers(0, 2**31),
    choice=st.sampled_from(QUANTIZERS),
)
def test_any_weight(
    rows: int, columns: int, spread: float, seed: int, choice: tuple[str, str]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    assert_same_as_reference(normal * (spread * normal).exp(), *choice)


# What follows differs from optimum-quanto, on purpose.


@pytest.mark.parametrize("qtype", EIGHT_BITS)
def test_row_of_zeros(qtype: str) -> None:
    """optimum-quanto's scale is 0, and its float8 codes are NaN."""
    weight = torch.randn(4, 64)
    weight[2] = 0
    _, expected_scale, _, value = reference.quantize(weight, qtype, "absmax")
    assert expected_scale[2] == 0
    assert value[2].isnan().any() == (qtype != "qint8")

    quantized = ops.quantize_weight(weight, qtype)
    data, scale, _ = ops.parts(quantized)
    assert scale[2] == 1
    assert not data[2].float().any()
    assert torch.equal(ops.dequantize(quantized)[2], weight[2])
    others = [0, 1, 3]
    assert_same_bits(scale[others], expected_scale[others])
    assert torch.equal(ops.dequantize(quantized)[others], value[others])


@pytest.mark.parametrize("constant", [0.0, 3.7, -2.1])
@pytest.mark.parametrize("inputs", [1, 64, 256])
@pytest.mark.parametrize("optimizer", ["max", "hqq"])
@pytest.mark.parametrize("qtype", AFFINE)
def test_constant_group(qtype: str, optimizer: str, inputs: int, constant: float) -> None:
    """optimum-quanto divides by a scale of 0, and casts NaN to integers."""
    weight = torch.full((3, inputs), constant)
    assert not reference.quantize(weight, qtype, "max")[1].any()

    quantized = ops.quantize_weight(weight, qtype, quantizer=optimizer)
    data, scale, _ = ops.parts(quantized)
    assert torch.equal(scale, torch.ones_like(scale))
    assert not data.any()
    assert torch.equal(ops.dequantize(quantized), weight)


@pytest.mark.parametrize("qtype", EIGHT_BITS)
def test_one_output_8_bits(qtype: str) -> None:
    """optimum-quanto's scale has no dimensions then; the numbers are the same."""
    weight = torch.randn(1, 96)
    expected_data, expected_scale, _, value = reference.quantize(weight, qtype, "absmax")
    assert expected_scale.shape == ()
    quantized = ops.quantize_weight(weight, qtype)
    data, scale, _ = ops.parts(quantized)
    assert scale.shape == (1, 1)
    assert_same_bits(data, expected_data)
    assert_same_bits(scale[0, 0], expected_scale)
    assert torch.equal(ops.dequantize(quantized), value)


@pytest.mark.parametrize("qtype", AFFINE)
def test_one_output_affine(qtype: str) -> None:
    """optimum-quanto quantizes each column by itself then: all scales are 0."""
    weight = torch.randn(1, 96)
    _, expected_scale, _, _ = reference.quantize(weight, qtype, "max")
    assert expected_scale.shape == (1, 96)
    assert not expected_scale.any()

    data, scale, shift = ops.parts(ops.quantize_weight(weight, qtype))
    twice = ops.parts(ops.quantize_weight(weight.expand(2, 96), qtype))
    assert scale.shape == shift.shape == (1, 1)
    assert torch.equal(scale, twice[1][:1])
    assert torch.equal(shift, twice[2][:1])
    assert data.shape == (1, 96)
    assert torch.equal(data & (2 ** int(qtype[4:]) - 1), twice[0][:1] & (2 ** int(qtype[4:]) - 1))


@pytest.mark.parametrize("qtype", AFFINE)
def test_hqq_of_ungrouped_conv_has_one_shift_a_row(qtype: str) -> None:
    """optimum-quanto averages over the kernel's last dimension alone: a shift for each rest."""
    weight = torch.randn(8, 3, 3, 3)
    assert reference.quantize(weight, qtype, "hqq")[2].shape == (8, 3, 3, 1)

    conv = ops.quantize_weight(weight, qtype, quantizer="hqq")
    data, scale, shift = ops.parts(conv)
    as_linear = ops.quantize_weight(weight.flatten(1), qtype, quantizer="hqq")
    linear_data, linear_scale, linear_shift = ops.parts(as_linear)
    assert shift.shape == scale.shape == (8, 1, 1, 1)
    assert torch.equal(data.flatten(1), linear_data)
    assert torch.equal(scale.flatten(1), linear_scale)
    assert torch.equal(shift.flatten(1), linear_shift)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("qtype", "optimizer"), [c for c in QUANTIZERS if c[1] != "hqq"])
def test_half_precision(qtype: str, optimizer: str, dtype: torch.dtype) -> None:
    """optimum-quanto computes in the weight's dtype. Quantal computes in fp32, from the scale that
    it stores, and is at least as accurate. A scale that fp16 holds as a subnormal stays in fp32.
    """
    weight = torch.randn(64, 512).to(dtype)
    quantized = ops.quantize_weight(weight, qtype, quantizer=optimizer)
    data, scale, shift = ops.parts(quantized)
    exact_scale, exact_shift = reference.quantize(weight.float(), qtype, optimizer)[1:3]
    stored = dtype if exact_scale.min() >= torch.finfo(dtype).tiny else torch.float32
    assert_same_bits(scale, exact_scale.to(stored))
    groups = weight.float().reshape(scale.shape[0], -1)
    if shift is None:
        largest = 127 if qtype == "qint8" else torch.finfo(data.dtype).max
        codes = (groups / scale.float()).clamp(-largest, largest)
        codes = codes.round() if qtype == "qint8" else codes
        assert_same_bits(data, codes.to(data.dtype))
    else:
        assert_same_bits(shift, exact_shift.to(dtype))
        codes = (groups + shift.float()).div(scale.float()).round()
        codes = codes.clamp(0, 2 ** int(qtype[4:]) - 1).to(torch.uint8)
        assert torch.equal(reference._unpack(data, int(qtype[4:]))[: codes.shape[0]], codes)

    def error(value: torch.Tensor) -> float:
        return math.sqrt((value.double() - weight.double()).square().mean())

    theirs = reference.quantize(weight, qtype, optimizer)[3]
    assert error(ops.dequantize(quantized)) <= error(theirs) * 1.0001
