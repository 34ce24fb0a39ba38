"""torch.ops.quantal.convolution, and the modules that call it."""

import re
from dataclasses import dataclass

import pytest
import quantal
import torch
from quantized import QTYPES, ops
from test_compile import NEARLY, handing_floats_on, opcheck
from torch import nn
from torch.nn import functional as F  # noqa: N812


@dataclass
class Case:
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def arguments(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups


CASES = [
    Case((2, 3, 17), (5, 3, 4), (2,), (3,), (2,)),
    Case((2, 3, 9, 8), (17, 3, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case((1, 32, 7, 5), (6, 32, 1, 1), (2, 1), (0, 0), (1, 1)),
    Case((2, 6, 7, 7), (4, 3, 3, 2), (1, 2), (1, 0), (1, 1), 2),
    # From 64 rows a group on, codes are multiplied on every processor.
    Case((2, 5, 9), (65, 5, 3), (1,), (1,), (1,)),
    Case((2, 3, 7, 6), (64, 3, 3, 3), (1, 2), (1, 1), (1, 1)),
    Case((1, 4, 5, 6), (128, 2, 2, 2), (1, 1), (0, 1), (1, 1), 2),
    Case((2, 8, 9, 7), (8, 1, 3, 3), (1, 1), (1, 1), (1, 1), 8),
    Case((1, 3, 5, 6, 7), (4, 3, 3, 2, 1), (1, 2, 1), (1, 0, 0), (1, 1, 2)),
]
ACTIVATIONS = [("", None), ("qint8", None), ("qint8", 0.03), ("qfloat8_e4m3fn", 0.03)]

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def parts(case: Case, qtype: str) -> tuple:
    torch.manual_seed(1)
    data, scale, shift = ops.encode(torch.randn(case.weight), qtype, 0)
    return data, scale, shift if shift.numel() else None


def call(case: Case, x: torch.Tensor, qtype: str, weight: tuple, *rest: object) -> torch.Tensor:
    bias, *others = rest or (None,)
    return ops.convolution(
        x, *weight, bias, qtype, 0, list(case.weight), *case.arguments(), *others
    )


def is_last(y: torch.Tensor) -> bool:
    return y.ndim in LAST and y.is_contiguous(memory_format=LAST[y.ndim])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("activations", "step"), ACTIVATIONS)
@pytest.mark.parametrize("qtype", QTYPES)
def test_is_the_convolution_of_quantized_values(
    qtype: str, activations: str, step: float | None, dtype: torch.dtype
) -> None:
    scale = None if step is None else torch.tensor(step)
    for case in CASES:
        weight = parts(case, qtype)
        x, bias = torch.randn(case.x).to(dtype), torch.randn(case.weight[0]).to(dtype)
        y = call(case, x, qtype, weight, bias, None, activations, scale)
        seen = ops.fake_quantize(x.float(), activations, scale, True) if activations else x
        exact_weight = ops.decode(*weight, qtype, 0, list(case.weight), torch.float64)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(case.stride) - 1]
        exact = convolve(seen.double(), exact_weight, bias.double(), *case.arguments())
        size = convolve(
            seen.abs().double(), exact_weight.abs(), bias.abs().double(), *case.arguments()
        )
        assert y.dtype == dtype
        assert y.is_contiguous()
        # Without kernels for integers the float operands are rounded to the dtype.
        unit = torch.finfo(dtype).eps
        assert ((y.double() - exact).abs() <= size * max(4 * unit, 2**-20)).all()


# Weights larger than what is dequantized at a time, those that few positions meet, and one for
# every way that a convolution takes (src/ops/packed_conv.h).
LARGE = [
    Case((1, 512, 12, 11), (515, 512, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case((2, 128, 3, 5), (80, 128, 3, 3), (2, 1), (1, 1), (1, 1)),
    Case((3, 520, 2, 3), (72, 520, 1, 1), (1, 1), (0, 0), (1, 1)),
    Case((1, 520, 4, 4), (72, 520, 1, 1), (2, 2), (1, 1), (1, 1)),
    # Few positions: of more than one sample, and where the kernel covers the whole input.
    Case((2, 128, 4, 3), (80, 128, 3, 3), (1, 1), (0, 0), (1, 1)),
    Case((3, 128, 3, 2), (80, 128, 3, 2), (1, 1), (0, 0), (1, 1)),
    # Many positions, of which torch's convolution takes less time.
    Case((1, 64, 28, 28), (40, 64, 3, 3), (1, 1), (1, 1), (1, 1)),
    Case((1, 24, 8, 16, 16), (24, 24, 3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    # Groups: of whole tiles of rows, thin ones, others.
    Case((2, 64, 9, 7), (96, 32, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    Case((2, 48, 9, 8), (48, 8, 3, 3), (1, 1), (1, 1), (1, 1), 6),
    Case((1, 36, 20, 20), (72, 12, 3, 3), (1, 1), (1, 1), (1, 1), 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qtype", QTYPES)
def test_large_weights_are_those_of_quantized_values(qtype: str, dtype: torch.dtype) -> None:
    for case in LARGE:
        weight = parts(case, qtype)
        x, bias = torch.randn(case.x).to(dtype), torch.randn(case.weight[0]).to(dtype)
        value = ops.decode(*weight, qtype, 0, list(case.weight), torch.float64)
        convolve = F.conv2d if x.ndim == 4 else F.conv3d
        exact = convolve(x.double(), value, bias.double(), *case.arguments())
        # Affine weights may be computed as scale * sum(code * x) - shift * sum(x).
        largest = value.abs() + 2 * value.abs().max()
        size = convolve(x.abs().double(), largest, bias.abs().double(), *case.arguments())
        for memory_format in (torch.contiguous_format, LAST[x.ndim]):
            y = call(case, x.contiguous(memory_format=memory_format), qtype, weight, bias)
            assert y.is_contiguous(memory_format=memory_format)
            bound = size * 2**-18 + exact.abs() * torch.finfo(dtype).eps
            if dtype != torch.float32:  # the weight is rounded, too
                bound += size * torch.finfo(dtype).eps
            assert ((y.double() - exact).abs() <= bound).all()


def test_a_result_outlives_the_next_call() -> None:
    case = CASES[1]
    x, one, other = torch.randn(case.x), parts(case, "qint8"), parts(case, "qint4")
    first = call(case, x, "qint8", one)
    before = first.clone()
    call(case, x, "qint4", other)
    assert torch.equal(first, before)


@pytest.mark.parametrize("activations", ["", "qint8"])
def test_keeps_the_memory_format_of_its_input(activations: str) -> None:
    for case in CASES:
        if len(case.x) < 4:
            continue
        weight, x = parts(case, "qint8"), torch.randn(case.x)
        last = x.contiguous(memory_format=LAST[x.ndim])
        y = call(case, last, "qint8", weight, None, None, activations)
        assert is_last(y)
        torch.testing.assert_close(y, call(case, x, "qint8", weight, None, None, activations))


@pytest.mark.parametrize("qtype", ["qint4", "qint8"])
def test_gradients_are_those_of_the_float_values(qtype: str) -> None:
    for case in CASES:
        for activations, step in ACTIVATIONS:
            scale = None if step is None else torch.tensor(step)
            weight = parts(case, qtype)
            leaves = [
                torch.randn(sizes, dtype=torch.float64, requires_grad=True)
                for sizes in (case.x, (case.weight[0],), case.weight)
            ]
            same = [leaf.detach().clone().requires_grad_() for leaf in leaves]
            x, bias, latent = leaves
            y = call(case, x, qtype, weight, bias, latent, activations, scale)
            x, bias, latent = same
            seen = ops.fake_quantize(x, activations, scale, True) if activations else x
            value = ops.decode(*weight, qtype, 0, list(case.weight), torch.float64, latent)
            convolve = (F.conv1d, F.conv2d, F.conv3d)[len(case.stride) - 1]
            expected = convolve(seen, value, bias, *case.arguments())
            grad = torch.randn_like(y)
            for got, want in zip(
                torch.autograd.grad(y, leaves, grad),
                torch.autograd.grad(expected, same, grad),
                strict=True,
            ):
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("activations", ["", "qint8"])
@pytest.mark.parametrize("qtype", ["qint4", "qint8"])
def test_is_sound_for_tracing(qtype: str, activations: str) -> None:
    for case in CASES:
        x = torch.randn(case.x, requires_grad=True)
        bias = torch.randn(case.weight[0], requires_grad=True)
        latent = torch.randn(case.weight, requires_grad=True)
        arguments = (*parts(case, qtype), bias, qtype, 0, list(case.weight), *case.arguments())
        opcheck(ops.convolution, x, *arguments, latent, activations)


@pytest.mark.skipif("avx" not in ops.isa(), reason="elsewhere torch's convolution has few rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 20, 48])
def test_memory_formats_have_the_same_bits(rows: int, dtype: torch.dtype) -> None:
    case = Case((2, 4, 9, 8), (rows, 4, 3, 3), (1, 1), (1, 1), (1, 1))
    weight, x = parts(case, "qint8"), torch.randn(case.x).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    for scale in (None, torch.tensor(0.03)):
        rest = (None, None, "qint8", scale)
        y = call(case, last, "qint8", weight, *rest)
        assert is_last(y)
        assert torch.equal(y, call(case, x, "qint8", weight, *rest))


def test_a_view_of_channels_last_keeps_its_memory_format() -> None:
    case = Case((2, 8, 6, 7), (8, 1, 3, 3), (1, 1), (1, 1), (1, 1), 8)
    wide = torch.randn(2, 16, 6, 7).contiguous(memory_format=torch.channels_last)
    x = wide[:, :8]
    rest = (None, None, "qint8", torch.tensor(0.03))
    y = call(case, x, "qint8", parts(case, "qint8"), *rest)
    assert is_last(y)
    planes = call(case, x.contiguous(), "qint8", parts(case, "qint8"), *rest)
    torch.testing.assert_close(y, planes.contiguous(memory_format=torch.channels_last))


def test_a_nan_spoils_what_it_reaches() -> None:
    case = CASES[1]
    x = torch.randn(case.x)
    x[0, 0, 0, 0] = torch.nan
    for scale in (None, torch.tensor(0.03)):
        y = call(case, x, "qint8", parts(case, "qint8"), None, None, "qint8", scale)
        assert y[0].isnan().any()
        assert y[1].isfinite().all()


def test_an_activation_brings_its_scale() -> None:
    for case in CASES:
        weight, scale = parts(case, "qint8"), torch.tensor(0.03)
        x = torch.randn(case.x)
        codes = ops.quantize_activation(x, "qint8", scale)
        y = call(case, codes, "qint8", weight, None, None, "qint8", torch.tensor(1.0))
        assert torch.equal(y, call(case, x, "qint8", weight, None, None, "qint8", scale))


def test_operands_that_do_not_fit_are_errors() -> None:
    case = CASES[1]
    weight, x = parts(case, "qint8"), torch.randn(case.x)
    for bias in (torch.randn(3), torch.randn(1, 17), torch.randn(1)):
        with pytest.raises(ValueError, match=r"expected a bias of shape \[17\]"):
            call(case, x, "qint8", weight, bias, None, "qint8")
    with pytest.raises(ValueError, match=r"expected input of shape \(batch, 3, …\)"):
        call(case, x[:, :2], "qint8", weight)
    with pytest.raises(ValueError, match=r"expected input of shape \(batch, 3, …\)"):
        call(case, x[0], "qint8", weight)
    with pytest.raises(ValueError, match="expected a float input"):
        call(case, x.long(), "qint8", weight)
    with pytest.raises(RuntimeError):
        call(case, x[..., :1, :1].expand(2, 3, 0, 1), "qint8", weight)


@pytest.mark.parametrize("activations", [None, "qint8"])
def test_a_module_says_what_input_it_wants(activations: str | None) -> None:
    """In an error of the type of torch's."""
    layer = quantal.QConv2d(3, 4, 3, weights="qint8", activations=activations)
    message = (
        r"\[quantal.QConv2d\] expected input of 4 dimensions \(one sample: 3\) with 3 channels"
    )
    for shape in ((1, 2, 5, 5), (2, 5, 5), (5, 5), (1, 1, 3, 5, 5)):
        got = re.escape(f", got {shape}")
        with pytest.raises(RuntimeError, match=message + got):
            layer(torch.randn(shape))


PADDINGS = [
    {"padding": "same", "kernel_size": 4},
    {"padding": "same", "kernel_size": (3, 2), "dilation": 2},
    {"padding": "same", "kernel_size": 3, "padding_mode": "circular"},
    {"padding": "valid", "kernel_size": 3},
    {"padding": (2, 1), "kernel_size": 3, "padding_mode": "reflect"},
    {"padding": (2, 1), "kernel_size": 3, "padding_mode": "replicate"},
]


@pytest.mark.parametrize("activations", [None, "qint8"])
@pytest.mark.parametrize("options", PADDINGS, ids=str)
def test_modules_pad_as_torch_does(options: dict, activations: str | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, **options))
    quantal.quantize(model, weights="qint8", activations=activations)
    plain = nn.Conv2d(3, 6, **options)
    plain.load_state_dict(
        {"weight": model[0].qweight.dequantize().detach(), "bias": model[0].bias.detach()}
    )
    x = torch.randn(2, 3, 9, 8)
    for y in (x, x[0]):
        seen = y
        if activations:
            batch = y if y.ndim == 4 else y[None]
            seen = ops.fake_quantize(batch, "qint8", None, True).reshape(y.shape)
        torch.testing.assert_close(model(y), plain(seen), rtol=1e-5, atol=1e-5)


def test_models_compile_whole() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    quantal.quantize(model, weights="qint8", activations="qint8")
    x = torch.randn(2, 3, 9, 8)
    with quantal.Calibration(model):
        model(x)
    quantal.freeze(model)
    compiled, expected = torch.compile(model, fullgraph=True), handing_floats_on(model)
    for sample in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(compiled(sample), expected(sample), **NEARLY)
