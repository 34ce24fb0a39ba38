"""PyTorch's float layers: as users call them, and with the weight reordered for oneDNN."""

import torch
import torch.nn.functional as F  # noqa: N812

from peers.peer import Floats, Linears, Scheme
from peers.torch_layers import TorchLinears, nbytes, prepare_torch

SCHEMES = (
    Scheme("fp32", "float", 32),
    Scheme("bf16", "float", 16),
    Scheme("fp32-prepacked", "float", 32),
    Scheme("bf16-prepacked", "float", 16),
)


def version() -> str:
    """The version that is measured."""
    return f"torch {torch.__version__}"


def _prepacked(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def make(scheme: Scheme, weight: Floats, copies: int, threads: int) -> Linears:
    """See `peers.peer`."""
    prepare_torch(threads)
    dtype = torch.bfloat16 if scheme.name.startswith("bf16") else torch.float32
    w = torch.from_numpy(weight).to(dtype)
    if scheme.name.endswith("-prepacked"):
        # 16: the number of tokens that the reordering expects, as torch.compile gives it.
        layers = [torch.ops.mkldnn._reorder_linear_weight(w, 16) for _ in range(copies)]
        return TorchLinears(layers, _prepacked, nbytes(w), dtype)
    layers = [w.clone() for _ in range(copies)]
    return TorchLinears(layers, lambda layer, x: F.linear(x, layer), nbytes(w), dtype)
