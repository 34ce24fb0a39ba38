"""Quantizes a small model, exports it with torch.export and compiles it to an AOTInductor package,
which examples/aoti/run.cc runs without Python."""

import argparse
import sys
from pathlib import Path

import quantal
import torch
from torch import nn
from tqdm import tqdm


def quantized_model() -> nn.Module:
    """int4 weights; the last layer has int8 weights and activations that are quantized as it
    runs."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    ).eval()
    quantal.quantize(model, weights="qint4", exclude="6")
    quantal.quantize(model, weights="qint8", activations="dynamic-qint8", include="6")
    quantal.freeze(model)
    return model


@torch.no_grad()
def export(folder: Path) -> None:
    """Writes model.pt2, and sample.pt: an input and what the model makes of it."""
    torch.manual_seed(0)
    with tqdm(total=3, desc="quantizing", unit="step") as steps:
        model = quantized_model()
        steps.update()
        steps.set_description("exporting")
        x = torch.randn(4, 1, 28, 28)
        batch = torch.export.Dim("batch", min=1, max=1024)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        steps.update()
        steps.set_description("compiling")  # half a minute
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / "model.pt2")
        )
        steps.update()
    torch.save([x, model(x)], folder / "sample.pt")
    print(f"Written: {package}, {folder / 'sample.pt'}")


def main(arguments: list[str] | None = None) -> int:
    """Exports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where model.pt2 and sample.pt go")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    export(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
