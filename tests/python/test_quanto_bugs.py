"""What optimum-quanto gets wrong, each under the bug's name: here it is right."""

from collections.abc import Callable
from pathlib import Path

import pytest
import quantal
import torch
from module_kinds import KINDS, WEIGHTED
from quantized import QTYPES, ops
from safetensors.torch import load_file, save_file
from torch import nn

FLOAT8 = [qtype for qtype in QTYPES if qtype.startswith("qfloat8")]

# ---- calibration


def test_as_of_a_calibration_is_none_there() -> None:
    calibration = quantal.Calibration(momentum=0.5)
    with calibration as given:
        assert given is calibration


@pytest.mark.parametrize("streamline", [False, True])
def test_scales_keep_the_graph_of_calibrating_with_gradients_there(streamline: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    quantal.quantize(model, weights="qint8", activations="qint8")
    x = torch.randn(5, 16, requires_grad=True)
    assert torch.is_grad_enabled()
    with quantal.Calibration(streamline=streamline):
        assert model(x).requires_grad
    for name, scale in model.named_buffers():
        assert not scale.requires_grad, name
        assert scale.grad_fn is None, name
        assert scale.is_leaf, name
    # So that steps can follow: a graph would be freed by the first.
    for _ in range(2):
        model(x).sum().backward()


# ---- weights


@pytest.mark.parametrize("outputs", [1, 7, 15, 17, 31, 33])
def test_bfloat16_int4_groups_of_128_crash_there_with_odd_outputs(outputs: int) -> None:
    """Where the number of outputs is no multiple of 16."""
    model = nn.Sequential(nn.Linear(256, outputs)).to(torch.bfloat16)
    quantal.quantize(model, weights="qint4")
    assert model[0].weight_group_size == 128
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    live = model(x)
    quantal.freeze(model)
    assert torch.equal(model(x), live)
    weight = model[0].weight.dequantize(torch.float64)
    expected = nn.functional.linear(x.double(), weight, model[0].bias.double())
    # The output's own rounding, and that of the decoded weight in each product.
    size = x.double().abs() @ weight.abs().t() + expected.abs()
    assert ((live - expected).abs() <= 2**-8 * size).all()


@pytest.mark.parametrize("qtype", ["qint2", "qint4"])
def test_hqq_is_useless_in_bfloat16_there(qtype: str) -> None:
    """There qint4 gains nothing over the extremes. Here it is computed in fp32, and gains what it
    gains there; only scale and shift are rounded."""
    weight = torch.randn(64, 256)
    weight[:, ::37] *= 6  # outliers, which HQQ is for
    weight = weight.to(torch.bfloat16)

    def error(quantizer: str, dtype: torch.dtype) -> float:
        parts = ops.encode(weight.to(dtype), qtype, 128, quantizer)
        value = ops.decode(*parts, qtype, 128, [64, 256], torch.float32)
        return (value - weight.float()).abs().pow(0.7).mean().item()  # in its norm

    assert error("hqq", torch.bfloat16) < 0.98 * error("max", torch.bfloat16)
    assert error("hqq", torch.bfloat16) == pytest.approx(error("hqq", torch.float32), rel=0.002)


@pytest.mark.parametrize("spread", [0.005, 0.00125, 0.00025, 0.00002])
def test_product_of_scales_underflows_in_float16_there(spread: float) -> None:
    """Int8 weights and activations: the error stays that of the codes, however small the scales."""
    model = nn.Sequential(nn.Linear(256, 64, bias=False))
    nn.init.normal_(model[0].weight, std=spread)
    model.half()
    x = torch.randn(32, 256).half()
    quantal.quantize(model, weights="qint8", activations="qint8")
    with torch.no_grad(), quantal.Calibration(streamline=True):
        exact = model[0].weight.double()
        model(x)
    quantal.freeze(model)
    layer = model[0]
    seen = ops.dequantize(ops.quantize_activation(x.double(), "qint8", layer.input_scale))
    codes = nn.functional.linear(seen, layer.weight.dequantize(torch.float64))
    with torch.no_grad():
        y = model(x).double()
    # One rounding of the output to half, whose smallest step is 2^-24.
    assert ((y - codes).abs() <= codes.abs() * 2**-11 + 2**-25 + 1e-6 * codes.abs().max()).all()
    expected = x.double() @ exact.t()
    assert (y - expected).norm() < 0.02 * expected.norm()


# ---- activations


@pytest.mark.parametrize("qtype", FLOAT8)
def test_float8_activations_do_not_compare_there(qtype: str) -> None:
    x = quantal.quantize_activation(torch.randn(5, 7), quantal.qtypes[qtype], torch.tensor(0.01))
    y = quantal.quantize_activation(torch.randn(5, 7), quantal.qtypes[qtype], torch.tensor(0.02))
    values = x.dequantize()
    comparisons: list[Callable] = [torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne]
    for compare in comparisons:
        for other in (0.0, torch.tensor(0.25), y):
            wanted = other.dequantize() if other is y else other
            got = compare(x, other)
            assert got.dtype == torch.bool
            assert torch.equal(got, compare(values, wanted))
    assert torch.equal(x < 0, values < 0)


@pytest.mark.parametrize("qtype", ["qint8", *FLOAT8])
def test_where_takes_no_quantized_other_there(qtype: str) -> None:
    x = quantal.quantize_activation(torch.randn(5, 7), quantal.qtypes[qtype], torch.tensor(0.01))
    y = quantal.quantize_activation(torch.randn(5, 7), quantal.qtypes[qtype], torch.tensor(0.02))
    values, others = x.dequantize(), y.dequantize()
    chosen = values > 0.1
    for one, two, expected in (
        (x, y, torch.where(chosen, values, others)),
        (x, others, torch.where(chosen, values, others)),
        (values, y, torch.where(chosen, values, others)),
        (x, 0.0, torch.where(chosen, values, 0.0)),
        (0.0, y, torch.where(chosen, 0.0, others)),
    ):
        got = torch.where(chosen, one, two)
        assert torch.equal(got.dequantize() if isinstance(got, quantal.QTensor) else got, expected)
    filled = x.masked_fill(chosen, -1.0)
    assert torch.equal(ops.dequantize(filled) if ops.is_quantized(filled) else filled,
                       values.masked_fill(chosen, -1.0))  # fmt: skip


# ---- requantize with a dictionary


class Tied(nn.Module):
    """An embedding whose weight is the head's; a buffer that no state_dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 64)
        self.body = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 12, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("angles", torch.arange(64.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(self.table(x) + torch.sin(self.angles))))


TOKENS = torch.tensor([[1, 3, 11], [0, 7, 7]])


def tied(qtype: str) -> tuple[Tied, dict, dict]:
    """A frozen model, its tensors and its map."""
    model = Tied()
    quantal.quantize(model, weights=qtype)
    quantal.freeze(model)
    return model, model.state_dict(), quantal.quantization_map(model)


def assert_refused(state: dict, quantization_map: dict, match: str) -> None:
    """And the model is as it was."""
    fresh = Tied()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        quantal.requantize(fresh, state, quantization_map)
    assert type(fresh.body) is nn.Linear
    assert list(fresh.state_dict()) == list(before)
    assert all(torch.equal(fresh.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("qtype", QTYPES)
def test_requantize_leaves_missing_tensors_uninitialised_there(qtype: str) -> None:
    _, state, quantization_map = tied(qtype)
    for key in state:
        if key.startswith("head.") or key.endswith("put_scale"):
            continue  # tied to the table; scales of activations that there are not
        rest = {name: tensor for name, tensor in state.items() if name != key}
        module = key.partition(".")[0]
        assert_refused(rest, quantization_map, rf"[Mm]issing.*{module}\.")


def test_requantize_hides_unexpected_tensors_there() -> None:
    _, state, quantization_map = tied("qint4")
    for key in ("other", "body.other", "body.weight._other"):
        refused = state | {key: torch.ones(2)}
        assert_refused(refused, quantization_map, rf"unexpected.*{key}")
    fresh = Tied()
    quantal.requantize(fresh, state | {"other": torch.ones(2)}, quantization_map, strict=False)
    assert fresh.body.frozen


@pytest.mark.parametrize("qtype", QTYPES)
def test_requantize_checks_no_shapes_and_dtypes_there(qtype: str) -> None:
    _, state, quantization_map = tied(qtype)
    for key, tensor in state.items():
        if key.endswith("put_scale"):
            continue
        wrong = torch.zeros(3, 3, 3, dtype=tensor.dtype)
        assert_refused(state | {key: wrong}, quantization_map, "size mismatch|shape")
    codes = next(key for key in state if key.startswith("body.weight._data"))
    wide = state[codes].to(torch.int32)
    assert_refused(state | {codes: wide}, quantization_map, r"body\.weight.*int32")


def test_requantize_leaves_buffers_on_meta_uninitialised_there() -> None:
    """Those that no file has: an error names them, and who fills them beforehand gets a model."""
    expected, state, quantization_map = tied("qint8")
    with torch.device("meta"):
        fresh = Tied()
    with pytest.raises(ValueError, match=r"no values for \['angles'\] on the meta device"):
        quantal.requantize(fresh, state, quantization_map)
    assert type(fresh.body) is nn.Linear
    fresh.angles = torch.arange(64.0)
    quantal.requantize(fresh, state, quantization_map)
    assert torch.equal(fresh(TOKENS), expected(TOKENS))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("qtype", QTYPES)
def test_requantize_unties_weights_there(qtype: str, device: str) -> None:
    expected, state, quantization_map = tied(qtype)
    assert expected.head.weight is expected.table.weight
    with torch.device(device):
        fresh = Tied()
    fresh.angles = torch.arange(64.0)
    # A file of safetensors has one of the two.
    for given in (state, {k: v for k, v in state.items() if not k.startswith("head.weight")}):
        quantal.requantize(fresh, given, quantization_map)
        assert fresh.head.weight is fresh.table.weight
        assert torch.equal(fresh(TOKENS), expected(TOKENS))
        fresh = Tied()


def test_requantize_makes_everything_train_there() -> None:
    _, state, quantization_map = tied("qint8")
    fresh = Tied()
    fresh.norm.requires_grad_(False)
    fresh.body.bias.requires_grad_(False)
    quantal.requantize(fresh, state, quantization_map)
    assert not any(p.requires_grad for p in fresh.parameters())
    fresh = Tied()
    quantal.requantize(fresh, state, quantization_map)
    trains = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert trains == {"body.bias", "norm.weight", "norm.bias"}


# ---- gradients


def strided(x: torch.Tensor) -> list[torch.Tensor]:
    """The same values in other orders of memory."""
    wide = torch.stack([x, x], -1)[..., 0]
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    return [wide, turned]


@pytest.mark.parametrize("activations", [None, "qint8", "dynamic-qint8", "qfloat8"])
@pytest.mark.parametrize("kind", [name for name in WEIGHTED if name != "embedding"])
def test_backward_wants_contiguous_gradients_there(kind: str, activations: str | None) -> None:
    model = KINDS[kind].model()
    quantal.quantize(model, weights="qint8", activations=activations)
    x = KINDS[kind].input()
    if activations in ("qint8", "qfloat8"):
        with torch.no_grad(), quantal.Calibration(model):
            model(x)

    def gradients(x: torch.Tensor, seed: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        leaf = x.detach().requires_grad_()
        model(leaf).backward(seed)
        return [leaf.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    seed = torch.randn_like(model(x))
    expected = gradients(x, seed)
    for other in strided(x):
        for grad in [seed, *strided(seed)]:
            assert not other.is_contiguous()
            for got, wanted in zip(gradients(other, grad), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)
    # What sum() gives has strides of zero.
    ones = torch.ones(()).expand(seed.shape)
    for got, wanted in zip(gradients(x, ones), gradients(x, torch.ones_like(seed)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


# ---- files


@pytest.mark.parametrize("calibrated", [False, True])
def test_safetensors_cannot_save_a_norm_without_weights_there(
    calibrated: bool, tmp_path: Path
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(16, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 4)]
        made = nn.Sequential(*layers)
        quantal.quantize(made, weights="qint4", activations="qint8")
        return made

    model, x = make(), torch.randn(3, 16)
    assert isinstance(model[1], quantal.QLayerNorm)
    if calibrated:
        with torch.no_grad(), quantal.Calibration(model):
            model(x)
        assert model[1].output_scale != 1
    quantal.freeze(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = make()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(x), model(x))
