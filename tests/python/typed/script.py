"""What a user's type checker sees of the package: test_typing.py checks this file with mypy, and
nothing runs it. A line that is to be an error says so: an `ignore` without an error is one, too."""

from pathlib import Path

import quantal
import quantal.nn
import torch
from quantal import QuantalConfig
from torch import nn
from typing_extensions import assert_type


def quantize_a_model(model: nn.Module, path: Path) -> None:
    quantal.quantize(model, weights=quantal.qint8, activations="dynamic-int8")
    quantal.quantize(model, "int4", exclude=["*.head"], group_size=64, parameters="*.experts.*")
    quantal.quantize(model, weigths="int8")  # type: ignore[call-arg]
    quantal.quantize(model, weights=8)  # type: ignore[arg-type]
    with quantal.Calibration(model, momentum=0.9), torch.no_grad():
        model(torch.randn(2, 3))
    quantal.freeze(model)
    assert_type(quantal.quantization_map(model), dict[str, dict[str, str]])
    quantal.save(model, path)
    quantal.save(path, model)  # type: ignore[arg-type]
    quantal.requantize(model, path)
    quantal.requantize(model, model.state_dict(), quantal.quantization_map(model), strict=False)
    assert_type(quantal.report(model), quantal.Report)


def quantize_tensors(weight: torch.Tensor) -> torch.Tensor:
    scale = quantal.absmax_scale(weight, quantal.qint8, axis=0)
    assert_type(scale, torch.Tensor)
    quantal.quantize_weight(weight, quantal.qint8, scale)  # type: ignore[call-arg, arg-type]
    quantized: quantal.QTensor = quantal.quantize_weight(weight, quantal.qint8, 0, scale)
    assert_type(quantal.qint4.name, str)
    assert_type(quantal.qint4.bits, int)
    return quantized.dequantize()


def quantize_a_module(module: nn.Linear) -> None:
    made = quantal.quantize_module(module, weights=quantal.qint8)
    if made is not None:
        assert_type(made, quantal.QModuleMixin)
        made.freeze()
        assert_type(made.frozen, bool)


def configure() -> None:
    config = QuantalConfig("int4", overrides={"*.down_proj": "int8"}, parameters="*.experts.*")
    assert_type(config.weights, str | None)
    QuantalConfig(4)  # type: ignore[arg-type]


def load_a_model(folder: Path) -> None:
    model = quantal.QuantizedModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="200MB")
