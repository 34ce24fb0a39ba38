"""What loading quantized weights takes beside them."""

from pathlib import Path

import pytest
import quantal
import torch
from memory import peak_bytes
from optimum import quanto

QTYPES = ["qint8", "qint4", "qfloat8"]


def network(device: str = "cpu") -> torch.nn.Sequential:
    with torch.device(device):
        return torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))


def bytes_of(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


@pytest.fixture(params=QTYPES)
def quantized(request: pytest.FixtureRequest) -> torch.nn.Sequential:
    """A frozen model."""
    model = network()
    quantal.quantize(model, weights=request.param)
    quantal.freeze(model)
    return model


def test_the_profiler_sees_what_is_allocated() -> None:
    assert peak_bytes(lambda: [torch.ones(1000), torch.ones(500)][0]) == 6000
    assert peak_bytes(lambda: None) == 0


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_requantize_takes_the_tensors_that_it_is_given(quantized, device: str) -> None:
    state, kinds = quantized.state_dict(), quantal.quantization_map(quantized)
    model = network(device)
    peak = peak_bytes(lambda: quantal.requantize(model, state, kinds))
    assert peak < 0.25 * bytes_of(state)
    assert torch.equal(model[3].weight.dequantize(), quantized[3].weight.dequantize())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_requantize_from_a_file_makes_one_copy(quantized, tmp_path: Path, device: str) -> None:
    file = tmp_path / "model.safetensors"
    quantal.save(quantized, file)
    size = bytes_of(quantized.state_dict())
    model = network(device)
    peak = peak_bytes(lambda: quantal.requantize(model, file), mapped=file)
    # A model with memory of its own gets places for codes first, which are not written to.
    assert peak < (1.1 if device == "meta" else 2.25) * size
    assert torch.equal(model[3].weight.dequantize(), quantized[3].weight.dequantize())


def test_optimum_quanto_makes_all_floats_first() -> None:
    source = network()
    quanto.quantize(source, weights=quanto.qint8)
    quanto.freeze(source)
    state, kinds = source.state_dict(), quanto.quantization_map(source)
    floats = bytes_of(network().state_dict())
    assert floats > 3.5 * bytes_of(state)
    model = network("meta")
    assert peak_bytes(lambda: quanto.requantize(model, state, kinds)) >= floats
