"""What `import quantal` brings with it."""

import os
import subprocess
import sys
from pathlib import Path

PYTHON = Path(__file__).parents[2] / "python"
PROGRAM = """
import sys
import torch
before = set(sys.modules)
import quantal
print(*sorted(set(sys.modules) - before))
"""


def test_imports_little_beside_torch() -> None:
    """Other libraries are imported where they are used."""
    env = os.environ | {"PYTHONPATH": str(PYTHON)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True
    )
    new = done.stdout.split()
    packages = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
    assert packages <= {"quantal", "safetensors", "torch"}
    assert not [name for name in new if name.startswith(("torch._dynamo", "torch._inductor"))]
    assert not [name for name in new if name.startswith("quantal.integrations")]
    # docs/python.md says how long they take; of these few every one is read in a millisecond or so.
    assert len(new) < 60
