"""A module of the user's own gets a quantized kind."""

import json

import torch
from optimum.quanto import (
    Calibration,
    QModuleMixin,
    QTensor,
    freeze,
    qint4,
    qint8,
    quantization_map,
    quantize,
    register_qmodule,
)


class Gated(torch.nn.Linear):
    """A linear layer with a learned gate."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.gate = torch.nn.Parameter(torch.full((out_features,), 0.5, device=device, dtype=dtype))

    def forward(self, x):
        return torch.sigmoid(self.gate) * torch.nn.functional.linear(x, self.weight, self.bias)


class QGated(QModuleMixin, Gated):
    @classmethod
    def qcreate(cls, module, weights, activations=None, optimizer=None, device=None):
        return cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            dtype=module.weight.dtype,
            device=device,
            weights=weights,
            activations=activations,
            optimizer=optimizer,
            quantize_input=True,
        )

    @classmethod
    def from_module(cls, module, weights=None, activations=None, optimizer=None):
        qmodule = super().from_module(module, weights, activations, optimizer)
        if qmodule is not None:
            qmodule.gate = module.gate
        return qmodule

    def forward(self, x):
        y = torch.nn.functional.linear(x, self.qweight, self.bias)
        return torch.sigmoid(self.gate) * (y.dequantize() if isinstance(y, QTensor) else y)


# A Gated is a Linear, too: optimum-quanto asks its table in order.
from optimum.quanto.nn.qmodule import _QMODULE_TABLE  # noqa: E402

linear = _QMODULE_TABLE.pop(torch.nn.Linear)
register_qmodule(Gated)(QGated)
_QMODULE_TABLE[torch.nn.Linear] = linear

torch.set_num_threads(1)
torch.manual_seed(0)
found = {}
x = torch.randn(5, 128)
for weights, activations in ((qint8, None), (qint4, None), (qint8, qint8)):
    model = torch.nn.Sequential(Gated(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    exact = model(x)
    quantize(model, weights=weights, activations=activations)
    if activations is not None:
        with Calibration(momentum=0.9), torch.no_grad():
            model(x)
    live = model(x)
    live.sum().backward()
    gradient = model[0].weight.grad
    freeze(model)
    output = model(x)
    name = f"{weights.name} {activations.name if activations else None}"
    found[name] = {
        "kind": type(model[0]).__name__,
        "frozen": model[0].frozen,
        "map": quantization_map(model),
        "keys": sorted(model.state_dict()),
        "input_scale": model[0].input_scale.item(),
        "output": output.detach().tolist(),
        "gradient": gradient.tolist(),
        "live": live.detach().tolist(),
        "error": ((output - exact).norm() / exact.norm()).item(),
    }
print(json.dumps(found))
