"""`import quantal.compat`: what resolves to Quantal, what is imported, what is said.

Every program here starts torch anew, so one answers several questions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PYTHON = Path(__file__).parents[3] / "python"

# What user code is known to import, by module.
NAMES = {
    "": "Calibration,freeze,qfloat8,qint2,qint4,qint8,quantize,requantize,QTensor,QModuleMixin,"
    "quantization_map,QLinear,QLayerNorm,QConv2d,MaxOptimizer,HqqOptimizer,AbsmaxOptimizer,"
    "ActivationQBytesTensor,absmax_scale,register_qmodule,QuantizedModelForCausalLM,"
    "QuantizedTransformersModel,QuantizedDiffusersModel,QuantizedPixArtTransformer2DModel",
    ".calibrate": "Calibration",
    ".library.extensions": "is_extension_available,get_extension",
    ".models.shared_dict": "ShardedStateDict",
    ".models.transformers_models": "QuantizedModelForCausalLM",
    ".nn": "QLinear,QConv2d",
    ".nn.qlinear": "QLinear",
    ".nn.qmodule": "_QMODULE_TABLE",
    ".quantize": "_quantize_submodule,quantize",
    ".tensor": "Optimizer,qtype,qtypes,quantize_weight",
    ".tensor.grouped": "group,ungroup",
    ".tensor.packed": "PackedTensor,pack_weights",
    ".tensor.qtensor": "QTensor",
    ".tensor.qtype": "qtype,qtypes,qfloat",
    ".tensor.weights": "WeightQBitsTensor",
    ".tensor.weights.awq": "AWQPackedTensor,AWQWeightQBitsTensor",
    ".tensor.weights.marlin.int4": "MarlinInt4WeightQBitsTensor",
    ".tensor.weights.qbytes": "WeightQBytesTensor",
    ".tensor.weights.tinygemm": "TinyGemmWeightQBitsTensor",
}


def run(code: str, *arguments: str, **environment: str) -> str:
    """What a program prints."""
    program = [sys.executable, *(arguments or ("-W", "error", "-c", code))]
    env = os.environ | {"PYTHONPATH": str(PYTHON)} | environment
    done = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """What one program found."""
    imports = "\n".join(f"from optimum.quanto{m} import {names}" for m, names in NAMES.items())
    return json.loads(
        run(f"""
import importlib.metadata as metadata, importlib.util, json, sys
import torch
from torch import nn
users_nn, before = nn, set(sys.modules)
import quantal.compat
from optimum.quanto import *
names = sorted(name for name in dir() if not name.startswith("_"))
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
finders = list(sys.meta_path)
quantal.compat.install()
{imports}
import optimum.quanto.quantize, optimum.quanto as quanto
print(json.dumps({{
    "names": names,
    "nn": nn is users_nn,
    "new": sorted(new - set(sys.stdlib_module_names)),
    "same finders": finders == sys.meta_path,
    "linear": QLinear.__module__,
    "quantize": type(quanto.quantize).__name__,
    "versions": [metadata.version(n) for n in ("optimum-quanto", "optimum_quanto", "pytest")],
    "owner": metadata.packages_distributions()["optimum"][0],
    "found": importlib.util.find_spec("optimum.quanto").name,
    "unknown": importlib.util.find_spec("optimum.quanto.nothing"),
}}))
""")
    )


def test_known_names(facts: dict[str, Any]) -> None:
    assert facts["linear"] == "quantal.nn.qlinear"


def test_metadata(facts: dict[str, Any]) -> None:
    version = "0.2.7+quantal"
    assert facts["versions"] == [version, version, pytest.__version__]
    assert (facts["owner"], facts["found"]) == ("optimum-quanto", "optimum.quanto")
    assert facts["unknown"] is None


def test_star_import_keeps_the_users_names(facts: dict[str, Any]) -> None:
    assert facts["nn"]
    assert not {"library", "models", "tensor", "Optional", "version"} & set(facts["names"])


def test_no_module_shadows_a_function(facts: dict[str, Any]) -> None:
    assert facts["quantize"] == "function"


def test_imports_no_other_library(facts: dict[str, Any]) -> None:
    assert facts["new"] == ["optimum", "quantal", "safetensors"]


def test_importing_it_twice_changes_nothing(facts: dict[str, Any]) -> None:
    assert facts["same finders"]


def test_absent_libraries() -> None:
    """No optimum, transformers or diffusers: the package is there; classes say what is missing."""
    said = run("""
import sys

class Hides:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name in ("optimum", "transformers", "diffusers"):
            return None
        return self.finder.find_spec(name, path, target)

import torch
sys.meta_path[:] = [Hides(finder) for finder in sys.meta_path]
import quantal.compat
import optimum
from optimum.quanto import *
print(list(optimum.__path__), is_transformers_available(), is_diffusers_available())
for kind in (QuantizedModelForCausalLM, QuantizedPixArtTransformer2DModel):
    try:
        kind.quantize(torch.nn.Linear(2, 2), weights="qint8")
    except ImportError as error:
        print(error)
""").split("\n")
    assert said[0] == "[] False False"
    assert "QuantizedModelForCausalLM requires the transformers library" in said[1]
    assert "QuantizedPixArtTransformer2DModel requires the diffusers library" in said[2]


@pytest.mark.parametrize("error", ["RuntimeError", "ImportError"])
def test_broken_libraries(tmp_path: Path, error: str) -> None:
    """transformers and diffusers that cannot be imported: optimum-quanto itself cannot, then."""
    for library in ("transformers", "diffusers"):
        (tmp_path / f"{library}.py").write_text(f"raise {error}('{library} is broken')\n")
    path = os.pathsep.join([str(PYTHON), str(tmp_path)])
    said = run(
        """
import sys, torch, quantal, quantal.compat
from optimum.quanto import *
print(is_transformers_available(), quantal.is_diffusers_available())
print([name for name in ("transformers", "diffusers") if name in sys.modules])
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
quantize(model, weights=qint8)
freeze(model)
print(model[0].weight.qtype.name)
for kind in (QuantizedModelForCausalLM, QuantizedPixArtTransformer2DModel):
    try:
        kind.quantize(model, weights=qint8)
    except Exception as error:
        print(type(error).__name__, error)
""",
        PYTHONPATH=path,
    ).split("\n")
    broken = [f"{error} transformers is broken", f"{error} diffusers is broken"]
    assert said == ["True True", "[]", "qint8", *broken]
    program = [sys.executable, "-c", "import optimum.quanto"]
    theirs = subprocess.run(
        program, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert theirs.stderr.endswith(f"{error}: transformers is broken\n")


@pytest.mark.parametrize(("value", "active"), [("1", "True"), ("0", "False")])
def test_environment_variable(value: str, active: str) -> None:
    code = "import sys, quantal; print('quantal.compat' in sys.modules)"
    assert run(code, QUANTAL_COMPAT=value) == active


def test_runs_unchanged_programs(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("from optimum.quanto import qint4\n")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, helper, optimum.quanto as q\n"
        "if __name__ == '__main__':\n    print(q.__version__, helper.qint4.name, sys.argv[1:])\n"
    )
    expected = "0.2.7+quantal qint4 ['--flag', '3']"
    assert run("", "-m", "quantal.compat", str(program), "--flag", "3") == expected
    path = os.pathsep.join([str(PYTHON), str(tmp_path)])
    by_name = run("", "-m", "quantal.compat", "-m", "program", "--flag", "3", PYTHONPATH=path)
    assert by_name == expected


def test_after_the_real_one_is_an_error() -> None:
    said = run("""
import sys, types
sys.modules["optimum.quanto"] = types.ModuleType("optimum.quanto")
sys.modules["optimum.quanto"].__file__ = "elsewhere"
try:
    import quantal.compat
except ImportError as error:
    print(error)
""")
    assert "already imported, from elsewhere: import quantal.compat first" in said
