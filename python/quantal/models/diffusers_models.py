"""Quantized models of diffusers."""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch

from .base import LazyClass, QuantizedModel, require
from .transformers_models import empty_weights

__all__ = ["QuantizedDiffusersModel", "QuantizedPixArtTransformer2DModel"]


class QuantizedDiffusersModel(QuantizedModel):
    """A quantized model of diffusers. Subclasses name its class in `base_class`:

    class QuantizedFluxTransformer2DModel(QuantizedDiffusersModel):
        base_class = FluxTransformer2DModel
    """

    library = "diffusers"
    weights_file = "diffusion_pytorch_model.safetensors"
    base_class: ClassVar[Any] = None

    @classmethod
    def _model_class(cls) -> type:
        return require("diffusers", cls.__name__).ModelMixin

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As `QuantizedModel.from_pretrained`."""
        if cls.base_class is None:
            raise ValueError("The `base_class` attribute needs to be configured.")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _empty_model(cls, folder: Path, source: Any, options: dict[str, Any]) -> torch.nn.Module:
        file = folder / "config.json"
        if not file.is_file():
            raise ValueError(f"{file.name} not found in {source}.")
        wanted, found = cls.base_class.__name__, json.loads(file.read_text("utf-8"))["_class_name"]
        if wanted != found:
            raise ValueError(
                f"Configured base class ({wanted}) differs from what was derived from the provided "
                f"configuration ({found})."
            )
        config = cls.base_class.load_config(folder, **options)
        with empty_weights("diffusers"):
            return cls.base_class.from_config(config)

    def _save_config(self, folder: Path) -> None:
        self._wrapped.save_config(folder)


class QuantizedPixArtTransformer2DModel(QuantizedDiffusersModel):
    """A quantized PixArt transformer."""

    base_class = LazyClass("diffusers", "PixArtTransformer2DModel")
