"""The compute capability that configurations are made for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_assumed: int | None = None


def arch(t: Tensor) -> int:
    """10 * major + minor of t's device (90 for an H200), 0 where there is none."""
    if _assumed is not None:
        return _assumed
    if not t.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(t.device)
    return 10 * major + minor


@contextlib.contextmanager
def assume(capability: int) -> Iterator[None]:
    """Configure for a device that is not here: kernels are compiled ahead of time, not launched."""
    global _assumed
    previous, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = previous
