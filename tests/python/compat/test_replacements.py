"""What optimum.quanto has under other rules than Quantal."""

import optimum.quanto as quanto
import pytest
import quantal
import torch
from optimum.quanto.library.extensions import get_extension, is_extension_available
from optimum.quanto.library.extensions.cpp import ext
from optimum.quanto.library.qbytes_mm import qbytes_int8pack_mm, qbytes_int_mm, qbytes_mm
from optimum.quanto.library.quantize import quantize_affine, quantize_symmetric
from optimum.quanto.quantize import _quantize_submodule, set_module_by_name
from optimum.quanto.tensor.function import QuantizedLinearFunction
from optimum.quanto.tensor.packed import PackedTensor, pack_weights
from optimum.quanto.tensor.weights.awq import AWQWeightQBitsTensor


def network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Embedding(7, 64), torch.nn.Linear(64, 64), torch.nn.Conv1d(4, 4, 3)
    )


def test_quantizes_the_kinds_that_optimum_quanto_knows() -> None:
    model = network()
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    assert quanto.quantization_map(model) == {"1": {"weights": "qint4", "activations": "none"}}
    quantal.quantize(model, weights="qint4", exclude="1")
    assert set(quantal.quantization_map(model)) == {"0", "1", "2"}


def test_patterns_that_match_nothing_get_a_warning() -> None:
    model = network()
    with pytest.warns(UserWarning, match=r"no module's name matches \['\*\.norm'\]"):
        quanto.quantize(model, weights=quanto.qint8, exclude=["*.norm", "0"])
    assert isinstance(model[1], quanto.QLinear)


def test_one_submodule() -> None:
    model = network()
    for name, module in list(model.named_modules()):
        if name:
            _quantize_submodule(model, name, module, weights="qint8")
    assert [type(m).__name__ for m in model] == ["Embedding", "QLinear", "Conv1d"]
    assert model[1].name == "1"


def test_heterogeneous_activations_work() -> None:
    """optimum-quanto raises; here a layer takes the value of another's codes."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    quanto.quantize(model, weights="qint8", activations="qint8", include="0")
    quanto.quantize(model, weights="qint8", activations="qfloat8", include="1")
    x = torch.randn(4, 8)
    with quanto.Calibration(streamline=False):
        model(x)
    codes = model[0](x)
    assert codes.qtype == quanto.qint8
    assert torch.equal(model[1](codes).dequantize(), model[1](codes.dequantize()).dequantize())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(1,), (10,), (7, 3), (16, 33), (5, 2, 3)])
def test_packed_tensor(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = PackedTensor.pack(codes, bits)
    assert torch.equal(packed.unpack(), codes)
    assert packed._data.shape == (-(-shape[0] * bits // 8), *shape[1:])
    assert (packed.dtype, packed.size()) == (torch.uint8, codes.size())
    assert torch.equal(torch.add(packed, 1), codes + 1)


def test_packing_of_bytes() -> None:
    assert pack_weights(torch.arange(10), 4).tolist() == [0x50, 0x61, 0x72, 0x83, 0x94]
    with pytest.raises(ValueError, match="uint8 only and cannot be moved"):
        PackedTensor.pack(torch.zeros(4, dtype=torch.uint8)).to(torch.float32)


def test_frozen_codes_are_packed_tensors() -> None:
    model = network()
    quanto.quantize(model, weights="qint4")
    quanto.freeze(model)
    assert isinstance(model[1].weight._data, PackedTensor)
    assert isinstance(model[1].weight, quanto.WeightQBitsTensor)
    assert not isinstance(model[1].weight, AWQWeightQBitsTensor)


def test_no_extensions_and_no_foreign_layouts() -> None:
    assert not is_extension_available("quanto_cpp")
    with pytest.raises(KeyError):
        get_extension("quanto_cuda")
    with pytest.raises(TypeError, match="a layout of optimum-quanto's kernels"):
        AWQWeightQBitsTensor(None)


def test_loaders_may_set_plain_tensors_as_codes() -> None:
    model = network()
    quanto.quantize(model, weights="qint4")
    quanto.freeze(model)
    weight = model[1].weight
    weight._scale = weight._scale * 2
    weight._data._data = weight._data._data.clone()
    model.requires_grad_(True)
    assert not any(part.requires_grad for part in weight.parameters())


@pytest.mark.parametrize("qtype", [quanto.qint8, quanto.qint4])
def test_linear_function(qtype: quanto.qtype) -> None:
    """Gradients go to the input, the float weight and the bias."""
    floats = [torch.randn(size, requires_grad=True) for size in ((2, 3, 64), (8, 64), (8,))]
    x, latent, bias = floats
    if qtype.bits == 8:
        scale = quanto.AbsmaxOptimizer()(latent, qtype, 0)
        weight = quanto.WeightQBytesTensor.quantize(latent, qtype, 0, scale)
    else:
        scale, shift = quanto.MaxOptimizer()(latent, qtype, 0, 32)
        weight = quanto.WeightQBitsTensor.quantize(latent, qtype, 0, 32, scale, shift)
    y = QuantizedLinearFunction.apply(x, weight, bias)
    value = weight.dequantize().detach()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, value, bias))
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ value)
    torch.testing.assert_close(latent.grad, grad.flatten(0, 1).t() @ x.detach().flatten(0, 1))
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


def test_the_librarys_functions_are_its_operators() -> None:
    x, scale = torch.randn(4, 24), torch.rand(4, 1) + 0.1
    for ours, name, arguments in (
        (quantize_symmetric, "quantize_symmetric", (x, torch.int8, 0, scale)),
        (quantize_affine, "quantize_affine", (x, 4, 0, None, scale, scale)),
        (ext.lib.unpack, "unpack", (torch.randint(0, 256, (3, 5), dtype=torch.uint8), 2)),
    ):
        assert torch.equal(ours(*arguments), getattr(torch.ops.quanto, name)(*arguments))
    codes = torch.randint(-128, 128, (5, 24), dtype=torch.int8)
    expected = x.double() @ codes.double().t()
    bound = 24 * torch.finfo(x.dtype).eps * (x.abs().double() @ codes.double().abs().t())
    for product in (qbytes_mm, qbytes_int8pack_mm):
        actual = product(x, codes, output_scales=torch.ones(5, 1))
        assert ((actual - expected).abs() <= bound).all()
    exact = codes.long() @ codes.long().t()
    assert torch.equal(qbytes_int_mm(codes, codes, torch.ones(5, 1)).long(), exact)


def test_modules_by_name() -> None:
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.ReLU()), torch.nn.ReLU())
    for name in ("0.0", "1"):
        set_module_by_name(model, name, torch.nn.GELU())
    assert [type(m).__name__ for m in (model[0][0], model[1])] == ["GELU", "GELU"]


def test_packed_codes_of_a_state_dict() -> None:
    codes, missing = torch.randint(0, 4, (6, 5), dtype=torch.uint8), []
    state = {"weight._data._data": PackedTensor.pack(codes, 2)._data}
    arguments = ("weight._data.", 2, codes.shape, codes.stride(), missing)
    assert torch.equal(PackedTensor.load_from_state_dict(state, *arguments).unpack(), codes)
    assert (state, missing) == ({}, [])
    assert PackedTensor.load_from_state_dict(state, *arguments) is None
    assert missing == ["weight._data._data"]
