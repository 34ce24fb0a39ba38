"""The package as pip installs it: it finds its library, and C++ projects find it.

The wheel compiles nothing anew: ccache knows its objects from the build folder."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
import quantal
import torch
from quantal.__main__ import main

ROOT = Path(__file__).parents[2]
BUILD = Path(os.environ["QUANTAL_LIBRARY"]).parents[1]
PACKAGE = Path(quantal.__file__).parent


def cached(name: str) -> str:
    """A variable of the build folder."""
    file = BUILD / "CMakeCache.txt"
    cache = file.read_text() if file.exists() else ""
    found = re.search(rf"^{name}:\w+=(.*)$", cache, re.MULTILINE)
    return found[1] if found else ""


pytestmark = pytest.mark.skipif(
    not cached("CCACHE_PROGRAM") or find_spec("scikit_build_core") is None,
    reason="needs a build folder, ccache and scikit-build-core",
)


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-index", "--no-deps"]
    # By its name: ccache tells c++ from g++, and pip's environment names the latter.
    environment = os.environ | {"CXX": cached("CMAKE_CXX_COMPILER")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip wheel` makes of the source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", ROOT, "--no-build-isolation", "--wheel-dir", folder)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """A folder with the packages quantal and torch, as site-packages has them. Always the same one,
    so that the compiler's cache knows what is compiled against it."""
    folder = BUILD / "python-install"
    shutil.rmtree(folder, ignore_errors=True)
    pip("install", wheel, "--target", folder)
    (folder / "torch").symlink_to(Path(torch.__file__).parent)
    return folder


def test_what_the_wheel_has(wheel: Path) -> None:
    assert re.fullmatch(rf"quantal-{quantal.__version__}-py3-none-linux_\w+\.whl", wheel.name)
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        f"quantal/{file.relative_to(PACKAGE)}"
        for file in PACKAGE.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    headers = {
        f"quantal/include/quantal/{file.name}" for file in (ROOT / "include/quantal").iterdir()
    }
    parts = ("", "_io", "_kernels")
    assert sources | headers < names
    assert {f"quantal/lib/libquantal{part}.so" for part in parts} < names
    rest = names - sources - headers
    assert all(
        name.startswith((f"quantal-{quantal.__version__}.dist-info/", "quantal/lib/"))
        for name in rest - {"quantal/_build.py", "quantal/share/doc/Quantal/LICENSE"}
    )


def run(site: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Python with that folder, as a user of the package runs it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("QUANTAL_")}
    environment |= {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_package_finds_its_library(site: Path) -> None:
    program = (
        "import torch, quantal;"
        "m = torch.nn.Sequential(torch.nn.Linear(64, 4));"
        "quantal.quantize(m, weights='qint4'); quantal.freeze(m);"
        "print(m(torch.ones(1, 64)).shape, quantal.library_path())"
    )
    done = run(site, "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(") ")[0].endswith("[1, 4]")
    assert Path(done.stdout.split()[-1]) == site / "quantal" / "lib" / "libquantal.so"


def test_no_compiler_at_run_time(site: Path, tmp_path: Path) -> None:
    """With nothing to find by PATH, every qtype is quantized, frozen and run, and nothing is
    written beside the package."""
    program = """
import shutil, torch, quantal
assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang", "ninja", "cmake")))
torch.manual_seed(0)
for weights in ("qint2", "qint4", "qint8", "qfloat8", "qfloat8_e4m3fnuz", "qfloat8_e5m2"):
    for activations in (None, "qint8", "dynamic-qint8"):
        layers = [torch.nn.Conv1d(8, 64, 3), torch.nn.Flatten(), torch.nn.Linear(128, 4)]
        model = torch.nn.Sequential(torch.nn.Embedding(9, 4), *layers)
        quantal.quantize(model, weights=weights, activations=activations)
        x = torch.randint(9, (3, 8))
        with quantal.Calibration(model):
            model(x)
        model(x).sum().backward()
        quantal.freeze(model)
        assert model(x).isfinite().all()
print("done")
"""
    before = sorted(site.rglob("*"))
    nowhere = str(tmp_path / "none")
    variables = {"PATH": nowhere, "CC": nowhere, "CXX": nowhere, "PYTHONDONTWRITEBYTECODE": "1"}
    done = run(site, "-c", program, **variables, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.stdout == "done\n", done.stderr
    assert not list(tmp_path.iterdir())
    assert sorted(site.rglob("*")) == before


def test_what_the_command_prints(site: Path) -> None:
    done = run(site, "-m", "quantal", "--version", "--isa", "--cmake-dir")
    version, isa, cmake_dir = done.stdout.splitlines()
    assert version.startswith(f"quantal {quantal.__version__}, torch {torch.__version__}, {site}")
    best = quantal._library.ops.supported_isas()[0]
    assert isa.startswith(f"{best} (the best of them; this processor runs {best}")
    assert Path(cmake_dir) == site / "quantal" / "lib" / "cmake" / "Quantal"


def test_help_without_arguments(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    assert "--cmake-dir" in capsys.readouterr().out


def test_one_version_everywhere() -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(r"project\(Quantal VERSION (?P<value>[0-9.]+)", cmake)
    assert found["value"] == quantal.__version__


def test_pip_fetches_no_torch_to_build_with() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (requires,) = re.findall(r"^requires = (.*)$", project, re.MULTILINE)
    assert "torch" not in requires


def test_instruction_set_by_name(site: Path) -> None:
    done = run(site, "-m", "quantal", "--isa", QUANTAL_ISA="portable")
    assert done.stdout.startswith("portable (which QUANTAL_ISA names; this processor runs ")


def test_instruction_set_that_is_not_there(site: Path) -> None:
    done = run(site, "-m", "quantal", "--isa", QUANTAL_ISA="mmx")
    assert done.returncode == 1
    assert "QUANTAL_ISA is 'mmx', which is no instruction set" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_library_that_is_not_there(site: Path) -> None:
    done = run(site, "-c", "import quantal", QUANTAL_LIBRARY="/nowhere/libquantal.so")
    assert done.returncode == 1
    assert "ImportError: [quantal] expected the C++ library at /nowhere/libqu" in done.stderr


def test_library_of_another_torch(site: Path) -> None:
    build = site / "quantal" / "_build.py"
    right = build.read_text()
    assert f'TORCH_VERSION = "{torch.__version__.partition("+")[0]}"' in right
    try:
        build.write_text('TORCH_VERSION = "1.13.1"\n')
        done = run(site, "-c", "import quantal")
    finally:
        build.write_text(right)
    assert "ImportError: [quantal] expected torch 1.13, which the C++ library was" in done.stderr


def test_cmake_dir_of_a_source_tree(capsys: pytest.CaptureFixture) -> None:
    assert main(["--cmake-dir"]) == 1
    assert "this package was not installed by pip" in capsys.readouterr().err


def test_cpp_project_builds_against_the_package(site: Path) -> None:
    """tests/consumer, which finds both libraries by that one folder."""
    options = {
        "Quantal_DIR": site / "quantal" / "lib" / "cmake" / "Quantal",
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": cached("CMAKE_CXX_COMPILER"),
        "CMAKE_CXX_COMPILER_LAUNCHER": cached("CCACHE_PROGRAM"),
    }
    build = site / "consumer"
    defined = [f"-D{name}={value}" for name, value in options.items()]
    source = str(ROOT / "tests" / "consumer")
    for command in (
        ["cmake", "-G", "Ninja", "-S", source, "-B", str(build), *defined],
        ["cmake", "--build", str(build), "--parallel", "2"],
        ["ctest", "--test-dir", str(build), "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
