#!/usr/bin/env python3
"""Times Quantal's convolutions beside torch's float and quantized ones, in one run.

All take turns in every round, so that what changes on the machine meanwhile meets all of them.
Each result is compared with float64 before it is timed. A time is the least of the rounds' medians.
Times of int8 activations include quantizing them, from float to float.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import machine
import report
from tqdm import tqdm

MAX_ERROR = 0.2  # of a result, relative: beyond it something is not computed at all


@dataclass(frozen=True)
class Layer:
    """A square two-dimensional convolution over one square image a sample."""

    name: str
    channels: int
    size: int
    rows: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    batch: int = 1

    @property
    def padding(self) -> int:
        """That keeps the size at stride 1."""
        return self.kernel // 2

    @property
    def products(self) -> int:
        """Multiplications of one call."""
        out = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return self.batch * out**2 * self.rows * self.channels // self.groups * self.kernel**2


LAYERS = (
    Layer("stem 7x7", 3, 224, 64, kernel=7, stride=2),
    Layer("stem 3x3, stride 2", 3, 224, 32, stride=2),
    Layer("3x3 of 64 at 56", 64, 56, 64),
    Layer("3x3 64 to 128, stride 2", 64, 56, 128, stride=2),
    Layer("3x3 of 128 at 28", 128, 28, 128),
    Layer("3x3 of 256 at 14", 256, 14, 256),
    Layer("3x3 of 512 at 14", 512, 14, 512),
    Layer("3x3 of 512 at 7", 512, 7, 512),
    Layer("1x1 16 to 96 at 112", 16, 112, 96, kernel=1),
    Layer("1x1 96 to 24 at 56", 96, 56, 24, kernel=1),
    Layer("1x1 64 to 256 at 56", 64, 56, 256, kernel=1),
    Layer("1x1 256 to 1024 at 14", 256, 14, 1024, kernel=1),
    Layer("1x1 1024 to 2048 at 14", 1024, 14, 2048, kernel=1),
    Layer("1x1 512 to 128 at 1", 512, 1, 128, kernel=1),
    Layer("3x3 of 8 at 4", 8, 4, 8),
    Layer("3x3 of 128 at 28, 32 groups", 128, 28, 128, groups=32),
    Layer("3x3 of 256 at 28, 32 groups", 256, 28, 256, groups=32),
    Layer("3x3 of 1024 at 7, 32 groups", 1024, 7, 1024, groups=32),
    Layer("3x3 depthwise of 144 at 56", 144, 56, 144, groups=144),
    Layer("3x3 depthwise of 96 at 112, stride 2", 96, 112, 96, stride=2, groups=96),
    Layer("5x5 depthwise of 672 at 14", 672, 14, 672, kernel=5, groups=672),
    Layer("3x3 of 64 at 56, batch 8", 64, 56, 64, batch=8),
)
QUICK_LAYERS = (Layer("3x3", 16, 8, 32), Layer("3x3 depthwise", 32, 8, 32, groups=32))

REFERENCE = "torch/fp32"
SCHEMES = (
    REFERENCE,
    "torch/quantized-fbgemm",
    "torch/quantized-onednn",
    "quantal/qint8",
    "quantal/qint4",
    "quantal/qint8-static",
    "quantal/qint8-dynamic",
    "quantal/qint4-static",
    "quantal/qint2-static",
    "torch/Conv2d",
    "quantal/QConv2d-qint8",
    "quantal/QConv2d-qint4",
    "quantal/QConv2d-qint8-a8",
)


def base_of(scheme: str) -> str:
    """What a scheme's time is compared with: modules with the float module."""
    return "torch/Conv2d" if "Conv2d" in scheme else REFERENCE


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", default="", metavar="TEXT", help="only layers whose name has it")
    add("--rounds", type=int, default=5, help="turns of each scheme (%(default)s)")
    add("--seconds", type=float, default=0.1, help="length of a turn (%(default)s)")
    add("--threads", type=int, default=2, help="threads (%(default)s)")
    add("--isa", choices=("native", "avx512", "avx2"), default="native",
        help="avx2: hold all to AVX2; avx512: to AVX-512 with VNNI, without AMX")  # fmt: skip
    add("--build", type=Path, default=machine.ROOT / "build" / "release", help="build folder")
    add("--output", type=Path, default=machine.ROOT / "build" / "bench-results", help="folder")
    add("--quick", action="store_true", help="small layers, one short round: to see that it runs")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.seconds = 1, 0.01
    return given


Call = Callable[[], Any]


def calls(layer: Layer, memory_format: Any) -> tuple[dict[str, Call], Any]:
    """Every scheme as a function without arguments, and the float64 result."""
    import torch
    from torch.nn.functional import conv2d

    ops = torch.ops.quantal
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(
        (layer.rows, layer.channels // layer.groups, layer.kernel, layer.kernel),
        generator=generator,
    )
    x = torch.randn(
        (layer.batch, layer.channels, layer.size, layer.size), generator=generator
    ).contiguous(memory_format=memory_format)
    bias = torch.randn(layer.rows, generator=generator)
    shape = (layer.stride, layer.padding, 1, layer.groups)
    lists = ([layer.stride] * 2, [layer.padding] * 2, [1, 1], layer.groups)
    weights = {q: ops.quantize_weight(w, q) for q in ("qint8", "qint4", "qint2")}
    exact = conv2d(x.double(), w.double(), bias.double(), *shape)
    x_scale, y_scale = x.abs().max() / 127, float(exact.abs().max()) / 127

    def static(q: str) -> Call:
        return lambda: conv2d(
            ops.quantize_activation(x, "qint8", x_scale), weights[q], bias, *shape
        )

    per_row = torch.quantize_per_channel(
        w,
        w.abs().amax((1, 2, 3)).double() / 127,
        torch.zeros(layer.rows, dtype=torch.long),
        0,
        torch.qint8,
    )

    def by_engine(engine: str) -> Call:
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.conv2d_prepack(per_row, bias, *lists)

        def run() -> Any:
            codes = torch.quantize_per_tensor(x, 2 * float(x_scale), 64, torch.quint8)
            y = torch.ops.quantized.conv2d(codes, packed, y_scale, 128)
            return y.dequantize()

        return run

    found = {
        REFERENCE: lambda: conv2d(x, w, bias, *shape),
        "torch/quantized-fbgemm": by_engine("fbgemm"),
        "torch/quantized-onednn": by_engine("onednn"),
        "quantal/qint8": lambda: conv2d(x, weights["qint8"], bias, *shape),
        "quantal/qint4": lambda: conv2d(x, weights["qint4"], bias, *shape),
        "quantal/qint8-dynamic": lambda: ops.conv_dynamic(x, weights["qint8"], bias, *lists),
    }
    for q in ("qint8", "qint4", "qint2"):
        found[f"quantal/{q}-static"] = static(q)
    for name, module in modules(layer, w, bias, x, memory_format).items():
        found[name] = lambda module=module: module(x)
    return found, exact


def modules(layer: Layer, weight: Any, bias: Any, x: Any, memory_format: Any) -> dict[str, Any]:
    """The float module and frozen quantized copies of it, those of int8 activations for x."""
    import quantal
    import torch

    def make() -> Any:
        sides = (layer.kernel, layer.stride, layer.padding)
        module = torch.nn.Conv2d(layer.channels, layer.rows, *sides, groups=layer.groups)
        module.load_state_dict({"weight": weight, "bias": bias})
        return torch.nn.Sequential(module.to(memory_format=memory_format))

    found = {"torch/Conv2d": make()[0]}
    for name, q, activations in (
        ("qint8", "qint8", None),
        ("qint4", "qint4", None),
        ("qint8-a8", "qint8", "qint8"),
    ):
        model = make()
        quantal.quantize(model, weights=q, activations=activations)
        with quantal.Calibration():
            model(x)
        quantal.freeze(model)
        found[f"quantal/QConv2d-{name}"] = model[0]
    return found


def measure(call: Call, seconds: float) -> float:
    """The median of the calls that fit in a turn."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return median(taken)


def run_layer(layer: Layer, name: str, memory_format: Any, given: argparse.Namespace) -> list[Any]:
    """All schemes of one layer, in turn."""
    found, exact = calls(layer, memory_format)
    size = float(exact.square().mean().sqrt())
    errors = {}
    for scheme in SCHEMES:
        error = float((found[scheme]().double() - exact).square().mean().sqrt()) / size
        # Two bits lose about as much as they keep.
        if not error < MAX_ERROR and "qint2" not in scheme:
            raise RuntimeError(f"{layer.name}: {scheme} is off by {error:.3f}")
        errors[scheme] = error
    turns: dict[str, list[float]] = {scheme: [] for scheme in SCHEMES}
    for number in range(given.rounds):
        first = number * 3 % len(SCHEMES)
        for scheme in SCHEMES[first:] + SCHEMES[:first]:
            turns[scheme].append(measure(found[scheme], given.seconds))
    return [
        {
            "layer": asdict(layer),
            "format": name,
            "scheme": scheme,
            "ms": min(turns[scheme]) * 1e3,
            "gflops": 2 * layer.products / min(turns[scheme]) / 1e9,
            "error": errors[scheme],
            "rounds": turns[scheme],
        }
        for scheme in SCHEMES
    ]


def markdown(document: dict[str, Any]) -> str:
    """A table for each memory format."""
    about, settings = document["machine"], document["settings"]
    lines = [
        "# Convolutions on the CPU",
        "",
        f"`{settings['command']}`, {document['date']}, commit {about['commit']}: {about['cpu']} "
        f"({', '.join(about['flags'])}), {settings['threads']} threads, instruction sets: "
        f"{settings['isa']}, {document['version']}.",
        "",
        f"Milliseconds, and how many times as fast as {REFERENCE}, modules of Python as "
        "torch/Conv2d; batch 1 where nothing else is said. qint8, qint4: float activations. "
        "static, dynamic, a8: int8 activations, quantized within the time. fbgemm and "
        "onednn: activations of 7 bits, as torch.ao has them: sums saturate with 8 on AVX2.",
        "",
    ]
    results = document["results"]
    for name in dict.fromkeys(r["format"] for r in results):
        lines += [f"## {name}", ""]
        rows = []
        for layer in dict.fromkeys(r["layer"]["name"] for r in results):
            of = {
                r["scheme"]: r
                for r in results
                if r["format"] == name and r["layer"]["name"] == layer
            }
            cells = [
                f"{of[s]['ms']:.3f} ({of[base_of(s)]['ms'] / of[s]['ms']:.2f})" for s in SCHEMES
            ]
            rows.append([layer, *cells])
        lines += report.table(["layer", *SCHEMES], rows)
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Runs the benchmark; writes JSON and a table."""
    given = parse_arguments()
    machine.prepare_environment(given.threads, given.isa, given.build)
    import torch

    torch.set_num_threads(given.threads)
    sys.path.insert(0, str(machine.ROOT / "python"))
    torch.ops.load_library(os.environ["QUANTAL_LIBRARY"])
    given.output.mkdir(parents=True, exist_ok=True)
    layers = [
        layer for layer in (QUICK_LAYERS if given.quick else LAYERS) if given.layers in layer.name
    ]
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    results = []
    with torch.inference_mode(), tqdm(total=len(layers) * len(formats), unit="layer") as progress:
        for layer in layers:
            for name, memory_format in formats.items():
                progress.set_description(f"{layer.name}, {name}")
                results += run_layer(layer, name, memory_format, given)
                progress.update()
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine.describe(),
        "version": f"torch {torch.__version__}",
        "settings": {
            "threads": given.threads,
            "isa": given.isa,
            "rounds": given.rounds,
            "seconds": given.seconds,
            "quick": given.quick,
            "command": " ".join(["benchmarks/conv.py", *sys.argv[1:]]),
        },
        "results": results,
    }
    stem = "conv-quick" if given.quick else f"conv-{given.isa}"
    report.save(document, markdown(document), given.output, stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
