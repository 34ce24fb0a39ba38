"""ONNX Runtime's quantized matrix products. One graph computes all copies.

accN is `accuracy_level`: at 4 MatMulNBits quantizes the activations to int8, at 0 it does not.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from peers.peer import (
    Floats,
    Linears,
    Run,
    Scheme,
    make_distinct,
    pack,
    quantize_symmetric,
)

SCHEMES = (
    Scheme("nbits8-g128-acc0", "w8", 8),
    Scheme("nbits4-g128-acc0", "w4", 4),
    Scheme("nbits4-g32-acc0", "w4", 4),
    Scheme("dynamic-int8", "w8a8", 8),
    Scheme("nbits8-g128-acc4", "w8a8", 8),
    Scheme("nbits4-g128-acc4", "w4a8", 4),
    Scheme("nbits4-g32-acc4", "w4a8", 4),
    Scheme("nbits2-g128-acc4", "w2a8", 2),
)


def version() -> str:
    """The version that is measured."""
    return f"onnxruntime {onnxruntime.__version__}"


# Makes node number `copy` and its constants.
Layer = Callable[[int], tuple[onnx.NodeProto, list[onnx.TensorProto]]]


def _matmul_nbits(scheme: Scheme, weight: Floats) -> tuple[Layer, int]:
    bits = int(scheme.weight_bits)
    traits = scheme.name.split("-")
    group, accuracy = int(traits[1].removeprefix("g")), int(traits[2].removeprefix("acc"))
    rows, columns = weight.shape
    codes, scales = quantize_symmetric(weight, bits, group)
    packed = pack(codes, bits).reshape(rows, columns // group, group * bits // 8)

    def layer(copy: int) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
        constants = [
            numpy_helper.from_array(make_distinct(packed, copy), f"codes{copy}"),
            numpy_helper.from_array(scales.reshape(-1), f"scales{copy}"),
        ]
        node = helper.make_node(
            "MatMulNBits",
            ["x", *(c.name for c in constants)],
            [f"y{copy}"],
            domain="com.microsoft",
            K=columns,
            N=rows,
            bits=bits,
            block_size=group,
            accuracy_level=accuracy,
        )
        return node, constants

    return layer, packed.nbytes + scales.nbytes


def _dynamic_int8(weight: Floats) -> tuple[Layer, int]:
    codes, scales = quantize_symmetric(weight, 8, None)
    transposed: NDArray[np.int8] = np.ascontiguousarray(codes.T)

    def layer(copy: int) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
        constants = [
            numpy_helper.from_array(make_distinct(transposed, copy), f"codes{copy}"),
            numpy_helper.from_array(scales[:, 0], f"scales{copy}"),
        ]
        node = helper.make_node(
            "DynamicQuantizeMatMul",
            ["x", *(c.name for c in constants)],
            [f"y{copy}"],
            domain="com.microsoft",
        )
        return node, constants

    return layer, codes.nbytes + scales.nbytes


class OrtLinears:
    """Copies of a layer as parallel nodes of one session."""

    def __init__(self, scheme: Scheme, weight: Floats, threads: int) -> None:
        dynamic = scheme.name == "dynamic-int8"
        self.shape = weight.shape
        self.threads = threads
        self.layer, self.weight_bytes = (
            _dynamic_int8(weight) if dynamic else _matmul_nbits(scheme, weight)
        )
        self.session: onnxruntime.InferenceSession | None = None
        self.copies = 0

    def bind(self, x: Floats, copies: int) -> Run:
        """See `peers.peer.Linears`."""
        if copies != self.copies:
            self.session = None  # its memory goes before the next one comes
            self.session = self._make_session(copies)
            self.copies = copies
        session = self.session
        return Run(
            [lambda: session.run(None, {"x": x})], lambda: session.run(["y0"], {"x": x})[0], copies
        )

    def _make_session(self, copies: int) -> onnxruntime.InferenceSession:
        rows, columns = self.shape
        made = [self.layer(copy) for copy in range(copies)]
        graph = helper.make_graph(
            [node for node, _ in made],
            "copies",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", columns])],
            [
                helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, ["tokens", rows])
                for copy in range(copies)
            ],
            [constant for _, constants in made for constant in constants],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        )
        model.ir_version = 10
        del made, graph
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # Threads that go on spinning after a call would take time from the next peer.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:  # a model in one piece may have 2 GiB at most
            path = Path(folder) / "model.onnx"
            onnx.save_model(model, str(path), save_as_external_data=True, location="weights")
            return onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )


def make(scheme: Scheme, weight: Floats, copies: int, threads: int) -> Linears:
    """See `peers.peer`."""
    return OrtLinears(scheme, weight, threads)
