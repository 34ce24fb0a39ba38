"""transformers' own use of optimum.quanto, unchanged, on Quantal."""

from typing import Any

import pytest
import quantal
import torch
from optimum.quanto import MaxOptimizer, QLinear, qint4, quantize_weight
from transformers import AutoModelForCausalLM, QuantoConfig, cache_utils
from transformers.cache_utils import QuantoQuantizedLayer
from transformers.utils import is_optimum_quanto_available, is_quanto_greater

# Relative error of logits for weights of a type, on random models of the fixture's size.
ERRORS = {"int8": 0.02, "float8": 0.06, "int4": 0.2, "int2": 0.8}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


def test_versions_satisfy_transformers() -> None:
    assert is_optimum_quanto_available()
    assert is_quanto_greater("0.2.5", accept_dev=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ERRORS)
def test_quanto_config(llama, llama_folder, tokens, weights: str, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=QuantoConfig(weights=weights), dtype=dtype
    )
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    quantized = [m for m in layers if isinstance(m, quantal.QLinear)]
    assert len(quantized) == len(layers) - 1  # the head stays float
    assert all(m.frozen and m.weight.qtype.name.startswith(f"q{weights}") for m in quantized)
    assert not any(t.is_meta for t in model.state_dict().values())
    with torch.no_grad():
        assert relative_error(model(tokens).logits, llama(tokens).logits) < ERRORS[weights]


@pytest.mark.parametrize("llama", ["untied"], indirect=True)
def test_transformers_saves_no_such_model(llama_folder, tmp_path) -> None:
    """With any implementation of optimum.quanto: QuantalConfig, or `quantal.save`, does."""
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=QuantoConfig(weights="int8")
    )
    with pytest.raises(ValueError, match=r"(?i)with .*quanto and is not serializable"):
        model.save_pretrained(tmp_path / "transformers")
    quantal.save(model, tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(llama_folder)
    quantal.requantize(again, tmp_path / "model.safetensors")
    saved = again.state_dict()
    assert all(torch.equal(saved[key], tensor) for key, tensor in model.state_dict().items())


def test_quanto_config_has_quantals_numbers(llama, llama_folder, tokens) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=QuantoConfig(weights="int4")
    )
    quantal.quantize(llama, weights="int4", exclude=["lm_head", "model.embed_tokens"])
    quantal.freeze(llama)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, llama(tokens).logits)


def rounded(t: torch.Tensor, bits: int, axis: int, group: int) -> torch.Tensor:
    """What a cache of keys or values keeps of them, by the formula."""
    rows = t.flatten() if axis == 0 else t.flatten(0, -2).t().flatten()
    groups = rows.reshape(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    scale[scale == 0] = 1
    kept = (scale * ((groups - low) / scale).round() + low).flatten()
    return (
        kept.reshape(t.shape) if axis == 0 else kept.reshape(t.shape[-1], -1).t().reshape(t.shape)
    )


class PlainLayer(QuantoQuantizedLayer):
    """transformers' layer of a cache, with that formula in the place of optimum.quanto."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return rounded(tensor, self.nbits, axis, self.q_group_size)

    def _dequantize(self, qtensor: torch.Tensor) -> torch.Tensor:
        return qtensor


GROUP = 16


def cache_options(bits: int, axis: int) -> dict[str, Any]:
    options = {"backend": "quanto", "nbits": bits, "axis_key": axis, "axis_value": axis}
    return options | {"q_group_size": GROUP, "residual_length": 8}


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("bits", [4, 2])
def test_quantized_cache(llama, tokens, monkeypatch, bits: int, axis: int) -> None:
    """Every token, and every logit, is that of a cache which plain torch rounds."""
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    options |= {"cache_implementation": "quantized", "cache_config": cache_options(bits, axis)}
    prompt, results = tokens[:, :8], []
    for layer in (QuantoQuantizedLayer, PlainLayer):
        monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", layer)
        mask = torch.ones_like(prompt)
        results.append(llama.generate(prompt, attention_mask=mask, **options))
    actual, expected = results
    assert isinstance(expected.past_key_values.layers[0], PlainLayer)
    assert not isinstance(actual.past_key_values.layers[0], PlainLayer)
    assert actual.sequences.shape == (1, 48)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize(("bits", "bound"), [(4, 0.06), (2, 0.3)])
def test_what_a_quantized_cache_costs(llama, tokens, bits: int, axis: int, bound: float) -> None:
    """Logits of the same tokens, one by one, beside those of a float cache."""
    text = torch.cat([tokens, tokens.flip(1), tokens], 1)[:, :24]
    cache = cache_utils.QuantizedCache(config=llama.config, **cache_options(bits, axis))
    with torch.no_grad():
        expected = llama(text).logits[0, 7:]
        found = [llama(text[:, :8], past_key_values=cache).logits[0, -1]]
        for i in range(8, 24):
            found.append(llama(text[:, i : i + 1], past_key_values=cache).logits[0, -1])
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert errors[0] < 1e-6  # the prompt's last token sees no quantized key
    assert all(0 < error < bound for error in errors[1:])


@pytest.mark.parametrize("axis", [0, -1])
def test_the_caches_own_calls(axis: int) -> None:
    keys = torch.randn(1, 2, 32, 16)
    scale, zero = MaxOptimizer()(keys, qint4, axis, 16)
    value = quantize_weight(keys, qint4, axis, scale, zero, 16).dequantize()
    assert value.shape == keys.shape
    assert ((value - keys).abs() <= scale.max() / 2 + 1e-6).all()


def test_the_caches_group_must_fit() -> None:
    keys = torch.randn(1, 1, 5, 4)
    with pytest.raises(ValueError, match=r"Group size \(64\) must be a divisor of \(5\)"):
        MaxOptimizer()(keys, qint4, -1, 64)


def test_linears_that_transformers_makes_on_meta() -> None:
    with torch.device("meta"):
        layer = QLinear(
            in_features=64, out_features=8, bias=False, dtype=torch.bfloat16, weights=qint4,
            activations=None,
        )  # fmt: skip
    layer.freeze()
    assert layer.weight.device.type == "meta"
    assert layer.weight.dtype == torch.bfloat16
