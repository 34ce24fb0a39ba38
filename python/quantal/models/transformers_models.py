"""Quantized models of transformers."""

from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..nn import QModuleMixin
from .base import LazyClass, QuantizedModel, require

__all__ = ["QuantizedModelForCausalLM", "QuantizedTransformersModel"]


class QuantizedTransformersModel(QuantizedModel):
    """A quantized model of transformers. Subclasses name the class that makes models of a
    configuration in `auto_class`:

        class QuantizedClassifier(QuantizedTransformersModel):
            auto_class = AutoModelForSequenceClassification
    """

    library = "transformers"
    weights_file = "model.safetensors"
    auto_class: ClassVar[Any] = None

    @classmethod
    def _model_class(cls) -> type:
        return require("transformers", cls.__name__).PreTrainedModel

    @classmethod
    def _empty_model(cls, folder: Path, source: Any, options: dict[str, Any]) -> torch.nn.Module:
        if cls.auto_class is None:
            raise ValueError(
                f"Quantized models cannot be reloaded using {cls.__name__}: use a specialized "
                "class such as QuantizedModelForCausalLM"
            )
        transformers = require("transformers", cls.__name__)
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        with empty_weights("transformers"):
            model = cls.auto_class.from_config(config)
        if (folder / "generation_config.json").is_file() and model.can_generate():
            generation = transformers.GenerationConfig.from_pretrained(folder)
            model.generation_config = generation
        model.tie_weights()
        return model

    def _save_config(self, folder: Path) -> None:
        model = self._wrapped
        config = copy(model.config)
        if getattr(config, "tie_word_embeddings", False) and not _is_tied(model):
            config.tie_word_embeddings = False
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)


def _is_tied(model: Any) -> bool:
    """Whether input and output embeddings are one weight, or both float (then a load ties them)."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in ends or not any(isinstance(end, QModuleMixin) for end in ends):
        return True
    return ends[0].weight is ends[1].weight


def empty_weights(library: str) -> AbstractContextManager:
    """Modules made inside have their parameters on the meta device, their buffers where they would
    be."""
    try:
        from accelerate import init_empty_weights
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Reloading a quantized {library} model requires the accelerate library."
        ) from error
    return init_empty_weights(include_buffers=False)


class QuantizedModelForCausalLM(QuantizedTransformersModel):
    """A quantized causal language model."""

    auto_class = LazyClass("transformers", "AutoModelForCausalLM")
