"""Fused experts of transformers' models: parameters of three dimensions, by name pattern."""

from pathlib import Path

import pytest
import quantal
import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

IS_V4 = transformers.__version__.startswith("4.")


@pytest.fixture
def model() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config).eval()


@pytest.mark.skipif(IS_V4, reason="experts are modules of their own before transformers 5")
@pytest.mark.parametrize("weights", ["qint8", "qint4", "qfloat8"])
def test_fused_experts(model: MixtralForCausalLM, weights: str, tmp_path: Path) -> None:
    tokens = torch.randint(99, (2, 12))
    with torch.no_grad():
        exact = model(tokens).logits
        quantal.quantize(model, weights=weights, parameters="*.experts.*", exclude="lm_head")
        names = set(quantal.quantization_map(model))
        assert {f"model.layers.{i}.mlp.experts.{p}" for i in (0, 1)
                for p in ("gate_up_proj", "down_proj")} <= names  # fmt: skip
        live = model(tokens).logits
        quantal.freeze(model)
        frozen = model(tokens).logits
    torch.testing.assert_close(frozen, live, rtol=0, atol=0)
    error = (frozen - exact).norm() / exact.norm()
    assert 0 < error < {"qint8": 0.02, "qint4": 0.25, "qfloat8": 0.1}[weights]
    experts = model.model.layers[0].mlp.experts
    assert not any(name.startswith("gate_up_proj") and p.is_floating_point() and p.dim() == 3
                   for name, p in experts.named_parameters())  # fmt: skip
    with torch.no_grad():
        generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 16)
    quantal.save(model, tmp_path / "model.safetensors")
    other = MixtralForCausalLM(model.config).eval()
    quantal.requantize(other, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, frozen, rtol=0, atol=0)


@pytest.mark.skipif(IS_V4, reason="experts are modules of their own before transformers 5")
@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8"])
def test_fused_experts_by_config(model: MixtralForCausalLM, weights: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "float")
    overrides = {"*.1.*.down_proj": {"weights": "int4", "group_size": 16}, "*.1.*up_proj": None}
    config = quantal.QuantalConfig(weights, parameters="*.experts.*_proj", overrides=overrides)
    quantized = MixtralForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    names = quantal.quantization_map(quantized)
    experts = {n.removeprefix("model.layers."): c["weights"] for n, c in names.items()
               if "experts" in n}  # fmt: skip
    layers = names["model.layers.0.self_attn.q_proj"]["weights"]
    assert experts == {
        "0.mlp.experts.gate_up_proj": layers,
        "0.mlp.experts.down_proj": layers,
        "1.mlp.experts.down_proj": "qint4",
    }
    tokens = torch.randint(99, (2, 12))
    with torch.no_grad():
        exact, expected = model(tokens).logits, quantized(tokens).logits
        assert 0 < (expected - exact).norm() < exact.norm()
        quantized.save_pretrained(tmp_path / "saved")
        again = MixtralForCausalLM.from_pretrained(tmp_path / "saved")
        assert quantal.quantization_map(again) == names
        torch.testing.assert_close(again(tokens).logits, expected, rtol=0, atol=0)


@pytest.mark.skipif(IS_V4, reason="experts are modules of their own before transformers 5")
def test_experts_that_stay_float_are_told_of(model: MixtralForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="4 parameters of three dimensions stay float, [4-9].%"):
        MixtralForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantal.QuantalConfig("int8")
        )
    with pytest.raises(ValueError, match=r"no parameter of two dimensions or more matches '\*.fc'"):
        MixtralForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantal.QuantalConfig("int8", parameters=["*.fc"])
        )


@pytest.mark.skipif(IS_V4, reason="experts are modules of their own before transformers 5")
def test_fused_experts_of_a_quantized_model(model: MixtralForCausalLM, tmp_path: Path) -> None:
    quantized = quantal.QuantizedModelForCausalLM.quantize(
        model, "qint4", exclude="lm_head", parameters="*.experts.*_proj", group_size=32
    )
    tokens = torch.randint(99, (2, 12))
    quantized.save_pretrained(tmp_path)
    again = quantal.QuantizedModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = quantized(tokens).logits
        torch.testing.assert_close(again(tokens).logits, expected, rtol=0, atol=0)
    experts = again.model.layers[0].mlp.experts
    assert experts.gate_up_proj.group_size == 32
