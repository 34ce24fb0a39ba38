"""Loads the C++ library, once."""

import os
from pathlib import Path
from typing import TypeVar

import torch

from ._operators import Operators

PACKAGE = Path(__file__).parent
_Operator = TypeVar("_Operator")


def library_path() -> Path:
    """The shared library that this process uses: QUANTAL_LIBRARY, or the one of the package."""
    named = os.environ.get("QUANTAL_LIBRARY")
    return Path(named) if named else PACKAGE / "lib" / "libquantal.so"


def _built_with() -> str | None:
    """The torch that the package's library was built with; None for a library named in
    QUANTAL_LIBRARY."""
    if os.environ.get("QUANTAL_LIBRARY"):
        return None
    try:
        from ._build import TORCH_VERSION
    except ImportError:
        return None
    return TORCH_VERSION


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _load() -> None:
    path = library_path()
    if not path.exists():
        raise ImportError(
            f"[quantal] expected the C++ library at {path}: install the package with pip, or name "
            "a built library in QUANTAL_LIBRARY"
        )
    built = _built_with()
    if built is not None and _minor(built) != _minor(torch.__version__):
        raise ImportError(
            f"[quantal] expected torch {'.'.join(_minor(built))}, which the C++ library was built "
            f"with, got {torch.__version__}: install Quantal again beside this torch"
        )
    torch.ops.load_library(str(path))


_load()
ops: Operators = torch.ops.quantal


def overload(operator: _Operator) -> _Operator:
    """The one overload of an operator: a call of the packet would choose among them each time."""
    return operator.default  # type: ignore[attr-defined]
