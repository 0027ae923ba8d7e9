"""selective_scan_2d with the compiled kernels: a block an image and 32 channels, a warp a direction, all of which read
one copy of u in shared memory. The sum over directions and the fixed-order sums of parts are those of triton.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _compiled
from .._device import arch
from . import triton as plain
from .reference import ORDERS, chunk_length

SOURCES = "selective_scan"  # below csrc
MAX_STATE = 16


def refuses(u, delta, a, b, c, d, z, delta_bias, state, height, width, scan, softplus) -> str | None:
    if not u.is_cuda:
        return f"u is on {u.device.type}; compiled kernels run on CUDA devices"
    if (reason := _compiled.missing(SOURCES, u.device.index)) is not None:
        return reason
    if (reason := plain.refuses(u, delta, a, b, c, d, z, delta_bias, state, height, width, scan, softplus)) is not None:
        return reason
    if a.shape[1] > MAX_STATE:
        return f"a state of {a.shape[1]}; the compiled kernels keep up to {MAX_STATE} in registers"
    for name, t in (("delta", delta), ("b", b), ("c", c), ("z", z)):
        if t is not None and t.dtype != u.dtype:
            return f"{name} is {t.dtype}, u {u.dtype}; the compiled kernels take one dtype"
    needed = shared_bytes(u.shape[1], len(scan), u.element_size())
    limit = _compiled.shared_limit(arch(u))
    if needed > limit:
        return f"{u.shape[1]} tokens need {needed} bytes of shared memory; the device has {limit}"
    return None


def declines(*values) -> str | None:
    return "not measured on a GPU yet; backend='cuda' forces it"


def shared_bytes(L: int, K: int, itemsize: int) -> int:
    """Of a block of the backward pass, as csrc/selective_scan counts them: tiles of b and c, marks, and u."""
    return K * 8 * 32 * 4 + K * (chunk_length(L) // 8) * 16 * 32 * 4 + L * 32 * itemsize


def forward(*values) -> tuple[Tensor, Tensor, Tensor]:
    return plain.forward(*values, launch=launch_forward)


def backward(dy, dlast, **context) -> dict[str, Tensor]:
    return plain.backward(dy, dlast, **context, launch=launch_backward)


def launch_forward(u, delta, a, b, c, d, z, bias, state, height, width, scan, softplus, parts, last, states, ops=None):
    """The compiled forward, into parts, last and states. ops: where it is registered, for tests."""
    ops = torch.ops.vlkernels_cuda if ops is None else ops
    ops.selective_scan_forward(
        u, delta, _float(a), b, c, _float(d), z, _float(bias), _float(state), height, width, *_bits(scan),
        chunk_length(u.shape[1]), softplus, parts, last, states,
    )  # fmt: skip


def launch_backward(
    dy, dlast, u, delta, a, b, c, d, z, bias, state, states, height, width, scan, softplus, *out, ops=None
) -> None:
    """The compiled backward, into du, ddelta, da, db, dc, dd, dbias, dstate and dz."""
    ops = torch.ops.vlkernels_cuda if ops is None else ops
    dy = dy if dy is None else dy.to(u.dtype)
    ops.selective_scan_backward(
        dy, dlast, u, delta, _float(a), b, c, _float(d), z, _float(bias), _float(state), states, height, width,
        *_bits(scan), chunk_length(u.shape[1]), softplus, *out,
    )  # fmt: skip


def _float(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.float().contiguous()


def _bits(scan: str) -> tuple[int, int]:
    """Bit k: does direction k run backwards; does it run down the columns."""
    orders = [ORDERS[letter] for letter in scan]
    return (
        sum(backwards << k for k, (_, backwards) in enumerate(orders)),
        sum(column << k for k, (column, _) in enumerate(orders)),
    )
