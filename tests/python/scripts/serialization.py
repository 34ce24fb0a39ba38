"""Frozen and unfrozen models in the files of torch.save."""

import json

import torch
from optimum.quanto import freeze, qtypes, quantization_map, quantize, requantize


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 16), torch.nn.ReLU(),
        torch.nn.Linear(16, 4, bias=False),
    )  # fmt: skip


torch.set_num_threads(1)
x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
found = {}
for weights in ("qint2", "qint4", "qint8", "qfloat8", "qfloat8_e5m2"):
    for frozen in (False, True):
        model = network()
        quantize(model, weights=qtypes[weights])
        if frozen:
            freeze(model)
        with torch.no_grad():
            expected = model(x)
        kept = []
        for weights_only in (True, False):
            torch.save(model.state_dict(), "state.pt")
            state = torch.load("state.pt", weights_only=weights_only)
            # into a float model, and into one that is quantized already
            fresh = network()
            requantize(fresh, state, quantization_map(model))
            other = network()
            quantize(other, weights=qtypes[weights])
            other.load_state_dict(state, assign=weights_only)
            kept += [torch.equal(loaded(x), expected) for loaded in (fresh, other)]
        torch.save(model, "model.pt")
        whole = torch.load("model.pt", weights_only=False)
        kept.append(torch.equal(whole(x), expected))
        found[f"{weights} {'frozen' if frozen else 'live'}"] = {
            "kept": kept,
            "output": expected.tolist(),
            "state": {key: [str(t.dtype), *t.shape] for key, t in state.items()},
            "frozen": [m.frozen for m in (*whole, *other) if hasattr(m, "frozen")],
        }
print(json.dumps(found))
