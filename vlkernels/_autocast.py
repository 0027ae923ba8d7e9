"""Autocast on any device, also where there is none (meta tensors)."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes products in on x's device, or None where it is off; float64 is left alone."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on and x.dtype != torch.float64 else None


def off(x: Tensor) -> contextlib.AbstractContextManager:
    """No autocast on x's device inside the block."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
