"""PyTorch's dynamically quantized linear layer, on both of its engines for x86."""

import warnings

import torch
from torch.ao.nn.quantized import dynamic

from peers.peer import Floats, Linears, Scheme, UnavailableError, quantize_symmetric
from peers.torch_layers import TorchLinears, nbytes, prepare_torch

SCHEMES = (
    Scheme("fbgemm", "w8a8", 8),
    Scheme("onednn", "w8a8", 8),
)


def version() -> str:
    """The version that is measured."""
    return f"torch {torch.__version__}"


def make(scheme: Scheme, weight: Floats, copies: int, threads: int) -> Linears:
    """See `peers.peer`."""
    prepare_torch(threads)
    warnings.simplefilter("ignore", DeprecationWarning)
    if scheme.name not in torch.backends.quantized.supported_engines:
        raise UnavailableError("torch was built without this engine")
    torch.backends.quantized.engine = scheme.name  # decides what set_weight_bias packs for

    _, scales = quantize_symmetric(weight, 8, None)
    row_scales = torch.from_numpy(scales[:, 0]).to(torch.float64)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    quantized = torch.quantize_per_channel(
        torch.from_numpy(weight), row_scales, zeros, 0, torch.qint8
    )
    layers = []
    for _ in range(copies):
        layer = dynamic.Linear(weight.shape[1], weight.shape[0], dtype=torch.qint8)
        layer.set_weight_bias(quantized, None)
        layers.append(layer)
    scale_bytes = 4 * len(scales)
    return TorchLinears(layers, lambda layer, x: layer(x), nbytes(quantized) + scale_bytes)
