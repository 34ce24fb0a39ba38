"""optimum-quanto's QLinear with frozen weights, in bf16, where its fast kernels are."""

import warnings
from importlib import metadata

import torch
from optimum import quanto
from torch import nn

from peers.peer import Floats, Linears, Scheme
from peers.torch_layers import TorchLinears, prepare_torch

SCHEMES = (
    Scheme("qint8", "w8", 8),
    Scheme("qint4", "w4", 4),
    Scheme("qfloat8", "fp8", 8),
    Scheme("qint2", "w2", 2),
)


def version() -> str:
    """The version that is measured."""
    return f"optimum-quanto {metadata.version('optimum-quanto')}"


def _layer(weight: torch.Tensor, qtype: quanto.qtype) -> nn.Module:
    rows, columns = weight.shape
    with torch.device("meta"):  # no float weight to fill with random numbers
        layer = nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    model = nn.Sequential(layer).eval()
    quanto.quantize(model, weights=qtype)
    quanto.freeze(model)
    return model[0]


def make(scheme: Scheme, weight: Floats, copies: int, threads: int) -> Linears:
    """See `peers.peer`."""
    prepare_torch(threads)
    warnings.simplefilter("ignore")
    w = torch.from_numpy(weight).to(torch.bfloat16)
    qtype = quanto.qtypes[scheme.name]
    layers = [_layer(w, qtype) for _ in range(copies)]
    groups = w.numel() // 128 if scheme.weight_bits < 8 else len(w)
    per_group = 4 if scheme.weight_bits < 8 else 2  # a scale and, for fewer bits, a shift in bf16
    weight_bytes = int(w.numel() * scheme.weight_bits / 8) + per_group * groups
    return TorchLinears(layers, lambda layer, x: layer(x), weight_bytes, torch.bfloat16)
