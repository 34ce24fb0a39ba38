"""A small CNN: quantized, calibrated, trained, frozen, saved as safetensors, requantized."""

import argparse
import json
from pathlib import Path

import torch
from optimum.quanto import Calibration, freeze, qtypes, quantization_map, quantize, requantize
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.norm = nn.LayerNorm(16 * 4 * 4)
        self.fc1 = nn.Linear(16 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = self.norm(torch.flatten(x, 1))
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


def batches(count, seed):
    """Noise of 12 by 12, in which a bright row or column tells the label."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(0, 10, (32,), generator=generator)
        images = torch.rand(32, 1, 12, 12, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            lines = image[0] if label < 5 else image[0].t()
            lines[2 * (label % 5) + 1] += 0.7
        yield images, labels


def train(model, steps, rate, seed):
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for images, labels in batches(steps, seed):
        optimizer.zero_grad()
        output = model(images)
        if hasattr(output, "dequantize") and type(output) is not torch.Tensor:
            output = output.dequantize()
        F.nll_loss(output, labels).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model):
    model.eval()
    right = [(model(x).argmax(1) == y).float().mean() for x, y in batches(20, seed=3)]
    return torch.stack(right).mean().item()


parser = argparse.ArgumentParser()
parser.add_argument("--weights", default="qint8")
parser.add_argument("--activations", default="none")
args = parser.parse_args()

torch.manual_seed(0)
torch.set_num_threads(1)
model = Net()
train(model, 80, 2e-3, seed=1)
found = {"float": accuracy(model)}

activations = None if args.activations == "none" else qtypes[args.activations]
quantize(model, weights=qtypes[args.weights], activations=activations)
if activations is not None:
    with Calibration():
        accuracy(model)
found["quantized"] = accuracy(model)

train(model, 40, 5e-4, seed=2)
found["trained"] = accuracy(model)

freeze(model)
found["frozen"] = accuracy(model)

save_file(model.state_dict(), "model.safetensors")
Path("map.json").write_text(json.dumps(quantization_map(model)))

with torch.device("meta"):
    fresh = Net()
state_dict = load_file("model.safetensors")
requantize(fresh, state_dict, json.loads(Path("map.json").read_text()), "cpu")
found["reloaded"] = accuracy(fresh)
found["map"] = quantization_map(fresh)
found["shapes"] = {key: [str(t.dtype), *t.shape] for key, t in sorted(state_dict.items())}
print(json.dumps(found))
