"""The orders of optimum-quanto's CUDA kernels, as Quantal and as optimum-quanto make them.

One process cannot have both: Quantal's are called in another. optimum-quanto's functions compute on
the CPU as well, but for an assertion that forbids it."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import reference_quanto  # noqa: F401  the real one
import torch

PYTHON = Path(__file__).parents[3] / "python"
WEIGHTS = "optimum.quanto.tensor.weights."
# Calls what a file lists, and saves the values.
PROGRAM = """
import sys, torch, quantal.compat
from importlib import import_module
calls, results = torch.load(sys.argv[1]), []
for module, function, arguments in calls:
    results.append(getattr(import_module(module), function)(*arguments))
torch.save(results, sys.argv[2])
"""

Call = tuple[str, str, list[Any]]


def calls() -> list[Call]:
    """Every function, on matrices of several shapes."""
    made: list[Call] = []
    for rows, columns in ((64, 64), (128, 192), (256, 128)):
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
        words = torch.randint(-(2**31), 2**31, (rows, columns // 8)).to(torch.int32)
        halves = torch.randint(-(2**15), 2**15, (rows // 4, columns)).to(torch.int16)
        tiles = torch.randint(-(2**31), 2**31, (columns // 16, rows * 2)).to(torch.int32)
        for reorder in (False, True):
            made += [
                ("awq.packed", "pack", [codes, reorder]),
                ("awq.packed", "unpack", [words, reorder]),
            ]
        made += [
            ("awq.packed", "reverse_awq_order", [codes]),
            ("awq.packed", "pack_v2", [codes]),
            ("awq.packed", "unpack_v2", [halves]),
            ("marlin.int4.packed", "pack", [codes]),
            ("marlin.int4.packed", "unpack", [tiles, (rows, columns)]),
            ("marlin.fp8.packed", "pack_fp8_as_int32", [codes.view(torch.float8_e4m3fn)]),
            ("marlin.fp8.packed", "pack_fp8_as_int32", [codes.view(torch.float8_e4m3fn).t()]),
            ("marlin.fp8.packed", "unpack_int32_to_fp8", [words]),
            ("packing", "unpack_int32_to_uint8", [words, 2]),
            ("packing", "unpack_int32_to_uint8", [words, 4]),
        ]
        for groups in (1, 4):
            scales = torch.randn(groups, rows)
            for reverse in (False, True):
                made.append(("marlin.permutations", "marlin_permute", [scales, reverse]))
    order = torch.randperm(32)
    for permutation in (order, order.tolist()):
        made += [
            ("reordering", "reorder", [torch.randn(4, 64), permutation]),
            ("reordering", "reverse", [permutation]),
        ]
    made.append(("marlin.fp8.packed", "get_scale_perms", []))
    return [(WEIGHTS + module, function, arguments) for module, function, arguments in made]


def theirs(module: str, function: str) -> Any:
    """optimum-quanto's function, without its assertions."""
    found = import_module(module)
    code = compile(Path(found.__file__).read_text("utf-8"), module, "exec", optimize=1)
    names = {"__name__": module, "__package__": found.__package__}
    exec(code, names)
    return names[function]


def test_orders_are_the_same(tmp_path: Path) -> None:
    wanted = calls()
    torch.save(wanted, tmp_path / "calls.pt")
    command = [sys.executable, "-c", PROGRAM, tmp_path / "calls.pt", tmp_path / "results.pt"]
    env = os.environ | {"PYTHONPATH": str(PYTHON)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    assert len(results) == len(wanted) == 59
    for (module, function, arguments), actual in zip(wanted, results, strict=True):
        expected = theirs(module, function)(*arguments)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), function
        actual, expected = actual.contiguous(), expected.contiguous()
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8)), function


@pytest.mark.parametrize(
    "kind",
    [
        "AWQPackedTensor.pack(codes)",
        "AWQPackedTensor.pack(codes, reorder=True)",
        "AWQPackedTensor.pack(codes, packing=AWQPacking.V2)",
        "MarlinInt4PackedTensor.pack(codes)",
    ],
)
def test_packed_tensors_are_their_codes(kind: str) -> None:
    program = f"""
import torch, quantal.compat
from optimum.quanto.tensor.weights.awq import AWQPackedTensor, AWQPacking
from optimum.quanto.tensor.weights.marlin.int4 import MarlinInt4PackedTensor
codes = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
packed = {kind}
assert packed._data.nbytes == codes.nbytes // 2
assert torch.equal(packed.unpack(), codes)
assert torch.equal(torch.add(packed, 1), codes + 1)
assert (packed.dtype, packed.size(), packed.device.type) == (torch.uint8, codes.size(), "cpu")
assert packed.to("meta").unpack().shape == codes.shape
try:
    packed.to(torch.float32)
except ValueError as error:
    print(error)
"""
    env = os.environ | {"PYTHONPATH": str(PYTHON)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "torch.uint8 only and cannot be moved to torch.float32" in done.stdout
