"""transformers' own use of optimum.quanto, unchanged, on Quantal."""

import pytest
import quantal
import torch
from optimum.quanto import MaxOptimizer, QLinear, qint4, quantize_weight
from transformers import AutoModelForCausalLM, QuantoConfig
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


def test_quanto_config_has_quantals_numbers(llama, llama_folder, tokens) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=QuantoConfig(weights="int4")
    )
    quantal.quantize(llama, weights="int4", exclude=["lm_head", "model.embed_tokens"])
    quantal.freeze(llama)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, llama(tokens).logits)


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("bits", [4, 2])
def test_quantized_cache(llama, tokens, bits: int, axis: int) -> None:
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    cache = {"backend": "quanto", "nbits": bits, "axis_key": axis, "axis_value": axis}
    cache |= {"q_group_size": 16, "residual_length": 8}
    mask = torch.ones_like(tokens[:, :8])
    expected = llama.generate(tokens[:, :8], attention_mask=mask, **options)
    actual = llama.generate(
        tokens[:, :8], attention_mask=mask, **options, cache_implementation="quantized",
        cache_config=cache,
    )  # fmt: skip
    assert actual.shape == expected.shape
    # The first token of decoding sees no quantized key: the others may differ with the cache.
    assert torch.equal(actual[:, :9], expected[:, :9])


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
