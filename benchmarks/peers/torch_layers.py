"""What the peers that are called through torch share."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch

from peers.peer import Floats, Run

Layer = TypeVar("Layer")


class TorchLinears(Generic[Layer]):
    """Copies of a layer that torch calls one at a time, as eager users do."""

    def __init__(
        self,
        layers: Sequence[Layer],
        call: Callable[[Layer, torch.Tensor], torch.Tensor],
        weight_bytes: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layers = layers
        self.call = call
        self.weight_bytes = weight_bytes
        self.dtype = dtype

    def bind(self, x: Floats, copies: int) -> Run:
        """See `peers.peer.Linears`."""
        given = torch.from_numpy(x).to(self.dtype)
        call, layers = self.call, self.layers[:copies]

        def output() -> Floats:
            return call(layers[0], given).to(torch.float32).numpy().astype(np.float32, copy=False)

        return Run([lambda layer=layer: call(layer, given) for layer in layers], output)


def prepare_torch(threads: int) -> None:
    """Inference with so many threads."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)


def nbytes(*tensors: torch.Tensor) -> int:
    """The bytes of the elements of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
