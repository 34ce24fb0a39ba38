#!/usr/bin/env python3
"""What calling a frozen quantal.nn.QLinear takes over calling its operator; beside torch's Linear.

The two take turns; what is told is the median of the differences between neighbouring turns, so
that what else the machine does meets both.
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

Call = Callable[[], Any]
FLOAT = "torch.nn.Linear"
SCHEMES = (
    (FLOAT, "", None),
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
    add("--turns", type=int, default=300, help="of each of the two (%(default)s)")
    add("--seconds", type=float, default=0.005, help="length of a turn (%(default)s)")
    add("--threads", type=int, default=2, help="threads (%(default)s)")
    add("--build", type=Path, default=machine.ROOT / "build" / "release", help="build folder")
    add("--output", type=Path, default=machine.ROOT / "build" / "bench-results", help="folder")
    add("--quick", action="store_true", help="few short turns: to see that it runs")
    given = parser.parse_args()
    if given.quick:
        given.sizes, given.turns, given.seconds = [64], 5, 0.001
    return given


def pair(size: int, weights: str, activations: str | None) -> tuple[Call, Call]:
    """The operator with the module's own arguments, and the module."""
    import quantal
    import torch

    torch.manual_seed(0)
    x = torch.randn(1, size)
    linear = torch.nn.Linear(size, size)
    if not weights:
        return (lambda: torch.nn.functional.linear(x, linear.weight, linear.bias)), (
            lambda: linear(x)
        )
    model = torch.nn.Sequential(linear)
    quantal.quantize(model, weights=weights, activations=activations)
    if activations == "qint8":
        with quantal.Calibration(model):
            model(x)
    quantal.freeze(model)
    module: Any = model[0]
    data, scale, shift = module.weight.parts()
    name, input_scale = module.activation_arguments()
    operator, group = torch.ops.quantal.linear.default, module.weight_group_size or 0
    bias, qtype = module.bias, module.weight_qtype.name
    return (
        lambda: operator(x, data, scale, shift, bias, qtype, group, None, name, input_scale)
    ), lambda: module(x)


def turn(call: Call, count: int) -> float:
    """Microseconds of one of `count` calls."""
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count * 1e6


def measure(size: int, scheme: tuple, given: argparse.Namespace) -> dict[str, Any]:
    """One scheme."""
    operator, module = pair(size, *scheme[1:])
    count = max(1, int(given.seconds * 1e6 / turn(operator, 20)))
    operators, modules = [], []
    for number in range(given.turns):
        pairs = [(operator, operators), (module, modules)]
        for call, taken in pairs if number % 2 else reversed(pairs):
            taken.append(turn(call, count))
    return {
        "scheme": scheme[0],
        "size": size,
        "operator_us": median(operators),
        "module_us": median(modules),
        "over_us": median(m - o for m, o in zip(modules, operators, strict=True)),
    }


def markdown(document: dict[str, Any]) -> str:
    """A table."""
    about, settings = document["machine"], document["settings"]
    rows = [
        [
            r["scheme"],
            f"{r['size']} x {r['size']}",
            *(f"{r[key]:.1f}" for key in ("operator_us", "module_us", "over_us")),
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
        *report.table(["layer", "size", "operator", "module", "over the operator"], rows),
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
            "turns": given.turns,
            "seconds": given.seconds,
            "command": " ".join(["benchmarks/python_call.py", *sys.argv[1:]]),
        },
        "results": results,
    }
    stem = "python-call-quick" if given.quick else "python-call"
    report.save(document, markdown(document), given.output, stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
