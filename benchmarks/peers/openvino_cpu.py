"""OpenVINO's compressed matrix products on CPUs. One graph computes all copies.

dqN is the plugin's `DYNAMIC_QUANTIZATION_GROUP_SIZE`: how many activations share a scale when it
quantizes them to int8; at 0 it does not. On processors without VNNI the plugin ignores it: such a
layer would be timed under a wrong name, so it is recognised by its result and left out.
"""

import numpy as np
import openvino
from openvino import opset13 as ops

from peers.peer import (
    GROUP,
    Floats,
    Linears,
    Run,
    Scheme,
    UnavailableError,
    make_distinct,
    pack,
    quantize_symmetric,
)

SCHEMES = (
    Scheme("f32", "float", 32),
    Scheme("i8-dq0", "w8", 8),
    Scheme("u4-g128-dq0", "w4", 4),
    Scheme("i8-dq128", "w8a8", 8),
    Scheme("u4-g128-dq128", "w4a8", 4),
)

_FLOAT_ERROR = 1e-4  # far below what rounding activations to int8 costs
_PROBED_ROWS = 64


def version() -> str:
    """The version that is measured."""
    return f"openvino {openvino.__version__.split('-')[0]}"


class OpenVinoLinears:
    """Copies of a layer as parallel nodes of one model."""

    def __init__(self, scheme: Scheme, weight: Floats, threads: int) -> None:
        self.shape = weight.shape
        dynamic_group = scheme.name.rpartition("dq")[2] if "dq" in scheme.name else "0"
        self.config = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": dynamic_group,
        }
        self.kind = scheme.name.split("-")[0]
        self.quantizes_activations = dynamic_group != "0"
        if self.kind == "f32":
            self.codes, self.scales = weight, np.empty((0, 1), np.float16)
        else:
            bits, group = (8, None) if self.kind == "i8" else (4, GROUP)
            codes, scales = quantize_symmetric(weight, bits, group)
            self.codes = codes if bits == 8 else pack(codes, bits)
            self.scales = scales.astype(np.float16)
            some = codes[:_PROBED_ROWS], self.scales[:_PROBED_ROWS].astype(np.float64)
            self.probe = some[0] * np.repeat(some[1], weight.shape[1] // some[1].shape[1], axis=1)
        self.weight_bytes = self.codes.nbytes + self.scales.nbytes
        self.request: openvino.InferRequest | None = None
        self.kept: list[np.ndarray] = []  # tensors share the memory of these arrays
        self.copies = 0

    def bind(self, x: Floats, copies: int) -> Run:
        """See `peers.peer.Linears`."""
        if copies != self.copies:
            self.request = None  # its memory goes before the next one comes
            self.kept.clear()
            self.request = self._make_request(copies)
            self.copies = copies
        request = self.request
        request.set_input_tensor(openvino.Tensor(x, shared_memory=True))

        def output() -> Floats:
            request.infer()
            return request.get_output_tensor(0).data

        if self.quantizes_activations:
            expected = x[:1].astype(np.float64) @ self.probe.T
            error = np.linalg.norm(output()[:1, :_PROBED_ROWS] - expected)
            if error < _FLOAT_ERROR * np.linalg.norm(expected):
                raise UnavailableError("on this processor the activations stay float: as dq0")
        return Run([request.infer], output, copies)

    def _make_request(self, copies: int) -> openvino.InferRequest:
        x = ops.parameter([-1, self.shape[1]], openvino.Type.f32, name="x")
        results = [
            ops.result(ops.matmul(x, self._weight(copy), False, True)) for copy in range(copies)
        ]
        model = openvino.Model(results, [x], "copies")
        return openvino.Core().compile_model(model, "CPU", self.config).create_infer_request()

    def _weight(self, copy: int) -> openvino.Node:
        if self.kind == "f32":
            changed = self.codes.copy()
            changed[-1, -1] += copy  # or equal constants become one
            return ops.constant(changed)
        codes = make_distinct(self.codes, copy)
        if self.kind == "i8":
            number = ops.convert(ops.constant(codes), openvino.Type.f16)
            return ops.convert(ops.multiply(number, ops.constant(self.scales)), openvino.Type.f32)
        rows, columns = self.shape
        grouped = [rows, columns // GROUP, GROUP]
        self.kept.append(codes)
        nibbles = ops.constant(openvino.Tensor(codes, grouped, openvino.Type.u4))
        eight = np.full(1, 0x88, np.uint8)
        self.kept.append(eight)
        zero = ops.constant(openvino.Tensor(eight, [1, 1, 1], openvino.Type.u4))
        number = ops.subtract(
            ops.convert(nibbles, openvino.Type.f16), ops.convert(zero, openvino.Type.f16)
        )
        product = ops.multiply(number, ops.constant(self.scales[:, :, np.newaxis]))
        flat = ops.reshape(product, ops.constant(np.array([rows, columns], np.int64)), False)
        return ops.convert(flat, openvino.Type.f32)


def make(scheme: Scheme, weight: Floats, copies: int, threads: int) -> Linears:
    """See `peers.peer`."""
    return OpenVinoLinears(scheme, weight, threads)
