"""Calibration of a model whose modules have hooks of the user's."""

import json

import torch
from optimum.quanto import Calibration, QLinear, freeze, qfloat8, qint8, quantize

torch.set_num_threads(1)
torch.manual_seed(0)
samples = [torch.randn(16, 32) * (1 + i / 4) for i in range(5)]
found = {}
for activations in (qint8, qfloat8):
    for momentum in (0.9, 0.5):
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)
        )
        calls = []
        model[0].register_forward_pre_hook(lambda module, args, calls=calls: calls.append("before"))
        model.register_forward_hook(
            lambda module, args, output, calls=calls: calls.append(list(output.shape))
        )
        quantize(model, weights=qint8, activations=activations)
        seen = []
        handles = [
            m.register_forward_hook(lambda m, args, output, seen=seen: seen.append(m.name))
            for m in model.modules()
            if isinstance(m, QLinear)
        ]
        with torch.no_grad(), Calibration(momentum=momentum):
            for sample in samples:
                model(sample)
        for handle in handles:
            handle.remove()
        freeze(model)
        with torch.no_grad():
            output = model(samples[0])
        if hasattr(output, "qtype"):
            output = output.dequantize()
        found[f"{activations.name} {momentum}"] = {
            "shapes": [call for call in calls if call != "before"],
            "seen": seen,
            "first input_scale": model[0].input_scale.item(),
            "output": output.tolist(),
        }
print(json.dumps(found))
