"""Runs the programs of scripts/, which are written for optimum-quanto, on it and on Quantal."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
QUANTAL = ("-m", "quantal.compat")
# reference_quanto: without what optimum-quanto compiles.
REFERENCE = (
    "-c",
    "import sys, runpy, reference_quanto; del sys.argv[0];"
    "runpy.run_path(sys.argv[0], run_name='__main__')",
)
# With nothing but the import changed.
RENAMED = (
    "-c",
    "import sys; from pathlib import Path; del sys.argv[0];"
    "source = Path(sys.argv[0]).read_text().replace('optimum.quanto', 'quantal');"
    "exec(compile(source, sys.argv[0], 'exec'), {'__name__': '__main__'})",
)


def outputs(script: str, *arguments: object, on: tuple[tuple[str, ...], ...]) -> list[Any]:
    """What the program prints, as JSON, on each; at the same time, each in a folder of its own."""
    path = os.pathsep.join([str(HERE.parents[1] / "python"), str(HERE)])
    program = [str(HERE / "scripts" / script), *map(str, arguments)]
    folders = [TemporaryDirectory() for _ in on]
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *how, *program],
            cwd=folder.name,
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for how, folder in zip(on, folders, strict=True)
    ]
    found = []
    for process, folder in zip(started, folders, strict=True):
        printed, said = process.communicate()
        folder.cleanup()
        assert process.returncode == 0, said
        found.append(json.loads(printed))
    return found


def both(script: str, *arguments: object) -> tuple[Any, Any]:
    """What it prints on Quantal, and on optimum-quanto."""
    ours, theirs = outputs(script, *arguments, on=(QUANTAL, REFERENCE))
    return ours, theirs


def _numbers(value: Any) -> list[float] | None:
    """The floats of nested lists; None where there is anything else."""
    if isinstance(value, float):
        return [value]
    if not isinstance(value, list):
        return None
    rows = [_numbers(item) for item in value]
    return None if None in rows else [number for row in rows for number in row]


def assert_close(actual: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """The same keys, texts and integers; arrays of floats within a relative error of their norm."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(actual[key], value, tolerance, f"{where}/{key}")
        return
    numbers, wanted = _numbers(actual), _numbers(expected)
    if numbers and wanted:
        assert len(numbers) == len(wanted), where
        error = math.dist(numbers, wanted)
        assert error <= tolerance * math.hypot(*wanted), f"{where}: {error / math.hypot(*wanted)}"
    elif isinstance(expected, list) and len(expected) == len(actual):
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_close(one, other, tolerance, f"{where}[{i}]")
    else:
        assert actual == expected, where
