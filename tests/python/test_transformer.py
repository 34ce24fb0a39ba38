"""torch.nn's attention and encoder layers, which run fused where nothing needs a gradient."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from quantized import ops
from torch import nn

PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 2 + [True] * 3])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
# Reassociated fp32 sums over two layers of unit-sized outputs.
ROUNDING = 5e-6


def with_weights(model: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy of the model whose matrices are make(matrix)."""
    model = copy.deepcopy(model)
    for name, weight in list(model.named_parameters()):
        if weight.dim() == 2:
            path, _, last = name.rpartition(".")
            made = make(weight.detach())
            parameter = nn.Parameter(made, requires_grad=made.requires_grad)
            setattr(model.get_submodule(path), last, parameter)
    return model


def rounded(weight: torch.Tensor) -> torch.Tensor:
    return ops.dequantize(ops.quantize_weight(weight, "qint8")).requires_grad_()


def frozen(weight: torch.Tensor) -> torch.Tensor:
    return ops.quantize_weight(weight, "qint8")


def live(weight: torch.Tensor) -> torch.Tensor:
    return ops.live_weight(weight.clone().requires_grad_(), "qint8")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
# torch warns that it does not nest sequences under norm_first, and that nested tensors are new.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_encoder(
    norm_first: bool, activation: str, nested: bool, grad: bool, tokens: torch.Tensor
) -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, batch_first=True, norm_first=norm_first, activation=activation
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    plain, quantized, trained = (with_weights(model, make) for make in (rounded, frozen, live))
    for mask, padding in itertools.product([None, CAUSAL], [None, PADDING]):
        shown = ~padding if padding is not None else torch.ones(3, 5, dtype=torch.bool)
        ops.reset_fallback_counts()
        with torch.set_grad_enabled(grad):
            expected = plain(tokens, mask=mask, src_key_padding_mask=padding)
            y = quantized(tokens, mask=mask, src_key_padding_mask=padding)
            assert torch.equal(y, trained(tokens, mask=mask, src_key_padding_mask=padding))
        torch.testing.assert_close(y[shown], expected[shown], rtol=0, atol=ROUNDING)
        assert ops.fallback_counts() == {}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"average_attn_weights": False},
        {"need_weights": False},
        {"key_padding_mask": PADDING},
        {"attn_mask": CAUSAL.isinf()},
        {"attn_mask": CAUSAL.isinf(), "key_padding_mask": PADDING},
    ],
    ids=lambda how: "+".join(how) or "plain",
)
def test_attention(how: dict[str, object], tokens: torch.Tensor) -> None:
    torch.manual_seed(1)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    plain, quantized = with_weights(model, rounded), with_weights(model, frozen)
    with torch.no_grad():
        expected, expected_weights = plain(tokens, tokens, tokens, **how)
        y, weights = quantized(tokens, tokens, tokens, **how)
    torch.testing.assert_close(y, expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_attention_to_other_sequences(tokens: torch.Tensor) -> None:
    torch.manual_seed(1)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    plain, quantized = with_weights(model, rounded), with_weights(model, frozen)
    keys, values = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    for actual, expected in zip(
        quantized(tokens, keys, values), plain(tokens, keys, values), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING)
    # The arguments of the fused operation, called as it is.
    arguments = [tokens, keys, values, 8, 2, plain.in_proj_weight, plain.in_proj_bias]
    out = plain.out_proj
    expected = torch._native_multi_head_attention(*arguments, out.weight, out.bias)
    arguments[5] = quantized.in_proj_weight
    actual = torch._native_multi_head_attention(*arguments, out.weight, out.bias)
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_nested_sequences(bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(8, 6, bias=bias)
    plain, quantized = with_weights(linear, rounded), with_weights(linear, live)
    grads = []
    for model in (plain, quantized):
        x = torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(1, 8) / 3], requires_grad=True)
        y = model(x)
        assert y.is_nested
        padded = torch.nested.to_padded_tensor(y, 0.0)
        padded.square().sum().backward()
        grads.append([padded, model.weight.grad, torch.nested.to_padded_tensor(x.grad, 0.0)])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_operations_on_nested_sequences_fall_back() -> None:
    x = torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(1, 8)])
    scale = ops.quantize_weight(torch.rand(2, 8), "qint8")
    ops.reset_fallback_counts()
    y = torch.mul(x, scale[0, 1])
    assert ops.fallback_counts() == {"aten::mul.Tensor": 1}
    assert torch.equal(y[1], ops.dequantize(scale)[0, 1].expand(1, 8))
