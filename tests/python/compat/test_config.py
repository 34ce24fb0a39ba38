"""QuantalConfig: quantizing while transformers loads; saving and loading what is quantized."""

import json

import pytest
import torch
from quantal import QuantalConfig, quantization_map
from transformers import AutoModelForCausalLM

MIXED = QuantalConfig(
    "int4",
    activations="dynamic-int8",
    group_size=32,
    overrides={
        "*.down_proj": "int8",
        "model.layers.0.*": {"optimizer": "hqq"},
        "*.o_proj": None,
        "*.v_proj": {"weights": None},
    },
)
CONFIGS = {
    "int8": QuantalConfig(),
    "int4": QuantalConfig("int4"),
    "int2": QuantalConfig("int2"),
    "float8": QuantalConfig("float8"),
    "qfloat8_e5m2": QuantalConfig("qfloat8_e5m2"),
    "static": QuantalConfig("int8", activations="int8"),
    "activations": QuantalConfig(None, activations="int8"),
    "mixed": MIXED,
}


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_saves_and_reloads(llama, llama_folder, tokens, tmp_path, name: str, dtype) -> None:
    config = CONFIGS[name]
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=config, dtype=dtype
    )
    expected = logits(model, tokens)
    assert not any(t.is_meta for t in model.state_dict().values())
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert quantization_map(again) == quantization_map(model)
    assert again.config.quantization_config.to_dict() == config.to_dict()
    saved = again.state_dict()
    for key, tensor in model.state_dict().items():
        assert saved[key].dtype == tensor.dtype, key
        assert torch.equal(saved[key].float(), tensor.float()), key
    assert torch.equal(logits(again, tokens), expected)
    error = (expected.float() - logits(llama, tokens)).norm() / logits(llama, tokens).norm()
    assert error < (0.8 if name == "int2" else 0.2)


def test_mixed_types_by_name(llama_folder) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=MIXED)
    kinds = quantization_map(model)
    dynamic = "dynamic-qint8"
    for layer in "01":
        prefix = f"model.layers.{layer}"
        assert kinds[f"{prefix}.mlp.down_proj"] == {"weights": "qint8", "activations": dynamic}
        assert kinds[f"{prefix}.mlp.up_proj"] == {"weights": "qint4", "activations": dynamic}
    # Layer 0 is named by an earlier pattern than "*.o_proj".
    assert "model.layers.0.self_attn.o_proj" in kinds
    assert "model.layers.1.self_attn.o_proj" not in kinds
    assert kinds["model.layers.1.self_attn.v_proj"]["weights"] == "none"
    assert not {"lm_head", "model.embed_tokens"} & kinds.keys()
    assert model.model.layers[0].mlp.up_proj.weight.group_size == 32


def test_embeddings_where_a_pattern_names_them(llama, llama_folder, tokens, tmp_path) -> None:
    config = QuantalConfig("int4", overrides={"model.embed_tokens": "int8", "lm_head": "int8"})
    if llama.config.tie_word_embeddings:
        with pytest.raises(ValueError, match="shares its weight: leave it float"):
            AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
        return
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
    kinds = quantization_map(model)
    assert kinds["lm_head"]["weights"] == kinds["model.embed_tokens"]["weights"] == "qint8"
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_json_keeps_the_order_of_patterns() -> None:
    text = json.dumps(MIXED.to_dict(), sort_keys=True)
    again = QuantalConfig.from_dict(json.loads(text))
    assert again.to_dict() == MIXED.to_dict()
    assert again.named_scheme("model.layers.0.self_attn.o_proj")[1]["weights"] == "int4"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weights": "int3"}, "expected one of qint2"),
        ({"weights": None}, "expected weights, activations or both"),
        ({"activations": "int4"}, "expected activations of 8 bits, got qint4"),
        ({"weights": "int4", "optimizer": "absmax"}, "expected optimizer max or hqq"),
        ({"weights": "int8", "optimizer": "hqq"}, "expected optimizer absmax"),
        ({"overrides": {"*": "int5"}}, "expected one of qint2"),
        ({"overrides": {"*": {"bits": 4}}}, "expected keys weights, activations"),
    ],
)
def test_what_no_layer_can_be(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        QuantalConfig(**options)


def test_a_group_that_does_not_fit_names_the_layer(llama_folder) -> None:
    config = QuantalConfig("int4", group_size=48)
    with pytest.raises(ValueError, match=r"model\.layers\.0.*group size"):
        AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
