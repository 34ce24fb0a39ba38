"""Operators are sound for torch.compile and torch.export, and models compile and export whole."""

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
COMPILED = [("qint4", "none"), ("qint8", "qint8")]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def parts(qtype: str, group_size: int = 0) -> tuple:
    data, scale, shift = ops.encode(torch.randn(OUT, IN), qtype, group_size)
    return data, scale, shift if shift.numel() else None


# ---- operators


def opcheck(op: object, *args: object) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor",
              "test_aot_dispatch_dynamic"]  # fmt: skip
    is_float8 = [isinstance(a, torch.Tensor) and a.dtype.itemsize == 1 and a.is_floating_point()
                 for a in args]  # fmt: skip
    if any(is_float8) or any(str(a).startswith("qfloat8") for a in args):
        checks.remove("test_schema")  # compares arguments with an operation that float8 lacks
    torch.library.opcheck(op.default, args, test_utils=checks)


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
    for qtype in ("qint8", "qint4"):
        latent = torch.randn(OUT, IN, requires_grad=True)
        weight = parts(qtype, 32 if qtype == "qint4" else 0)
        group = 32 if qtype == "qint4" else 0
        opcheck(ops.linear, x, *weight, None, qtype, group, latent, activations, step)


@pytest.mark.parametrize("optimizer", ["max", "hqq"])
def test_operators_of_quantizers(optimizer: str) -> None:
    options = [0.7, 10.0, 1.01, 4.0] if optimizer == "hqq" else []
    opcheck(ops.encode, torch.randn(OUT, IN), "qint4", 32, optimizer, options)


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


def closeness(activations: str) -> dict[str, float]:
    """A code may fall on the other side of a step. Eager layers hand calibrated codes on, graphs
    round their values once more for the next layer."""
    return {"rtol": 1e-4, "atol": 1e-5 if activations == "none" else 0.05}


def check_batches(model: nn.Module, compiled: object, activations: str) -> None:
    """One graph, made for the first batch, serves every other."""
    first = inputs(4)
    torch._dynamo.mark_dynamic(first, 0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(first), eager(model, first), **closeness(activations))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (2, 7, 33):
                x = inputs(batch)
                y = compiled(x)
                torch.testing.assert_close(y, eager(model, x), **closeness(activations))


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize(("qtype", "state"), FORMS)
def test_one_graph_for_all_batches(qtype: str, state: str, activations: str) -> None:
    model = make(qtype, activations, state)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_batches(model, compiled, activations)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("qtype", ["qint4", "qint8"])
def test_convolutions(qtype: str, activations: str) -> None:
    """In one graph; torch's own convolutions are compiled anew for larger batches."""
    layers = [nn.Conv1d(2, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 3, 3)]
    model = nn.Sequential(nn.Embedding(9, 16), *layers)
    how = {} if activations == "none" else {"activations": activations}
    quantal.quantize(model, weights=qtype, **how)
    x = torch.tensor([[[1, 2]], [[3, 8]]]).squeeze(1)
    if activations == "qint8":
        with torch.no_grad(), quantal.Calibration(model):
            model(x)
    quantal.freeze(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), eager(model, x), **closeness(activations))


@pytest.mark.parametrize(("qtype", "activations"), COMPILED)
def test_inductor(qtype: str, activations: str) -> None:
    model = make(qtype, activations)
    check_batches(model, torch.compile(model, fullgraph=True), activations)


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
    module = program.module()
    for batch in (1, 4, 9):
        with torch.no_grad():
            x = inputs(batch)
            how = {"rtol": 0, "atol": 0} if activations != "qint8" else closeness(activations)
            torch.testing.assert_close(module(x), eager(model, x), **how)


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
