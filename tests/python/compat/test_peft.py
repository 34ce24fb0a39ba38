"""LoRA adapters on quantized layers: training, merging, unmerging, saving."""

import copy

import pytest
import quantal
import quantal.integrations.peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model

QTYPES = ["qint8", "qint4", "qint2", "qfloat8"]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def adapted(llama, weights: str, tokens: torch.Tensor, steps: int = 5, **options: bool):
    """A model with trained adapters, and its losses."""
    quantal.quantize(llama, weights=weights, exclude=["lm_head", "model.embed_tokens"])
    quantal.freeze(llama)
    model = get_peft_model(llama, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


@pytest.mark.parametrize("weights", QTYPES)
def test_adapters_train(llama, tokens, weights: str) -> None:
    model, losses = adapted(llama, weights, tokens)
    assert losses[-1] < losses[0] - 0.1
    names = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B"}
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, quantal.integrations.peft.QuantizedLoraLinear)


@pytest.mark.parametrize("weights", QTYPES)
def test_merges_and_unmerges(llama, tokens, weights: str) -> None:
    model, _ = adapted(llama, weights, tokens)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    codes = [part.clone() for part in layer.base_layer.weight.parameters()]
    expected = logits(model, tokens)
    weight = layer.base_layer.weight.dequantize() + layer.get_delta_weight("default")
    model.merge_adapter()
    merged = layer.base_layer.weight
    assert layer.base_layer.frozen
    assert merged.qtype.name.startswith(weights)
    reference = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    reference.weight.data = weight.detach()
    again = quantal.quantize_module(reference, weights)
    again.freeze()
    assert torch.equal(merged.dequantize(), again.weight.dequantize())
    error = (logits(model, tokens) - expected).norm() / expected.norm()
    assert error < {"qint8": 0.02, "qfloat8": 0.06, "qint4": 0.25, "qint2": 1.0}[weights]
    model.unmerge_adapter()
    for part, old in zip(layer.base_layer.weight.parameters(), codes, strict=True):
        assert torch.equal(part.float(), old.float())
    assert torch.equal(logits(model, tokens), expected)


def test_merge_and_unload_saves_as_any_quantized_model(llama, tokens, tmp_path) -> None:
    model, _ = adapted(llama, "qint8", tokens)
    merged = model.merge_and_unload()
    assert isinstance(merged.model.layers[0].self_attn.q_proj, quantal.QLinear)
    quantal.QuantizedModelForCausalLM(merged).save_pretrained(tmp_path)
    again = quantal.QuantizedModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(merged, tokens))


def test_adapters_reload(llama, tokens, tmp_path) -> None:
    model, _ = adapted(llama, "qint4", tokens)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(logits(again.eval(), tokens), expected)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_on_a_model_that_was_quantized_while_it_loaded(
    llama, llama_folder, tokens, tmp_path, weights: str
) -> None:
    """By QuantalConfig: adapters train, merge, and the model is saved with what they learned."""
    loaded = type(llama).from_pretrained(
        llama_folder, quantization_config=quantal.QuantalConfig(weights)
    )
    model = get_peft_model(loaded, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    merged = model.eval().merge_and_unload()
    expected = logits(merged, tokens)
    merged.save_pretrained(tmp_path / "merged")
    again = type(llama).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, tokens), expected)


def test_a_broken_adapter_changes_nothing(llama, tokens) -> None:
    model, _ = adapted(llama, "qint8", tokens)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    codes = layer.base_layer.weight
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight"):
        layer.merge()
    assert layer.base_layer.weight is codes
    assert not layer.merged


def test_what_cannot_be_merged_is_said(llama, tokens) -> None:
    model, _ = adapted(llama, "qint8", tokens, steps=0, lora_bias=True)
    with pytest.raises(NotImplementedError, match="'default' is more than LoRA or DoRA"):
        model.merge_adapter()


def floats_of(layer: torch.nn.Module) -> torch.nn.Linear:
    """A float linear of a quantized one's values."""
    made = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    made.weight.data = layer.weight.dequantize()
    if layer.bias is not None:
        made.bias.data = layer.bias.data.clone()
    return made


@pytest.mark.parametrize("weights", ["qint8", "qint4"])
def test_dora_is_pefts(llama, tokens, weights: str) -> None:
    """Outputs, gradients and the merged weight are those of peft's DoRA over the decoded weight."""
    quantal.quantize(llama, weights=weights, exclude=["lm_head", "model.embed_tokens"])
    quantal.freeze(llama)
    exact = copy.deepcopy(llama)
    for name, module in list(exact.named_modules()):
        if isinstance(module, quantal.QLinear):
            exact.set_submodule(name, floats_of(module))
    models = []
    for base in (llama, exact):
        torch.manual_seed(3)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True)
        model = get_peft_model(base, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        for _ in range(3):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model.eval())
    ours, theirs = models
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens), **close)
    layers = [m.base_model.model.model.layers[0].self_attn.q_proj for m in models]
    magnitudes = [layer.lora_magnitude_vector["default"].weight for layer in layers]
    assert (magnitudes[0] != layers[0].base_layer.weight.dequantize().norm(dim=1)).any()
    torch.testing.assert_close(*magnitudes, **close)

    codes = layers[0].base_layer.weight
    expected = logits(ours, tokens)
    for model in models:
        model.merge_adapter()
    step = codes._scale.max() * 1.5
    merged = [layer.base_layer.weight for layer in layers]
    assert layers[0].base_layer.frozen
    assert (merged[0].dequantize() - merged[1]).abs().max() < step
    assert not torch.equal(merged[0].dequantize(), codes.dequantize())
    ours.unmerge_adapter()
    assert layers[0].base_layer.weight is codes
    assert torch.equal(logits(ours, tokens), expected)


def test_dora_reloads(llama, tokens, tmp_path) -> None:
    model, losses = adapted(llama, "qint4", tokens, use_dora=True)
    assert losses[-1] < losses[0] - 0.1
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(logits(again.eval(), tokens), expected)


def test_float_layers_are_pefts(llama) -> None:
    model = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__.startswith("peft.")
