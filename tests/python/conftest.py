"""What every test of Quantal through Python starts from."""

from collections.abc import Iterator

import pytest
import torch
from quantized import ops


def pytest_configure(config: pytest.Config) -> None:
    """Whole weights that an operation dequantizes warn once: most tests do that on purpose."""
    config.addinivalue_line("filterwarnings", r"ignore:\[quantal\]")
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support")
    config.addinivalue_line("filterwarnings", r"ignore:`torch.jit:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:torch.qr is deprecated")


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Gives every test the same random numbers, one thread and no fallback counted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ops.reset_fallback_counts()
    yield
    torch.set_num_threads(threads)
