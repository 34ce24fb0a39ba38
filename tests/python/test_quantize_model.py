"""quantize(), quantize_module() and freeze() over whole models: what is chosen, what is shared, and
the message of every mistake."""

import re

import pytest
import quantal
import torch
from module_kinds import KINDS, WEIGHTED
from quantized import QTYPES
from torch import nn


class Branches(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.second = nn.ModuleDict({"proj": nn.Linear(64, 64), "norm": nn.LayerNorm(64)})
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(self.second["norm"](self.second["proj"](x)))


def quantized_names(model: nn.Module) -> list[str]:
    return sorted(quantal.quantization_map(model))


# ---- include, exclude


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ["first.0", "first.2", "head", "second.proj"]),
        ("first.*", None, ["first.0", "first.2"]),
        (["first.0", "head"], None, ["first.0", "head"]),
        (None, "head", ["first.0", "first.2", "second.proj"]),
        (None, ["*.0", "second.*"], ["first.2", "head"]),
        ("first.*", "first.2", ["first.0"]),
        ("*.[02]", None, ["first.0", "first.2"]),
    ],
)
def test_patterns(include, exclude, expected: list[str]) -> None:
    model = Branches()
    quantal.quantize(model, weights="qint8", include=include, exclude=exclude)
    assert quantized_names(model) == expected


def test_several_calls_mix_types() -> None:
    model = Branches()
    quantal.quantize(model, weights="qint4", include="first.*")
    quantal.quantize(model, weights="qint8", activations="qint8", exclude="first.*")
    assert quantal.quantization_map(model) == {
        "first.0": {"weights": "qint4", "activations": "none"},
        "first.2": {"weights": "qint4", "activations": "none"},
        "second.proj": {"weights": "qint8", "activations": "qint8"},
        "second.norm": {"weights": "none", "activations": "qint8"},
        "head": {"weights": "qint8", "activations": "qint8"},
    }


# ---- what is wrong with a call


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_pattern_that_matches_nothing(argument: str) -> None:
    model = Branches()
    message = re.escape("[quantal.quantize] no module's name matches 'layers.*'")
    with pytest.raises(ValueError, match=message):
        quantal.quantize(model, weights="qint8", **{argument: ["head", "layers.*"]})
    assert quantized_names(model) == []


def test_nothing_to_quantize_to() -> None:
    message = re.escape("[quantal.quantize] expected weights, activations or both")
    with pytest.raises(ValueError, match=message):
        quantal.quantize(Branches())


@pytest.mark.parametrize("argument", ["weights", "activations"])
def test_unknown_qtype(argument: str) -> None:
    with pytest.raises(KeyError, match=r"expected one of qint2, qint4.*, got 'qint5'"):
        quantal.quantize(Branches(), **{argument: "qint5"})


@pytest.mark.parametrize("qtype", ["qint2", "qint4"])
def test_narrow_activations(qtype: str) -> None:
    model = Branches()
    message = re.escape(f"[quantal] expected activations of 8 bits, got {qtype}")
    with pytest.raises(ValueError, match=message):
        quantal.quantize(model, weights="qint8", activations=qtype)
    assert quantized_names(model) == []


def test_quantizing_twice() -> None:
    model = Branches()
    quantal.quantize(model, weights="qint8", include="head")
    message = re.escape("[quantal.quantize] 'head' is quantized: exclude it, or start from floats")
    with pytest.raises(ValueError, match=message):
        quantal.quantize(model, weights="qint8")
    assert quantized_names(model) == ["head"]


def test_model_that_is_itself_a_module_to_replace() -> None:
    linear = nn.Linear(8, 8)
    with pytest.raises(
        ValueError, match=r"itself a module to replace: call quantal.quantize_modul"
    ):
        quantal.quantize(linear, weights="qint8")
    quantized = quantal.quantize_module(linear, weights="qint8")
    assert isinstance(quantized, quantal.QLinear)
    assert quantized.weight is linear.weight


def test_model_without_quantizable_modules() -> None:
    with pytest.warns(UserWarning, match="no module of the model has a quantized kind"):
        quantal.quantize(nn.Sequential(nn.ReLU()), weights="qint8")


def test_quantize_module_without_a_quantized_kind() -> None:
    assert quantal.quantize_module(nn.ReLU(), weights="qint8") is None
    norm = nn.Embedding(4, 8, max_norm=1.0)
    assert quantal.quantize_module(norm, weights="qint8") is None


class PaddedConv(nn.Conv2d):
    """As the convolutions that pad as TensorFlow's do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


class ShiftedEmbedding(nn.Embedding):
    """As the position embeddings of OPT and BART in transformers."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input + 2)


class NamedLinear(nn.Linear):
    """A class of its own whose forward is torch's."""


def test_a_forward_of_its_own_is_not_dropped() -> None:
    model = nn.ModuleDict(
        {
            "conv": PaddedConv(3, 4, 2),
            "embedding": ShiftedEmbedding(9, 8),
            "linear": NamedLinear(8, 4),
        }
    )
    image, index = torch.randn(1, 3, 5, 5), torch.arange(7)
    expected = [model["conv"](image), model["embedding"](index)]
    with pytest.warns(UserWarning, match=r"forward of their own.*conv.*embedding.*register_qmod"):
        quantal.quantize(model, weights="qint8")
    assert quantized_names(model) == ["linear"]
    assert torch.equal(model["conv"](image), expected[0])
    assert torch.equal(model["embedding"](index), expected[1])
    states = {layer.name: layer.left_alone for layer in quantal.report(model).layers}
    assert states["conv"] == states["embedding"] == "its class has a forward of its own"


class ChannelNorm(nn.LayerNorm):
    """As that of ConvNeXt: over the first dimension."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.transpose(1, -1)).transpose(1, -1)


def test_no_warning_of_forwards_that_were_excluded_or_have_no_weights(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model = nn.Sequential(PaddedConv(3, 4, 2), nn.Conv2d(4, 4, 2), ChannelNorm(4))
    quantal.quantize(model, weights="qint8", exclude="0")
    assert not recwarn.list


def test_mixin_needs_a_torch_module() -> None:
    class Alone(quantal.QModuleMixin):
        pass

    with pytest.raises(TypeError, match=r"must inherit from a torch.nn.Module class"):
        Alone()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_freeze_refuses_weights_that_are_not_finite(value: float) -> None:
    model = Branches()
    quantal.quantize(model, weights="qint8")
    with torch.no_grad():
        model.second["proj"].weight[1, 2] = value
    with pytest.raises(ValueError, match=r"second.proj.weight"):
        quantal.freeze(model)
    assert not any(m.frozen for m in model.modules() if isinstance(m, quantal.QModuleMixin))


# ---- group sizes


@pytest.mark.parametrize("qtype", ["qint2", "qint4"])
@pytest.mark.parametrize(("wanted", "scales"), [(None, 2), (32, 8), (64, 4), (256, 1), (0, 1)])
def test_group_size(qtype: str, wanted: int | None, scales: int) -> None:
    model = nn.Sequential(nn.Linear(256, 3))
    quantal.quantize(model, weights=qtype, group_size=wanted)
    x = torch.randn(2, 256)
    live = model(x)
    quantal.freeze(model)
    assert model[0].weight._scale.shape == (3 * scales, 1)
    assert torch.equal(model(x), live)


def test_group_size_of_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(16, 4, 3))
    quantal.quantize(model, weights="qint4", group_size=48)
    x = torch.randn(1, 16, 5, 5)
    live = model(x)
    quantal.freeze(model)
    assert model[0].weight._scale.shape == (4 * 3, 1)
    assert torch.equal(model(x), live)


@pytest.mark.parametrize("wanted", [48, -1, 512])
def test_group_size_that_does_not_divide(wanted: int) -> None:
    model = nn.Sequential(nn.Linear(256, 3))
    message = re.escape(
        "[quantal] expected a group size that divides rows of 256 elements (qint2 and qint4 "
        f"only), got {wanted} for qint4"
    )
    with pytest.raises(ValueError, match=message):
        quantal.quantize(model, weights="qint4", group_size=wanted)
    assert type(model[0]) is nn.Linear


def test_group_size_of_8_bit_weights_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(256, 3))
    quantal.quantize(model, weights="qint8", group_size=32)
    assert model[0].weight_group_size is None
    with pytest.raises(ValueError, match=r"got 32 for qint8"):
        quantal.QLinear(256, 3, weights="qint8", group_size=32)


# ---- what is shared stays shared


class Twice(nn.Module):
    """One linear under two names, and one weight in two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64)
        self.other = nn.Sequential(self.one, nn.ReLU())
        self.tied = nn.Linear(64, 64)
        self.tied.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.other(self.one(x)))


@pytest.mark.parametrize("qtype", QTYPES)
def test_shared_modules_and_weights(qtype: str) -> None:
    model = Twice()
    x = torch.randn(3, 64)
    quantal.quantize(model, weights=qtype)
    assert model.one is model.other[0]
    assert model.one.weight is model.tied.weight
    model(x).sum().backward()
    assert len(list(model.parameters())) == 3
    with torch.no_grad():
        live = model(x)
        quantal.freeze(model)
        assert torch.equal(model(x), live)
    assert model.one is model.other[0]
    assert model.one.weight is model.tied.weight


def test_shared_module_is_chosen_by_either_name() -> None:
    model = Twice()
    quantal.quantize(model, weights="qint8", include="other.*")
    assert isinstance(model.one, quantal.QLinear)
    assert model.one is model.other[0]
    assert type(model.tied) is nn.Linear


@pytest.mark.parametrize("kind", WEIGHTED)
def test_parameters_mode_and_hooks_stay(kind: str) -> None:
    model = KINDS[kind].model()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    model.eval()
    before = dict(model.named_parameters())
    quantal.quantize(model, weights="qint8")
    assert all(p is before[name] for name, p in model.named_parameters())
    assert len(before) == len(list(model.parameters()))
    assert not model[0].training
    model(KINDS[kind].input())
    assert seen == [type(model[0])]


def test_parameters_that_do_not_train_stay_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.requires_grad_(False)
    quantal.quantize(model, weights="qint8")
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(torch.randn(2, 8)).requires_grad
