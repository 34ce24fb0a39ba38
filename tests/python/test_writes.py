"""Every write to a quantized tensor is seen, honoured or refused: in place, through views, out=."""

from collections.abc import Callable

import pytest
import quantal
import torch
import torch.nn.functional as F  # noqa: N812
from quantized import QTYPES, ops, quantize, weight
from torch import nn

WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "add_": lambda t: t.add_(1),
    "mul_": lambda t: t.mul_(0.5),
    "copy_": lambda t: t.copy_(torch.ones_like(t)),
    "fill_": lambda t: t.fill_(0.25),
    "item": lambda t: t.__setitem__((0, 1), 7.0),
    "row": lambda t: t.__setitem__(2, torch.arange(8.0)),
    "column": lambda t: t.__setitem__((slice(None), 3), 0.0),
    "mask": lambda t: t.__setitem__(t > 0, -1.0),
    "index_put": lambda t: t.index_put_((torch.tensor([0, 4]),), torch.zeros(8)),
    "view": lambda t: t.view(-1)[5:9].mul_(3),
    "select": lambda t: t[1].zero_(),
    "narrow": lambda t: t.narrow(0, 2, 3).add_(1),
    "transpose": lambda t: t.t()[2].add_(1),
    "diagonal": lambda t: t.diagonal().fill_(9),
    "chunk": lambda t: t.chunk(3)[1].neg_(),
    "data": lambda t: t.data.add_(1),
    "detach": lambda t: t.detach().add_(1),
    "foreach": lambda t: torch._foreach_mul_([t], 2.0),
    "out": lambda t: torch.add(torch.ones(6, 8), 1, out=t),
    "out of matmul": lambda t: torch.matmul(torch.ones(6, 2), torch.ones(2, 8), out=t),
    "init": lambda t: nn.init.constant_(t, 0.1),
    "normal_": lambda t: t.normal_(generator=torch.Generator().manual_seed(3)),
    "scatter_": lambda t: t.scatter_(0, torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8)),
    "lerp_": lambda t: t.lerp_(torch.zeros(6, 8), 0.1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_live_weight_sees_every_write(write: Callable[[torch.Tensor], object]) -> None:
    source = weight()
    q = quantize("live", source)
    x = torch.randn(5, 8)
    F.linear(x, q)  # fills the cache of codes
    with torch.no_grad():
        write(q)
        write(source)
    assert torch.equal(ops.latent(q), source)
    expected = ops.dequantize(quantize("frozen", source))
    assert torch.equal(ops.dequantize(q), expected)
    torch.testing.assert_close(F.linear(x, q), F.linear(x, expected))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_activation_sees_every_write(write: Callable[[torch.Tensor], object]) -> None:
    q = quantize("activation", weight())
    value = ops.dequantize(q)
    write(q)
    write(value)
    assert torch.equal(ops.dequantize(q), value)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_frozen_weight_loses_no_write(write: Callable[[torch.Tensor], object]) -> None:
    """Either the write raises, or it is honoured, or the next use of the weight raises."""
    q = quantize("frozen", weight())
    value = ops.dequantize(q)
    x = torch.randn(5, 8)
    try:
        write(q)
        after = F.linear(x, q)
    except RuntimeError as error:
        assert "frozen weight" in str(error)  # noqa: PT017
        return
    write(value)
    expected = F.linear(x, ops.dequantize(quantize("frozen", value)))
    torch.testing.assert_close(after, expected)


def test_frozen_weight_survives_a_refused_write() -> None:
    q = quantize("frozen", weight())
    value = ops.dequantize(q)
    with pytest.raises(RuntimeError, match="cannot write to a frozen weight"):
        q.add_(1)
    assert torch.equal(ops.dequantize(q), value)


def test_views_share_an_activation() -> None:
    q = quantize("activation", weight())
    value = ops.dequantize(q)
    part, part_value = q.view(-1)[3:20], value.view(-1)[3:20]
    q.relu_()
    value.relu_()
    assert torch.equal(ops.dequantize(part), part_value)
    part.mul_(-2)
    part_value.mul_(-2)
    assert torch.equal(ops.dequantize(q), value)


def test_latent_and_parts_of_a_view() -> None:
    q = quantize("live", weight())
    assert torch.equal(ops.latent(q[2:4]), ops.latent(q)[2:4])
    assert torch.equal(ops.latent(q.t()), ops.latent(q).t())
    for view in (q[2:4], q.t()):
        with pytest.raises(ValueError, match="expected a whole weight"):
            ops.parts(view)


def test_embedding_with_max_norm_renormalizes_the_latent() -> None:
    source, tokens = weight() * 10, torch.tensor([1, 4])
    q = quantize("live", source)
    actual = F.embedding(tokens, q, max_norm=1.0)
    F.embedding(tokens, source, max_norm=1.0)
    assert torch.equal(ops.latent(q), source)
    assert torch.equal(actual, ops.dequantize(quantize("frozen", source))[tokens])


def test_set_data_of_a_live_weight() -> None:
    q, new = quantize("live", weight().requires_grad_()), weight()
    q.data = new
    assert ops.is_live(q)
    assert torch.equal(ops.latent(q), new)
    assert torch.equal(ops.dequantize(q), ops.dequantize(quantize("frozen", new)))
    frozen = quantize("frozen", weight())
    for target, data in ((frozen, new), (q, new.double()), (q, new[:2])):
        with pytest.raises(RuntimeError, match="incompatible tensor type"):
            target.data = data
    with pytest.raises(RuntimeError, match="a plain tensor of shape"):
        new.data = q


# ---- weights of modules


def _module(qtype: str) -> nn.Linear:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(8, 6))
    quantal.quantize(model, weights=qtype)
    quantal.freeze(model)
    return model[0]


def _parameter(qtype: str) -> nn.Module:
    torch.manual_seed(4)
    module = nn.Module()
    module.weight = nn.Parameter(weight())
    quantal.quantize(module, weights=qtype, parameters="weight")
    quantal.freeze(module)
    return module


@pytest.mark.parametrize("make", [_module, _parameter])
@pytest.mark.parametrize("qtype", QTYPES)
def test_weight_of_a_module_loses_no_direct_write(
    qtype: str, make: Callable[[str], nn.Module]
) -> None:
    """Nor one of a frozen parameter. Views of it are copies, as those of an indexed tensor are."""
    of_views = {"view", "select", "narrow", "transpose", "diagonal", "chunk"}
    for name, write in WRITES.items():
        if name in of_views | {"copy_", "data", "detach"}:
            continue
        module = make(qtype)
        value = module.weight.dequantize()
        with pytest.raises((RuntimeError, TypeError)):
            write(module.weight)
        assert torch.equal(module.weight.dequantize(), value), name
    for name in ("data", "detach"):
        with pytest.raises(RuntimeError, match="cannot write to a frozen weight"):
            WRITES[name](make(qtype).weight)


@pytest.mark.parametrize("name", ["view", "select", "narrow", "transpose", "diagonal", "chunk"])
@pytest.mark.parametrize("qtype", QTYPES)
def test_weight_of_a_module_loses_no_write_to_a_view(qtype: str, name: str) -> None:
    module = _module(qtype)
    value = module.weight.dequantize()
    with pytest.raises(RuntimeError, match="frozen weight"):
        WRITES[name](module.weight)
    assert torch.equal(module.weight.dequantize(), value)


@pytest.mark.parametrize("make", [_module, _parameter])
@pytest.mark.parametrize("qtype", QTYPES)
def test_copy_quantizes_into_the_weight_of_a_module(
    qtype: str, make: Callable[[str], nn.Module]
) -> None:
    module, source = make(qtype), weight() * 3
    parts = [p.data_ptr() for p in module.weight.parameters()]
    assert module.weight.copy_(source) is module.weight
    expected = ops.dequantize(ops.quantize_weight(source, qtype))
    torch.testing.assert_close(module.weight.dequantize(), expected)
    assert [p.data_ptr() for p in module.weight.parameters()] == parts
    twin = make(qtype)
    with torch.no_grad():
        twin.weight.copy_(module.weight)
    assert torch.equal(twin.weight.dequantize(), module.weight.dequantize())
    before = twin.weight.dequantize()
    with pytest.raises(ValueError, match="finite"):
        twin.weight.copy_(torch.full((6, 8), float("nan")))
    assert torch.equal(twin.weight.dequantize(), before)
