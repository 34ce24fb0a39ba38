"""How much memory of tensors a call takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], mapped: Path | None = None) -> int:
    """The most bytes that the CPU's allocator had given out since the call began. A file that is
    mapped into memory is none of them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    size = 0 if mapped is None else mapped.stat().st_size
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        # Files are mapped in whole pages, and reported with what belongs to the mapping.
        if event.name() == "[memory]" and not (size and abs(abs(event.nbytes()) - size) < 4096):
            now += event.nbytes()
            peak = max(peak, now)
    return peak
