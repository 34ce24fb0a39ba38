"""Quantized models of transformers and diffusers, saved and loaded as optimum-quanto does.

Neither library is imported before a class is used.
"""

from .diffusers_models import QuantizedDiffusersModel, QuantizedPixArtTransformer2DModel
from .shared_dict import ShardedStateDict
from .transformers_models import QuantizedModelForCausalLM, QuantizedTransformersModel

__all__ = [
    "QuantizedDiffusersModel",
    "QuantizedModelForCausalLM",
    "QuantizedPixArtTransformer2DModel",
    "QuantizedTransformersModel",
    "ShardedStateDict",
]
