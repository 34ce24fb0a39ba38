#!/usr/bin/env python3
"""What calling a frozen quantal.nn.QLinear takes beside the product itself; torch's Linear, too.

Modules call torch's function, which notes when it begins and ends: what is told is the
time of a call before and after that, less what the notes take, as medians. So the product, whose
time differs from call to call by more than all of this, is left out, but not what it does to the
caches. The last column is the whole call less one of the same operator from Python
(``torch.ops.quantal.linear``, torch's ``linear``), in turns.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import machine
import report
from tqdm import tqdm

SCHEMES = (
    ("torch.nn.Linear", "", None),
    ("qint8", "qint8", None),
    ("qint4", "qint4", None),
    ("qint8, dynamic int8 activations", "qint8", "dynamic-qint8"),
    ("qint8, static int8 activations", "qint8", "qint8"),
    ("qint4, dynamic int8 activations", "qint4", "dynamic-qint8"),
    ("qint4, static int8 activations", "qint4", "qint8"),
)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[64, 4096], help="rows and columns (%(default)s)")
    add("--calls", type=int, default=1500, help="of each of them (%(default)s)")
    add("--threads", type=int, default=2, help="threads (%(default)s)")
    add("--build", type=Path, default=machine.ROOT / "build" / "release", help="build folder")
    add("--output", type=Path, default=machine.ROOT / "build" / "bench-results", help="folder")
    add("--quick", action="store_true", help="few calls: to see that it runs")
    given = parser.parse_args()
    if given.quick:
        given.sizes, given.calls = [64], 10
    return given


class Stamps:
    """torch's function, which notes when it was last called and when it returned."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.begin = self.end = 0
        self.arguments: tuple = ()

    def __call__(self, *arguments: Any) -> Any:
        self.arguments = arguments
        self.begin = time.perf_counter_ns()
        result = self.function(*arguments)
        self.end = time.perf_counter_ns()
        return result

    def around(self, call: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
        """Microseconds of a call: outside of the function, and within."""
        begin = time.perf_counter_ns()
        call(*arguments)
        end = time.perf_counter_ns()
        inside = self.end - self.begin
        return (end - begin - inside) / 1000, inside / 1000


def make_module(size: int, weights: str, activations: str | None, x: Any) -> Any:
    """A linear layer, frozen where it is quantized."""
    import quantal
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(size, size))
    if weights:
        quantal.quantize(model, weights=weights, activations=activations)
        if activations == "qint8":
            with quantal.Calibration(model):
                model(x)
        quantal.freeze(model)
    return model[0]


def operator_of(module: Any, x: Any) -> Callable[[], Any]:
    """What the module computes, as a call of its operator: torch's, or one of torch.ops."""
    import torch

    if type(module) is torch.nn.Linear:
        weight, bias, linear = module.weight, module.bias, torch.nn.functional.linear
        return lambda: linear(x, weight, bias)
    data, scale, shift = module.weight.parts()
    how = (module.weight_qtype.name, module.weight_group_size or 0, None)
    arguments = (x, data, scale, shift, module.bias, *how, *module.activation_arguments())
    linear = torch.ops.quantal.linear.default
    return lambda: linear(*arguments)


def over_operator(module: Any, x: Any, count: int) -> float:
    """Microseconds that a call of the module takes over one of its operator, which take turns."""
    operator = operator_of(module, x)
    taken = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        module(x)
        middle = time.perf_counter_ns()
        operator()
        taken.append(2 * middle - begin - time.perf_counter_ns())
    return median(taken) / 1000


def measure(size: int, scheme: tuple, given: argparse.Namespace) -> dict[str, Any]:
    """One scheme. The module, the function alone and a module that does no more than call it take
    turns."""
    import torch
    from quantal.nn import qlinear

    class Empty(torch.nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return stamps(*arguments)

    name, weights, activations = scheme
    x = torch.randn(1, size)
    module, empty = make_module(size, weights, activations, x), Empty()
    stamps = Stamps(torch.nn.functional.linear)
    torch.nn.functional.linear = qlinear._torch_linear = stamps
    try:
        for _ in range(3):  # then the weight is bound
            module(x)
        arguments = stamps.arguments
        calls = ((module, (x,)), (stamps, arguments), (empty, arguments))
        taken = [[stamps.around(call, *args) for call, args in calls] for _ in range(given.calls)]
    finally:
        torch.nn.functional.linear = qlinear._torch_linear = stamps.function
    over = over_operator(module, x, given.calls)
    outside = [[turn[i][0] - turn[1][0] for turn in taken] for i in (0, 2)]
    return {
        "scheme": name,
        "size": size,
        "function_us": median(turn[0][1] for turn in taken),
        "module_us": median(outside[0]),
        "empty_us": median(outside[1]),
        "over_operator_us": over,
    }


def markdown(document: dict[str, Any]) -> str:
    """A table."""
    about, settings = document["machine"], document["settings"]
    rows = [
        [
            r["scheme"],
            f"{r['size']} x {r['size']}",
            *(
                f"{r[key]:.1f}"
                for key in ("function_us", "module_us", "empty_us", "over_operator_us")
            ),
        ]
        for r in document["results"]
    ]
    lines = [
        "# A call from Python",
        "",
        f"`{settings['command']}`, {document['date']}, commit {about['commit']}: {about['cpu']} "
        f"({', '.join(about['flags'])}), {settings['threads']} threads, {document['version']}. One "
        "token, inference mode, microseconds.",
        "",
        *report.table(
            ["layer", "size", "function", "module beside it", "empty module", "over its operator"],
            rows,
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Runs the benchmark; writes JSON and a table."""
    given = parse_arguments()
    machine.prepare_environment(given.threads, "native", given.build)
    sys.path.insert(0, str(machine.ROOT / "python"))
    import torch

    torch.set_num_threads(given.threads)
    given.output.mkdir(parents=True, exist_ok=True)
    cases = [(size, scheme) for size in given.sizes for scheme in SCHEMES]
    with torch.inference_mode():
        results = [measure(*case, given) for case in tqdm(cases, unit="layer")]
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine.describe(),
        "version": f"torch {torch.__version__}",
        "settings": {
            "threads": given.threads,
            "calls": given.calls,
            "command": " ".join(["benchmarks/python_call.py", *sys.argv[1:]]),
        },
        "results": results,
    }
    stem = "python-call-quick" if given.quick else "python-call"
    report.save(document, markdown(document), given.output, stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
