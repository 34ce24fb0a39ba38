"""What optimum.quanto has, as JSON: the real one, or Quantal's.

    python surface.py             # {module: {name: its parameters, or null}} of the installed one
    python surface.py names.json  # of the names in that, where optimum.quanto has them

Names are of modules, what they define, and the methods of classes. A name that is not there is left
out, a module that is not there is null.
"""

import ast
import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "optimum.quanto"


def defined(body: list[ast.stmt]) -> Iterator[str]:
    """Public functions, classes with their methods, and constants."""
    for node in body:
        if isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name) and t.id[0] != "_")
        # torch.library's decorators and its own leave None.
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
            how = [ast.unparse(decorator) for decorator in node.decorator_list]
            if not any(text.startswith(("torch.library", "register_qbytes")) for text in how):
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{method}" for method in defined(node.body))


def exported(module: str) -> Iterator[str]:
    """What a package has of its modules."""
    for name, value in vars(import_module(module)).items():
        origin = getattr(value, "__module__", type(value).__module__)
        is_dict = name == "qtypes" and module in (PACKAGE, f"{PACKAGE}.tensor")
        if name[0] != "_" and (origin.startswith(module) or is_dict):
            yield name


def installed() -> dict[str, list[str]]:
    """Every module of the installed package, and its names."""
    folder = Path(next(iter(find_spec(PACKAGE).submodule_search_locations)))
    found = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        module = ".".join([PACKAGE, *(part for part in parts if part != "__init__")])
        names = list(defined(ast.parse(file.read_text("utf-8")).body))
        is_package = file.name == "__init__.py" and "subpackage" not in module
        found[module] = names + list(exported(module)) if is_package else names
    return found


def parameters(value: object) -> list | None:
    """Name, kind and default of each; None of what is not called."""
    if not callable(value):
        return None
    try:
        signature = inspect.signature(value)
    except ValueError:  # built in
        return []
    return [[p.name, p.kind.name, default_of(p)] for p in signature.parameters.values()]


def default_of(parameter: inspect.Parameter) -> str | None:
    """Its text; None where there is none. A qtype's name says whose it is."""
    if parameter.default is parameter.empty:
        return None
    return str(parameter.default).removeprefix("quantal.").removeprefix("quanto.")


def facts(module: str, names: Iterable[str]) -> dict | None:
    try:
        found = import_module(module)
    except ImportError:
        return None
    made = {}
    for name in names:
        value = found
        for part in name.split("."):
            value = getattr(value, part, ...)
        if value is not ...:
            made[name] = parameters(value)
    return made


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text("utf-8")) if sys.argv[1:] else installed()
    print(json.dumps({module: facts(module, names or ()) for module, names in wanted.items()}))
