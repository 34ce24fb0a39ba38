"""A classifier of transformers: quantized but for its norms and head, calibrated, frozen."""

import json

import torch
from optimum.quanto import Calibration, QTensor, freeze, qint4, qint8, quantization_map, quantize
from transformers import BertConfig, BertForSequenceClassification

torch.set_num_threads(1)
config = BertConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=128, max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0,
)  # fmt: skip
generator = torch.Generator().manual_seed(0)
tokens = torch.randint(3, 64, (96, 16), generator=generator)
labels = torch.randint(0, 3, (96,), generator=generator)
tokens[:, 1] = tokens[:, 5] = labels  # the tokens that tell


def trained():
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(30):
        loss = model(tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def evaluate(model):
    with torch.no_grad():
        logits = model(tokens).logits
    logits = logits.dequantize() if isinstance(logits, QTensor) else logits
    return (logits.argmax(-1) == labels).float().mean().item(), logits.tolist()


found = {"float": evaluate(trained())}
for weights, activations in ((qint8, None), (qint4, None), (qint8, qint8)):
    model = trained()
    quantize(model, weights=weights, activations=activations, exclude=["*.LayerNorm", "classifier"])
    if activations is not None:
        with Calibration():
            evaluate(model)
    live = evaluate(model)
    freeze(model)
    name = f"{weights.name} {activations.name if activations else None}"
    found[name] = {
        "same": live == evaluate(model),
        "accuracy": live[0],
        "logits": live[1],
        "map": quantization_map(model),
    }
print(json.dumps(found))
