"""quantal.save, load, requantize from files and report: one format for Python, C++ and
optimum-quanto."""

import copy
import json
from pathlib import Path

import pytest
import quantal
import torch
from quantized import QTYPES
from reference_quanto import quanto
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint_exchange import (
    DTYPES,
    assert_same_bits,
    assert_same_output,
    make_input,
    make_model,
    read_with_quantal,
    run_tool,
)
from torch import nn

SCALES = ("input_scale", "output_scale")


def small(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(160, 48), nn.ReLU(), nn.LayerNorm(48), nn.Linear(48, 160), nn.Linear(160, 1)
    ).to(dtype)


def quantized(qtype: str, dtype: torch.dtype = torch.float32, **how: object) -> nn.Sequential:
    model = small(dtype)
    quantal.quantize(model, weights=qtype, **how)
    return model


def frozen(qtype: str, dtype: torch.dtype = torch.float32, **how: object) -> nn.Sequential:
    model = quantized(qtype, dtype, **how)
    quantal.freeze(model)
    return model


def value(x: torch.Tensor) -> torch.Tensor:
    return x.dequantize() if isinstance(x, quantal.QTensor) else x


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    states = actual.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert_same_bits(states[0][name], tensor, name)


# ---- one's own files


@pytest.mark.parametrize("target", ["float", "meta", "same form"])
@pytest.mark.parametrize("state", ["frozen", "live"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("qtype", QTYPES)
def test_round_trip(
    qtype: str, dtype: torch.dtype, state: str, target: str, tmp_path: Path
) -> None:
    model = (frozen if state == "frozen" else quantized)(qtype, dtype)
    file = tmp_path / "model.safetensors"
    quantal.save(model, file)
    if target == "same form":
        again = quantized(qtype, dtype)
        for parameter in again.parameters():
            parameter.data.zero_()
        quantal.load(file, again)
    else:
        with torch.device("meta" if target == "meta" else "cpu"):
            again = small(dtype)
        quantal.requantize(again, file)
    assert_same_state(again, model)
    x = torch.randn(3, 160, dtype=dtype)
    assert torch.equal(again(x), model(x))
    assert [m.frozen for m in again if isinstance(m, quantal.QModuleMixin)] == [
        state == "frozen"
    ] * 3
    expected = model[0].weight.snr_db if state == "frozen" else None
    assert getattr(again[0].weight, "snr_db", None) == expected


@pytest.mark.parametrize("activations", ["qint8", "qfloat8_e4m3fn", "dynamic-qint8"])
@pytest.mark.parametrize("streamline", [True, False])
def test_activations(activations: str, streamline: bool, tmp_path: Path) -> None:
    model = quantized("qint8", activations=activations)
    x = torch.randn(16, 160)
    with torch.no_grad(), quantal.Calibration(model, streamline=streamline):
        model(x)
    quantal.freeze(model)
    quantal.save(model, tmp_path / "model.safetensors")
    again = small()
    quantal.requantize(again, tmp_path / "model.safetensors")
    assert quantal.quantization_map(again) == quantal.quantization_map(model)
    assert_same_state(again, model)
    outputs = again(x), model(x)
    assert isinstance(outputs[0], quantal.QTensor) == isinstance(outputs[1], quantal.QTensor)
    assert torch.equal(value(outputs[0]), value(outputs[1]))


def test_group_sizes_and_quantizers_are_kept(tmp_path: Path) -> None:
    model = quantized("qint4", group_size=16, optimizer=quantal.HqqOptimizer())
    quantal.save(model, tmp_path / "live.safetensors")
    again = small()
    quantal.requantize(again, tmp_path / "live.safetensors")
    assert [m.weight_group_size for m in (again[0], again[3], again[4])] == [16, 16, 16]
    assert isinstance(again[0].optimizer, quantal.HqqOptimizer)
    quantal.freeze(model)
    quantal.freeze(again)
    assert_same_state(again, model)


def test_a_live_weight_of_an_optimizer_without_a_name(tmp_path: Path) -> None:
    model = quantized("qint4", optimizer=quantal.HqqOptimizer(iters=3))
    with pytest.raises(ValueError, match=r"'0.weight' is not frozen.*HqqOptimizer"):
        quantal.save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
    quantal.freeze(model)
    quantal.save(model, tmp_path / "model.safetensors")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 64)
        self.body = nn.Linear(64, 64)
        self.again = self.body
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.body(self.embedding(x))))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("state", ["frozen", "live"])
def test_shared_weights_are_stored_once(state: str, is_tied: bool, tmp_path: Path) -> None:
    model = Tied()
    quantal.quantize(model, weights="qint4", activations="qint8")
    if state == "frozen":
        quantal.freeze(model)
    quantal.save(model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        aliases = json.loads(file.metadata()["quantal.aliases"])
        names = set(file.keys())
    assert aliases == {
        "again.weight": "body.weight",
        "again.bias": "body.bias",
        "head.weight": "embedding.weight",
    }
    assert not any(name.startswith(("again.", "head.weight")) for name in names)
    again = Tied()
    if not is_tied:
        again.head.weight = nn.Parameter(torch.zeros(32, 64))
    quantal.requantize(again, tmp_path / "model.safetensors")
    assert again.head.weight is again.embedding.weight
    assert again.again is again.body
    assert again.head.activation_qtype is quantal.qint8
    x = torch.arange(8)
    assert torch.equal(again(x), model(x))


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        quantal.save(frozen("qint4"), tmp_path / name)
    contents = {(tmp_path / name).read_bytes() for name in ("a", "b", "c")}
    assert len(contents) == 1


def test_saving_replaces_the_file_as_a_whole(tmp_path: Path) -> None:
    target, link = tmp_path / "model.safetensors", tmp_path / "link"
    quantal.save(frozen("qint8"), target)
    target.chmod(0o640)
    link.symlink_to(target)
    loaded = small()
    quantal.requantize(loaded, target)
    before = loaded.state_dict()["0.weight._data"].clone()
    quantal.save(frozen("qint4"), link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert torch.equal(loaded.state_dict()["0.weight._data"], before)
    bytes_before = target.read_bytes()
    model = frozen("qint8")
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="'sparse': expected a dense tensor"):
        quantal.save(model, target)
    assert target.read_bytes() == bytes_before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "model.safetensors"]


def test_what_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on device meta"):
        quantal.save(frozen("qint8").to("meta"), tmp_path / "model.safetensors")


def test_folders_and_shards(tmp_path: Path) -> None:
    model = frozen("qint4")
    quantal.save(model, tmp_path / "whole")
    tensors = load_file(tmp_path / "whole")
    with safe_open(tmp_path / "whole", "pt") as file:
        metadata = file.metadata()
    names = sorted(tensors)
    shards = {"1.safetensors": names[::2], "2.safetensors": names[1::2]}
    folder = tmp_path / "sharded"
    folder.mkdir()
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard, metadata)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (folder, index, str(folder)):
        again = small()
        quantal.requantize(again, path)
        assert_same_state(again, model)
    index.write_text(json.dumps({"weight_map": {"0.bias": "../whole"}}))
    with pytest.raises(ValueError, match=r"names of files beside it, got '\.\./whole'"):
        quantal.requantize(small(), folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="got 0 files"):
        quantal.requantize(small(), tmp_path / "empty")


# ---- loading is strict, and all or nothing


def rewritten(tmp_path: Path, change: object, qtype: str = "qint8") -> Path:
    """A saved model whose tensors and metadata `change` has changed."""
    quantal.save(frozen(qtype, activations="qint8"), tmp_path / "good.safetensors")
    tensors = load_file(tmp_path / "good.safetensors")
    with safe_open(tmp_path / "good.safetensors", "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    return tmp_path / "bad.safetensors"


def edit_record(metadata: dict, **fields: object) -> None:
    records = json.loads(metadata["quantal.weights"])
    records["3.weight"] |= fields
    metadata["quantal.weights"] = json.dumps(records)


BROKEN = {
    "missing": (lambda t, m: t.pop("3.weight._scale"), r"expected tensor '3.weight._scale'"),
    "missing bias": (lambda t, m: t.pop("3.bias"), r"expected tensor '3.bias'"),
    "left over": (lambda t, m: t.update(x=torch.ones(1)), "no place for tensor 'x'"),
    "misshaped": (
        lambda t, m: t.update({"3.weight._data": torch.zeros(3, 3, dtype=torch.int8)}),
        r"'3.weight._data' has shape \(3, 3\), the model wants \(160, 48\)",
    ),
    "dtype of codes": (
        lambda t, m: t.update({"3.weight._data": t["3.weight._data"].to(torch.int16)}),
        r"'3.weight._data' has dtype torch.int16, the model wants torch.int8",
    ),
    "dtype": (
        lambda t, m: t.update({"3.bias": t["3.bias"].double()}),
        r"'3.bias' has dtype torch.float64, the model wants torch.float32",
    ),
    "scale of zero": (lambda t, m: t["3.weight._scale"].zero_(), "finite and positive"),
    "bad input scale": (
        lambda t, m: t["3.input_scale"].fill_(float("nan")),
        "'3.input_scale' to be a finite positive scale",
    ),
    "version": (lambda t, m: m.update({"quantal.format_version": "2"}), "format version 1"),
    "not JSON": (lambda t, m: m.update({"quantal.weights": "{"}), "is not JSON"),
    "a list": (lambda t, m: m.update({"quantal.aliases": "[]"}), "expected an object, got list"),
    "unknown layer": (
        lambda t, m: m.update({"quantal.aliases": '{"y.weight": "3.weight"}'}),
        "names 'y', which the model lacks",
    ),
    "unknown qtype": (lambda t, m: edit_record(m, weights="qint3"), "to name a qtype"),
    "shape": (lambda t, m: edit_record(m, shape=[2, 2]), r"has shape \(2, 2\)"),
    "dtype of record": (lambda t, m: edit_record(m, dtype="F16"), "has dtype F16"),
    "field": (lambda t, m: edit_record(m, group_size="x"), "'group_size' to be of type int"),
}


@pytest.mark.parametrize("into", ["requantize", "load"])
@pytest.mark.parametrize("how", BROKEN)
def test_an_error_changes_nothing(how: str, into: str, tmp_path: Path) -> None:
    change, message = BROKEN[how]
    path = rewritten(tmp_path, change)
    model = small() if into == "requantize" else quantized("qint8", activations="qint8")
    modules, state = dict(model.named_modules()), model.state_dict(keep_vars=True)
    values = {name: tensor.clone() for name, tensor in state.items()}
    run = quantal.requantize if into == "requantize" else lambda m, p: quantal.load(p, m)
    with pytest.raises(ValueError, match=message) as raised:
        run(model, path)
    assert str(path) in str(raised.value)
    assert dict(model.named_modules()) == modules
    after = model.state_dict(keep_vars=True)
    assert {name: id(tensor) for name, tensor in after.items()} == {
        name: id(tensor) for name, tensor in state.items()
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in values.items())


def test_truncated_and_absent_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    quantal.save(frozen("qint8"), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        quantal.requantize(small(), path)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        quantal.load(tmp_path / "none.safetensors", small())


def test_load_wants_the_same_form(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    quantal.save(frozen("qint8"), path)
    with pytest.raises(ValueError, match=r"the model's is not: quantize it the same way"):
        quantal.load(path, small())
    with pytest.raises(ValueError, match=r"quantized as qint8 .* the model's as qint4"):
        quantal.load(path, quantized("qint4"))
    quantal.save(small(), path)
    with pytest.raises(ValueError, match=r"is float, the model's is quantized"):
        quantal.load(path, quantized("qint8"))
    quantal.save(quantized("qint8"), path)
    with pytest.raises(ValueError, match="not frozen, the model's is"):
        quantal.load(path, frozen("qint8"))


def test_load_keeps_what_an_optimizer_holds(tmp_path: Path) -> None:
    quantal.save(quantized("qint8"), tmp_path / "model.safetensors")
    model = quantized("qint8")
    held = list(model.parameters())
    model[0].weight.data.zero_()
    with torch.inference_mode():
        quantal.load(tmp_path / "model.safetensors", model)
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    assert held[0].requires_grad
    assert_same_state(model, quantized("qint8"))


@pytest.mark.parametrize("how", ["uncalibrated", "not read", "read"])
def test_norm_without_weight(how: str, tmp_path: Path) -> None:
    """Its output's scale is in the file where it has one: C++ has no place for more."""
    last = nn.Linear(8, 8) if how == "read" else nn.Identity()
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False), last)
    fresh, x = copy.deepcopy(model), torch.randn(4, 8)
    quantal.quantize(model, weights="qint8", activations="qint8")
    if how != "uncalibrated":
        with quantal.Calibration(model):
            model(x)
    quantal.freeze(model)
    quantal.save(model, tmp_path / "model.safetensors")
    keys = {k for k in load_file(tmp_path / "model.safetensors") if k.startswith("1.")}
    assert keys == ({"1.output_scale"} if how == "read" else set())
    quantal.requantize(fresh, tmp_path / "model.safetensors")
    assert torch.equal(value(fresh(x)), value(model(x)))
    assert quantal.quantization_map(fresh) == quantal.quantization_map(model)


# ---- C++


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", QTYPES)
def test_cpp_reads_python(qtype: str, dtype: str, tmp_path: Path) -> None:
    model = make_model(dtype)
    quantal.quantize(model, weights=qtype)
    quantal.freeze(model)
    quantal.save(model, tmp_path / "model.safetensors")
    again, output = read_with_quantal(tmp_path / "model.safetensors", dtype)
    written = load_file(tmp_path / "model.safetensors")
    assert again.keys() == written.keys()
    for name, tensor in written.items():
        assert_same_bits(again[name], tensor, name)
    assert_same_output(output, model(make_input().to(DTYPES[dtype])).detach(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", QTYPES)
def test_python_reads_cpp(qtype: str, dtype: str, tmp_path: Path) -> None:
    inputs = {"weights": make_model(dtype).state_dict(), "input": {"input": make_input()}}
    for name, tensors in inputs.items():
        save_file(tensors, tmp_path / name)
    checkpoint, output = tmp_path / "model.safetensors", tmp_path / "output"
    run_tool("write", dtype, qtype, *(tmp_path / name for name in inputs), checkpoint, output)
    model = make_model(dtype)
    quantal.requantize(model, checkpoint)
    quantal.save(model, tmp_path / "again.safetensors")
    written, again = load_file(checkpoint), load_file(tmp_path / "again.safetensors")
    assert again.keys() == written.keys()
    for name, tensor in written.items():
        assert_same_bits(again[name], tensor, name)
    with safe_open(checkpoint, "pt") as one, safe_open(tmp_path / "again.safetensors", "pt") as two:
        metadata = [f.metadata() for f in (one, two)]
    for key in metadata[0]:
        if key != "format":
            assert json.loads(metadata[0][key]) == json.loads(metadata[1][key]), key
    actual = model(make_input().to(DTYPES[dtype])).detach()
    assert_same_output(actual, load_file(output)["output"], dtype)


# ---- optimum-quanto


@pytest.mark.parametrize("place", ["beside", "metadata", "nowhere", "argument"])
@pytest.mark.parametrize("qtype", QTYPES)
def test_python_reads_optimum_quanto(qtype: str, place: str, tmp_path: Path) -> None:
    model = small()[:4]  # its qint2 and qint4 weights of one row are refused
    if quanto.qtypes[qtype].bits == 8:
        model = small()
    skeleton = model
    original = nn.Sequential(*model)
    quanto.quantize(original, weights=quanto.qtypes[qtype])
    quanto.freeze(original)
    mapping = quanto.quantization_map(original)
    metadata = {"quantization_map": json.dumps(mapping)} if place == "metadata" else None
    save_file(original.state_dict(), tmp_path / "model.safetensors", metadata)
    if place == "beside":
        (tmp_path / "quanto_qmap.json").write_text(json.dumps(mapping))
    skeleton = small() if len(model) == 5 else small()[:4]
    given = mapping if place == "argument" else None
    quantal.requantize(skeleton, tmp_path, given)
    for name, tensor in original.state_dict().items():
        own = skeleton.state_dict()[name]
        assert_same_bits(own.reshape(tensor.shape), tensor, name)
    x = torch.randn(3, 160)
    torch.testing.assert_close(skeleton(x), original(x))


@pytest.mark.parametrize("qtype", ["qint2", "qint4"])
def test_one_row_without_groups_is_refused(qtype: str, tmp_path: Path) -> None:
    original = nn.Sequential(nn.Linear(48, 1))
    quanto.quantize(original, weights=quanto.qtypes[qtype])
    quanto.freeze(original)
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors.*0\.weight"):
        quantal.requantize(
            nn.Sequential(nn.Linear(48, 1)),
            tmp_path / "model.safetensors",
            quanto.quantization_map(original),
        )


@pytest.mark.parametrize("qtype", QTYPES)
def test_optimum_quanto_reads_python(qtype: str, tmp_path: Path) -> None:
    model = frozen(qtype)
    quantal.save(model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        mapping = json.loads(file.metadata()["quantization_map"])
    theirs = small()
    quanto.requantize(theirs, load_file(tmp_path / "model.safetensors"), mapping)
    for name, tensor in theirs.state_dict().items():
        assert_same_bits(tensor, model.state_dict()[name], name)
    x = torch.randn(3, 160)
    torch.testing.assert_close(theirs(x), model(x))


# ---- the report


def test_report() -> None:
    model = quantized("qint4", activations="qint8", exclude="4")
    with torch.no_grad(), quantal.Calibration(model):
        model(torch.randn(4, 160))
    live = quantal.report(model)
    quantal.freeze(model)
    report = quantal.report(model)
    layers = {layer.name: layer for layer in report.layers}
    assert list(layers) == ["0", "2", "3", "4"]
    assert (layers["0"].weights, layers["0"].group_size) == ("qint4", 32)
    assert (layers["3"].group_size, layers["3"].frozen) == (0, True)
    assert layers["0"].bytes_before == 4 * 160 * 48
    assert layers["0"].bytes_after == 160 * 48 // 2 + 48 * 5 * 8
    assert layers["0"].input_scale == model[0].input_scale.item()
    assert layers["4"].left_alone == "not quantized"
    assert 15 < layers["0"].snr_db < 30
    decoded, exact = model[0].weight.dequantize(), small()[0].weight.detach()
    noise = (decoded - exact).double().square().sum() / exact.double().square().sum()
    assert layers["0"].snr_db == pytest.approx(-10 * noise.log10().item())
    assert [layer.bytes_after for layer in live.layers] == [
        layer.bytes_after for layer in report.layers
    ]
    assert [layer.snr_db for layer in live.layers] == pytest.approx(
        [layer.snr_db for layer in report.layers]
    )
    state = model.state_dict().values()
    assert report.bytes_after == sum(tensor.nbytes for tensor in state)
    text = str(report).splitlines()
    assert text[0].split()[:3] == ["layer", "kind", "weights"]
    assert text[-1].startswith(f"all parameters and buffers: {report.bytes_before} bytes before")
