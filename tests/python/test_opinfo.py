"""Every operation of PyTorch, on its own samples: quantized tensors give what their values give.

Forward, in place, out= and gradients are compared with the same call on plain tensors of the
same values. A live weight stands for its latent, or in compute operations for its quantized value.
"""

import collections
from typing import Any

import pytest
import torch
from operator_samples import (
    BROKEN_OUT,
    CHANGE_SHAPE,
    NO_TENSOR_INPUT,
    OPS,
    READ_EITHER,
    READ_QUANTIZED,
    UNDECLARED_WRITES,
    UNINITIALIZED,
    WRITE_INPUT,
    Case,
    cases,
    full_name,
    tolerances,
)
from quantized import float_value, ops, quantize
from torch.utils._pytree import tree_leaves

SAMPLES = 8
FROZEN_REFUSES = "cannot write to a frozen weight"
LIVE_REFUSES = "cannot change the shape or storage of a live weight"

Tensors = dict[int, torch.Tensor]

SAMPLED = [
    (op, kind, chosen) for op in OPS for kind, chosen in cases(op, SAMPLES).items() if chosen
]


class Check:
    """The comparisons of one case; `reading` says what a live weight stands for."""

    def __init__(self, op: Any, case: Case, reading: str) -> None:
        self.op = op
        self.name = full_name(op)
        self.case = case
        self.reading = reading

    def values(self, quantized: Tensors) -> Tensors:
        """The plain tensors that the quantized ones stand for."""
        read = ops.dequantize if self.reading == "quantized" else float_value
        return {i: read(tensor).detach().clone() for i, tensor in quantized.items()}

    def assert_same(self, actual: Any, expected: Any, is_gradient: bool = False) -> None:
        actual, expected = tree_leaves(actual), tree_leaves(expected)
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            if not isinstance(e, torch.Tensor):
                assert a == e or (a != a and e != e)
                continue
            assert (a.shape, a.dtype, a.layout) == (e.shape, e.dtype, e.layout)
            if self.name in UNINITIALIZED:
                continue
            a, e = self._plain(a), e.detach()
            outputs = e.size(-1) if e.dim() else 1
            rtol, atol = tolerances(self.name, is_gradient, outputs)
            torch.testing.assert_close(a, e, rtol=rtol, atol=atol, equal_nan=True)

    def _plain(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if tensor.layout != torch.strided or not ops.is_quantized(tensor):
            return tensor
        return (ops.dequantize if self.reading == "quantized" else float_value)(tensor)

    def forward(self) -> Any:
        """Compares results; returns those of plain tensors, or None where the operation raises."""
        quantized = self.case.quantized()
        values = self.values(quantized)
        try:
            expected = self.case.call(self.op, values)
        except Exception:
            # PyTorch has its own exception for each.
            with pytest.raises(Exception):  # noqa: B017, PT011
                self.case.call(self.op, quantized)
            return None
        try:
            actual = self.case.call(self.op, quantized)
        except RuntimeError as error:
            self._assert_refused(error, self.case.kinds.values(), WRITE_INPUT)
            return None
        self.assert_same(actual, expected)
        # What the operation left of its inputs, most of which it does not write.
        if self.name not in UNDECLARED_WRITES:
            self.assert_same(list(quantized.values()), list(values.values()))
        return expected

    def _assert_refused(self, error: RuntimeError, kinds: Any, frozen_refuse: set[str]) -> None:
        if FROZEN_REFUSES in str(error):
            assert "frozen" in kinds
            assert self.name in frozen_refuse
        else:
            assert LIVE_REFUSES in str(error), error
            assert "live" in kinds
            assert self.name in CHANGE_SHAPE

    def in_place(self) -> None:
        """Writes to the first input, where it is the quantized one."""
        if self.op.inplace_variant is None or 0 not in self.case.kinds:
            return
        quantized = self.case.quantized()
        values = self.values(quantized)
        values[0] = float_value(quantized[0]).detach().clone()
        try:
            self.case.call(self.op.inplace_variant, values)
        except Exception:
            return
        target = quantized[0]
        before = float_value(target).clone()
        try:
            result = self.case.call(self.op.inplace_variant, quantized)
        except RuntimeError as error:
            self._assert_refused(error, self.case.kinds[0], {self.name})
            assert torch.equal(float_value(target), before)
            return
        assert result is target
        self.assert_same(float_value(target), values[0])

    def out(self, expected: Any) -> None:
        """Writes to a plain out= from quantized inputs, and to a quantized one from plain ones."""
        is_one = isinstance(expected, torch.Tensor) and expected.layout == torch.strided
        if not self.op.supports_out or not is_one or self.name in BROKEN_OUT:
            return
        quantized = self.case.quantized()
        values = self.values(quantized)
        reference = torch.empty_like(expected)
        try:
            self.case.call(self.op, values, out=reference)
        except Exception:
            return
        torch.testing.assert_close(reference, expected, equal_nan=True, rtol=1e-3, atol=1e-3)
        plain = torch.empty_like(expected)
        self.case.call(self.op, quantized, out=plain)
        self.assert_same(plain, reference)
        kind = next(iter(self.case.kinds.values()))
        can_hold = expected.dtype == torch.float32 and expected.numel() > 0
        if can_hold and (kind == "activation" or expected.dim() >= 2):
            self._write_quantized_out(kind, values, reference)

    def _write_quantized_out(self, kind: str, values: Tensors, expected: torch.Tensor) -> None:
        target = quantize(kind, torch.rand(expected.shape))
        if kind != "frozen":
            assert self.case.call(self.op, values, out=target) is target
            torch.testing.assert_close(float_value(target), expected, equal_nan=True)
            return
        before = ops.dequantize(target)
        try:
            self.case.call(self.op, values, out=target)
        except (RuntimeError, ValueError) as error:
            assert FROZEN_REFUSES in str(error) or "finite" in str(error)  # noqa: PT017
            assert torch.equal(ops.dequantize(target), before)
            return
        # Composite operations end in copy_(), which quantizes.
        again = ops.dequantize(quantize("frozen", expected))
        torch.testing.assert_close(ops.dequantize(target), again)

    def gradients(self) -> None:
        """Compares gradients of the quantized tensors and of every other float one."""
        if not self.op.supports_autograd:
            return
        others = {
            i: leaf
            for i, leaf in enumerate(self.case.leaves)
            if isinstance(leaf, torch.Tensor)
            and leaf.dtype == torch.float32
            and leaf.layout == torch.strided
            and i not in self.case.kinds
        }
        for floats in (others, {}):
            values = self.values(self.case.quantized())
            plain = {i: t.clone().requires_grad_() for i, t in {**values, **floats}.items()}
            try:
                expected = self._gradient(plain, plain)
            except Exception:
                continue
            leaves = {
                i: self.case.leaves[i].clone(memory_format=torch.contiguous_format).requires_grad_()
                for i in plain
            }
            tensors = dict(leaves)
            for i, kind in self.case.kinds.items():
                tensors[i] = quantize(kind, leaves[i])
                if kind == "live":
                    leaves[i] = tensors[i]
            self._assert_same_gradients(self._gradient(tensors, leaves), expected)
            return

    def _gradient(self, tensors: Tensors, leaves: Tensors) -> dict[int, torch.Tensor | None]:
        result = self.case.call(self.op, tensors)
        outputs = [
            out
            for out in tree_leaves(result)
            if isinstance(out, torch.Tensor) and out.requires_grad
        ]
        if not outputs:
            return {}
        generator = torch.Generator().manual_seed(2)
        weights = [
            torch.rand(out.shape, dtype=out.dtype, generator=generator)
            if out.layout == torch.strided
            else torch.ones_like(out)
            for out in outputs
        ]
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), weights, allow_unused=True, retain_graph=False
        )
        return dict(zip(leaves, gradients, strict=True))

    def _assert_same_gradients(
        self,
        actual: dict[int, torch.Tensor | None],
        expected: dict[int, torch.Tensor | None],
    ) -> None:
        for i in {**actual, **expected}:
            a, e = actual.get(i), expected.get(i)
            # A quantizing step turns "no gradient" into zeros.
            if a is None or e is None:
                assert a is None or not a.any()
                assert e is None or not e.any()
            else:
                self.assert_same(a, e, is_gradient=True)

    def run(self) -> None:
        expected = self.forward()
        self.in_place()
        if expected is not None:
            self.out(expected)
            self.gradients()


def check(op: Any, case: Case) -> None:
    name = full_name(op)
    either = {name, f"{name}[{next(iter(case.kinds))}]"} & READ_EITHER
    if not either or "live" not in case.kinds.values():
        Check(op, case, "quantized" if name in READ_QUANTIZED else "latent").run()
        return
    try:
        Check(op, case, "quantized").run()
    except AssertionError:
        Check(op, case, "latent").run()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("op", "kind", "chosen"),
    SAMPLED,
    ids=[f"{full_name(op)}-{kind}" for op, kind, _ in SAMPLED],
)
def test_operation(op: Any, kind: str, chosen: list[Case]) -> None:
    """One operation with tensors of one kind."""
    for case in chosen:
        check(op, case)


def test_coverage() -> None:
    """The sweep is as wide as it was: no operation fell out of it unseen."""
    operations, samples = collections.Counter(), collections.Counter()
    for _, kind, chosen in SAMPLED:
        operations[kind] += 1
        samples[kind] += len(chosen)
    assert operations == {"frozen": 576, "live": 576, "activation": 652, "mixed": 229}
    assert samples.total() > 15_000
    reached = {full_name(op) for op, _, _ in SAMPLED}
    assert {full_name(op) for op in OPS} - reached == NO_TENSOR_INPUT
