"""Trains a small network on Fashion-MNIST, quantizes it in several ways, and compares accuracy and
file size with float.

What Quantal does is in `quantized_weights` and `quantized_activations`."""

import argparse
import copy
import gzip
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from quantal import Calibration, QModuleMixin, freeze, quantization_map, quantize, requantize
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

EVAL_BATCH = 256
CALIBRATION_IMAGES = 2048


@dataclass
class Samples:
    """Images (n, 1, 28, 28) of bytes, and labels (n)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Samples":
        """The first `count` of them; 0: all."""
        count = count or len(self)
        return Samples(self.images[:count], self.labels[:count])

    def inputs(self, picked: torch.Tensor | slice) -> torch.Tensor:
        """Floats from -1 to 1, which the network takes."""
        return self.images[picked].float().div(127.5).sub(1)


@dataclass
class Result:
    """One line of the table."""

    scheme: str
    accuracy: float
    file_bytes: int


class Net(nn.Sequential):
    """A small convolutional network: ordinary torch, nothing of Quantal in it."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(16, 64, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )


def read_idx(folder: Path, name: str) -> torch.Tensor:
    """An IDX file of bytes, plain or .gz."""
    plain, packed = folder / name, folder / f"{name}.gz"
    if not plain.exists() and not packed.exists():
        raise FileNotFoundError(
            f"{plain}: no such file. Debian has Fashion-MNIST in the package "
            "dataset-fashion-mnist; --data names another folder of IDX files"
        )
    data = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).reshape(shape)


def load_samples(folder: Path, part: str, limit: int) -> Samples:
    """ "train" or "t10k"."""
    images = read_idx(folder, f"{part}-images-idx3-ubyte").unsqueeze(1)
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte").long()
    return Samples(images, labels).first(limit)


def train(net: nn.Module, samples: Samples, options: argparse.Namespace, rate: float) -> None:
    """An ordinary loop; quantized modules train as float ones do."""
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    net.train()
    for epoch in range(options.epochs):
        order = torch.randperm(len(samples)).split(options.batch_size)
        bar = tqdm(order, desc=f"epoch {epoch + 1}/{options.epochs}", unit="batch")
        average = None
        for picked in bar:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(samples.inputs(picked)), samples.labels[picked])
            loss.backward()
            optimizer.step()
            now = loss.item()
            average = now if average is None else 0.95 * average + 0.05 * now
            bar.set_postfix(loss=f"{average:.3f}", refresh=False)


@torch.no_grad()
def predict(net: nn.Module, samples: Samples, label: str) -> torch.Tensor:
    """Logits of all images."""
    net.eval()
    starts = range(0, len(samples), EVAL_BATCH)
    bar = tqdm(starts, desc=label, unit="batch")
    return torch.cat([net(samples.inputs(slice(i, i + EVAL_BATCH))) for i in bar])


class Demo:
    """The float model, and each way to quantize it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.train = load_samples(options.data, "train", options.limit)
        self.test = load_samples(options.data, "t10k", options.limit)
        self.net = Net()
        self.results: list[Result] = []

    def run(self) -> None:
        """Everything, one after the other."""
        train(self.net, self.train, self.options, rate=1e-3)
        self.save_and_read_back("float", self.net)
        for scheme in ("qint8", "qint4", "qint2", "qfloat8"):
            self.quantized_weights(scheme)
        self.quantized_activations()

    def quantized_weights(self, scheme: str) -> None:
        """Weights alone, after training."""
        net = copy.deepcopy(self.net)
        quantize(net, weights=scheme)
        freeze(net)
        self.save_and_read_back(scheme, net)

    def quantized_activations(self) -> None:
        """Activations with scales of run time, then calibrated, then after an epoch more."""
        dynamic = copy.deepcopy(self.net)
        quantize(dynamic, weights="qint8", activations="dynamic-qint8")
        freeze(dynamic)
        self.save_and_read_back("qint8, dynamic qint8", dynamic)

        net = copy.deepcopy(self.net)
        quantize(net, weights="qint8", activations="qint8")
        with Calibration(net):
            # Training images: the test must stay unseen.
            predict(net, self.train.first(CALIBRATION_IMAGES), "calibrate")
        calibrated = copy.deepcopy(net)
        freeze(calibrated)
        self.save_and_read_back("qint8, qint8", calibrated)

        train(net, self.train, argparse.Namespace(**vars(self.options) | {"epochs": 1}), rate=5e-4)
        freeze(net)
        self.save_and_read_back("qint8, qint8, trained", net)

    def save_and_read_back(self, scheme: str, net: nn.Module) -> None:
        """Saves the model and reads the file into a fresh one, which must compute the same."""
        path = self.options.out / f"{scheme.replace(', ', '-').replace(' ', '-')}.safetensors"
        before = predict(net, self.test, f"test {scheme}")
        save_file(net.state_dict(), path)
        fresh = Net()
        requantize(fresh, load_file(path), quantization_map(net))
        after = predict(fresh, self.test, "test the file")
        if not torch.equal(before, after):
            raise RuntimeError(f"{path}: the model that was read back gives other outputs")
        kinds = {type(m).__name__ for m in fresh.modules() if isinstance(m, QModuleMixin)}
        tqdm.write(f"{scheme}: {', '.join(sorted(kinds)) or 'no quantized modules'}")
        accuracy = 100 * (after.argmax(1) == self.test.labels).double().mean().item()
        self.results.append(Result(scheme, accuracy, path.stat().st_size))


def table(results: list[Result]) -> str:
    """Results beside the first one, which is float."""
    plain = results[0]
    lines = [f"{'weights, activations':<24}{'accuracy %':>12}{'vs float':>10}{'bytes':>12}{'':>9}"]
    for result in results:
        difference = result.accuracy - plain.accuracy
        ratio = result.file_bytes / plain.file_bytes
        lines.append(
            f"{result.scheme:<24}{result.accuracy:>12.2f}{difference:>+10.2f}"
            f"{result.file_bytes:>12,}{f'x {ratio:.2f}':>9}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default="/usr/share/datasets/fashion-mnist",
                        help="folder with the four IDX files, plain or .gz")  # fmt: skip
    parser.add_argument("--out", type=Path, default="results/python", help="folder for the models")
    parser.add_argument("--epochs", type=int, default=3, help="epochs to train in float")
    parser.add_argument("--batch-size", type=int, default=64, help="images a training step")
    parser.add_argument("--limit", type=int, default=0,
                        help="use only the first N images of each part; 0: all")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of images")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        demo = Demo(options)
    except FileNotFoundError as error:
        print(f"fashion_mnist: error: {error}", file=sys.stderr)
        return 1
    demo.run()
    print(table(demo.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
