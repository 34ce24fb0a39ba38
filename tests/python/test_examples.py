"""The programs of examples/, on little data."""

import ast
import gzip
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import wave
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RUNNER = Path(os.environ["QUANTAL_LIBRARY"]).parents[1] / "examples" / "aoti" / "quantal-aoti"


def run(*command: object, path: Path | None = None) -> subprocess.CompletedProcess:
    """With `path` among the folders of modules."""
    folders = [str(ROOT / "python"), *([str(path)] if path else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "TQDM_DISABLE": "1"}
    return subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


PROGRAMS = sorted(EXAMPLES.glob("*/*.py"))
#: Runs programs with --help, all in one process, and prints what they printed.
HELP = """
import contextlib, io, json, runpy, sys
texts = []
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stop:
            texts.append(text.getvalue() if stop.code == 0 else f"exit {stop.code}")
print(json.dumps(texts))
"""
#: Stands for transformers, which is in environments of its own: --help loads no model.
TRANSFORMERS = "def __getattr__(name):\n    return type(name, (), {})\n"


@pytest.fixture(scope="module")
def help_texts(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    folder = tmp_path_factory.mktemp("help")
    if find_spec("transformers") is None:
        (folder / "transformers.py").write_text(TRANSFORMERS)
    done = run(sys.executable, "-c", HELP, *PROGRAMS, path=folder)
    assert done.returncode == 0, done.stderr
    return dict(zip(PROGRAMS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_help(program: Path, help_texts: dict[Path, str]) -> None:
    """Says what the program does and every option, before anything is looked for."""
    source, text = program.read_text(), " ".join(help_texts[program].split())
    assert text.startswith(f"usage: {program.name} [-h]")
    assert all(option in text for option in re.findall(r'"(--[-a-z]+)"', source))
    first_line = ast.get_docstring(ast.parse(source)).splitlines()[0]
    assert " ".join(first_line.split()[:6]) in text


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.ndim])
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    data = header + sizes + bytes(values.flatten().tolist())
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Sixty images of noise, whose label shows as a bright row."""
    for part, suffix in (("train", ""), ("t10k", ".gz")):
        labels = torch.arange(60) % 10
        pixels = torch.randint(0, 100, (60, 28, 28))
        pixels[torch.arange(60), 2 * labels + 4] = 255
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", pixels)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return tmp_path


def test_fashion_mnist(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = EXAMPLES / "python" / "fashion_mnist.py"
    options = ("--data", images, "--out", out, "--epochs", "2", "--batch-size", "10")
    done = run(sys.executable, program, *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("weights, activations"))
    rows = {line[:24].strip(): line[24:].split() for line in lines[header + 1 :]}
    assert list(rows) == [
        *("float", "qint8", "qint4", "qint2", "qfloat8"),
        *("qint8, dynamic qint8", "qint8, qint8", "qint8, qint8, trained"),
    ]
    accuracy = {scheme: float(row[0]) for scheme, row in rows.items()}
    assert accuracy["float"] > 50
    for scheme in ("qint8", "qint8, dynamic qint8", "qint8, qint8"):
        assert accuracy[scheme] == pytest.approx(accuracy["float"], abs=5)
    sizes = {scheme: int(row[2].replace(",", "")) for scheme, row in rows.items()}
    assert sizes["qint2"] < sizes["qint4"] < sizes["qint8"] < sizes["float"] / 3.5
    assert sorted(p.stat().st_size for p in out.glob("*.safetensors")) == sorted(sizes.values())


def test_fashion_mnist_without_data(tmp_path: Path) -> None:
    program = EXAMPLES / "python" / "fashion_mnist.py"
    done = run(sys.executable, program, "--data", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("fashion_mnist: error: ")
    assert "dataset-fashion-mnist" in done.stderr


@pytest.fixture
def coloured_images(tmp_path: Path) -> Path:
    """Ten classes of six images of noise for each part, whose label shows as a bright row."""
    for part in ("train", "test"):
        for label, name in itertools.product(range(10), range(6)):
            folder = tmp_path / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 100, (32, 32, 3), dtype=torch.uint8)
            pixels[3 * label + 1] = 255
            Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
    return tmp_path


def test_cifar10_resnet(coloured_images: Path, tmp_path: Path) -> None:
    program = EXAMPLES / "python" / "cifar10_resnet.py"
    net = runpy.run_path(str(program))["ResNet"](blocks=1)
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "net.th")
    out = tmp_path / "out"
    options = ("--data", coloured_images, "--checkpoint", tmp_path / "net.th", "--out", out)
    done = run(
        sys.executable, program, *options, "--batch-size", "10", "--epochs", "12", "--rounds", "2"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert len(rows) == 13
    accuracy = {scheme: float(row[0]) for scheme, row in rows.items()}
    for scheme in ("float-trained", "int8-static8-trained", "int4-trained", "int4-static8-trained"):
        assert accuracy[scheme] > 50, lines
    sizes = {scheme: int(row[1].replace(",", "")) for scheme, row in rows.items()}
    assert sizes["int2"] < sizes["int4"] < sizes["int8"] < sizes["float"]
    assert sizes["int8-static8"] == pytest.approx(sizes["int8"], rel=0.02)
    assert {p.stem: p.stat().st_size for p in out.iterdir()} == sizes


@pytest.mark.parametrize("missing", ["data", "checkpoint"])
def test_cifar10_resnet_says_what_is_missing(
    coloured_images: Path, tmp_path: Path, missing: str
) -> None:
    program = EXAMPLES / "python" / "cifar10_resnet.py"
    state = runpy.run_path(str(program))["ResNet"](blocks=1).state_dict()
    torch.save(state, tmp_path / "net.th")
    places = {"data": coloured_images, "checkpoint": tmp_path / "net.th"}
    places[missing] = tmp_path / "none"
    done = run(sys.executable, program, *(f"--{name}={path}" for name, path in places.items()))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"cifar10_resnet: error: {tmp_path / 'none'}")
    assert "https://github.com/" in done.stderr


def test_efficientnet(coloured_images: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(1)
    model = package.EfficientNet.from_name("efficientnet-lite0")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    program = EXAMPLES / "python" / "efficientnet.py"
    options = ("--out", tmp_path / "out", "--count", "8", "--batch-size", "4", "--rounds", "1")
    images = coloured_images / "test"
    done = run(sys.executable, program, tmp_path / "model.pth", images, *options)
    assert done.returncode == 0, done.stderr
    assert "forward of their own" not in done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[1:]}
    assert list(rows) == ["float", "int8", "float8", "int4", "int8-dynamic8", "int8-static8"]
    noise = {scheme: float(row[2]) for scheme, row in rows.items()}
    assert noise["float"] == float("inf")
    for scheme in ("int8", "int8-dynamic8", "int8-static8"):
        assert noise[scheme] > 20
    assert noise["int8"] > noise["float8"] > noise["int4"]
    sizes = {scheme: int(row[4].replace(",", "")) for scheme, row in rows.items()}
    assert sizes["int4"] < sizes["int8"] < sizes["float"] / 3


def write_wave(path: Path, rate: int) -> None:
    """A second of noise, louder and louder."""
    samples = torch.randn(rate) * torch.linspace(10, 5_000, rate)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, rate, "NONE", ""))
        file.writeframes(samples.to(torch.int16).numpy().tobytes())


@pytest.fixture
def vad_checkpoint(tmp_path: Path) -> Path:
    """Random weights with the names and shapes of Silero VAD's, large enough to say something."""
    torch.manual_seed(1)
    program = runpy.run_path(str(EXAMPLES / "python" / "voice_activity.py"))
    state = {name: 3 * value for name, value in program["SileroVAD"]().state_dict().items()}
    save_file(state, tmp_path / "vad.safetensors")
    return tmp_path / "vad.safetensors"


def test_voice_activity(vad_checkpoint: Path, tmp_path: Path) -> None:
    recordings = [tmp_path / "16k.wav", tmp_path / "48k.wav"]
    for path, rate in zip(recordings, (16_000, 48_000), strict=True):
        write_wave(path, rate)
    program = EXAMPLES / "python" / "voice_activity.py"
    options = ("--out", tmp_path / "out", "--rounds", "1")
    done = run(sys.executable, program, vad_checkpoint, *recordings, *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["16k.wav", "48k.wav"]
    assert all(line.endswith("of 1.00 s") for line in lines[:2])
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert list(rows) == ["float", "int8", "float8", "int4", "int8-dynamic8", "int8-static8"]
    apart = {scheme: float(row[2]) for scheme, row in rows.items()}
    assert apart["float"] == 0
    assert 0 < apart["int8"] < apart["int4"] < 0.2
    assert 0 < apart["int8-static8"] < 0.05
    sizes = {scheme: int(row[3].replace(",", "")) for scheme, row in rows.items()}
    assert sizes["int4"] < sizes["int8"] < sizes["float"]


def test_voice_activity_names_a_recording_it_cannot_read(
    vad_checkpoint: Path, tmp_path: Path
) -> None:
    write_wave(tmp_path / "cd.wav", 44_100)
    done = run(
        *(sys.executable, EXAMPLES / "python" / "voice_activity.py"),
        *(vad_checkpoint, tmp_path / "cd.wav"),
    )
    assert done.returncode == 1
    error = f"voice_activity: error: {tmp_path / 'cd.wav'}: expected 16 bits at a multiple"
    assert done.stderr.splitlines()[-1].startswith(error)


@pytest.mark.skipif(not RUNNER.exists(), reason="the examples are not built")
def test_exported_model_runs_without_python(tmp_path: Path) -> None:
    done = run(sys.executable, EXAMPLES / "aoti" / "export.py", tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(RUNNER, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "operations on dequantized values: 0" in done.stdout
    (tmp_path / "model.pt2").unlink()
    done = run(RUNNER, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("quantal-aoti: error: ")


@pytest.mark.skipif(
    not RUNNER.exists() or shutil.which("ldd") is None,
    reason="the examples are not built, or no ldd",
)
def test_the_runner_links_no_python() -> None:
    done = run("ldd", RUNNER)
    assert done.returncode == 0, done.stderr
    libraries = [line.split()[0] for line in done.stdout.splitlines() if line.split()]
    assert any(name.startswith("libquantal") for name in libraries)
    assert not [name for name in libraries if "python" in name]
