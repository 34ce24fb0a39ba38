"""bitsandbytes' 4-bit normal floats and 8-bit layers, which run on CPUs, too."""

import copy
import warnings

import bitsandbytes as bnb
import torch
from torch import nn

from peers.peer import Floats, Linears, Scheme
from peers.torch_layers import TorchLinears, prepare_torch

SCHEMES = (
    Scheme("nf4", "w4", 4),
    Scheme("int8", "w8a8", 8),
)
_NF4_BLOCK = 64  # weights that share a scale


def version() -> str:
    """The version that is measured."""
    return f"bitsandbytes {bnb.__version__}"


def _nf4(weight: torch.Tensor) -> nn.Module:
    rows, columns = weight.shape
    layer = bnb.nn.Linear4bit(
        columns,
        rows,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        compress_statistics=False,
    )
    layer.weight = bnb.nn.Params4bit(
        weight.to(torch.bfloat16),
        requires_grad=False,
        quant_type="nf4",
        blocksize=_NF4_BLOCK,
        compress_statistics=False,
    )
    return layer.to("cpu").eval()


def _int8(weight: torch.Tensor) -> nn.Module:
    rows, columns = weight.shape
    layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=0.0)
    layer.weight = bnb.nn.Int8Params(
        weight.to(torch.float16), requires_grad=False, has_fp16_weights=False
    )
    return layer.to("cpu").eval()


def make(scheme: Scheme, weight: Floats, copies: int, threads: int) -> Linears:
    """See `peers.peer`."""
    prepare_torch(threads)
    warnings.simplefilter("ignore")
    w = torch.from_numpy(weight)
    # The activations' types in which neither layer converts them.
    layer, dtype = (_nf4(w), torch.bfloat16) if scheme.name == "nf4" else (_int8(w), torch.float16)
    # The first call lays the weight out for its kernel: before it is copied.
    layer(torch.zeros(1, weight.shape[1], dtype=dtype))
    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]
    scales = w.numel() // _NF4_BLOCK if scheme.name == "nf4" else len(w)
    weight_bytes = int(w.numel() * scheme.weight_bits / 8) + 4 * scales
    return TorchLinears(layers, lambda each, x: each(x), weight_bytes, dtype)
