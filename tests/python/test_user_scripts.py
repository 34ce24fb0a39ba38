"""Programs for optimum-quanto, unchanged, on Quantal: the numbers are optimum-quanto's.

Where activations are quantized they differ, since Quantal keeps outputs quantized that another
quantized module reads, and averages inputs with the momentum that it was given.
"""

import pytest
from user_scripts import QUANTAL, RENAMED, assert_close, both, outputs

FP32 = 2e-6


@pytest.mark.parametrize("weights", ["qint8", "qint4"])
def test_vision(weights: str) -> None:
    ours, theirs = both("vision.py", "--weights", weights)
    assert_close(ours, theirs, FP32)
    assert ours["float"] > 0.9


@pytest.mark.parametrize("qtype", ["qint8", "qfloat8"])
def test_vision_with_activations(qtype: str) -> None:
    ours, theirs = both("vision.py", "--weights", qtype, "--activations", qtype)
    assert (ours["map"], ours["shapes"]) == (theirs["map"], theirs["shapes"])
    assert ours["reloaded"] == ours["frozen"] == ours["trained"]
    for stage in ("float", "quantized", "trained", "reloaded"):
        assert ours[stage] == pytest.approx(theirs[stage], abs=0.02)


def test_custom_module() -> None:
    ours, theirs = both("custom_module.py")
    for name, result in ours.items():
        expected = theirs[name]
        # optimum-quanto's files leave out parameters other than weight and bias.
        result["keys"].remove("0.gate")
        assert result["error"] == pytest.approx(expected["error"], rel=0.2)
        for found in (result, expected):
            del found["error"]
            if name == "qint8 qint8":
                del found["gradient"]  # other neurons are on
        assert_close(result, expected, 0.02 if name == "qint8 qint8" else FP32)


def test_tensors() -> None:
    ours, theirs = both("tensors.py")
    for name, result in ours.items():
        if name.startswith("activation"):
            kind, dtype, value = result.pop("kept half")
            assert_close([kind, dtype], theirs[name]["kept half"][:2], 0)
            assert_close(value, theirs[name].pop("kept half")[2], 1e-3)
    assert_close(ours, theirs, FP32)


def test_serialization() -> None:
    ours, theirs = both("serialization.py")
    assert_close(ours, theirs, FP32)
    assert all(all(result["kept"]) for result in ours.values())


def test_hooks() -> None:
    ours, theirs = both("hooks.py")
    for name, result in ours.items():
        expected = theirs[name]
        assert (result["shapes"], result["seen"]) == (expected["shapes"], expected["seen"])
        # optimum-quanto averages inputs with 0.9 whatever it is told.
        if name.endswith("0.9"):
            assert_close(result["first input_scale"], expected["first input_scale"], FP32)
            assert_close(result["output"], expected["output"], 0.03)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("vision.py", ("--weights", "qint4")),
        ("vision.py", ("--weights", "qint8", "--activations", "qint8")),
        ("tensors.py", ()),
        ("serialization.py", ()),
        ("hooks.py", ()),
    ],
)
def test_with_the_import_changed(script: str, arguments: tuple[str, ...]) -> None:
    unchanged, renamed = outputs(script, *arguments, on=(QUANTAL, RENAMED))
    assert renamed == unchanged
