"""What a quantized tensor is in Python: kernels, modes, writes, views, and errors that explain."""

import copy
import io
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
import quantal
import torch
import torch.nn.functional as F  # noqa: N812
from quantal.tensor import wrap
from quantized import QTYPES, activation_scale, float_value, ops, quantize, weight
from torch import nn
from torch.utils.checkpoint import checkpoint

KINDS = ("frozen", "live", "activation")


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("kind", ["frozen", "activation"])
def test_copies_and_files(kind: str, qtype: str) -> None:
    if kind == "activation" and quantal.qtypes[qtype].is_affine:
        pytest.skip("activations have 8 bits")
    x = torch.randn(6, 64)
    if kind == "frozen":
        t = wrap(ops.quantize_weight(x, qtype))
    else:
        t = wrap(ops.quantize_activation(x, qtype, torch.tensor(0.03)))
    copies = [copy.deepcopy(t), pickle.loads(pickle.dumps(t))]
    for weights_only in (True, False):
        file = io.BytesIO()
        torch.save({"t": t}, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=weights_only)["t"])
    for other in copies:
        assert type(other) is type(t)
        assert (other.qtype, other.shape, other.dtype) == (t.qtype, t.shape, t.dtype)
        for part, own in zip(ops.parts(other), ops.parts(t), strict=True):
            assert (part is None and own is None) or (
                torch.equal(part.float(), own.float()) and part.data_ptr() != own.data_ptr()
            )


# Kernels: these operations run on codes, and no weight is dequantized for a fallback.


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("kind", ["frozen", "live"])
def test_compute_operations_have_kernels(kind: str, qtype: str) -> None:
    def make(*shape: int) -> torch.Tensor:
        make_weight = ops.quantize_weight if kind == "frozen" else ops.live_weight
        return make_weight(torch.randn(shape), qtype)

    matrix, kernel, stack = make(6, 8), make(4, 3, 3, 3), make(2, 8, 5)
    value = {id(w): ops.dequantize(w) for w in (matrix, kernel, stack)}
    x, image, tokens = torch.randn(5, 8), torch.randn(2, 3, 9, 9), torch.tensor([[0, 5], [3, 3]])
    bias = torch.randn(6)
    calls: list[tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = [
        (matrix, lambda w: F.linear(x, w, bias)),
        (matrix, lambda w: F.linear(x[None, :, None], w)),
        (matrix, lambda w: x @ w.t()),
        (matrix, lambda w: x @ w.T),
        (matrix, lambda w: torch.addmm(bias, x, w.t())),
        (matrix, lambda w: torch.mm(w, x.t())),
        (matrix, lambda w: w @ x[0]),
        (matrix, lambda w: torch.einsum("bi,oi->bo", x, w)),
        (matrix, lambda w: torch.inner(x, w)),
        (matrix, lambda w: F.embedding(tokens, w)),
        (matrix, lambda w: F.embedding_bag(tokens, w, mode="sum")),
        (kernel, lambda w: F.conv2d(image, w, padding=1, stride=2)),
        (kernel, lambda w: F.conv_transpose2d(torch.randn(1, 4, 3, 3), w)),
        (stack, lambda w: torch.bmm(torch.randn(2, 3, 8), w)),
        (stack, lambda w: torch.randn(2, 3, 8) @ w),
    ]
    for tensor, call in calls:
        torch.manual_seed(1)
        actual = call(tensor)
        torch.manual_seed(1)
        torch.testing.assert_close(actual, call(value[id(tensor)]))
    assert ops.fallback_count() == 0, dict(ops.fallback_counts())


def test_view_of_columns_stays_quantized() -> None:
    q = quantize("live", weight().requires_grad_())
    columns = q[:, :4]
    assert ops.is_quantized(columns)
    assert ops.fallback_count() == 0
    assert torch.equal(columns, ops.latent(q)[:, :4])
    x = torch.randn(3, 4)
    assert torch.equal(x @ columns.t(), x @ ops.dequantize(q)[:, :4].t())


def test_view_that_shows_the_latent_counts() -> None:
    """Where the latent is not contiguous, a view that is not a range of rows is float: training
    would not see the codes, so it counts. Under no_grad, where optimizers and norms look, it does
    not.
    """
    q = ops.live_weight(weight().t().requires_grad_(), "qint8")
    columns = q[:, :4]
    assert torch.equal(columns, ops.latent(q)[:, :4])
    assert dict(ops.fallback_counts()) == {"aten::slice.Tensor": 1}
    with torch.no_grad():
        q[:, 2:4].norm()
    assert ops.fallback_count() == 1


@pytest.mark.parametrize("kind", ["frozen", "live"])
@pytest.mark.parametrize("layer", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers(layer: str, kind: str) -> None:
    module = getattr(nn, layer)(8, 6, num_layers=2, bidirectional=True)
    plain = copy.deepcopy(module)
    for name, parameter in list(module.named_parameters()):
        if "weight" not in name:
            continue
        quantized = quantize(kind, parameter.detach().requires_grad_(kind == "live"))
        with torch.no_grad():
            getattr(plain, name).copy_(ops.dequantize(quantized))
        setattr(module, name, nn.Parameter(quantized, requires_grad=kind == "live"))
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(module(x)[0], plain(x)[0])


def test_composite_kernels_are_differentiable() -> None:
    """Where we register a composite operation for the backend, PyTorch drops its gradient."""
    missing = []
    for name in torch._C._dispatch_get_all_op_names():
        has = lambda key, name=name: torch._C._dispatch_has_kernel_for_dispatch_key(name, key)  # noqa: E731
        if not name.startswith("aten::") or not has("PrivateUse3"):
            continue
        composite = has("CompositeImplicitAutograd") and not name.endswith("out")
        if composite and not has("AutogradPrivateUse3") and not has("Autograd"):
            missing.append(name)
    missing.remove("aten::_has_compatible_shallow_copy_type")  # returns a bool
    assert not missing


# Modes


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode(kind: str, made_inside: bool) -> None:
    x, source = torch.randn(5, 8), weight()
    outside = None if made_inside else quantize(kind, source)
    with torch.inference_mode():
        q = quantize(kind, source) if outside is None else outside
        value = ops.dequantize(q)
        torch.testing.assert_close(F.linear(x, q), F.linear(x, value))
        assert torch.equal(q.relu() if kind == "activation" else q + 0, _relu_or_same(q, kind))
        for view in (
            lambda t: t.t(),
            lambda t: t[1],
            lambda t: t[:, 2:5],
            lambda t: t.unsqueeze(0),
            lambda t: t.view(-1),
            lambda t: t.expand(2, 6, 8),
            lambda t: t.permute(1, 0),
            lambda t: t.diagonal(),
            lambda t: torch.stack(t.unbind(0)),
            lambda t: torch.cat(t.split(2)),
        ):
            assert torch.equal(float_value(view(q)), view(float_value(q)))
    if outside is not None and kind != "live":
        leaf = x.clone().requires_grad_()
        F.linear(leaf, outside).sum().backward()
        torch.testing.assert_close(leaf.grad, value.sum(0).expand(5, 8))


def _relu_or_same(q: torch.Tensor, kind: str) -> torch.Tensor:
    value = float_value(q)
    return value.relu() if kind == "activation" else value


def test_inference_tensor_can_be_trained_after() -> None:
    with torch.inference_mode():
        q = ops.live_weight(weight(), "qint8")
    F.linear(torch.randn(5, 8), q.requires_grad_()).sum().backward()
    assert q.grad.shape == (6, 8)
    with torch.no_grad():
        q.sub_(q.grad)
    assert torch.equal(ops.dequantize(q), ops.dequantize(quantize("frozen", ops.latent(q))))


@pytest.mark.parametrize("kind", ["frozen", "live"])
def test_autocast(kind: str) -> None:
    q, x = quantize(kind, weight().requires_grad_()), torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, q)
    assert y.dtype == torch.bfloat16
    plain_x, plain_w = x.detach().requires_grad_(), ops.dequantize(q).detach().requires_grad_()
    expected = F.linear(plain_x.bfloat16(), plain_w.bfloat16())
    # The kernel does not round the weight to bfloat16, torch does.
    torch.testing.assert_close(y, expected, rtol=0.016, atol=0.03)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, plain_x.grad)
    if kind == "live":
        assert torch.equal(q.grad, plain_w.grad)
        assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    q, x = quantize("live", weight().requires_grad_()), torch.randn(5, 8, requires_grad=True)
    y = checkpoint(lambda x: F.linear(x, q).relu(), x, use_reentrant=reentrant)
    y.square().sum().backward()
    grads = q.grad.clone(), x.grad.clone()
    q.grad = x.grad = None
    F.linear(x, q).relu().square().sum().backward()
    assert torch.equal(q.grad, grads[0])
    assert torch.equal(x.grad, grads[1])


@pytest.mark.parametrize("kind", ["frozen", "live"])
def test_functional_call(kind: str) -> None:
    module = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    q = {f"{i}.weight": quantize(kind, module[i].weight.detach()) for i in (0, 2)}
    x = torch.randn(5, 8)
    actual = torch.func.functional_call(module, q, (x,))
    values = {name: ops.dequantize(t) for name, t in q.items()}
    torch.testing.assert_close(actual, torch.func.functional_call(module, values, (x,)))
    assert ops.fallback_count() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_vmap(kind: str) -> None:
    q, x = quantize(kind, weight()), torch.randn(3, 5, 8)
    value = ops.dequantize(q)
    actual = torch.vmap(lambda x: F.linear(x, q))(x)
    torch.testing.assert_close(actual, torch.vmap(lambda x: F.linear(x, value))(x))
    expected = float_value(q)
    assert torch.equal(torch.vmap(lambda row: row * 2 + 1)(q), expected * 2 + 1)


@pytest.mark.parametrize("kind", ["frozen", "live"])
def test_functional_gradients(kind: str) -> None:
    q, x = quantize(kind, weight()), torch.randn(8)
    value = ops.dequantize(q)

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (w @ x).tanh().sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        actual, expected = (transform(lambda x, w=w: loss(x, w))(x) for w in (q, value))
        torch.testing.assert_close(actual, expected)


def test_double_backward() -> None:
    x = torch.randn(4, 8, dtype=torch.double, requires_grad=True)
    latent = weight().double().requires_grad_()
    for q in (ops.quantize_weight(latent.detach(), "qint4"), ops.live_weight(latent, "qint4")):
        assert torch.autograd.gradcheck(lambda x, q=q: F.linear(x, q).tanh(), (x,))
        assert torch.autograd.gradgradcheck(lambda x, q=q: F.linear(x, q).tanh(), (x,))

    def second_order(w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (first,) = torch.autograd.grad(F.linear(x, w).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, w))

    live = ops.live_weight(latent, "qint4")
    value = ops.dequantize(live).detach().requires_grad_()
    for actual, expected in zip(second_order(live), second_order(value), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_threads() -> None:
    """Eight threads share one live weight: what each computes is what it computes alone."""
    q = quantize("live", weight(64, 32).requires_grad_())
    inputs = [torch.randn(10, 32) for _ in range(8)]

    def work(x: torch.Tensor) -> list[torch.Tensor]:
        results = []
        for _ in range(20):
            y = F.linear(x, q)
            results += [y.detach(), torch.autograd.grad(y.square().sum(), q)[0]]
        return results

    expected = [work(x)[:2] for x in inputs]
    with torch.no_grad():
        q.add_(0)  # every thread finds the cached codes out of date
    results: list[list[torch.Tensor]] = [[] for _ in inputs]

    def run(i: int) -> None:
        torch.set_num_threads(1)  # it is each thread's own, and sums depend on it
        results[i] = work(inputs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, (y, grad) in zip(results, expected, strict=True):
        assert len(found) == 40
        for actual_y, actual_grad in zip(found[::2], found[1::2], strict=True):
            assert torch.equal(actual_y, y)
            assert torch.equal(actual_grad, grad)


# Operators of other libraries


@pytest.fixture(scope="module")
def scaled_product() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """An operator registered after Quantal was loaded, with a gradient of its own."""

    @torch.library.custom_op("quantal_test::scaled_product", mutates_args=())
    def operator(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return 2 * x.mm(w.t())

    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        # Of a live weight `mm` would read the quantized value and `index_select` the latent.
        rows = w.index_select(0, torch.arange(w.shape[0]))
        return 2 * grad.mm(rows), 2 * grad.t().mm(x)

    operator.register_autograd(
        backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )
    return operator


@pytest.mark.parametrize("kind", ["frozen", "live"])
def test_operator_registered_later(kind: str, scaled_product: Callable) -> None:
    x, q = torch.randn(5, 8, requires_grad=True), quantize(kind, weight().requires_grad_())
    value = ops.dequantize(q).detach()
    y = scaled_product(x, q)
    assert torch.equal(y, 2 * x.mm(value.t()))
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * value.sum(0).expand(5, 8))
    if kind == "live":
        torch.testing.assert_close(q.grad, 2 * x.detach().sum(0).expand(6, 8))
    assert dict(ops.fallback_counts()) == {"quantal_test::scaled_product": 1}


def test_operator_registered_after_the_tensor() -> None:
    """It meets a tensor that is older: the next quantized tensor brings it the fallback."""
    older = quantize("live", weight())

    @torch.library.custom_op("quantal_test::total", mutates_args=())
    def total(w: torch.Tensor) -> torch.Tensor:
        return w.sum().clone()

    quantize("frozen", weight())
    assert torch.equal(total(older), ops.dequantize(older).sum())
    assert dict(ops.fallback_counts()) == {"quantal_test::total": 1}


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_operand(kind: str, layout: str) -> None:
    adjacency, q = torch.eye(6)[[1, 0, 3, 2, 5, 4]], quantize(kind, weight())
    sparse = getattr(adjacency, layout)()
    value = ops.dequantize(q)
    assert torch.equal(torch.mm(sparse, q), adjacency @ value)
    if layout == "to_sparse":
        assert torch.equal(torch.sparse.mm(sparse, q), adjacency @ value)
        assert torch.equal(torch.sparse.addmm(q, sparse, q), value + adjacency @ value)


# What needs memory or a format of its own: an error that says what to do, or the right values.


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("kind", KINDS)
def test_values_reach_python(kind: str) -> None:
    q = quantize(kind, weight())
    value = float_value(q)
    assert q.tolist() == value.tolist()
    assert q[1].tolist() == value[1].tolist()
    assert q[2, 3].item() == value[2, 3].item()
    assert np.array_equal(q.numpy(), value.numpy())
    assert np.array_equal(np.asarray(q), value.numpy())
    assert np.array_equal(q.numpy(force=True), value.numpy())
    assert torch.equal(torch.tensor(q), value)
    assert repr(q) == repr(value)
    assert f"{q[0, 0]:.3f}" == f"{value[0, 0]:.3f}"
    assert str(q.double()) == str(q.double().cpu())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "use",
    [
        lambda q: q.data_ptr(),
        lambda q: q.untyped_storage(),
        lambda q: q.__dlpack__(),
        lambda q: q.share_memory_(),
        copy.deepcopy,
        copy.copy,
        pickle.dumps,
        lambda q: torch.save(q, io.BytesIO()),
    ],
    ids=[
        "data_ptr",
        "untyped_storage",
        "dlpack",
        "share_memory_",
        "deepcopy",
        "copy",
        "pickle",
        "save",
    ],
)
def test_memory_access_explains(kind: str, use: Callable[[torch.Tensor], object]) -> None:
    q = quantize(kind, weight())
    with pytest.raises((RuntimeError, NotImplementedError), match="of a quantized tensor") as error:
        use(q)
    assert "dequantize()" in str(error.value)


def test_as_strided_out_of_bounds() -> None:
    q = ops.quantize_activation(torch.arange(4.0), "qint8", torch.tensor(1.0))
    assert torch.equal(
        ops.dequantize(q.as_strided((2, 2), (2, 1))), torch.tensor([[0.0, 1], [2, 3]])
    )
    for sizes, strides, offset in (((2, 2), (2, 1), 1), ((5,), (1,), 0), ((1,), (1,), 4)):
        with pytest.raises(RuntimeError, match="out of bounds"):
            q.as_strided(sizes, strides, offset)


@pytest.mark.parametrize("kind", ["frozen", "live"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_moves_with_the_codes(kind: str, dtype: torch.dtype) -> None:
    q = quantize(kind, weight())
    moved = q.to(dtype)
    assert ops.is_quantized(moved)
    assert moved.dtype == dtype
    expected = ops.dequantize(q).to(dtype)
    rtol = 2**-23 if dtype == torch.float64 else 0
    torch.testing.assert_close(ops.dequantize(moved), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("kind", ["frozen", "live"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_falls_back_to_eager(kind: str, backend: str) -> None:
    module = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    for i in (0, 2):
        q = quantize(kind, module[i].weight.detach().requires_grad_(kind == "live"))
        module[i].weight = nn.Parameter(q, requires_grad=kind == "live")
    x = torch.randn(5, 8)
    expected = module(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend)
    assert torch.equal(compiled(x), expected)
    if kind == "live":
        compiled(x).sum().backward()
        assert torch.equal(module[2].bias.grad, torch.full((3,), 5.0))
        with torch.no_grad():
            module[0].weight.mul_(2)
        assert torch.equal(compiled(x), module(x))
        assert not torch.equal(compiled(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_compile_of_a_quantized_argument(kind: str) -> None:
    """Right numbers or an error; never numbers of something else."""
    torch._dynamo.reset()
    q, x = quantize(kind, weight()), torch.randn(5, 8)
    expected = F.linear(x, ops.dequantize(q)) * 2
    try:
        actual = torch.compile(lambda x, w: F.linear(x, w) * 2, backend="aot_eager")(x, q)
    except Exception as error:
        assert "quantized tensor" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(actual, expected)


def test_activation_keeps_codes_through_views_and_relu() -> None:
    q = ops.quantize_activation(weight(), "qint8", activation_scale(weight()))
    for result in (q.relu(), q.view(3, 16), q.t(), q[2:], q * 2, -q, torch.cat([q, q])):
        assert ops.is_quantized(result)
        assert ops.parts(result)[0].dtype == torch.int8
    assert ops.fallback_count() == 0


def tokens_to_int8(x: torch.Tensor) -> torch.Tensor:
    """What dynamic quantization with one scale a token makes of `x`, straight through."""
    scale = (x.detach().abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float).tiny)
    return x + ((x / scale).round().clamp(-127, 127) * scale - x).detach()


@pytest.mark.parametrize("qtype", QTYPES)
def test_linear_dynamic(qtype: str) -> None:
    weight = torch.randn(37, 200, requires_grad=True)
    bias = torch.randn(37, requires_grad=True)
    x = torch.randn(2, 5, 200, requires_grad=True)
    plain = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    q = ops.live_weight(weight, qtype)
    y = ops.linear_dynamic(x, q, bias)
    value = ops.dequantize(ops.quantize_weight(plain[1], qtype))
    expected = F.linear(tokens_to_int8(plain[0]), value, plain[2])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-4)
    y.square().sum().backward()
    expected.square().sum().backward()
    for actual, reference in zip((x, q, bias), plain, strict=True):
        torch.testing.assert_close(actual.grad, reference.grad, rtol=1e-4, atol=5e-2)
    ops.freeze(q)
    assert torch.equal(ops.linear_dynamic(x, q, bias), y)
    half = ops.linear_dynamic(x.bfloat16(), q, bias.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.03, atol=0.5)


def test_linear_dynamic_names_what_does_not_fit() -> None:
    q = ops.quantize_weight(torch.randn(4, 6), "qint8")
    with pytest.raises(ValueError, match=r"\[4, 6\].*\[2, 5\]"):
        ops.linear_dynamic(torch.randn(2, 5), q)
    with pytest.raises(ValueError, match="expected a quantized weight"):
        ops.linear_dynamic(torch.randn(2, 6), torch.randn(4, 6))
    with pytest.raises(ValueError, match="Long"):
        ops.linear_dynamic(torch.ones(2, 6, dtype=torch.long), q)
    assert ops.linear_dynamic(torch.randn(0, 6), q).shape == (0, 4)
    assert ops.linear_dynamic(torch.full((1, 6), torch.nan), q).isnan().all()
