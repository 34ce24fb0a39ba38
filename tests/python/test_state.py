"""Quantized modules are ordinary modules: one suite for every qtype, frozen and live."""

import copy
import io
import pickle
from collections.abc import Iterator
from functools import partial

import pytest
import quantal
import torch
from quantized import QTYPES
from reference_quanto import quanto
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from test_checkpoint_exchange import assert_same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

STATES = ("frozen", "live")
SCALES = ("input_scale", "output_scale")
ALL = [(qtype, state) for qtype in QTYPES for state in STATES]
every_form = pytest.mark.parametrize(("qtype", "state"), ALL)
every_qtype = pytest.mark.parametrize("qtype", QTYPES)


class Net(nn.Module):
    """A convolution whose rows have no groups, and linears with and without groups and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Linear(8 * 16, 40)
        self.norm = nn.LayerNorm(40)
        self.out = nn.Linear(40, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        return self.out(self.norm(torch.tanh(self.wide(x))))


def floats() -> Net:
    torch.manual_seed(2)
    return Net()


def make(qtype: str, state: str = "frozen", **how: object) -> Net:
    model = floats()
    quantal.quantize(model, weights=qtype, **how)
    if state == "frozen":
        quantal.freeze(model)
    return model


def data(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_same_model(actual: nn.Module, expected: nn.Module) -> None:
    """The same tensors under the same keys, and the same results."""
    states = actual.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[1].items():
        assert_same_bits(states[0][name], tensor, name)
    assert torch.equal(actual(data()), expected(data()))
    for one, two in zip(actual.parameters(), expected.parameters(), strict=True):
        assert (type(one), one.requires_grad) == (type(two), two.requires_grad)


# ---- state_dict


@every_form
def test_state_dict_is_that_of_optimum_quanto(qtype: str, state: str) -> None:
    theirs = floats()
    quanto.quantize(theirs, weights=quanto.qtypes[qtype])
    if state == "frozen":
        quanto.freeze(theirs)
    expected, actual = theirs.state_dict(), make(qtype, state).state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor, name)


@every_form
def test_torch_save_and_safetensors(qtype: str, state: str) -> None:
    model = make(qtype, state)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in model.state_dict().values())
    for tensors in (loaded, load_bytes(save_bytes(model.state_dict()))):
        again = make(qtype, state)
        for parameter in again.parameters():
            parameter.data.zero_()
        again.load_state_dict(tensors)
        assert_same_model(again, model)


@pytest.mark.parametrize("assign", [False, True])
@every_qtype
def test_frozen_state_freezes_a_live_model(qtype: str, assign: bool) -> None:
    model = make(qtype)
    other_groups = floats()
    size = 8 if quantal.qtypes[qtype].bits < 8 else None
    quantal.quantize(other_groups, weights=qtype, include=["wide", "out"], group_size=size)
    quantal.quantize(other_groups, weights=qtype, include="conv")
    quantal.freeze(other_groups)
    for target in (make(qtype, "live"), other_groups):
        target.load_state_dict(model.state_dict(), assign=assign)
        assert_same_model(target, model)


@pytest.mark.parametrize("assign", [False, True])
@every_qtype
def test_float_state_thaws_nothing(qtype: str, assign: bool) -> None:
    """Floats go into a live model; into a frozen one they do not fit."""
    state = floats().state_dict()
    live = make(qtype, "live")
    live.load_state_dict(state, assign=assign)
    assert torch.equal(live.wide.weight, state["wide.weight"])
    with pytest.raises(RuntimeError, match=r"wide\.weight"):
        make(qtype).load_state_dict(state, assign=assign)


def parts_of(qtype: str) -> list[str]:
    narrow = quantal.qtypes[qtype].bits < 8
    names = ["_data._data", "_scale", "_shift"] if narrow else ["_data", "_scale"]
    return [f"wide.weight.{name}" for name in names]


@every_qtype
def test_load_state_dict_is_strict(qtype: str) -> None:
    model = make(qtype)
    good = model.state_dict()
    for key in [*parts_of(qtype), "wide.bias", "norm.weight"]:
        state = {name: tensor for name, tensor in good.items() if name != key}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}'):
            model.load_state_dict(state)
        result = model.load_state_dict(state, strict=False)
        assert result.missing_keys == [key]
        with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
            model.load_state_dict(state | {key: torch.zeros(3, 3, 3, dtype=good[key].dtype)})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"wide\.weight\._other"'):
        model.load_state_dict(good | {"wide.weight._other": torch.ones(1)})
    codes = parts_of(qtype)[0]
    with pytest.raises(RuntimeError, match=f"expected {codes} of .*got torch.int32"):
        model.load_state_dict(good | {codes: good[codes].to(torch.int32)})
    for tensor, name in ((model.state_dict()[k], k) for k in good):
        assert_same_bits(tensor, good[name], name)


@every_qtype
def test_missing_parts_of_a_live_module(qtype: str) -> None:
    for key in parts_of(qtype):
        state = make(qtype).state_dict()
        del state[key]
        with pytest.raises(RuntimeError, match=r"Missing key.*wide\.weight"):
            make(qtype, "live").load_state_dict(state)


# ---- copies


@every_form
def test_deepcopy_and_pickle(qtype: str, state: str) -> None:
    model = make(qtype, state)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    for copied in copies:
        assert_same_model(copied, model)
        assert {p.data_ptr() for p in copied.parameters()}.isdisjoint(
            p.data_ptr() for p in model.parameters()
        )
        copied.requires_grad_(True)
        assert copied.wide.bias.requires_grad


@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_another_dtype(qtype: str, state: str, dtype: torch.dtype) -> None:
    """Codes stay; scales, biases and what is computed change."""
    model, before = make(qtype, state).to(dtype), make(qtype, state)
    assert model.wide.weight.dtype == model.conv.weight.dtype == dtype
    for name, tensor in before.state_dict().items():
        after = model.state_dict()[name]
        if name.endswith("_data"):
            assert_same_bits(after, tensor, name)
        else:
            # Scales of e5m2 are too small for half.
            keeps = name.endswith("weight._scale") and (qtype, dtype) == SMALL_SCALES
            assert after.dtype == (torch.float32 if keeps and state == "frozen" else dtype), name
    output = model(data(dtype))
    assert output.dtype == dtype
    # Half has 11 bits, bfloat16 8; a live weight may get other codes.
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-5}[dtype]
    if state == "live":
        tolerance += 2.0 ** -quantal.qtypes[qtype].bits * 4
    assert (output.double() - before(data()).double()).abs().max() < tolerance
    assert torch.equal(getattr(make(qtype, state), _METHODS[dtype])()(data(dtype)), output)


SMALL_SCALES = ("qfloat8_e5m2", torch.float16)
_METHODS = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}


@every_qtype
def test_to_half_keeps_scales_that_it_cannot_hold(qtype: str) -> None:
    """Half-precision scales of tiny weights and activations would be zero: they stay fp32."""

    def tiny() -> nn.Sequential:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(32, 8), nn.Linear(32, 8))
        with torch.no_grad():
            model[0].weight.mul_(1e-6)
        quantal.quantize(model, weights=qtype, activations="qint8")
        return model

    model = tiny()
    with quantal.Calibration(model):
        model[0](torch.full((1, 32), 1e-6))
        model[1](torch.ones(1, 32))
    quantal.freeze(model)
    value, scale = model[0].weight.dequantize(), model[0].input_scale.clone()
    model.half()
    small, usual = model[0], model[1]
    assert small.weight._scale.dtype == small.input_scale.dtype == torch.float32
    assert usual.input_scale.dtype == torch.float16
    if (qtype, torch.float16) != SMALL_SCALES:
        assert usual.weight._scale.dtype == torch.float16
    assert torch.equal(small.input_scale, scale)
    assert (small.weight.dequantize() - value).abs().max() <= 2**-24
    assert small.weight.dequantize(torch.float32).count_nonzero() == value.count_nonzero()
    x = torch.randn(3, 32).half()
    for target in (tiny().half(), copy.deepcopy(model)):
        for part in target.parameters():
            part.data.zero_()
        target.load_state_dict(model.state_dict())
        assert target[0].weight._scale.dtype == torch.float32
        assert torch.equal(target[0](x * 1e-6), small(x * 1e-6))
        assert torch.equal(target[1](x), usual(x))
    model.float()
    assert model[1].weight._scale.dtype == torch.float32


def test_calibrated_half_model_keeps_tiny_scales() -> None:
    model = nn.Sequential(nn.Linear(32, 8)).half()
    quantal.quantize(model, weights="qint8", activations="qint8")
    with quantal.Calibration(model):
        model(torch.full((1, 32), 1e-5).half())
    expected = torch.tensor(1e-5).half().item() / 127
    assert model[0].input_scale.item() == pytest.approx(expected, rel=1e-6)


@every_qtype
def test_missing_scales_of_activations(qtype: str) -> None:
    """Codes without them are an error where activations have static scales, and nowhere else."""
    model = make(qtype, "live", activations="qint8")
    with quantal.Calibration(model):
        model(data())
    quantal.freeze(model)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(SCALES)}
    for target in (make(qtype, "live", activations="qint8"), model):
        with pytest.raises(RuntimeError, match=r'Missing key.*"wide\.input_scale".*output_scale"'):
            target.load_state_dict(state)
        assert "wide.output_scale" in target.load_state_dict(state, strict=False).missing_keys
    for how in ({}, {"activations": "dynamic-qint8"}):
        make(qtype, "live", **how).load_state_dict(state)
    make(qtype, "live", activations="qint8").load_state_dict(floats().state_dict())
    del (one := model.state_dict())["wide.output_scale"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"wide\.output_scale"'):
        model.load_state_dict(one)


@every_form
def test_meta_and_back(qtype: str, state: str) -> None:
    model = make(qtype, state)
    meta = copy.deepcopy(model).to("meta")
    assert all(t.is_meta for t in meta.state_dict().values())
    assert meta(data().to("meta")).shape == (5, 6)
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert_same_model(empty, model)
    assigned = make(qtype, state).to("meta")
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert_same_model(assigned, model)
    assigned.requires_grad_(True)


# ---- processes


def _send_output(model: nn.Module, x: torch.Tensor, queue: object) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(x).numpy().tolist())
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1:
            parameter.data.zero_()


@pytest.mark.parametrize("state", STATES)
def test_shared_memory_and_processes(state: str) -> None:
    """One process of each kind sees every model; what it writes arrives here."""
    context = torch.multiprocessing.get_context("spawn")
    models = nn.ModuleDict({qtype: make(qtype, state) for qtype in QTYPES}).share_memory()
    assert all(p.is_shared() for p in models.parameters())
    expected = torch.cat([models[q](data()) for q in QTYPES]).detach()
    queue = context.SimpleQueue()
    process = context.Process(target=_send_output, args=(AllOf(models), data(), queue))
    process.start()
    got = torch.tensor(queue.get())
    process.join()
    assert process.exitcode == 0
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert all(models[q].wide.bias.count_nonzero() == 0 for q in QTYPES)


class AllOf(nn.Module):
    def __init__(self, models: nn.ModuleDict) -> None:
        super().__init__()
        self.models = models

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([model(x) for model in self.models.values()])


class Encoded(torch.utils.data.Dataset):
    """Computes its samples with a quantized model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model(data()[i : i + 1])[0]


def test_data_loader_workers() -> None:
    models = AllOf(nn.ModuleDict({f"{q} {s}": make(q, s) for q, s in ALL}))
    loader = torch.utils.data.DataLoader(Encoded(models), batch_size=2, num_workers=2)
    got = torch.cat(list(loader))
    expected = torch.stack([Encoded(models)[i] for i in range(4)])
    assert torch.equal(got, expected)


# ---- modes, hooks, functions


@every_form
def test_grad_modes(qtype: str, state: str) -> None:
    model = make(qtype, state)
    expected = model(data())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(data()), expected)
            inside = make(qtype, state)  # made and frozen inside
            assert torch.equal(inside(data()), expected)
            assert torch.equal(copy.deepcopy(inside)(data()), expected)
    assert expected.requires_grad


@every_form
def test_autocast(qtype: str, state: str) -> None:
    model = make(qtype, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(data())
        assert model.wide(torch.randn(2, 128)).dtype == torch.bfloat16
        assert model.conv(data()).dtype == torch.bfloat16
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert model.norm.weight.grad.dtype == torch.float32
    assert (output.float() - model(data())).abs().max() < 0.15


@every_form
def test_functional_call_and_grad(qtype: str, state: str) -> None:
    model = make(qtype, state)
    parameters = dict(model.named_parameters())
    doubled = {
        name: p * 2 if p.is_floating_point() and p.element_size() > 1 else p
        for name, p in parameters.items()
    }
    called = torch.func.functional_call(model, doubled, (data(),))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.data.copy_(doubled[name])
    assert torch.equal(called, other(data()))
    assert torch.equal(model(data()), make(qtype, state)(data()))


@every_form
def test_torch_func_grad(qtype: str, state: str) -> None:
    model = make(qtype, state)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    gradients, of_input = torch.func.grad(loss, argnums=(0, 1))(trained, data())
    x = data().requires_grad_()
    model(x).square().sum().backward()
    # Transforms go through torch's convolution, which sums in another order than the library's.
    torch.testing.assert_close(of_input, x.grad, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, trained[name].grad, rtol=1e-5, atol=1e-5)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, data().unsqueeze(1))
    for name, gradient in each.items():
        torch.testing.assert_close(gradient.sum(0), gradients[name], rtol=1e-4, atol=1e-5)


@every_form
def test_hooks(qtype: str, state: str) -> None:
    model, seen = make(qtype, state), []
    model.wide.register_forward_pre_hook(lambda m, args: seen.append("before"))
    model.wide.register_forward_hook(lambda m, args, out: out * 2)
    model.wide.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    if state == "frozen":
        for module in model.wide.weight.modules():
            module.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    x = torch.randn(2, 128, requires_grad=True)
    model.wide(x).sum().backward()
    names = ["PackedCodes"] * (quantal.qtypes[qtype].bits < 8) + ["QWeight"]
    assert seen == ["before", *(names if state == "frozen" else []), "backward"]
    plain = make(qtype, state)
    assert torch.equal(model.wide(x), 2 * plain.wide(x))


@pytest.mark.parametrize("reentrant", [False, True])
@every_form
def test_activation_checkpointing(qtype: str, state: str, reentrant: bool) -> None:
    results = []
    for run in (lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=reentrant)):
        model, x = make(qtype, state), data().requires_grad_()
        run(model, x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two, "gradient")


@every_form
def test_requires_grad(qtype: str, state: str) -> None:
    model = make(qtype, state)
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(data()).requires_grad
    model.requires_grad_(True)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    weights = {"conv.weight", "wide.weight", "out.weight"} if state == "live" else set()
    assert trains == {"conv.bias", "wide.bias", "norm.weight", "norm.bias"} | weights
    x = data().requires_grad_()
    model(x).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trains
    assert x.grad.abs().sum() > 0


# ---- training


class Rounded(torch.autograd.Function):
    """What fake quantization is: the rounded value forward, the identity backward."""

    @staticmethod
    def forward(ctx: object, weight: torch.Tensor, qtype: str) -> torch.Tensor:
        return torch.ops.quantal.dequantize(torch.ops.quantal.quantize_weight(weight, qtype))

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple:
        return grad, None


class RoundedLinear(torch.autograd.Function):
    """The same with the library's products, which sum in an order of their own."""

    @staticmethod
    def forward(
        ctx: object, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, qtype: str
    ) -> torch.Tensor:
        group = torch.ops.quantal.default_group_size(qtype, weight.shape[1])
        data, scale, shift = torch.ops.quantal.encode(weight, qtype, group)
        how = (data, scale, shift if shift.numel() else None)
        ctx.saved = x, how, qtype, group
        return torch.ops.quantal.linear(x, *how, bias, qtype, group)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple:
        x, how, qtype, group = ctx.saved
        of_x = torch.ops.quantal.linear_input_grad(grad, *how, qtype, group, x.shape[1])
        return of_x, grad.t().mm(x), grad.sum(0) if ctx.needs_input_grad[2] else None, None


class RoundedConvolution(torch.autograd.Function):
    """The same of a convolution with 3 x 3 taps, whose gradients are torch's."""

    @staticmethod
    def forward(
        ctx: object, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, qtype: str
    ) -> torch.Tensor:
        group = torch.ops.quantal.default_group_size(qtype, weight[0].numel())
        data, scale, shift = torch.ops.quantal.encode(weight, qtype, group)
        how = (data, scale, shift if shift.numel() else None)
        value = torch.ops.quantal.decode(*how, qtype, group, weight.shape, weight.dtype)
        ctx.save_for_backward(x, value)
        return torch.ops.quantal.convolution(
            x, *how, bias, qtype, group, weight.shape, [1, 1], [1, 1], [1, 1], 1
        )

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple:
        x, value = ctx.saved_tensors
        sides = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        wanted = (ctx.needs_input_grad[0], True, True)
        gradients = torch.ops.aten.convolution_backward(
            grad, x, value, [grad.shape[1]], *sides, wanted
        )
        return *gradients, None


def fake_quantized(model: Net, qtype: str, x: torch.Tensor, own_products: bool) -> torch.Tensor:
    """The forward pass with fake-quantized weights, in torch's products or the library's."""

    def linear(x: torch.Tensor, m: nn.Module) -> torch.Tensor:
        if own_products:
            return RoundedLinear.apply(x, m.weight, m.bias, qtype)
        return nn.functional.linear(x, Rounded.apply(m.weight, qtype), m.bias)

    def convolution(x: torch.Tensor, m: nn.Module) -> torch.Tensor:
        if own_products:
            return RoundedConvolution.apply(x, m.weight, m.bias, qtype)
        return nn.functional.conv2d(x, Rounded.apply(m.weight, qtype), m.bias, padding=1)

    x = torch.relu(convolution(x, model.conv)).flatten(1)
    return linear(model.norm(torch.tanh(linear(x, model.wide))), model.out)


def optimizers() -> Iterator[tuple[str, object]]:
    yield "AdamW", lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1)
    yield "SGD", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True)


def trained(model: nn.Module, forward: object, optimizer: object, *how: object) -> list[float]:
    optimizer = optimizer(model.parameters())
    target = torch.arange(5) % 6
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(forward(data(), *how), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", [make for _, make in optimizers()], ids=["AdamW", "SGD"])
@every_qtype
def test_training_is_fake_quantized_training(qtype: str, optimizer: object) -> None:
    """To the bit with the library's products, and closely with torch's."""
    live = make(qtype, "live")
    losses = trained(live, live, optimizer)
    assert losses[-1] < losses[0]
    for own_products in (True, False):
        plain = floats()
        expected = trained(plain, partial(fake_quantized, plain, qtype), optimizer, own_products)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
        if own_products:
            assert losses == expected
            for (name, one), two in zip(live.named_parameters(), plain.parameters(), strict=True):
                assert_same_bits(one.detach(), two.detach(), name)


@every_form
def test_frozen_weights_do_not_train(qtype: str, state: str) -> None:
    model = make(qtype, state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained(model, model, lambda p: torch.optim.AdamW(p, lr=1e-2))
    for name, tensor in model.state_dict().items():
        is_fixed = ".weight._" in name or name.endswith("put_scale")
        assert torch.equal(tensor, before[name]) == is_fixed, name
