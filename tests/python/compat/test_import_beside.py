"""`import quantal` beside transformers and diffusers imports neither."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[3] / "python"
LIBRARIES = {"accelerate", "diffusers", "huggingface_hub", "optimum", "peft", "transformers"}
PROGRAM = """
import sys
import torch
before = set(sys.modules)
{}
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}}))
"""
QUANTIZES = """
import quantal
model = torch.nn.Sequential(torch.nn.Linear(64, 8))
quantal.quantize(model, weights="qint4", activations="qint8")
with quantal.Calibration(model):
    model(torch.ones(2, 64))
quantal.freeze(model)
assert quantal.is_transformers_available()
"""


@pytest.mark.parametrize(
    ("program", "imported"),
    [
        ("import quantal", set()),
        (QUANTIZES, set()),
        ("import quantal.compat", set()),
        ("import quantal.compat\nfrom optimum.quanto import *", {"optimum"}),
        # Who asks for what needs it gets it.
        ("from quantal import QuantalConfig", {"transformers"}),
    ],
)
def test_imports_no_other_library(program: str, imported: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(program)],
        env=os.environ | {"PYTHONPATH": str(PYTHON)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split()) & LIBRARIES
    assert found == imported if "transformers" not in imported else found >= imported
