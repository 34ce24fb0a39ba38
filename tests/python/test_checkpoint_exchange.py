"""Checkpoints go both ways between optimum-quanto 0.2.7 and Quantal in C++, with the same codes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from quantized import QTYPES
from reference_quanto import quanto
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

_BUILT = Path(__file__).parents[2] / "build/release/tests/python/tools/exchange_tool"
TOOL = os.environ.get("QUANTAL_EXCHANGE_TOOL", str(_BUILT))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS = 7


def make_model(dtype: str = "float32") -> nn.Sequential:
    """The twin of make_model() in tools/exchange_tool.cc."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),  # rows of 144: one group a row
        nn.ReLU(),
        nn.Conv2d(32, 8, 3),  # rows of 288: groups of 96
        nn.Flatten(),
        nn.Linear(128, 24),
        nn.ReLU(),
        nn.Linear(24, 320, bias=False),
        nn.ReLU(),
        nn.Linear(320, 256),  # groups of 64
        nn.ReLU(),
        nn.Linear(256, 16),  # groups of 128
    )
    return model.to(DTYPES[dtype]).eval()


def make_input() -> torch.Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(4))


def run_tool(*words: str | Path) -> None:
    done = subprocess.run([TOOL, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def read_with_quantal(checkpoint: Path, dtype: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What Quantal saves again of a checkpoint, and what it computes with it."""
    folder = checkpoint.parent
    save_file({"input": make_input()}, folder / "input.safetensors")
    again, output = folder / "again.safetensors", folder / "output.safetensors"
    run_tool("read", dtype, checkpoint, folder / "input.safetensors", again, output)
    return load_file(again), load_file(output)["output"]


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), name
    same = actual.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8))
    assert same, name


def assert_same_output(actual: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    """Each layer rounds its sums once, of at most 320 terms in fp32; errors add up over layers."""
    unit = torch.finfo(DTYPES[dtype]).eps / 2 + 320 * 2.0**-24
    error = (actual - expected.float()).abs().max()
    assert error <= 2 * LAYERS * unit * expected.abs().max()


def quanto_model(qtype: str, dtype: str, **how: object) -> nn.Sequential:
    model = make_model(dtype)
    quanto.quantize(model, weights=quanto.qtypes[qtype], **how)
    return model


@pytest.mark.parametrize("map_place", ["beside", "metadata", "nowhere"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", QTYPES)
def test_quantal_reads_optimum_quanto(
    qtype: str, dtype: str, map_place: str, tmp_path: Path
) -> None:
    model = quanto_model(qtype, dtype)
    quanto.freeze(model)
    state, mapping = model.state_dict(), json.dumps(quanto.quantization_map(model))
    metadata = {"quantization_map": mapping} if map_place == "metadata" else None
    save_file(state, tmp_path / "model.safetensors", metadata=metadata)
    if map_place == "beside":
        (tmp_path / "quanto_qmap.json").write_text(mapping)
    again, output = read_with_quantal(tmp_path / "model.safetensors", dtype)
    # input_scale and output_scale say nothing where activations are not quantized.
    state = {k: v for k, v in state.items() if not k.endswith(("input_scale", "output_scale"))}
    assert {k for k in again if not k.endswith(("input_scale", "output_scale"))} == set(state)
    for name, tensor in state.items():
        assert_same_bits(again[name], tensor, name)
    with torch.no_grad():
        expected = model(make_input().to(DTYPES[dtype]))
    assert_same_output(output, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", QTYPES)
def test_optimum_quanto_reads_quantal(qtype: str, dtype: str, tmp_path: Path) -> None:
    save_file(make_model(dtype).state_dict(), tmp_path / "float.safetensors")
    save_file({"input": make_input()}, tmp_path / "input.safetensors")
    checkpoint, output = tmp_path / "model.safetensors", tmp_path / "output.safetensors"
    run_tool(
        "write",
        dtype,
        qtype,
        tmp_path / "float.safetensors",
        tmp_path / "input.safetensors",
        checkpoint,
        output,
    )
    with safe_open(checkpoint, "pt") as file:
        mapping = json.loads(file.metadata()["quantization_map"])
    assert mapping == {
        str(i): {"weights": qtype, "activations": "none"} for i in (0, 2, 4, 6, 8, 10, 12)
    }
    state = load_file(checkpoint)

    model = make_model(dtype)
    quanto.requantize(model, dict(state), mapping)
    loaded = model.state_dict()
    parts = {name for name in state if "weight._" in name}
    assert parts == {name for name in loaded if "weight._" in name}
    for name, tensor in state.items():
        if name.endswith(("input_scale", "output_scale")):
            assert loaded[name] == tensor == 1
        elif name.endswith("_shift") and dtype == "bfloat16" and qtype == "qint4":
            # Its int4 kernel keeps 8 * scale - shift, rounded to bfloat16.
            torch.testing.assert_close(loaded[name], tensor, rtol=2.0**-6, atol=2.0**-8)
        else:
            assert_same_bits(loaded[name], tensor, name)
    with torch.no_grad():
        expected = model(make_input().to(DTYPES[dtype]))
    assert_same_output(load_file(output)["output"], expected, dtype)


@pytest.mark.parametrize("qtype", QTYPES)
def test_both_write_the_same_file(qtype: str, tmp_path: Path) -> None:
    """In fp32 the quantized tensors of the two are the same bytes under the same keys."""
    save_file(make_model().state_dict(), tmp_path / "float.safetensors")
    save_file({"input": make_input()}, tmp_path / "input.safetensors")
    checkpoint = tmp_path / "model.safetensors"
    run_tool(
        "write",
        "float32",
        qtype,
        tmp_path / "float.safetensors",
        tmp_path / "input.safetensors",
        checkpoint,
        tmp_path / "output.safetensors",
    )
    model = quanto_model(qtype, "float32")
    quanto.freeze(model)
    written = load_file(checkpoint)
    for name, tensor in model.state_dict().items():
        if not name.endswith(("input_scale", "output_scale")):
            assert_same_bits(written[name], tensor, name)


def test_calibrated_activations(tmp_path: Path) -> None:
    """Static int8 inputs of linears: the scales arrive, and the same codes are multiplied."""
    model = quanto_model("qint8", "float32", activations=quanto.qint8, exclude=["0", "2", "4"])
    with torch.no_grad(), quanto.Calibration():
        model(make_input())
        expected = model(make_input())
    quanto.freeze(model)
    with torch.no_grad():
        expected = model(make_input())
    expected = expected.dequantize() if hasattr(expected, "dequantize") else expected
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "quanto_qmap.json").write_text(json.dumps(quanto.quantization_map(model)))
    again, output = read_with_quantal(tmp_path / "model.safetensors", "float32")
    for name in state:
        if name.endswith(("input_scale", "_data", "_scale")) and "output" not in name:
            assert again[name].float().equal(state[name].float()), name
    # A code may fall on the other side of a step where the sums before it round differently.
    steps = state["12.input_scale"] * state["12.weight._scale"].max() * 127
    assert (output - expected).abs().max() <= 4 * steps
