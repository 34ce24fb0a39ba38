"""Training on live weights is training with fake quantization, bit for bit, whatever steps them.

The twin has plain parameters, quantized anew in every forward pass.
"""

from collections.abc import Callable
from typing import Any

import pytest
import quantal
import torch
import torch.nn.functional as F  # noqa: N812
from quantized import QTYPES, ops
from torch import nn

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, **k: torch.optim.SGD(p, lr=0.1, **k),
    "sgd_nesterov": lambda p, **k: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, **k
    ),
    "adam": lambda p, **k: torch.optim.Adam(p, lr=0.01, weight_decay=0.01, amsgrad=True, **k),
    "adamw": lambda p, **k: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, **k),
    "adagrad": lambda p, **k: torch.optim.Adagrad(p, lr=0.05, **k),
    "rmsprop": lambda p, **k: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, **k),
    "nadam": lambda p, **k: torch.optim.NAdam(p, lr=0.01, **k),
    "radam": lambda p, **k: torch.optim.RAdam(p, lr=0.01, **k),
    "adamax": lambda p, **k: torch.optim.Adamax(p, lr=0.01, **k),
    "asgd": lambda p, **k: torch.optim.ASGD(p, lr=0.01, **k),
    "rprop": lambda p, **k: torch.optim.Rprop(p, lr=0.01, **k),
    "adadelta": lambda p, **k: torch.optim.Adadelta(p, lr=1.0, **k),
}
FUSED = ("sgd", "sgd_nesterov", "adam", "adamw", "adagrad")
STEPS = 4


class FakeQuantize(torch.autograd.Function):
    """The quantized value of a float weight, with the identity as its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, qtype: str) -> torch.Tensor:
        return ops.dequantize(ops.quantize_weight(weight.detach(), qtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class Net(nn.Module):
    """A convolution, an embedding and linears, whose weights are live or fake-quantized."""

    def __init__(self, qtype: str, live: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.qtype = qtype
        self.live = live
        for name, shape in (
            ("conv", (6, 3, 3, 3)),
            ("first", (16, 6 * 4 * 4)),
            ("second", (4, 16)),
            ("table", (5, 16)),
        ):
            weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            if live:
                weight = ops.live_weight(weight.requires_grad_(), qtype)
            self.register_parameter(name, nn.Parameter(weight))
        self.bias = nn.Parameter(torch.zeros(16))

    def weight(self, name: str) -> torch.Tensor:
        weight = getattr(self, name)
        return weight if self.live else FakeQuantize.apply(weight, self.qtype)

    def codes(self, name: str) -> torch.Tensor:
        """The weight of what has kernels that read the quantized tensor itself."""
        weight = getattr(self, name)
        return weight if self.live else ops.quantize_weight(weight, self.qtype)

    def latents(self) -> list[torch.Tensor]:
        return [
            ops.latent(p) if ops.is_quantized(p) else p.detach() for _, p in self.named_parameters()
        ]

    def forward(self, x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, self.codes("conv")).relu().flatten(1)
        y = F.linear(y, self.codes("first"), self.bias) + F.embedding(token, self.weight("table"))
        return F.linear(y.tanh(), self.codes("second"))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(8, 3, 6, 6, generator=generator),
            torch.randint(5, (8,), generator=generator),
            torch.randint(4, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def train(net: Net, optimizer: torch.optim.Optimizer, clip: float | None = None) -> list[float]:
    losses = []
    for x, token, target in batches(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x, token), target)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_training(live: Net, fake: Net, losses: list[float], expected: list[float]) -> None:
    assert losses == expected
    for actual, reference in zip(live.latents(), fake.latents(), strict=True):
        assert torch.equal(actual, reference)


def variants() -> list[tuple[str, dict[str, bool]]]:
    chosen = [(name, {"foreach": foreach}) for name in OPTIMIZERS for foreach in (False, True)]
    return chosen + [(name, {"fused": True}) for name in FUSED]


@pytest.mark.parametrize(("name", "how"), variants(), ids=str)
def test_optimizer(name: str, how: dict[str, bool]) -> None:
    live, fake = Net("qint8", live=True), Net("qint8", live=False)
    losses = train(live, OPTIMIZERS[name](live.parameters(), **how))
    expected = train(fake, OPTIMIZERS[name](fake.parameters(), **how))
    assert_same_training(live, fake, losses, expected)
    assert ops.fallback_count() == 0, dict(ops.fallback_counts())


@pytest.mark.parametrize("qtype", QTYPES)
def test_qtype(qtype: str) -> None:
    live, fake = Net(qtype, live=True), Net(qtype, live=False)
    losses = train(live, torch.optim.AdamW(live.parameters(), lr=0.01), clip=0.5)
    expected = train(fake, torch.optim.AdamW(fake.parameters(), lr=0.01), clip=0.5)
    assert_same_training(live, fake, losses, expected)


def test_unquantized_training_differs() -> None:
    """The comparison above would notice a weight that is read as it is."""
    live, fake = Net("qint4", live=True), Net("qint4", live=False)
    expected = train(fake, torch.optim.SGD(fake.parameters(), lr=0.1))
    assert train(live, torch.optim.SGD(live.parameters(), lr=0.1)) == expected
    fake = Net("qint4", live=False)
    fake.weight = lambda name: getattr(fake, name)
    assert train(fake, torch.optim.SGD(fake.parameters(), lr=0.1)) != expected


def test_lbfgs() -> None:
    live, fake = Net("qint8", live=True), Net("qint8", live=False)
    losses = []
    for net in (live, fake):
        optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
        x, token, target = batches(1)[0]

        def closure(net=net, optimizer=optimizer, x=x, token=token, target=target) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x, token), target)
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(3)])
    assert_same_training(live, fake, *losses)


def test_accumulated_gradients() -> None:
    live, fake = Net("qint8", live=True), Net("qint8", live=False)
    for net in (live, fake):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for x, token, target in batches(STEPS):
            (F.cross_entropy(net(x, token), target) / STEPS).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert not any(p.grad.any() for p in net.parameters())
    assert_same_training(live, fake, [], [])


def test_optimizer_state_is_float_and_reloads() -> None:
    live, fake = Net("qint8", live=True), Net("qint8", live=False)
    losses = []
    for net in (live, fake):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        first = train(net, optimizer)
        for state in optimizer.state.values():
            assert not ops.is_quantized(state["exp_avg"])
        resumed = torch.optim.Adam(net.parameters(), lr=0.5)
        resumed.load_state_dict(optimizer.state_dict())
        losses.append(first + train(net, resumed))
    assert_same_training(live, fake, *losses)


def test_scheduler_averaging_and_vectors() -> None:
    live, fake = Net("qint8", live=True), Net("qint8", live=False)
    vectors, losses = [], []
    for net in (live, fake):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        losses.append(train(net, optimizer))
        scheduler.step()
        losses[-1] += train(net, optimizer)
        vector = nn.utils.parameters_to_vector(net.parameters()).detach()
        nn.utils.vector_to_parameters(vector * 0.5, net.parameters())
        vectors.append(nn.utils.parameters_to_vector(net.parameters()).detach())
        losses[-1] += train(net, optimizer)
    assert torch.equal(*vectors)
    assert_same_training(live, fake, *losses)


def test_bfloat16_parameters() -> None:
    live, fake = Net("qint8", live=True), Net("qint8", live=False)
    outputs = []
    for net in (live, fake):
        net.to(torch.bfloat16)
        x, token, target = batches(1)[0]
        loss = F.cross_entropy(net(x.bfloat16(), token), target)
        loss.backward()
        outputs.append([loss, net.conv.grad, net.first.grad, net.table.grad])
        assert all(p.grad.dtype == torch.bfloat16 for p in net.parameters())
    # The codes of a live weight stay those of the weight before it was rounded: close, not equal.
    for actual, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02)


def test_gradient_scaler_and_autocast() -> None:
    losses = []
    live, fake = Net("qint8", live=True), Net("qint8", live=False)
    for net in (live, fake):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        losses.append([])
        for x, token, target in batches(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(x, token), target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            assert all(p.grad.dtype == torch.float32 for p in net.parameters())
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(loss.item())
    assert_same_training(live, fake, *losses)


def test_frozen_after_training_computes_the_same() -> None:
    net = Net("qint8", live=True)
    train(net, torch.optim.Adam(net.parameters(), lr=0.01))
    x, token, _ = batches(1)[0]
    expected = net(x, token)
    for name in ("conv", "first", "second", "table"):
        ops.freeze(getattr(net, name))
        assert ops.is_frozen(getattr(net, name))
    assert torch.equal(net(x, token), expected)
    assert ops.fallback_count() == 0


# ---- modules

MODULE_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = OPTIMIZERS | {
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "muon": lambda p: torch.optim.Muon(p, lr=0.01),  # of matrices only: the model has no biases
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
}


def modules(qtype: str) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Tanh(), nn.Linear(32, 8, bias=False))
    quantal.quantize(model, weights=qtype)
    return model


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("name", MODULE_OPTIMIZERS)
def test_modules_train_under_any_optimizer(name: str, qtype: str) -> None:
    """The loss falls, and the codes are those of what the optimizer wrote."""
    model = modules(qtype)
    x, target = torch.randn(64, 64), torch.randn(64, 8)
    before = [m.qweight._data.clone() for m in (model[0], model[2])]
    optimizer = MODULE_OPTIMIZERS[name](model.parameters())

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (model(x) - target).square().mean()
        value.backward()
        return value

    first = loss().item()
    for _ in range(20):
        optimizer.step(loss)
    assert loss().item() < 0.9 * first
    for layer, old in zip((model[0], model[2]), before, strict=True):
        data, scale, _ = ops.encode(layer.weight.detach(), qtype, layer.weight_group_size or 0)
        assert not torch.equal(data.view(torch.uint8), old.view(torch.uint8))
        assert torch.equal(layer.qweight._data.view(torch.uint8), data.view(torch.uint8))
        assert torch.equal(layer.qweight._scale, scale)
    trained = model(x)
    quantal.freeze(model)
    assert torch.equal(model(x), trained)


def test_every_optimizer_of_torch_is_tried() -> None:
    base = torch.optim.Optimizer
    known = {
        name.lower()
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    }
    assert known - {"sparseadam"} <= set(MODULE_OPTIMIZERS)


@pytest.mark.parametrize("qtype", QTYPES)
def test_sparse_adam_trains_an_embedding(qtype: str) -> None:
    """The rows that were looked up, and no others."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(20, 64, sparse=True))
    quantal.quantize(model, weights=qtype)
    layer, tokens = model[0], torch.tensor([[1, 7, 7], [19, 1, 4]])
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        loss.backward()
        assert layer.weight.grad.is_sparse
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    changed = (layer.weight.detach() != before).any(1).nonzero().flatten()
    assert changed.tolist() == [1, 4, 7, 19]
    trained = model(tokens)
    quantal.freeze(model)
    assert torch.equal(model(tokens), trained)
