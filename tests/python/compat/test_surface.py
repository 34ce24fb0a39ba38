"""The names and call forms of optimum.quanto, read from the installed optimum-quanto 0.2.7: all are
there under `quantal.compat` but those that docs/compatibility.md lists."""

import json
from pathlib import Path
from typing import Any

import pytest
import quantal
from user_scripts import QUANTAL, REFERENCE, outputs

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[2] / "docs" / "compatibility.md"
PACKAGE = "optimum.quanto."

# Modules, and names of others, that are absent on purpose.
ABSENT_MODULES = {
    *("library.extensions.cuda", "library.extensions.hip", "library.extensions.mps"),
    "tensor.activations.qbytes_ops",
}
ABSENT = {
    *("Extension", "register_extension"),
    *("ActivationQBytesQuantizer", "WeightQBytesQuantizer", "WeightsQBitsQuantizer"),
    *("QBitsDequantizer", "QBytesDequantizer", "WeightQBytesLinearFunction"),
    *("AWQWeightQBitsDequantizer", "AWQWeightQBitsLinearFunction", "MarlinF8QBytesLinearFunction"),
    *("MarlinQBitsDequantizer", "MarlinQBitsLinearFunction"),
    *("TinyGemmQBitsDequantizer", "TinyGemmQBitsLinearFunction"),
    *("get_column_permutation", "get_row_permutation", "shrink_lp_op"),
    *("Calibration.calibrate_input", "Calibration.calibrate_output", "Calibration.tag_outputs"),
    *("QModuleMixin.qforward", "WeightQBitsTensor.weight_qbits_tensor"),
    "WeightQBytesTensor.weight_qbytes_tensor",
}
# Classes that are there for isinstance() alone.
NAMES_ONLY = {
    *("AWQWeightQBitsTensor", "MarlinF8PackedTensor", "MarlinF8QBytesTensor"),
    *("MarlinInt4WeightQBitsTensor", "TinyGemmPackedTensor", "TinyGemmWeightQBitsTensor"),
}
# Calls that read otherwise, and take at least the same.
OTHERWISE = {
    # Bases, of which there are no instances by themselves.
    *("QTensor", "QBitsTensor", "QBytesTensor"),
    # torch's own, which C++ implements.
    "QTensor.equal",
    # By `apply`.
    *("QuantizedLinearFunction.forward", "QuantizedLinearFunction.backward"),
    # Hooks that torch calls, by position.
    *("QModuleMixin.quantize_input", "QModuleMixin.quantize_output"),
    # The third parameter is a qtype there, too, in the class that overrides it.
    "SymmetricOptimizer.optimize",
}

Surface = dict[str, dict[str, Any] | None]


@pytest.fixture(scope="module")
def surfaces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Surface, Surface]:
    """Quantal's and optimum-quanto's."""
    script, names = HERE / "surface.py", tmp_path_factory.mktemp("surface") / "names.json"
    (theirs,) = outputs(script, on=(REFERENCE,))
    names.write_text(json.dumps(theirs))
    (ours,) = outputs(script, names, on=(QUANTAL,))
    assert len(theirs) > 50
    return ours, theirs


def calls(surfaces: tuple[Surface, Surface]) -> dict[str, tuple[Any, Any]]:
    """The parameters of every name that both have."""
    ours, theirs = surfaces
    return {
        f"{module} {name}": (ours[module][name], expected)
        for module, names in theirs.items()
        for name, expected in (names or {}).items()
        if name in (ours[module] or {})
    }


def takes(ours: list, theirs: list) -> bool:
    """Whether every call of theirs is one of ours: what is more has a default."""
    kinds = [kind for _, kind, _ in ours]
    if "VAR_POSITIONAL" in kinds and "VAR_KEYWORD" in kinds:
        named = {name: default for name, kind, default in ours if kind == "KEYWORD_ONLY"}
        own = {name: default for name, kind, default in theirs if kind == "KEYWORD_ONLY"}
        return named | own == named
    common = [p for p in theirs if not p[1].startswith("VAR_")]
    by_name = {name: (place, kind, default) for place, (name, kind, default) in enumerate(ours)}
    for place, (name, kind, default) in enumerate(common):
        found = by_name.get(name)
        if found is None or found[1] != kind or (default is not None and found[2] != default):
            return False
        if kind != "KEYWORD_ONLY" and found[0] != place:
            return False
    more = [p for p in ours if p[0] not in {name for name, _, _ in common}]
    return all(default is not None or kind.startswith("VAR_") for _, kind, default in more)


def test_every_name_is_there(surfaces: tuple[Surface, Surface]) -> None:
    ours, theirs = surfaces
    # optimum's commands need optimum, and transformers' models transformers.
    there = {module for module, names in theirs.items() if names is not None}
    missing = {m.removeprefix(PACKAGE) for m in there if ours[m] is None}
    assert missing == ABSENT_MODULES
    absent = {
        name
        for module in there
        if ours[module] is not None
        for name in theirs[module].keys() - ours[module].keys()
        if name.partition(".")[0] not in NAMES_ONLY | ABSENT
        or name.partition(".")[0] == name
        or name in ABSENT
    }
    assert absent == ABSENT


def test_every_name_of_the_package_is_quantals(surfaces: tuple[Surface, Surface]) -> None:
    names = surfaces[1]["optimum.quanto"]
    assert {"quantize", "qint4", "QTensor", "get_extension", "is_diffusers_available"} < set(names)
    assert not [name for name in names if not hasattr(quantal, name)]


def test_call_forms(surfaces: tuple[Surface, Surface]) -> None:
    found = calls(surfaces)
    assert len(found) > 120
    wrong = {
        name: pair
        for name, pair in found.items()
        if None not in pair
        and name.rpartition(" ")[2] not in OTHERWISE
        and name.rpartition(" ")[2].partition(".")[0] not in NAMES_ONLY
        and not takes(*pair)
    }
    assert not wrong


def test_what_is_absent_is_listed() -> None:
    text = DOCUMENT.read_text("utf-8")
    for name in ABSENT_MODULES | ABSENT | NAMES_ONLY:
        assert f"`{name}`" in text, name
