"""Parameters of modules without a quantized kind: fused experts and own modules."""

import copy
import pickle
from pathlib import Path

import pytest
import quantal
import torch
from quantized import QTYPES, ops
from torch import nn

every_qtype = pytest.mark.parametrize("qtype", QTYPES)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 64))
        self.down_proj = nn.Parameter(torch.randn(4, 64, 16))
        self.bias = nn.Parameter(torch.zeros(4, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = 0
        for i in range(4):
            gate, up = nn.functional.linear(x, self.gate_up_proj[i], self.bias[i]).chunk(2, -1)
            out = out + nn.functional.linear(torch.tanh(gate) * up, self.down_proj[i])
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.experts(x))


def make(qtype: str, state: str = "frozen") -> Model:
    torch.manual_seed(0)
    model = Model()
    quantal.quantize(model, weights=qtype, parameters="*_proj")
    if state == "frozen":
        quantal.freeze(model)
    return model


def rounded(weight: torch.Tensor, qtype: str) -> torch.Tensor:
    """Row by row of the last dimension, as a matrix of that width is quantized."""
    matrix = weight.detach().reshape(-1, weight.shape[-1])
    group = ops.default_group_size(qtype, matrix.shape[1])
    return ops.dequantize(ops.quantize_weight(matrix, qtype, group)).reshape(weight.shape)


@every_qtype
def test_values(qtype: str) -> None:
    live, frozen = make(qtype, "live"), make(qtype)
    expected = rounded(live.experts._parameters["gate_up_proj"], qtype)
    assert torch.equal(live.experts.gate_up_proj, expected)
    weight = frozen.experts.gate_up_proj
    assert isinstance(weight, quantal.QParameter)
    assert (weight.shape, weight.dtype, weight.ndim) == ((4, 32, 64), torch.float32, 3)
    assert torch.equal(weight.dequantize(), expected)
    x = torch.randn(5, 64)
    assert torch.equal(live(x), frozen(x))


@every_qtype
def test_operations_on_a_frozen_parameter(qtype: str) -> None:
    weight = make(qtype).experts.gate_up_proj
    value = weight.dequantize()
    for index in (2, -1, torch.tensor([3, 0, -2]), slice(1, 3), (0, 1), torch.tensor([[1], [2]])):
        assert torch.equal(weight[index], value[index]), index
    mask = torch.tensor([True, False, True, False])
    assert torch.equal(weight[mask], value[mask])
    with pytest.raises(IndexError):
        weight[4]
    assert [torch.equal(a, b) for a, b in zip(weight, value, strict=True)] == [True] * 4
    x = torch.randn(4, 3, 64)
    assert torch.equal(torch.bmm(x, weight.transpose(1, 2)), torch.bmm(x, value.transpose(1, 2)))
    assert torch.equal(torch.matmul(x.mT.mT, weight.mT), torch.matmul(x, value.mT))
    assert torch.equal(nn.functional.linear(x[0], weight[1]), nn.functional.linear(x[0], value[1]))


@every_qtype
def test_live_parameters_train(qtype: str) -> None:
    model, plain = make(qtype, "live"), make(qtype, "live")
    assert set(model.state_dict()) >= {"experts.gate_up_proj", "experts.down_proj"}
    x = torch.randn(6, 64)
    model(x).square().sum().backward()
    experts = plain.experts
    values = {}
    for name in ("gate_up_proj", "down_proj"):
        values[f"experts.{name}"] = rounded(experts._parameters[name], qtype).requires_grad_()

    reference = Model()
    reference.load_state_dict(
        {k: v for k, v in plain.state_dict().items() if not k.endswith("put_scale")}
    )
    reference.head = plain.head
    y = torch.func.functional_call(reference, values, (x,))
    y.square().sum().backward()
    for name, value in values.items():
        gradient = model.experts._parameters[name.rpartition(".")[2]].grad
        assert torch.equal(gradient, value.grad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model.experts.gate_up_proj.detach().clone()
    optimizer.step()
    assert not torch.equal(model.experts.gate_up_proj, before)


@pytest.mark.parametrize("state", ["frozen", "live"])
@every_qtype
def test_state(qtype: str, state: str, tmp_path: Path) -> None:
    model, x = make(qtype, state), torch.randn(3, 64)
    expected = model(x)
    narrow = quantal.qtypes[qtype].bits < 8
    if state == "frozen":
        names = {"_data._data", "_scale", "_shift"} if narrow else {"_data", "_scale"}
        keys = {k for k in model.state_dict() if k.startswith("experts.down_proj")}
        assert keys == {f"experts.down_proj.{name}" for name in names}
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected)
    quantal.save(model, tmp_path / "model.safetensors")
    again = Model()
    quantal.requantize(again, tmp_path / "model.safetensors")
    assert torch.equal(again(x), expected)
    assert quantal.quantization_map(again) == quantal.quantization_map(model)
    same_form = make(qtype, "live")
    quantal.load(tmp_path / "model.safetensors", same_form)
    assert torch.equal(same_form(x), expected)
    by_map = Model()
    quantal.requantize(by_map, model.state_dict(), quantal.quantization_map(model))
    assert torch.equal(by_map(x), expected)
    assert model.half().experts.down_proj.dtype == torch.float16


def test_what_is_asked_for_wrongly() -> None:
    with pytest.raises(ValueError, match=r"no parameter .* matches 'nothing\*'"):
        quantal.quantize(Model(), weights="qint8", parameters="nothing*")
    with pytest.raises(ValueError, match="expected weights for the parameters"):
        quantal.quantize(Model(), activations="qint8", parameters="*_proj")
    model = make("qint8", "live")
    with pytest.raises(ValueError, match=r"'experts\.\w+' is quantized already"):
        quantal.quantize(model, weights="qint8", parameters="*_proj", include=[])
    with torch.no_grad():
        model.experts._parameters["down_proj"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"experts\.down_proj"):
        quantal.freeze(model)
    assert not model.head.frozen


def test_modules_can_be_left_out() -> None:
    model = Model()
    quantal.quantize(model, weights="qint4", include=[], parameters=["*.down_proj"])
    assert type(model.head) is nn.Linear
    assert list(quantal.quantization_map(model)) == ["experts.down_proj"]


def test_a_map_may_leave_a_parameter_float() -> None:
    fresh, none = Model(), {"weights": "none", "activations": "none"}
    quantal.requantize(fresh, Model().state_dict(), {"experts.down_proj": none})
    assert quantal.quantization_map(fresh) == {}
