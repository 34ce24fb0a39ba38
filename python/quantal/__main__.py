"""``python -m quantal``: what this installation is, for build scripts and bug reports."""

import argparse
import os
import sys

import torch

from . import __version__
from ._library import PACKAGE, library_path, ops


def cmake_dir() -> str:
    """The folder for CMake's ``Quantal_DIR``."""
    folder = PACKAGE / "lib" / "cmake" / "Quantal"
    if not (folder / "QuantalConfig.cmake").exists():
        raise FileNotFoundError(
            f"[quantal] expected QuantalConfig.cmake in {folder}: this package was not installed "
            "by pip"
        )
    return str(folder)


def isa() -> str:
    """The instruction set that kernels run with, and why."""
    asked = "which QUANTAL_ISA names" if os.environ.get("QUANTAL_ISA") else "the best of them"
    return f"{ops.isa()} ({asked}; this processor runs {', '.join(ops.supported_isas())})"


def version() -> str:
    """Versions of Quantal and torch, and the library's file."""
    return f"quantal {__version__}, torch {torch.__version__}, {library_path()}"


def main(arguments: list[str] | None = None) -> int:
    """Prints what is asked for, a line each."""
    parser = argparse.ArgumentParser(prog="python -m quantal", description=__doc__)
    said = parser.add_argument_group("what to print")
    for flag, function in (("--version", version), ("--cmake-dir", cmake_dir), ("--isa", isa)):
        said.add_argument(
            flag, dest="asked", action="append_const", const=function, help=function.__doc__
        )
    asked = parser.parse_args(arguments).asked
    if not asked:
        parser.print_help()
        return 0
    try:
        for function in asked:
            print(function())
    except (FileNotFoundError, RuntimeError) as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
