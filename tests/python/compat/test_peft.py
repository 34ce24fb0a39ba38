"""LoRA adapters on quantized layers: training, merging, unmerging, saving."""

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


def adapted(llama, weights: str, tokens: torch.Tensor, steps: int = 5):
    """A model with trained adapters, and its losses."""
    quantal.quantize(llama, weights=weights, exclude=["lm_head", "model.embed_tokens"])
    quantal.freeze(llama)
    model = get_peft_model(llama, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
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


def test_a_broken_adapter_changes_nothing(llama, tokens) -> None:
    model, _ = adapted(llama, "qint8", tokens)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    codes = layer.base_layer.weight
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight"):
        layer.merge()
    assert layer.base_layer.weight is codes
    assert not layer.merged


def test_what_cannot_be_is_said(llama, tokens) -> None:
    quantal.quantize(llama, weights="qint8", include="*.q_proj")
    quantal.freeze(llama)
    with pytest.raises(NotImplementedError, match="DoRA needs a float layer"):
        get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))


def test_float_layers_are_pefts(llama) -> None:
    model = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__.startswith("peft.")
