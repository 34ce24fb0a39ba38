"""QuantalConfig: quantizing while transformers loads; saving and loading what is quantized."""

import json

import pytest
import torch
import transformers
from accelerate.utils import CustomDtype
from quantal import Calibration, QuantalConfig, quantization_map
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer

IS_V4 = transformers.__version__.startswith("4.")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streamline", [True, False])
@pytest.mark.parametrize("activations", ["int8", "float8"])
def test_calibrated_scales_are_saved(
    llama_folder, tokens, tmp_path, activations: str, streamline: bool, dtype: torch.dtype
) -> None:
    config = QuantalConfig("int8", activations=activations)
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=config, dtype=dtype
    )
    at_run_time = logits(model, tokens)
    with Calibration(model, streamline=streamline):
        for text in (tokens, tokens.flip(1)):
            logits(model, text)
    expected = logits(model, tokens)
    assert not torch.equal(expected, at_run_time)
    scales = {k: v for k, v in model.state_dict().items() if k.endswith("put_scale")}
    assert len(scales) == 28
    assert all(v.item() != 1 for k, v in scales.items() if k.endswith("input_scale"))
    assert any(v.item() != 1 for k, v in scales.items() if k.endswith("output_scale")) != streamline
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    for key, scale in scales.items():
        assert torch.equal(again.state_dict()[key], scale), key
    assert torch.equal(logits(again, tokens), expected)


@pytest.mark.parametrize("llama", ["untied"], indirect=True)
def test_float8_e4m3fnuz(llama, llama_folder, tokens, tmp_path) -> None:
    """Where transformers cannot read such files, it writes none."""
    config = QuantalConfig("qfloat8_e4m3fnuz")
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
    data = model.model.layers[0].mlp.up_proj.weight._data
    assert data.dtype == torch.float8_e4m3fnuz
    error = (logits(model, tokens) - logits(llama, tokens)).norm() / logits(llama, tokens).norm()
    assert error < 0.06
    if IS_V4:
        with pytest.raises(ValueError, match="is not serializable"):
            model.save_pretrained(tmp_path / "saved")
        return
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("llama", ["untied"], indirect=True)
@pytest.mark.parametrize(
    ("parts", "floats"),
    [
        (["q_proj", "lm_head"], {"0.self_attn.q_proj", "1.self_attn.q_proj", "lm_head"}),
        (["model.layers.1.mlp", "self_attn", "lm_head"], {"mlp", "self_attn", "lm_head"}),
        ([], set()),
    ],
)
def test_modules_to_not_convert(llama, llama_folder, tokens, tmp_path, parts, floats) -> None:
    config = QuantalConfig("int8", modules_to_not_convert=parts)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantized = set(quantization_map(model))
    assert quantized < linears if parts else quantized == linears
    for name in linears - quantized:
        assert any(part in name for part in floats), name
        assert torch.equal(model.get_submodule(name).weight, llama.get_submodule(name).weight)
    for name in quantized:
        assert not any(f".{part}." in f".{name}." for part in parts), name
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert set(quantization_map(again)) == quantized
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("llama", ["untied"], indirect=True)
def test_device_maps_count_quantized_bytes(llama, llama_folder, tokens, tmp_path) -> None:
    """Half of the memory that floats need: they go to the disk in part, codes do not."""
    floats = sum(parameter.nbytes for parameter in llama.parameters())
    options = {"device_map": "auto", "max_memory": {"cpu": floats // 2}}
    offloaded = AutoModelForCausalLM.from_pretrained(
        llama_folder, **options, offload_folder=tmp_path
    )
    assert "disk" in offloaded.hf_device_map.values()
    for weights in ("int8", "int4", "int2", "float8"):
        model = AutoModelForCausalLM.from_pretrained(
            llama_folder, quantization_config=QuantalConfig(weights), **options
        )
        assert {str(tensor.device) for tensor in model.state_dict().values()} == {"cpu"}
        whole = AutoModelForCausalLM.from_pretrained(
            llama_folder, quantization_config=QuantalConfig(weights)
        )
        assert torch.equal(logits(model, tokens), logits(whole, tokens))


@pytest.mark.parametrize(
    ("weights", "size"), [("int8", 1), ("float8", 1), ("int4", 0.5), ("int2", 0.25), (None, None)]
)
def test_sizes_for_device_maps(weights: str | None, size: float | None) -> None:
    config = QuantalConfig(weights, activations=None if weights else "int8")
    quantizer = AutoHfQuantizer.from_config(config)
    assert quantizer.quantized_element_size == size
    kind = quantizer.adjust_target_dtype(torch.bfloat16)
    names = {1: torch.int8, 0.5: CustomDtype.INT4, 0.25: CustomDtype.INT2, None: torch.bfloat16}
    assert kind == names[size]
    assert quantizer.adjust_max_memory({0: 100, "cpu": 50}) == {0: 90, "cpu": 45}


@pytest.mark.parametrize("llama", ["untied"], indirect=True)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_saved_layers_on_the_disk(llama_folder, tokens, tmp_path, weights: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=QuantalConfig(weights)
    )
    model.save_pretrained(tmp_path / "saved")
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    if not IS_V4:
        with pytest.raises(ValueError, match="no weights on disk"):
            AutoModelForCausalLM.from_pretrained(
                llama_folder, quantization_config=QuantalConfig(weights),
                device_map={"": "disk"}, offload_folder=tmp_path / "disk",
            )  # fmt: skip
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved",
        device_map=dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"},
        offload_folder=tmp_path / "disk",
    )
    assert again.model.layers[1].mlp.up_proj.weight._scale.is_meta
    assert torch.equal(logits(again, tokens), logits(model, tokens))


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
