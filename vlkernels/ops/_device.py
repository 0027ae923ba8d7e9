"""The compute capability that configurations are made for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# multiprocessors; one config serves the variants of an architecture
_SMS = {80: 108, 90: 132, 100: 148, 120: 170}

_assumed: int | None = None


def arch(t: Tensor) -> int:
    """10 * major + minor of t's device (90 for an H200), 0 where there is none."""
    if _assumed is not None:
        return _assumed
    if not t.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(t.device)
    return 10 * major + minor


def multiprocessors(capability: int) -> int:
    """How many programs fill a device of this architecture; sm_90's where it is unknown."""
    return _SMS.get(capability, _SMS[90])


@contextlib.contextmanager
def assume(capability: int) -> Iterator[None]:
    """Configure for a device that is not here: kernels are compiled ahead of time, not launched."""
    global _assumed
    previous, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = previous
