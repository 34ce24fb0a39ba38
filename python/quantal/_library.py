"""Loads the C++ library, once."""

import os
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent


def library_path() -> Path:
    """The shared library that this process uses: QUANTAL_LIBRARY, or the one of the package."""
    named = os.environ.get("QUANTAL_LIBRARY")
    if named:
        return Path(named)
    return _PACKAGE / "lib" / "libquantal.so"


def _load() -> None:
    path = library_path()
    if not path.exists():
        raise ImportError(
            f"[quantal] expected the C++ library at {path}: install the package with pip, or name "
            "a built library in QUANTAL_LIBRARY"
        )
    torch.ops.load_library(str(path))


_load()
ops = torch.ops.quantal
