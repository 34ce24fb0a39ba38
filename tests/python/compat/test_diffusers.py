"""diffusers' own use of optimum.quanto, unchanged, on Quantal; quantized models of diffusers."""

from pathlib import Path

import pytest
import quantal
import torch

diffusers = pytest.importorskip("diffusers")

ERRORS = {"int8": 0.02, "float8": 0.06, "int4": 0.15, "int2": 0.6}
DTYPES = [torch.float32, torch.bfloat16]
INPUTS = {
    "hidden_states": torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8),
    "encoder_hidden_states": torch.linspace(1, -1, 160).reshape(1, 5, 32),
    "timestep": torch.tensor([3]),
    "added_cond_kwargs": {"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)},
}


@pytest.fixture
def pixart():
    """A small transformer."""
    torch.manual_seed(2)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=64, sample_size=8, patch_size=2, caption_channels=32,
        norm_type="ada_norm_single",
    ).eval()  # fmt: skip


def output(model, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    def cast(value):
        if isinstance(value, dict):
            return {name: cast(item) for name, item in value.items()}
        return value.to(dtype) if value.is_floating_point() else value

    with torch.no_grad():
        return model(**cast(INPUTS), return_dict=False)[0].float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ERRORS)
def test_quanto_config(pixart, tmp_path: Path, weights: str, dtype: torch.dtype) -> None:
    pixart.save_pretrained(tmp_path / "float")
    model = type(pixart).from_pretrained(
        tmp_path / "float", torch_dtype=dtype,
        quantization_config=diffusers.QuantoConfig(weights_dtype=weights),
    )  # fmt: skip
    layer = model.transformer_blocks[0].attn1.to_q
    assert isinstance(layer, quantal.QLinear)
    assert layer.frozen
    expected = output(pixart)
    actual = output(model, dtype)
    assert (actual - expected).norm() / expected.norm() < ERRORS[weights]
    model.save_pretrained(tmp_path / "quantized")
    again = type(pixart).from_pretrained(tmp_path / "quantized", torch_dtype=dtype)
    assert again.transformer_blocks[0].attn1.to_q.weight.qtype == layer.weight.qtype
    assert torch.equal(output(again, dtype), actual)


@pytest.mark.parametrize("size", ["5GB", "100KB"])
@pytest.mark.parametrize("weights", ["qint8", "qint4"])
def test_quantized_model(pixart, tmp_path: Path, weights: str, size: str) -> None:
    kind = quantal.QuantizedPixArtTransformer2DModel
    model = kind.quantize(pixart, weights=weights, exclude="proj_out")
    model.save_pretrained(tmp_path, max_shard_size=size)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"config.json", "quanto_qmap.json"} < names
    assert ("diffusion_pytorch_model.safetensors" in names) == (size == "5GB")
    assert torch.equal(output(kind.from_pretrained(tmp_path)), output(pixart))


def test_what_is_wrong_is_said(pixart, tmp_path: Path) -> None:
    class Other(quantal.QuantizedDiffusersModel):
        base_class = diffusers.UNet2DModel

    kind = quantal.QuantizedPixArtTransformer2DModel
    kind.quantize(pixart, weights="qint8").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"base class \(UNet2DModel\) differs .*PixArt"):
        Other.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`base_class` attribute needs to be configured"):
        quantal.QuantizedDiffusersModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a diffusers model"):
        kind.quantize(torch.nn.Linear(2, 2), weights="qint8")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json not found in"):
        kind.from_pretrained(tmp_path)
