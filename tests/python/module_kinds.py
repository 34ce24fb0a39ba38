"""One small module of each kind that Quantal quantizes, and an input for it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["CONVOLUTIONS", "KINDS", "WEIGHTED", "Kind"]


@dataclass(frozen=True)
class Kind:
    """How to make a module, and an input of it."""

    module: Callable[[], nn.Module]
    input: Callable[[], torch.Tensor]

    def model(self) -> nn.Sequential:
        """The module inside another: `quantize` replaces children."""
        return nn.Sequential(self.module())


def _floats(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape)


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(96, 8), _floats(5, 96)),
    "linear without bias": Kind(lambda: nn.Linear(33, 7, bias=False), _floats(2, 3, 33)),
    "conv1d": Kind(lambda: nn.Conv1d(8, 6, 3, padding=1), _floats(2, 8, 9)),
    "conv2d": Kind(lambda: nn.Conv2d(8, 6, 3, stride=2, groups=2), _floats(2, 8, 9, 7)),
    "conv2d reflect": Kind(
        lambda: nn.Conv2d(32, 4, 1, padding=1, padding_mode="reflect", bias=False),
        _floats(2, 32, 4, 4),
    ),
    "conv3d": Kind(lambda: nn.Conv3d(4, 5, 2, dilation=2), _floats(2, 4, 5, 4, 3)),
    "conv_transpose1d": Kind(
        lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1), _floats(2, 6, 5)
    ),
    "conv_transpose2d": Kind(
        lambda: nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), _floats(2, 6, 5, 4)
    ),
    "conv_transpose3d": Kind(
        lambda: nn.ConvTranspose3d(3, 4, 2, padding=1), _floats(1, 3, 4, 3, 5)
    ),
    "embedding": Kind(
        lambda: nn.Embedding(20, 64, padding_idx=3), lambda: torch.tensor([[1, 3, 19], [0, 1, 1]])
    ),
    "layer_norm": Kind(lambda: nn.LayerNorm(16), _floats(3, 16)),
    "layer_norm without affine": Kind(
        lambda: nn.LayerNorm(16, elementwise_affine=False), _floats(3, 16)
    ),
}

WEIGHTED = [name for name in KINDS if not name.startswith("layer_norm")]
CONVOLUTIONS = [name for name in KINDS if name.startswith("conv")]
