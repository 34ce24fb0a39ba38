"""``torch.ops.quanto`` under `quantal.compat`: what optimum-quanto's own operators answer.

One process cannot have both: Quantal's are called in another."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import reference_quanto  # noqa: F401  defines optimum-quanto's
import torch

PYTHON = Path(__file__).parents[2] / "python"
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Calls what a file lists, and saves the values, or the error's kind and text.
PROGRAM = """
import sys, torch, quantal.compat
calls, results = torch.load(sys.argv[1]), {}
for name, (operator, arguments) in calls.items():
    operator = getattr(torch.ops.quanto, operator)
    try:
        value = operator(*arguments)
    except Exception as error:
        results[name] = (type(error).__name__, str(error))
        continue
    meta = operator(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
    results[name] = value
    assert (meta.shape, meta.dtype, meta.is_meta) == (value.shape, value.dtype, True), name
for operator in ("quantize_symmetric", "quantize_affine", "unpack", "qbytes_mm"):
    arguments = calls[operator][1]
    torch.library.opcheck(getattr(torch.ops.quanto, operator).default, tuple(arguments))
torch.save(results, sys.argv[2])
"""

Calls = dict[str, tuple[str, list[Any]]]


def symmetric() -> Calls:
    base = torch.randn(6, 8)
    base[0, 0] = -128.4 * 0.05  # code -128
    steps = {
        None: torch.tensor(0.05),
        0: torch.rand(6, 1) / 20 + 0.01,
        -1: torch.rand(1, 8) / 20 + 0.01,
        1: torch.rand(1, 8) / 20 + 0.01,
    }
    calls: Calls = {"quantize_symmetric": ("quantize_symmetric", [base, torch.int8, 0, steps[0]])}
    for dtype, floats, (axis, scale) in product(EIGHT_BITS, FLOATS, steps.items()):
        arguments = [base.to(floats), dtype, axis, scale.to(floats)]
        calls[f"symmetric {dtype} {floats} {axis}"] = ("quantize_symmetric", arguments)
    wrong = {
        "scale": [base, torch.int8, None, steps[0]],
        "1D": [base[0], torch.int8, 0, steps[0][0]],
        "axis": [base[None], torch.int8, 1, steps[0][None]],
        "one": [base[:1], torch.int8, 0, steps[0][:1]],
        "several": [base, torch.int8, 0, base],
        "dims": [base, torch.int8, 0, steps[0].flatten()],
    }
    return calls | {f"wrong {name}": ("quantize_symmetric", a) for name, a in wrong.items()}


def affine() -> Calls:
    base = torch.randn(6, 8)
    calls: Calls = {}
    for bits, floats, axis, group in product((2, 4), FLOATS, (0, -1), (None, 2)):
        count = base.shape[axis] if group is None else base.numel() // group
        shape = (count, 1) if axis == 0 else (1, count)
        scale = (torch.rand(shape) + 0.1).to(floats)
        for name, shift in (
            ("float", torch.rand(shape).to(floats)),
            ("integer", torch.randint(0, 2**bits, shape, dtype=torch.uint8)),
        ):
            arguments = [base.to(floats), bits, axis, group, scale, shift]
            calls[f"affine {bits} {floats} {axis} {group} {name}"] = ("quantize_affine", arguments)
    calls["quantize_affine"] = ("quantize_affine", arguments)
    for name, axis, group in (("affine axis", 1, None), ("affine group", 0, 5)):
        calls[f"wrong {name}"] = ("quantize_affine", [base, 4, axis, group, scale, shift])
    return calls


def unpack() -> Calls:
    packed = torch.randint(0, 256, (5, 3), dtype=torch.uint8)
    calls: Calls = {"unpack": ("unpack", [packed, 4])}
    for bits, data in product((2, 4), (packed, packed[0], packed[:, None], packed.t())):
        calls[f"unpack {bits} {tuple(data.shape)}"] = ("unpack", [data, bits])
    return calls


def products() -> Calls:
    calls: Calls = {}
    for dtype, floats in product(EIGHT_BITS, FLOATS):
        weight = torch.randn(5, 24).mul(20).to(dtype)
        for shape, scale in product(((3,), (2, 3), (1, 2, 1)), (torch.rand(5, 1), torch.rand(()))):
            x = torch.randn(*shape, 24)
            name = f"{dtype} {floats} {shape} {tuple(scale.shape)}"
            scale = scale.to(floats)
            calls[f"mm {name}"] = ("qbytes_mm", [x.to(floats), weight, scale])
            # optimum-quanto multiplies int8 by int8 alone with any scale.
            if dtype == torch.int8:
                codes = torch.randint(-128, 128, (*shape, 24), dtype=torch.int8)
                calls[f"int8 mm {name}"] = ("qbytes_mm", [codes, weight, scale])
    calls["qbytes_mm"] = calls["mm torch.int8 torch.float32 (3,) (5, 1)"]
    return calls


@pytest.fixture(scope="module")
def calls() -> Calls:
    torch.manual_seed(0)
    return symmetric() | affine() | unpack() | products()


@pytest.fixture(scope="module")
def results(calls: Calls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("operators")
    torch.save(calls, folder / "calls.pt")
    command = [sys.executable, "-c", PROGRAM, folder / "calls.pt", folder / "results.pt"]
    env = os.environ | {"PYTHONPATH": str(PYTHON)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


def expected_of(operator: str, arguments: list[Any]) -> Any:
    try:
        return getattr(torch.ops.quanto, operator)(*arguments)
    except ValueError as error:
        return ("ValueError", str(error))


def test_codes_are_the_same(calls: Calls, results: dict[str, Any]) -> None:
    for name, (operator, arguments) in calls.items():
        if operator == "qbytes_mm":
            continue
        actual, expected = results[name], expected_of(operator, arguments)
        if isinstance(expected, tuple):
            assert actual == expected, name
        else:
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
            assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8)), name
    assert sum(isinstance(value, tuple) for value in results.values()) == 8


def test_products(calls: Calls, results: dict[str, Any]) -> None:
    """Within the rounding of the scales' dtype; of integers, bit for bit."""
    checked = 0
    for name, (operator, arguments) in calls.items():
        if operator != "qbytes_mm":
            continue
        x, weight, scale = arguments
        actual = results[name]
        exact = x.double() @ (scale.double() * weight.double()).t()
        size = (x.double().abs() @ (scale.double() * weight.double()).abs().t()).clamp_min(1e-30)
        # Products and sums in fp32 or better; the result is rounded once.
        bound = (
            24 * torch.finfo(torch.float32).eps * size + torch.finfo(scale.dtype).eps * exact.abs()
        )
        assert actual.dtype == scale.dtype
        assert actual.shape == (*x.shape[:-1], 5), name
        assert ((actual.double() - exact).abs() <= bound).all(), name
        if x.dtype == torch.int8 and scale.ndim:
            assert torch.equal(actual, expected_of(operator, arguments)), name
        checked += 1
    assert checked == 91  # 4 types of weights, 3 of floats, 3 shapes, 2 of scales; and int8 codes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("unpack(torch.zeros(2, dtype=torch.uint8), 8)", "Can only unpack 2-bit or 4-bit tensors."),
        ("unpack(torch.zeros(2), 4)", "Unsupported data type: expected torch.uint8, got"),
        (
            "qbytes_mm(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 1))",
            "expected int8 or float8 weights, got torch.float32",
        ),
        ("gemm_f16i4_awq()", "object has no attribute 'gemm_f16i4_awq'"),
    ],
)
def test_what_is_refused(call: str, message: str) -> None:
    program = f"import torch, quantal.compat; torch.ops.quanto.{call}"
    env = os.environ | {"PYTHONPATH": str(PYTHON)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert message in done.stderr
