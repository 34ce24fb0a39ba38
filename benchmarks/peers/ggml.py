"""llama.cpp's ggml, through benchmarks/ggml: weights in its block formats, activations in int8.

A `+` after the type: the weights are repacked, several rows interleaved, as llama.cpp does when it
loads a model. One graph computes all copies.
"""

import ctypes
import os
from pathlib import Path

import numpy as np

from peers.peer import Floats, Run, Scheme, UnavailableError

_BUILDS = Path(__file__).parents[2] / ".venv-bench" / "ggml"

SCHEMES = (
    Scheme("f32", "float", 32),
    Scheme("bf16", "float", 16),
    Scheme("q8_0", "w8a8", 8),
    Scheme("q4_0", "w4a8", 4),
    Scheme("q4_0+", "w4a8", 4),
    Scheme("q4_K", "w4a8", 4),
    Scheme("q4_K+", "w4a8", 4),
    Scheme("q2_K", "w2a8", 2),
    Scheme("q2_K+", "w2a8", 2),
)


def _load() -> ctypes.CDLL:
    build = "avx2" if os.environ.get("QUANTAL_ISA") == "avx2" else "native"
    path = _BUILDS / build / "libggml_linear.so"
    if not path.exists():
        raise ImportError("not built: scripts/bench-setup.sh does that")
    library = ctypes.CDLL(str(path))
    pointer, floats = ctypes.c_void_p, np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
    library.ggml_linear_version.restype = ctypes.c_char_p
    library.ggml_linear_error.restype = ctypes.c_char_p
    library.ggml_linear_new.restype = pointer
    library.ggml_linear_new.argtypes = [
        ctypes.c_char_p,
        ctypes.c_bool,
        ctypes.c_int64,
        ctypes.c_int64,
        floats,
        ctypes.c_int,
        ctypes.c_int,
    ]
    library.ggml_linear_weight_bytes.restype = ctypes.c_size_t
    library.ggml_linear_weight_bytes.argtypes = [pointer]
    library.ggml_linear_bind.restype = ctypes.c_bool
    library.ggml_linear_bind.argtypes = [pointer, floats, ctypes.c_int64, ctypes.c_int]
    library.ggml_linear_run.restype = ctypes.c_bool
    library.ggml_linear_run.argtypes = [pointer]
    library.ggml_linear_output.restype = None
    library.ggml_linear_output.argtypes = [pointer, floats]
    library.ggml_linear_free.restype = None
    library.ggml_linear_free.argtypes = [pointer]
    return library


_LIBRARY = _load()


def version() -> str:
    """The version that is measured."""
    return f"ggml {_LIBRARY.ggml_linear_version().decode()}"


class GgmlLinears:
    """Copies of a layer in one graph."""

    def __init__(self, scheme: Scheme, weight: Floats, copies: int, threads: int) -> None:
        name, repacked = scheme.name.removesuffix("+"), scheme.name.endswith("+")
        self.rows = weight.shape[0]
        self.handle = _LIBRARY.ggml_linear_new(
            name.encode(), repacked, *weight.shape, weight, copies, threads
        )
        if not self.handle:
            raise UnavailableError(_LIBRARY.ggml_linear_error().decode())
        self.weight_bytes = _LIBRARY.ggml_linear_weight_bytes(self.handle)

    def __del__(self) -> None:
        """Frees weights and graph."""
        if self.handle:
            _LIBRARY.ggml_linear_free(self.handle)

    def bind(self, x: Floats, copies: int) -> Run:
        """See `peers.peer.Linears`."""
        if not _LIBRARY.ggml_linear_bind(self.handle, x, len(x), copies):
            raise UnavailableError(_LIBRARY.ggml_linear_error().decode())
        y = np.empty((len(x), self.rows), np.float32)

        def output() -> Floats:
            _LIBRARY.ggml_linear_run(self.handle)
            _LIBRARY.ggml_linear_output(self.handle, y)
            return y

        return Run([lambda: _LIBRARY.ggml_linear_run(self.handle)], output, copies)


def make(scheme: Scheme, weight: Floats, copies: int, threads: int) -> GgmlLinears:
    """See `peers.peer`."""
    return GgmlLinears(scheme, weight, copies, threads)
