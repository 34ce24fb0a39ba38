"""The machine that is measured: its processors, its limits, and how to hold libraries to an ISA."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# What holds each library to AVX2. It is read when the library loads.
AVX2_ENVIRONMENT = {
    "QUANTAL_ISA": "avx2",  # and which build of ggml is loaded
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # in torch and in OpenVINO
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "OV_CPU_MAX_ISA": "AVX2",  # OpenVINO's own kernels, in releases that read it
}
# What hides AMX.
AVX512_ENVIRONMENT = {"QUANTAL_ISA": "avx512_vbmi", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}
ENVIRONMENTS = {"avx2": AVX2_ENVIRONMENT, "avx512": AVX512_ENVIRONMENT}

# Peers that go on using AVX-512 where it is there: their figures are then marked.
NOT_HELD = {
    "onnx_runtime": "ONNX Runtime has no setting for its instruction set",
    "openvino_cpu": "OpenVINO's own kernels ignore OV_CPU_MAX_ISA in some releases",
    "bitsandbytes_cpu": "bitsandbytes has no setting for its instruction set",
}

_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512vbmi", "amx_int8")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpuinfo(key: str) -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def cpu_flags() -> list[str]:
    """The instruction sets that matter here and that the processor has."""
    present = set(_cpuinfo("flags").split())
    return [flag for flag in _FLAGS if flag in present]


def one_processor_a_core(count: int) -> list[int]:
    """`count` processors that this process may use, on cores of their own where there are enough.

    Two hardware threads of one core share its arithmetic: they would halve every peak.
    """
    allowed = sorted(os.sched_getaffinity(0))
    first_of_core: dict[str, int] = {}
    for cpu in allowed:
        siblings = _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first_of_core.setdefault(siblings or str(cpu), cpu)
    chosen = list(first_of_core.values())
    chosen += [cpu for cpu in allowed if cpu not in chosen]
    return sorted(chosen[:count])


def prepare_environment(threads: int, isa: str, build: Path) -> None:
    """Sets affinity and variables that the processes started from here inherit."""
    os.sched_setaffinity(0, one_processor_a_core(threads))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("OMP_PROC_BIND", "true")
    os.environ.setdefault("QUANTAL_LIBRARY", str(build / "src" / "libquantal.so"))
    # quanto compiles an extension on its first use.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".venv-bench" / "torch_extensions"))
    os.environ["PATH"] = f"{ROOT / '.venv-bench' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ.update(ENVIRONMENTS.get(isa, {}))


def not_held(isa: str) -> dict[str, str]:
    """The peers that use more than `isa` on this machine, and why."""
    return NOT_HELD if isa == "avx2" and "avx512f" in cpu_flags() else {}


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 8 << 30


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def describe() -> dict[str, Any]:
    """What a reader of the figures has to know about the machine."""
    return {
        "cpu": _cpuinfo("model name") or platform.processor(),
        "family": _cpuinfo("cpu family"),
        "model": _cpuinfo("model"),
        "flags": cpu_flags(),
        "processors": os.cpu_count(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
        "commit": _commit(),
    }


def measure_limits(
    program: Path, threads: int, isa: str, quick: bool, folder: Path
) -> dict[str, Any]:
    """Runs benchmarks/limits.cc's program and returns what it wrote."""
    result = folder / "limits.json"
    command = [str(program), "--threads", str(threads), "--json", str(result)]
    command += ["--isa", "avx2"] if isa == "avx2" else []
    command += ["--quick"] if quick else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(result.read_text())
