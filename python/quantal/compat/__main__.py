"""``python -m quantal.compat program.py …``: runs an unchanged program on Quantal."""

import os
import runpy
import sys


def main() -> None:
    """Runs the program or module that the command line names, as python itself does."""
    arguments = sys.argv[1:]
    if not arguments or arguments == ["-m"]:
        sys.exit("usage: python -m quantal.compat (program.py | -m module) [arguments …]")
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
