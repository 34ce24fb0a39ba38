"""Quantized tensors, without modules."""

import io
import json

import torch
from optimum.quanto import (
    AbsmaxOptimizer,
    ActivationQBytesTensor,
    HqqOptimizer,
    MaxOptimizer,
    QTensor,
    WeightQBitsTensor,
    WeightQBytesTensor,
    absmax_scale,
    group,
    qfloat8,
    qint2,
    qint4,
    qint8,
    quantize_activation,
    quantize_weight,
    ungroup,
)

torch.set_num_threads(1)
torch.manual_seed(0)
found = {}
weight = torch.randn(32, 256)
x = torch.randn(4, 256)


def describe(q):
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    return {
        "is": [isinstance(q, kind) for kind in (QTensor, WeightQBitsTensor, WeightQBytesTensor)],
        "is activation": isinstance(q, ActivationQBytesTensor),
        "shape": [*q.shape, *q.size(), q.ndim, q.numel()],
        "dtype": [str(q.dtype), str(q.device), q.qtype.name, q.axis],
        "value": q.dequantize().tolist(),
        "pickled": torch.equal(again.dequantize(), q.dequantize()),
        "equal": [torch.equal(q, q.detach()), torch.equal(q, q.to("cpu"))],
        "plus one": (q + 1)[0, :4].tolist(),
        "sum": q.sum().item(),
    }


for qtype in (qint8, qfloat8):
    scale = AbsmaxOptimizer()(weight, qtype, 0)
    q = quantize_weight(weight, qtype, 0, scale)
    found[qtype.name] = describe(q) | {
        "scale": q._scale.tolist(),
        "linear": torch.nn.functional.linear(x, q).tolist(),
        "matmul": torch.matmul(x, q.t()).tolist(),
    }

for qtype, optimizer in ((qint4, MaxOptimizer()), (qint2, MaxOptimizer()), (qint4, HqqOptimizer())):
    for group_size in (128, None):
        scale, shift = optimizer(weight, qtype, 0, group_size)
        q = quantize_weight(weight, qtype, 0, scale, shift, group_size)
        name = f"{qtype.name} {type(optimizer).__name__} {group_size}"
        found[name] = describe(q) | {
            "scale": q._scale.tolist(),
            "linear": torch.nn.functional.linear(x, q).tolist(),
        }

for qtype in (qint8, qfloat8):
    q = quantize_activation(x, qtype, absmax_scale(x, qtype))
    kept = {
        "view": q.view(2, 2, 256),
        "transpose": q.t(),
        "permute": q.view(2, 2, 256).permute(2, 0, 1),
        "row": q[1],
        "rows": q[1:3],
        "unsqueeze": q.unsqueeze(0),
        "times": q * 2,
        "divided": q / 3,
        "detached": q.detach(),
        "cloned": q.clone(),
        "half": q.to(torch.float16),
    }
    found[f"activation {qtype.name}"] = describe(q) | {
        f"kept {name}": [isinstance(value, QTensor), str(value.dtype), value.dequantize().tolist()]
        for name, value in kept.items()
    }
    found[f"activation {qtype.name}"] |= {
        "gelu": torch.nn.functional.gelu(q).tolist(),
        "softmax": torch.softmax(q, -1).dequantize().tolist(),
        "mean": q.mean().item(),
        "matmul": (q @ q.t()).tolist(),
    }

latent = weight.clone().requires_grad_()
q = quantize_weight(latent, qint8, 0, AbsmaxOptimizer()(latent.detach(), qint8, 0))
q.dequantize().square().sum().backward()
found["gradient"] = latent.grad.tolist()
found["grouped"] = [
    torch.equal(ungroup(group(weight, axis, 32), axis, weight.shape), weight) for axis in (0, -1)
]
print(json.dumps(found))
