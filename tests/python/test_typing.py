"""py.typed keeps its word: mypy finds nothing wrong in the package, nor in a user's script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[2]


def check(*files: Path, cache: Path) -> str:
    """What mypy says of them, with the project's settings."""
    command = [sys.executable, "-m", "mypy", f"--config-file={ROOT / 'pyproject.toml'}",
               f"--cache-dir={cache}", "--no-error-summary", *map(str, files)]  # fmt: skip
    env = os.environ | {"MYPYPATH": str(ROOT / "python")}
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=cache).stdout


def test_the_package_and_a_script_that_uses_it(tmp_path: Path) -> None:
    assert check(ROOT / "python" / "quantal", Path(__file__).parent / "typed", cache=tmp_path) == ""
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import quantal\n\nquantal.freeze(3)\nquantal.qint8.size\n")
    found = check(wrong, cache=tmp_path)
    assert '3: error: Argument 1 to "freeze" has incompatible type "int"' in found
    assert '4: error: "qtype" has no attribute "size"' in found
