"""Finders of the package optimum.quanto and of the distribution optimum-quanto."""

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from . import _operators, _surface

__all__ = ["VERSION", "install"]

#: The version of optimum-quanto whose names and call forms Quantal has.
VERSION = "0.2.7+quantal"

_PACKAGE = "optimum.quanto"
_DISTRIBUTION = "optimum-quanto"


class _Distribution(Distribution):
    """Metadata of a distribution that lies nowhere on disk."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return (
                f"Metadata-Version: 2.1\nName: {_DISTRIBUTION}\nVersion: {VERSION}\n"
                "Summary: Quantal under optimum-quanto's names\n"
            )
        return "optimum\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


class _Loader(Loader):
    """Fills a module with the names that `_surface` lists for it."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        inner = module.__name__.removeprefix(_PACKAGE).lstrip(".")
        module.__doc__ = f"Quantal under the names of {module.__name__}."
        if not inner:
            # Now, so that no later import puts a module (quantize) over a function of its name.
            for name in _surface.MODULES:
                if name and not name.startswith(_surface.LAZY):
                    import_module(f"{_PACKAGE}.{name}")
            module.__version__ = VERSION  # type: ignore[attr-defined]
        found, exported = _surface.names_of(inner)
        module.__dict__.update(found)
        module.__all__ = exported  # type: ignore[attr-defined]


class _Finder(MetaPathFinder):
    """Goes first: what it knows, it knows better than an installed optimum-quanto."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(_PACKAGE + "."):
            return None
        inner = fullname.removeprefix(_PACKAGE).lstrip(".")
        if inner not in _surface.MODULES:
            return None
        is_package = any(name.startswith(inner + ".") for name in _surface.MODULES) or not inner
        spec = ModuleSpec(fullname, _Loader(), origin=_surface.__file__, is_package=is_package)
        spec.has_location = True
        return spec

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterator[Distribution]:
        """Ours where every distribution is asked for, or this one."""
        wanted = getattr(context, "name", None)
        if wanted is None or re.sub(r"[-_.]+", "-", wanted).lower() == _DISTRIBUTION:
            yield _Distribution()


class _NamespaceFinder(MetaPathFinder):
    """Goes last: an empty package ``optimum`` where no other is installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, None, is_package=True) if fullname == "optimum" else None


def _warn_of_importers() -> None:
    """Libraries that looked for optimum-quanto when they were imported, and found none."""
    asked = {
        "transformers.utils.import_utils": "_is_optimum_quanto_available",
        "diffusers.utils.import_utils": "_optimum_quanto_available",
    }
    for name, flag in asked.items():
        if getattr(sys.modules.get(name), flag, None) is False:
            library = name.partition(".")[0]
            warnings.warn(
                f"[quantal.compat] {library} was imported first and found no optimum-quanto: "
                f"import quantal.compat before {library}",
                stacklevel=4,
            )
    probe: Any = getattr(
        sys.modules.get("transformers.utils.import_utils"), "_is_package_available", ""
    )
    if callable(getattr(probe, "cache_clear", None)):
        probe.cache_clear()


def install() -> None:
    """Puts the finders in place; once is enough.

    Raises ImportError where the real optimum.quanto is imported already: its classes would go on
    being used by whoever holds them.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if _PACKAGE in sys.modules:
        raise ImportError(
            f"[quantal.compat] {_PACKAGE} is already imported, from "
            f"{sys.modules[_PACKAGE].__file__}: import quantal.compat first"
        )
    sys.meta_path.insert(0, _Finder())
    sys.meta_path.append(_NamespaceFinder())
    _operators.register()
    _warn_of_importers()
