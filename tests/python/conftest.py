"""What every test of Quantal through Python starts from."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from quantized import ops

# Whole weights that an operation dequantizes warn once: most tests here do that on purpose.
warnings.filterwarnings("ignore", message=r"\[quantal\]")


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Gives every test the same random numbers, one thread and no fallback counted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ops.reset_fallback_counts()
    yield
    torch.set_num_threads(threads)
