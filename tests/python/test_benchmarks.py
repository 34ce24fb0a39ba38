"""What the benchmarks compute around their measurements: quantized weights and reports."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import report
from peers.peer import make_distinct, pack, quantize_symmetric


@pytest.mark.parametrize(("bits", "bound"), [(2, 1.0), (4, 0.5), (8, 0.5)])
@pytest.mark.parametrize("group", [16, None])
def test_codes_times_scales_are_the_weight(bits: int, bound: float, group: int | None) -> None:
    """Within half a step; two bits lack the code +2, and lose a whole one there."""
    weight = np.random.default_rng(0).standard_normal((5, 32), dtype=np.float32)
    codes, scales = quantize_symmetric(weight, bits, group)
    steps = np.repeat(scales, 32 // scales.shape[1], axis=1)
    assert np.abs(codes * steps - weight).max() <= bound * steps.max() * (1 + 1e-6)
    assert (codes >= -(2 ** (bits - 1))).all()
    assert (codes < 2 ** (bits - 1)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_codes_unpack(bits: int) -> None:
    """The first code lies in the lowest bits."""
    codes = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 16), np.int8)
    packed = pack(codes, bits)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    unpacked = (packed[:, :, np.newaxis] >> shifts) & np.uint8(2**bits - 1)
    assert (unpacked.reshape(3, 16).astype(np.int16) - 2 ** (bits - 1) == codes).all()


def test_distinct_copies_differ_and_the_first_does_not() -> None:
    """For more copies than a byte counts."""
    codes = np.zeros((2, 4), np.int8)
    copies = {make_distinct(codes, i).tobytes() for i in range(300)}
    assert len(copies) == 300
    assert (make_distinct(codes, 0) == codes).all()


def _result(peer: str, scheme: str, family: str, ms: float) -> report.Result:
    return {
        "peer": peer,
        "scheme": scheme,
        "family": family,
        "rows": 8,
        "columns": 16,
        "tokens": 1,
        "ms": ms,
        "gbps": 1.0,
        "gflops": 1.0,
        "held": True,
    }


def test_ratios_name_the_best_peer_of_the_family() -> None:
    """Not of another family, and not Quantal."""
    results = report.Results(
        {
            "results": [
                _result("torch_float", "fp32", "float", 8.0),
                _result("quantal", "qint4", "w4", 2.0),
                _result("quantal", "qint4-bf16", "w4", 1.0),
                _result("slow", "w4", "w4", 6.0),
                _result("fast", "w4", "w4", 3.0),
                _result("other", "w4a8", "w4a8", 0.5),
            ]
        }
    )
    text = "\n".join(report.ratios(results, (8, 16)))
    assert "| quantal/qint4 | 1 | 1.50 of fast/w4 | 4.00 | - | - |" in text
    assert "| quantal/qint4-bf16 | 1 | 3.00 of fast/w4 | 8.00 | - | - |" in text
