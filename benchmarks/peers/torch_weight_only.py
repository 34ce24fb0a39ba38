"""PyTorch's own kernels for quantized weights and bf16 activations."""

import torch

from peers.peer import GROUP, Floats, Linears, Scheme, quantize_symmetric
from peers.torch_layers import TorchLinears, nbytes, prepare_torch

SCHEMES = (
    Scheme("int8pack", "w8", 8),
    Scheme("int4pack-g128", "w4", 4),
)


def version() -> str:
    """The version that is measured."""
    return f"torch {torch.__version__}"


def _int8pack(weight: Floats, copies: int) -> Linears:
    codes, scales = (torch.from_numpy(t) for t in quantize_symmetric(weight, 8, None))
    row_scales = scales[:, 0].to(torch.bfloat16)
    return TorchLinears(
        [(codes.clone(), row_scales.clone()) for _ in range(copies)],
        lambda layer, x: torch.ops.aten._weight_int8pack_mm(x, *layer),
        nbytes(codes, row_scales),
        torch.bfloat16,
    )


def _int4pack(weight: Floats, copies: int) -> Linears:
    codes, scales = (torch.from_numpy(t) for t in quantize_symmetric(weight, 4, GROUP))
    inner_k_tiles = 2  # ignored on CPUs
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        codes.to(torch.int32) + 8, inner_k_tiles
    )
    # (groups, rows, 2): scale, and what is added after it; 0 since the kernel subtracts 8.
    scales_and_zeros = torch.stack((scales.t(), torch.zeros_like(scales.t())), dim=2)
    scales_and_zeros = scales_and_zeros.contiguous().to(torch.bfloat16)
    return TorchLinears(
        [(packed.clone(), scales_and_zeros.clone()) for _ in range(copies)],
        lambda layer, x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, layer[0], GROUP, layer[1]),
        nbytes(packed, scales_and_zeros),
        torch.bfloat16,
    )


def make(scheme: Scheme, weight: Floats, copies: int, threads: int) -> Linears:
    """See `peers.peer`."""
    prepare_torch(threads)
    return (_int8pack if scheme.name == "int8pack" else _int4pack)(weight, copies)
