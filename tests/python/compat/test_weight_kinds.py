"""The constructors and static methods of quantized tensors' classes, beside optimum-quanto's."""

from typing import Any

import pytest
import quantal
import reference_quanto  # noqa: F401  spares the real one its compiler
import torch
from optimum import quanto

EIGHT_BITS = ("qint8", "qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2")
SHAPES = ((6, 64), (5, 3, 3, 3), (1, 32))


def assert_same(ours: Any, theirs: Any) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert ours.qtype.name == theirs.qtype.name
    torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=0, atol=1e-6)


def saved(weight: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    weight.save_to_state_dict(found, "weight.", keep_vars=False)
    return found


def eight_bits(qtype: str, axis: int | None, shape: tuple[int, ...]) -> Any:
    """optimum-quanto's weight."""
    base = torch.randn(shape)
    scale = quanto.AbsmaxOptimizer()(base, quanto.qtypes[qtype], axis)
    axis = None if scale.ndim == 0 else axis
    return base, quanto.WeightQBytesTensor.quantize(base, quanto.qtypes[qtype], axis, scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [0, -1, None])
@pytest.mark.parametrize("qtype", EIGHT_BITS)
def test_weights_of_8_bits(qtype: str, axis: int | None, shape: tuple[int, ...]) -> None:
    base, theirs = eight_bits(qtype, axis, shape)
    kind, own = quantal.WeightQBytesTensor, quantal.qtypes[qtype]
    size, stride, axis = theirs.size(), theirs.stride(), theirs.axis
    made = [
        kind.quantize(base, own, axis, theirs._scale),
        kind.create(own, axis, size, stride, theirs._data, theirs._scale),
        kind(own, axis, size, stride, theirs._data, theirs._scale, None),
        kind.load_from_state_dict(saved(theirs), "weight.", own, axis, size, stride, None, []),
    ]
    for weight in made:
        assert isinstance(weight, kind)
        assert not isinstance(weight, quantal.WeightQBitsTensor)
        assert weight.optimize() is weight
        assert_same(weight, theirs)
        for key, part in saved(weight).items():
            if axis is not None:
                assert torch.equal(part.float(), saved(theirs)[key].float()), key
        # And what it saves, optimum-quanto reads; it has one scale for each row.
        kept = 0 if axis is None and shape[0] > 1 else axis
        again = quanto.WeightQBytesTensor.load_from_state_dict(
            saved(weight), "weight.", theirs.qtype, kept, size, stride, None, []
        )
        assert_same(weight, again)


def below_8_bits(qtype: str, axis: int, group: int | None, shape: tuple[int, ...]) -> Any:
    """A float weight, its scale and shift, and optimum-quanto's weight."""
    base = torch.randn(shape)
    scale, shift = quanto.MaxOptimizer()(base, quanto.qtypes[qtype], axis, group)
    arguments = (quanto.qtypes[qtype], axis, group, scale, shift)
    return base, scale, shift, quanto.WeightQBitsTensor.quantize(base, *arguments, optimized=False)


@pytest.mark.parametrize(
    ("shape", "group"), [((6, 64), 32), ((7, 33), None), ((4, 32, 3, 3), 96), ((5, 3, 3, 3), None)]
)
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("qtype", ["qint4", "qint2"])
def test_weights_below_8_bits(
    qtype: str, axis: int, shape: tuple[int, ...], group: int | None
) -> None:
    if axis == -1 and group is not None:
        group = 3
    base, scale, shift, theirs = below_8_bits(qtype, axis, group, shape)
    kind, own = quantal.WeightQBitsTensor, quantal.qtypes[qtype]
    size, stride = theirs.size(), theirs.stride()
    packed, codes = theirs._data._data, theirs._data.unpack()
    made = [
        kind.quantize(base, own, axis, group, scale, shift),
        kind.create(own, axis, group, size, stride, codes, scale, shift),
        kind.create(own, axis, group, size, stride, packed, scale, shift),
        kind.create(own, axis, group, size, stride, theirs._data, scale, shift),
        kind(own, axis, group, size, stride, codes, scale, shift),
        kind.load_from_state_dict(saved(theirs), "weight.", own, axis, group, size, stride, []),
    ]
    for weight in made:
        assert isinstance(weight, kind)
        assert weight.optimize() is weight
        assert (weight.axis, weight._group_size) == (axis, group)
        assert_same(weight, theirs)
        assert saved(weight).keys() == saved(theirs).keys()
        for key, part in saved(weight).items():
            assert torch.equal(part, saved(theirs)[key]), key


def test_zero_points() -> None:
    base = torch.randn(6, 64)
    scale, zero = quanto.MaxOptimizer()(base, quanto.qint4, 0, 32, zeropoint=True)
    theirs = quanto.WeightQBitsTensor.quantize(base, quanto.qint4, 0, 32, scale, zero, False)
    ours = quantal.WeightQBitsTensor.create(
        quantal.qint4, 0, 32, theirs.size(), theirs.stride(), theirs._data, scale, zero
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("qtype", EIGHT_BITS)
def test_activations(qtype: str, dtype: torch.dtype) -> None:
    base, scale = torch.randn(3, 5, 8).to(dtype), torch.tensor(0.03, dtype=dtype)
    theirs = quanto.ActivationQBytesTensor.quantize(base, quanto.qtypes[qtype], scale)
    kind, own = quantal.ActivationQBytesTensor, quantal.qtypes[qtype]
    assert_same(kind.quantize(base.float(), own, scale.float()), quanto.ActivationQBytesTensor
        .quantize(base.float(), quanto.qtypes[qtype], scale.float()))  # fmt: skip
    made = kind(own, theirs.size(), theirs.stride(), theirs._data, scale)
    assert isinstance(made, kind)
    assert not isinstance(made, quantal.WeightQBytesTensor)
    assert torch.equal(made._data.float(), theirs._data.float())
    assert (made.dtype, made._scale.item()) == (dtype, scale.item())


@pytest.mark.parametrize("qtype", ["qint8", "qint4"])
def test_weights_of_modules_are_saved_alike(qtype: str) -> None:
    layer = torch.nn.Linear(64, 8)
    model = torch.nn.Sequential(layer)
    quantal.quantize(model, weights=qtype)
    quantal.freeze(model)
    weight, found = model[0].weight, {}
    weight.save_to_state_dict(found, "0.weight.", keep_vars=False)
    assert weight.optimize() is weight
    state = model.state_dict()
    assert found.keys() == {key for key in state if key.startswith("0.weight.")}
    assert all(torch.equal(part, state[key]) for key, part in found.items())


def test_what_is_missing_is_named() -> None:
    missing: list[str] = []
    found = quantal.WeightQBitsTensor.load_from_state_dict(
        {"weight._scale": torch.ones(2, 1)},
        "weight.",
        quantal.qint4,
        0,
        None,
        (2, 8),
        None,
        missing,
    )
    assert found is None
    assert missing == ["weight._data._data", "weight._shift"]
    reference_missing: list[str] = []
    state = {"weight._scale": torch.ones(2, 1)}
    quanto.WeightQBitsTensor.load_from_state_dict(
        state, "weight.", quanto.qint4, 0, None, (2, 8), None, reference_missing
    )
    assert missing == reference_missing


@pytest.mark.parametrize("package", [quantal, quanto])
def test_what_is_no_such_weight(package: Any) -> None:
    base, one = torch.randn(4, 8), torch.ones(4, 1)
    with pytest.raises(ValueError, match="QBytesTensor can only be of 8-bit qtype"):
        package.WeightQBytesTensor.quantize(base, package.qint4, 0, one)
    with pytest.raises(ValueError, match="can only be of qint2 or qint4 qtype"):
        package.WeightQBitsTensor.quantize(base, package.qint8, 0, None, one, one)
    with pytest.raises(ValueError, match=r"axis parameter must be 0 \(first axis\)"):
        package.WeightQBitsTensor.quantize(base, package.qint4, 1, None, one, one)
