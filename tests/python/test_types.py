"""What type checkers are told."""

import inspect
from pathlib import Path

import pytest
import quantal
import torch
from quantal._operators import Operators

SCHEMAS = {
    schema.name.removeprefix("quantal::"): schema
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("quantal::")
}
TYPES = {
    "Dict[str, int]": "dict[str, int]",
    "List[float]": "collections.abc.Sequence[float]",
    "List[int]": "collections.abc.Sequence[int]",
    "List[str]": "list[str]",
    "Optional[Tensor]": "torch.Tensor | None",
    "Optional[int]": "int | None",
    "Tensor": "torch.Tensor",
}


def test_every_operator_is_typed() -> None:
    assert {name for name in vars(Operators) if not name.startswith("_")} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_operator(name: str) -> None:
    signature = inspect.signature(getattr(Operators, name))
    _, *parameters = signature.parameters.values()  # without self
    schema = SCHEMAS[name]
    assert [p.name for p in parameters] == [a.name for a in schema.arguments]
    for parameter, argument in zip(parameters, schema.arguments, strict=True):
        default = parameter.default
        assert (default is not inspect.Parameter.empty) == argument.has_default_value()
        if argument.has_default_value():
            wanted = argument.default_value
            assert default == (tuple(wanted) if isinstance(wanted, list) else wanted)
        if parameter.annotation is torch.dtype:  # an int to schemas
            continue
        kind = TYPES.get(argument.type.annotation_str, argument.type.annotation_str)
        assert inspect.formatannotation(parameter.annotation) == kind
    kinds = [TYPES.get(r.type.annotation_str, r.type.annotation_str) for r in schema.returns]
    whole = kinds[0] if len(kinds) == 1 else f"tuple[{', '.join(kinds)}]" if kinds else "None"
    assert inspect.formatannotation(signature.return_annotation) == whole


def test_the_package_says_that_it_has_types() -> None:
    assert (Path(quantal.__file__).parent / "py.typed").is_file()
