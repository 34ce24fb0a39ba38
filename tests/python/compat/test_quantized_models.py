"""QuantizedModelForCausalLM and its kin: files, reloading, exchange with optimum-quanto."""

import json
import subprocess
import sys
from pathlib import Path

import optimum.quanto as quanto
import pytest
import quantal
import torch
import transformers
from memory import peak_bytes
from quantal.models import ShardedStateDict

QTYPES = ["qint8", "qint4", "qint2", "qfloat8", "qfloat8_e5m2"]
CLASSES = {
    "quantal": quantal.QuantizedModelForCausalLM,
    "optimum.quanto": quanto.QuantizedModelForCausalLM,
}


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("weights", QTYPES)
def test_reloads_what_it_saved(llama, tokens, tmp_path, weights: str, name: str) -> None:
    model = CLASSES[name].quantize(llama, weights=weights)
    model.save_pretrained(tmp_path)
    files = {"config.json", "generation_config.json", "model.safetensors", "quanto_qmap.json"}
    assert {file.name for file in tmp_path.iterdir()} == files
    again = CLASSES[name].from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert quantal.quantization_map(again._wrapped) == quantal.quantization_map(llama)
    assert not again.training
    assert again.generate(tokens, max_new_tokens=2, do_sample=False).shape == (1, 11)


def test_quantal_keeps_ties(llama, tokens, tmp_path) -> None:
    tied = llama.config.tie_word_embeddings
    model = quantal.QuantizedModelForCausalLM.quantize(llama, weights="qint4")
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    again = quantal.QuantizedModelForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert again.config.tie_word_embeddings == tied
    saved = ShardedStateDict.of_folder(tmp_path, "model.safetensors")
    heads = [k for k in saved if ".weight._" in k and ("lm_head" in k or "embed_tokens" in k)]
    assert len(heads) == (3 if tied else 6)


def test_compat_leaves_embeddings_to_the_file(llama, tmp_path) -> None:
    """A quantized head and a float embedding are two weights from now on."""
    model = quanto.QuantizedModelForCausalLM.quantize(llama, weights="qint8")
    was_tied = llama.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    assert llama.config.tie_word_embeddings == was_tied
    assert type(llama.model.embed_tokens) is torch.nn.Embedding


def test_shards(llama, tokens, tmp_path) -> None:
    model = quantal.QuantizedModelForCausalLM.quantize(llama, weights="qint8")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(file.stat().st_size < 50_000 for file in shards)
    again = quantal.QuantizedModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("llama", ["untied"], indirect=True)
@pytest.mark.parametrize("weights", ["qint8", "qint4"])
def test_reloading_makes_no_floats(llama, tmp_path, weights: str) -> None:
    """At most one copy of what was saved, where optimum-quanto has all float weights besides."""
    floats = sum(parameter.nbytes for parameter in llama.parameters())
    model = quantal.QuantizedModelForCausalLM.quantize(llama, weights=weights)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    peak = peak_bytes(lambda: quantal.QuantizedModelForCausalLM.from_pretrained(tmp_path), file)
    assert peak <= 1.1 * file.stat().st_size < floats / 2


def test_shards_stay_in_their_folder(tmp_path) -> None:
    for file in ("../model.safetensors", "/model.safetensors", ""):
        with pytest.raises(ValueError, match="expected a file name in the index"):
            ShardedStateDict(tmp_path, {"weight": file})


def test_what_is_missing_is_said(llama, tmp_path) -> None:
    model = quantal.QuantizedModelForCausalLM.quantize(llama, weights="qint8")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be reloaded using QuantizedTransformersModel"):
        quantal.QuantizedTransformersModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a transformers model"):
        quantal.QuantizedModelForCausalLM.quantize(torch.nn.Linear(2, 2), weights="qint8")
    with pytest.raises(ValueError, match="must be a quantized transformers model"):
        quantal.QuantizedModelForCausalLM(transformers.LlamaForCausalLM(llama.config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="No safetensor weights found in"):
        quantal.QuantizedModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "quanto_qmap.json").unlink()
    with pytest.raises(ValueError, match="No quantization map found in"):
        quantal.QuantizedModelForCausalLM.from_pretrained(tmp_path)


def test_hooks_of_the_model_run(llama, tokens) -> None:
    model = quantal.QuantizedModelForCausalLM.quantize(llama, weights="qint8")
    calls = []
    llama.register_forward_hook(lambda *_: calls.append(1))
    logits(model, tokens)
    assert calls == [1]


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"": torch.device("cpu")}])
def test_device_maps_of_one_device(llama, tokens, tmp_path, device_map) -> None:
    model = quantal.QuantizedModelForCausalLM.quantize(llama, weights="qint8")
    model.save_pretrained(tmp_path)
    load = quantal.QuantizedModelForCausalLM.from_pretrained
    again = load(tmp_path, device_map=device_map)
    assert {t.device.type for t in again.state_dict().values()} == {"cpu"}
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    with pytest.raises(ValueError, match="expected a device_map of one device"):
        load(tmp_path, device_map={"model": "cpu", "lm_head": "cpu"})


def test_own_class(tmp_path) -> None:
    class QuantizedClassifier(quantal.QuantizedTransformersModel):
        auto_class = transformers.AutoModelForSequenceClassification

    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        vocab_size=50, num_labels=3,
    )  # fmt: skip
    bert = transformers.BertForSequenceClassification(config).eval()
    model = QuantizedClassifier.quantize(bert, weights="qint4", activations="qint8")
    model.save_pretrained(tmp_path)
    again = QuantizedClassifier.from_pretrained(tmp_path)
    tokens = torch.arange(6).reshape(1, 6)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


EXCHANGE = """
import sys, torch, transformers
transformers.logging.set_verbosity_error()
from optimum.quanto import QuantizedModelForCausalLM, quantize
assert quantize.__module__ == "optimum.quanto.quantize", quantize.__module__
source, target, *qtypes = sys.argv[1:]
tokens = (torch.arange(9).reshape(1, 9) * 7 % 96)
for qtype in qtypes:
    with torch.no_grad():
        model = QuantizedModelForCausalLM.from_pretrained(f"{source}/{qtype}")
        torch.save(model(tokens).logits, f"{target}/read_{qtype}.pt")
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{source}/float")
        model = QuantizedModelForCausalLM.quantize(model.eval(), weights=qtype)
        torch.save(model(tokens).logits, f"{target}/wrote_{qtype}.pt")
        model.save_pretrained(f"{target}/{qtype}")
"""


@pytest.mark.skipif(int(transformers.__version__[0]) > 4, reason="optimum-quanto 0.2.7 fits 4")
@pytest.mark.parametrize("llama", ["untied"], indirect=True)
def test_exchange_with_optimum_quanto(llama, llama_folder, tokens, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    llama.save_pretrained(ours / "float")
    qtypes, expected = ["qint8", "qint4", "qfloat8"], {}
    for qtype in qtypes:
        model = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
        model = quanto.QuantizedModelForCausalLM.quantize(model.eval(), weights=qtype)
        model.save_pretrained(ours / qtype)
        expected[qtype] = logits(model, tokens)
    program = [sys.executable, "-W", "ignore", "-c", EXCHANGE, ours, theirs, *qtypes]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for qtype in qtypes:
        torch.testing.assert_close(torch.load(theirs / f"read_{qtype}.pt"), expected[qtype])
        again = quanto.QuantizedModelForCausalLM.from_pretrained(theirs / qtype)
        wrote = torch.load(theirs / f"wrote_{qtype}.pt")
        torch.testing.assert_close(logits(again, tokens), wrote)
