"""Models that Python scripted or traced, quantized, calibrated and frozen in C++."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

_BUILT = Path(__file__).parents[2] / "build/release/tests/python/tools/exchange_tool"
TOOL = os.environ.get("QUANTAL_EXCHANGE_TOOL", str(_BUILT))


class Classifier(nn.Module):
    """Tokens in, classes out: an embedding, an LSTM and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 24)
        self.lstm = nn.LSTM(24, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(self.embedding(x.abs().mul(4).long()))
        return self.head(y[:, -1])


class Attention(nn.Module):
    """Self-attention with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.norm(x + y)


def encoder(**options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.GELU(),
        nn.Linear(16, 6),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (images, (4, 3, 8, 8)),
    "classifier": (Classifier, (3, 7)),
    "attention": (Attention, (2, 5, 16)),
    "encoder": (encoder, (2, 5, 16)),
    "encoder_norm_first": (lambda: encoder(norm_first=True, activation="gelu"), (2, 5, 16)),
}


def run_tool(
    model: torch.jit.ScriptModule, x: torch.Tensor, folder: Path, *how: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What the tool computed in each state, and the operations that fell back when frozen."""
    model.save(folder / "model.pt")
    save_file({"input": x}, folder / "input.safetensors")
    words = [TOOL, "script", folder / "model.pt", folder / "input.safetensors", *how]
    done = subprocess.run(
        [*map(str, words), str(folder / "output.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "output.safetensors"), done.stdout.splitlines()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("activations", ["none", "qint8"])
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("name", MODELS)
def test_quantizes(name: str, how: str, activations: str, mode: str, tmp_path: Path) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(2)
    model, x = make(), torch.randn(shape)
    model.train(mode == "train")
    made = (
        torch.jit.script(model) if how == "script" else torch.jit.trace(model, x, check_trace=False)
    )
    outputs, fallbacks = run_tool(made, x, tmp_path, "qint8", activations, mode)
    for state, runs in outputs.items():
        if state.startswith("calibrating"):
            continue
        for run in runs[1:]:
            torch.testing.assert_close(run, runs[0], rtol=0, atol=1e-6, msg=state)
    # Weight-only, nothing falls back.
    if activations == "none":
        assert not fallbacks
    exact = outputs["float_grad"][0]
    for grad in ("", "_grad"):
        assert torch.equal(outputs[f"frozen{grad}"], outputs[f"live{grad}"]), grad
        error = relative_error(outputs[f"frozen{grad}"][0], exact)
        assert 0 < error < (0.01 if activations == "none" else 0.04)
    # The fused layers that torch runs without gradients quantize the same activations.
    assert relative_error(outputs["frozen"], outputs["frozen_grad"]) < 1e-6
