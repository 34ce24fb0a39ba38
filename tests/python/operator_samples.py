"""PyTorch's operator samples with some of their tensors quantized, and what is known of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from quantized import quantize
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

OPS = [op for op in op_db if torch.float32 in op.dtypes]
KINDS = ("frozen", "live", "activation", "mixed")

# Operations without a float tensor among their arguments.
NO_TENSOR_INPUT = {
    "arange",
    "broadcast_shapes",
    "empty",
    "empty_permuted",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "randint",
    "randn",
    "scalar_tensor",
    "signal.windows.bartlett",
    "signal.windows.blackman",
    "signal.windows.cosine",
    "signal.windows.exponential",
    "signal.windows.gaussian",
    "signal.windows.general_cosine",
    "signal.windows.general_hamming",
    "signal.windows.hamming",
    "signal.windows.hann",
    "signal.windows.kaiser",
    "signal.windows.nuttall",
    "zeros",
}

# Results of uninitialized memory: only shape and dtype are compared.
UNINITIALIZED = {"empty_like", "new_empty", "new_empty_strided"}

# Operations that write an input, or a clone of it: frozen weights refuse, and so do their clones.
WRITE_INPUT = {
    "cauchy",
    "exponential",
    "geometric",
    "log_normal",
    "nn.functional.embedding",  # max_norm
    "nn.functional.embedding_bag",  # max_norm
    "nn.functional.gaussian_nll_loss",
    "normal.in_place",
    "resize_",
    "resize_as_",
    "uniform",
    "zero_",
}

# Operations that write an input which their schema calls read-only: the write is lost.
UNDECLARED_WRITES = {"native_batch_norm", "nn.functional.batch_norm"}

# Operations that, or whose in-place form, change the shape or the strides: a live weight refuses,
# since its latent is the parameter that an optimizer steps.
CHANGE_SHAPE = {
    "as_strided",
    "nn.functional.dropout3d",
    "resize_",
    "resize_as_",
    "squeeze",
    "squeeze.multiple",
    "t",
    "transpose",
    "unsqueeze",
}

# Operations that compute with weights: of a live weight they read the quantized value, in any
# position. Every other operation reads the latent.
READ_QUANTIZED = {
    "__rmatmul__",
    "addbmm",
    "addmm",
    "addmm.decomposed",
    "addmv",
    "baddbmm",
    "bmm",
    "bmm.triton_optimized",
    "cdist",
    "cholesky_inverse",
    "cholesky_solve",
    "einsum",
    "inner",
    "linalg.lstsq",
    "linalg.lstsq.grad_oriented",
    "linalg.multi_dot",
    "linalg.pinv",
    "linalg.pinv.hermitian",
    "linalg.pinv.singular",
    "matmul",
    "mm",
    "mv",
    "nn.functional.bilinear",
    "nn.functional.conv1d",
    "nn.functional.conv2d",
    "nn.functional.conv3d",
    "nn.functional.conv_transpose1d",
    "nn.functional.conv_transpose2d",
    "nn.functional.conv_transpose3d",
    "nn.functional.embedding",
    "nn.functional.embedding_bag",
    "nn.functional.layer_norm",
    "nn.functional.linear",
    "nn.functional.linear_cross_entropy",
    "nn.functional.linear_cross_entropy.chunked",
    "nn.functional.linear_cross_entropy.chunked_none",
    "nn.functional.multi_head_attention_forward",
    "pca_lowrank",
    "pinverse",
    "sparse.mm.reduce",
    "sparse.sampled_addmm",
    "svd_lowrank",
    "tensordot",
}

# Composed of operations of both sorts; which of them meets the weight depends on the arguments:
# results and gradients must be those of one reading. "[0]": only where argument 0 is the weight
# (padding="same" pads a float copy; class probabilities are multiplied; products of n and -n).
READ_EITHER = {
    "linalg.matrix_power",
    "nn.functional.conv3d[0]",
    "nn.functional.linear_cross_entropy.chunked[2]",
    "nn.functional.linear_cross_entropy.chunked_none[2]",
    "nn.functional.linear_cross_entropy[2]",
    "nn.functional.scaled_dot_product_attention",
}

# In PyTorch 2.13 these give wrong results when they write to out=, for plain tensors too.
BROKEN_OUT = {"fft.ihfft2", "fft.ihfftn"}

# Softmax of codes gives codes of scale 1/127: within half a step of the float result. Gradients
# y_i (w_i - sum_j w_j y_j) follow: every y is off by half a step, and |w| stays below 4.
_HALF_STEP = 0.5 / 127 + 1e-6
SOFTMAX = {"softmax", "nn.functional.softmin", "masked.softmax", "masked.softmin"}

# rtol and atol where the defaults of torch.testing.assert_close are too strict.
TOLERANCES = {
    # A double weight decodes in double arithmetic: it differs by the rounding of one fp32 product.
    "double": (2.0**-23, 0.0),
    "float_power": (1e-5, 1e-5),
    # Kernels sum in another order than torch's.
    "nn.functional.conv1d": (1e-5, 3e-5),
    "nn.functional.conv2d": (1e-5, 3e-5),
    "nn.functional.conv3d": (1e-5, 3e-5),
    # The scales of query and key take the factor 1/sqrt(d) where floats would be multiplied: logits
    # of up to 50 differ by their rounding, 2^-22, and softmax turns that into a relative error.
    "nn.functional.scaled_dot_product_attention": (2e-5, 2e-5),
    # Least squares of singular systems amplify the rounding of each call.
    "linalg.lstsq": (1e-3, 1e-3),
    "linalg.lstsq.grad_oriented": (1e-3, 1e-3),
    "linalg.pinv.singular": (1e-3, 1e-3),
    "svd_lowrank": (1e-3, 1e-3),
    "pca_lowrank": (1e-3, 1e-3),
    # Linears in a row, whose kernels sum in another order than torch's.
    "nn.functional.multi_head_attention_forward": (1e-5, 2e-4),
}


def full_name(op: Any) -> str:
    """The name of an operation with its variant: "norm.fro"."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def tolerances(name: str, is_gradient: bool, outputs: int) -> tuple[float | None, float | None]:
    """What torch.testing.assert_close may allow between float and quantized results of `name`."""
    if name in SOFTMAX:
        return 0.0, _HALF_STEP * ((4 + 4 * outputs) if is_gradient else 1)
    return TOLERANCES.get(name, (None, None))


@dataclass
class Case:
    """One sample of an operation and which of its tensors are quantized, and how."""

    leaves: list[Any]
    spec: TreeSpec
    kinds: dict[int, str]

    def call(self, function: Callable[..., Any], tensors: dict[int, torch.Tensor], **extra: Any):
        """Calls `function` with copies of the sample's arguments, `tensors` put in place."""
        leaves = [tensors.get(i, _copy(leaf)) for i, leaf in enumerate(self.leaves)]
        first, args, kwargs = tree_unflatten(leaves, self.spec)
        torch.default_generator.manual_seed(1)  # torch.manual_seed() takes a millisecond
        return function(first, *args, **kwargs, **extra)

    def quantized(self) -> dict[int, torch.Tensor]:
        """The quantized tensors, by position."""
        return {i: quantize(kind, self.leaves[i]) for i, kind in self.kinds.items()}


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _is_float_matrix(leaf: Any, least_dims: int) -> bool:
    return (
        isinstance(leaf, torch.Tensor)
        and leaf.layout == torch.strided
        and leaf.dtype == torch.float32
        and leaf.dim() >= least_dims
        and 0 < leaf.numel() <= 20_000
        and bool(leaf.isfinite().all())
    )


def _choices(leaves: list[Any], kind: str) -> Iterator[dict[int, str]]:
    floats = [i for i, leaf in enumerate(leaves) if _is_float_matrix(leaf, 0)]
    if kind == "mixed":
        # As in a quantized network: the first input is an activation, what follows are weights.
        kinds = {i: "frozen" if _is_float_matrix(leaves[i], 2) else "activation" for i in floats}
        if len(floats) > 1:
            yield {**kinds, floats[0]: "activation"}
        return
    for i in floats[:3]:
        if kind == "activation" or _is_float_matrix(leaves[i], 2):
            yield {i: kind}


def _samples(op: Any) -> list[tuple[list[Any], TreeSpec]]:
    samples = []
    torch.manual_seed(0)
    # op.sample_inputs() is this and a look at the whole call stack for each sample.
    for sample in op.sample_inputs_func(op, "cpu", torch.float32, requires_grad=False):
        detached = tree_map(
            lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf,
            (sample.input, sample.args, sample.kwargs),
        )
        samples.append(tree_flatten(detached))
    return samples


def _is_renormalized(leaves: list[Any], spec: TreeSpec) -> bool:
    """True where the operation rescales the rows of its weight first, which moves the codes."""
    _, _, kwargs = tree_unflatten(leaves, spec)
    return kwargs.get("max_norm") is not None


def cases(op: Any, most: int) -> dict[str, list[Case]]:
    """For each kind at most `most` samples of `op`, spread over all that can have such tensors."""
    samples = _samples(op)
    picked = {}
    for kind in KINDS:
        by_sample = []
        for leaves, spec in samples:
            choices = [Case(leaves, spec, kinds) for kinds in _choices(leaves, kind)]
            if choices and not (kind == "live" and _is_renormalized(leaves, spec)):
                by_sample.append(choices)
        step = max(1, len(by_sample) / most)
        chosen = [by_sample[int(i * step)] for i in range(min(most, len(by_sample)))]
        picked[kind] = [case for choices in chosen for case in choices]
    return picked
