"""Operators are sound for torch.compile and torch.export, and models compile and export whole."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import quantal
import torch
from quantized import QTYPES, ops
from torch import nn
from torch.export import Dim, export

OUT, IN = 12, 64
ACTIVATIONS = ("none", "qint8", "dynamic-qint8")
FORMS = [*((qtype, "frozen") for qtype in QTYPES), ("qint4", "live"), ("qint8", "live")]
#: Of inductor, which compiles C++ for each.
COMPILED = [
    ("qint2", "none"),
    ("qint4", "none"),
    ("qint8", "none"),
    ("qint8", "qint8"),
    ("qint8", "dynamic-qint8"),
    ("qfloat8_e4m3fn", "none"),
]
#: Those over plain tensors, which compiled code may call.
FOR_GRAPHS = {
    *("linear", "linear_input_grad", "convolution", "embedding"),
    *("decode", "encode", "encode_with", "fake_quantize"),
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def parts(qtype: str, group_size: int = 0) -> tuple:
    data, scale, shift = ops.encode(torch.randn(OUT, IN), qtype, group_size)
    return data, scale, shift if shift.numel() else None


# ---- operators


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor",
          "test_aot_dispatch_dynamic")  # fmt: skip


def opcheck(op: Any, *args: object) -> None:
    with float8_compared_by_bytes():
        torch.library.opcheck(op.default, args, test_utils=CHECKS)


@contextlib.contextmanager
def float8_compared_by_bytes() -> Iterator[None]:
    """Whether an operator wrote to its arguments, torch's check of schemas asks allclose(), which
    float8 lacks."""
    allclose = torch.allclose

    def compare(one: torch.Tensor, two: torch.Tensor, **how: Any) -> bool:
        if one.is_floating_point() and one.dtype.itemsize == 1:
            return torch.equal(one.view(torch.uint8), two.view(torch.uint8))
        return allclose(one, two, **how)

    with mock.patch.object(torch, "allclose", compare):
        yield


GROUPED = [
    ("qint2", 32),
    ("qint4", 24),
    ("qint4", 0),
    ("qint4", 32),
    *((qtype, 0) for qtype in QTYPES[2:]),
]


@pytest.mark.parametrize(("qtype", "group"), GROUPED)
def test_operators_over_weights(qtype: str, group: int) -> None:
    weight = parts(qtype, group)
    x = torch.randn(3, IN, requires_grad=True)
    opcheck(ops.linear, x, *weight, torch.randn(OUT, requires_grad=True), qtype, group)
    opcheck(ops.linear, x, *weight, None, qtype, group, torch.randn(OUT, IN, requires_grad=True))
    opcheck(ops.linear_input_grad, torch.randn(2, 3, OUT, requires_grad=True), *weight, qtype,
            group, IN)  # fmt: skip
    latent = torch.randn(OUT, IN, requires_grad=True)
    opcheck(ops.decode, *weight, qtype, group, [OUT, IN], torch.bfloat16)
    opcheck(ops.decode, *weight, qtype, group, [OUT, IN], torch.float32, latent)
    indices = torch.tensor([[1, 5], [0, 11]])
    opcheck(ops.embedding, indices, *weight, qtype, group, [OUT, IN], torch.float32)
    opcheck(ops.encode, latent, qtype, group)
    opcheck(ops.encode_with, latent, *weight[1:], qtype, group)


@pytest.mark.parametrize("scale", [None, 0.05])
@pytest.mark.parametrize("activations", ["qint8", "qfloat8_e4m3fn", "qfloat8_e5m2"])
def test_operators_over_activations(activations: str, scale: float | None) -> None:
    x = torch.randn(2, 3, IN, requires_grad=True)
    step = None if scale is None else torch.tensor(scale)
    for per_sample in (False, True):
        opcheck(ops.fake_quantize, x, activations, step, per_sample)
    for qtype in QTYPES if activations == "qint8" else ("qint4", "qfloat8_e5m2"):
        latent = torch.randn(OUT, IN, requires_grad=True)
        group = 32 if quantal.qtypes[qtype].is_affine else 0
        weight = parts(qtype, group)
        opcheck(ops.linear, x, *weight, None, qtype, group, latent, activations, step)


@pytest.mark.parametrize("optimizer", ["max", "hqq"])
def test_operators_of_quantizers(optimizer: str) -> None:
    options = [0.7, 10.0, 1.01, 4.0] if optimizer == "hqq" else []
    opcheck(ops.encode, torch.randn(OUT, IN), "qint4", 32, optimizer, options)


@pytest.mark.parametrize(
    ("activations", "scale"),
    [("", None), ("qint8", None), ("qint8", 0.05), ("qfloat8_e4m3fn", None)],
)
def test_convolution_of_every_qtype(activations: str, scale: float | None) -> None:
    """test_convolution.py has other shapes."""
    step = None if scale is None else torch.tensor(scale)
    sizes = [64 if activations else 6, 2, 3]  # so many rows multiply codes
    for qtype in QTYPES:
        x = torch.randn(2, 4, 9, requires_grad=True)
        weight, bias, latent = (
            torch.randn(shape, requires_grad=True) for shape in (sizes, sizes[:1], sizes)
        )
        data, scales, shift = ops.encode(weight.detach(), qtype, 0)
        shift = shift if shift.numel() else None
        how = (qtype, 0, sizes, [1], [1], [1], 2, latent, activations, step)
        opcheck(ops.convolution, x, data, scales, shift, bias, *how)


def test_operators_for_graphs_are_those_that_are_tagged() -> None:
    """docs/python.md lists them. The others take or give quantized tensors, or no tensor at all."""
    schemas = (s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("quantal::"))
    names = {name.removeprefix("quantal::") for name in schemas}
    tag = torch.Tag.pt2_compliant_tag
    assert {name for name in names if tag in getattr(ops, name).default.tags} == FOR_GRAPHS
    text = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    (listed,) = [part for part in text.split("\n\n") if "Operators for compiled code" in part]
    assert all(f"`{name}`" in listed for name in FOR_GRAPHS)


def test_a_quantized_tensor_is_no_argument_of_a_graph() -> None:
    weight = ops.quantize_weight(torch.randn(OUT, IN), "qint8")
    compiled = torch.compile(torch.nn.functional.linear, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="Cannot access storage of a quantized tensor"):
        compiled(torch.randn(3, IN), weight)


# ---- models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.up = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.down = nn.Linear(96, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x)).flatten(1)
        return self.down(self.norm(torch.nn.functional.gelu(self.up(x))))


def inputs(batch: int) -> torch.Tensor:
    return torch.randn(batch, 32, generator=torch.Generator().manual_seed(batch))


def make(qtype: str, activations: str, state: str = "frozen") -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    quantal.quantize(
        model, weights=qtype, activations=None if activations == "none" else activations
    )
    if activations == "qint8":
        with torch.no_grad(), quantal.Calibration(model):
            model(inputs(32))
    if state == "frozen":
        quantal.freeze(model)
    return model.eval()


def eager(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y.dequantize() if isinstance(y, quantal.QTensor) else y


def handing_floats_on(model: nn.Module) -> nn.Module:
    """A copy of it whose layers do what compiled ones do: between eager layers whose activations
    are calibrated go codes, which the next layer takes with their scale; in graphs go the floats
    that they stand for, which the next layer rounds with its own."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, quantal.QModuleMixin):
            module.register_forward_hook(lambda m, args, y: ops.dequantize(y) if ops.is_quantized(y)
                                         else y)  # fmt: skip
    return model


#: Inductor's own loops sum in another order.
EXACTLY, NEARLY = {"rtol": 0, "atol": 0}, {"rtol": 1e-5, "atol": 5e-6}


def check_batches(model: nn.Module, compiled: Any, closeness: dict[str, float]) -> None:
    """One graph, made for the first batch, serves every other."""
    first, expected = inputs(4), handing_floats_on(model)
    torch._dynamo.mark_dynamic(first, 0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(first), expected(first), **closeness)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (2, 7, 33):
                x = inputs(batch)
                torch.testing.assert_close(compiled(x), expected(x), **closeness)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize(("qtype", "state"), FORMS)
def test_one_graph_for_all_batches(qtype: str, state: str, activations: str) -> None:
    model = make(qtype, activations, state)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_batches(model, compiled, EXACTLY)


def test_codes_handed_on_differ_by_less_than_quantizing_does() -> None:
    """Eager results beside those of graphs, where activations are calibrated."""
    model, x = make("qint8", "qint8"), inputs(32)
    exact = make("qint8", "none")
    with torch.no_grad():
        codes, floats = eager(model, x), handing_floats_on(model)(x)
        assert 0 < (codes - floats).norm() < (codes - exact(x)).norm()


class Signals(nn.Module):
    """An embedding and convolutions, whose second multiplies codes; `transposed` ones are torch's.

    torch compiles its own convolutions anew where a batch reaches 16."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 16)
        self.line = nn.Conv1d(16, 6, 3, padding="same")
        self.plane = nn.Conv2d(1, 64, 3, stride=2)
        self.last = nn.ConvTranspose2d(64, 3, 3) if transposed else nn.Conv2d(64, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.line(self.table(x).transpose(1, 2)))
        return self.last(self.plane(y.unsqueeze(1)))


def tokens(batch: int) -> torch.Tensor:
    return torch.randint(9, (batch, 7), generator=torch.Generator().manual_seed(batch))


def signals(qtype: str, activations: str, transposed: bool) -> nn.Module:
    torch.manual_seed(0)
    model = Signals(transposed)
    how = {} if activations == "none" else {"activations": activations}
    quantal.quantize(model, weights=qtype, **how)
    if activations == "qint8":
        with torch.no_grad(), quantal.Calibration(model):
            model(tokens(16))
    quantal.freeze(model)
    return model.eval()


SIGNALS = [
    *((qtype, "none") for qtype in QTYPES),
    *((qtype, a) for qtype in ("qint4", "qint8") for a in ("qint8", "dynamic-qint8")),
]


@pytest.mark.parametrize(("qtype", "activations"), SIGNALS)
def test_one_graph_of_convolutions_and_embeddings(qtype: str, activations: str) -> None:
    model = signals(qtype, activations, transposed=False)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = handing_floats_on(model)
    with torch.no_grad():
        for batch in (4, 2, 7, 33):
            with torch._dynamo.config.patch(error_on_recompile=batch != 4):
                y = compiled(tokens(batch))
            torch.testing.assert_close(y, expected(tokens(batch)), **EXACTLY)


@pytest.mark.parametrize(("qtype", "activations"), SIGNALS)
def test_export_of_convolutions_and_embeddings(qtype: str, activations: str) -> None:
    model = signals(qtype, activations, transposed=True)
    program = export(model, (tokens(4),), dynamic_shapes=({0: Dim("batch", min=1, max=512)},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert targets >= {f"quantal.{op}.default" for op in ("embedding", "convolution", "decode")}
    module, expected = program.module(), handing_floats_on(model)
    with torch.no_grad():
        for batch in (1, 4, 33):
            y = module(tokens(batch))
            torch.testing.assert_close(y, expected(tokens(batch)), **EXACTLY)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("qtype", ["qint4", "qint8", "qfloat8_e4m3fn"])
def test_one_graph_of_a_bf16_model(qtype: str, activations: str) -> None:
    model = make(qtype, activations).bfloat16()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = handing_floats_on(model)
    with torch.no_grad():
        for batch in (4, 7, 33):
            x = inputs(batch).bfloat16()
            with torch._dynamo.config.patch(error_on_recompile=batch != 4):
                y = compiled(x)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y, expected(x), **EXACTLY)


@pytest.mark.parametrize(("qtype", "activations"), [("qint8", "none"), ("qint4", "dynamic-qint8")])
def test_inductor_of_convolutions_and_embeddings(qtype: str, activations: str) -> None:
    model = signals(qtype, activations, transposed=False)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (4, 7, 33):
            with torch._dynamo.config.patch(error_on_recompile=batch != 4):
                y = compiled(tokens(batch))
            torch.testing.assert_close(y, model(tokens(batch)), **NEARLY)


@pytest.mark.parametrize(("qtype", "activations"), COMPILED)
def test_inductor(qtype: str, activations: str) -> None:
    model = make(qtype, activations)
    check_batches(model, torch.compile(model, fullgraph=True), NEARLY)


def gradients(run: object, model: nn.Module) -> list[torch.Tensor]:
    x = inputs(6).requires_grad_()
    model.zero_grad()
    run(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    ("state", "backend"), [("frozen", "aot_eager"), ("live", "aot_eager"), ("live", "inductor")]
)
def test_training_step(state: str, backend: str) -> None:
    model = make("qint4", "none", state).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    got, expected = gradients(compiled, model), gradients(model, model)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("qtype", ["qint4", "qint8"])
def test_training_step_of_int8_activations(qtype: str) -> None:
    model = make(qtype, "dynamic-qint8", "live").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, expected = gradients(compiled, model), gradients(model, model)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_compiled_optimizer_step() -> None:
    """Weights that a compiled step changed are quantized anew, in the graph that is there."""
    model = make("qint8", "none", "live").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = []
    for step in range(4):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = compiled(inputs(6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(compiled(inputs(6)), model(inputs(6)))
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("qtype", QTYPES)
def test_export(qtype: str, activations: str) -> None:
    model = make(qtype, activations)
    program = export(model, (inputs(4),), dynamic_shapes=({0: Dim("batch", min=1, max=512)},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "quantal.linear.default" in targets
    assert {n for n in program.state_dict if "weight._" in n} == {
        n for n in model.state_dict() if "weight._" in n
    }
    module, expected = program.module(), handing_floats_on(model)
    for batch in (1, 4, 9):
        with torch.no_grad():
            torch.testing.assert_close(module(inputs(batch)), expected(inputs(batch)), **EXACTLY)


def test_exported_program_is_saved(tmp_path: object) -> None:
    model = make("qint4", "none")
    program = export(model, (inputs(4),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(loaded(inputs(3)), model(inputs(3)))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 24, 16))
        self.down = nn.Parameter(torch.randn(4, 24, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.bmm(x.expand(4, *x.shape[1:]), self.up.transpose(1, 2))
        return torch.stack([torch.tanh(y[i]) @ self.down[i] for i in range(4)]).sum(0)


@pytest.mark.parametrize(("qtype", "state"), FORMS)
def test_parameters_compile(qtype: str, state: str) -> None:
    model = Experts()
    quantal.quantize(model, weights=qtype, parameters="*")
    if state == "frozen":
        quantal.freeze(model)
    x = torch.randn(1, 5, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(export(model, (x,)).module()(x), model(x))
