"""selective_scan_2d in Triton: a launch for all directions each way, and a second that sums them in a fixed order.

Forward keeps a direction's states before each chunk; backward computes all others from them. Sums over channels (db,
dc) and over images (da, dd, dbias) are written in parts and added in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .. import _refuse
from .._device import arch
from .kernels import selective_scan_2d_bwd_kernel, selective_scan_2d_fwd_kernel, selective_scan_2d_merge_kernel
from .reference import ORDERS, chunk_length

MAX_STATE = 32
MERGED = 1024  # elements a program of the merge; not timed on a GPU yet


def refuses(u, delta, a, b, c, d, z, delta_bias, state, height, width, scan, softplus) -> str | None:
    given = {"delta": delta, "a": a, "b": b, "c": c, "d": d, "z": z, "delta_bias": delta_bias, "state": state}
    if (reason := _refuse.common(u, None, **given)) is not None:
        return reason
    if a.shape[1] > MAX_STATE:
        return f"a state of {a.shape[1]}; kernels keep up to {MAX_STATE} in registers"
    if z is not None and len(scan) > 1:
        return f"z with {len(scan)} directions; kernels gate the result of one, multiply the sum by SiLU(z) yourself"
    return None


def declines(*values) -> str | None:
    return None


@dataclass(frozen=True)
class Config:
    """channels a program, its warps, and of how many steps backward keeps the states in registers."""

    channels: int
    warps: int
    fine: int


def config(S: int, group: int, device_arch: int) -> Config:
    """A warp a program and a channel a lane: 32 lanes hold S states each. Of wider states backward keeps fewer steps,
    for they are S registers each: 2 steps of 16 spill, and so do 8 of 1. Not timed on a GPU yet."""
    state = triton.next_power_of_2(S)
    channels = max(16, min(32, triton.next_power_of_2(group)))
    return Config(channels, 1, max(1, min(2, 16 // state)))


@dataclass(frozen=True)
class _Call:
    """What both kernels of one call take alike."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    grid: tuple[int]
    blocks: int
    tiles: Config
    constants: dict


def _call(u, delta, a, b, c, z, height, width, scan, softplus, **has) -> _Call:
    (B, L, D), (K, G, S) = u.shape, b.shape[2:]
    group = D // G
    tiles = config(S, group, arch(u))
    blocks, chunk = triton.cdiv(group, tiles.channels), chunk_length(L)
    orders = [ORDERS[letter] for letter in scan]
    return _Call(
        (B, L, height, width, K, G, D, S, group, blocks, chunk, triton.cdiv(L, chunk)),
        (
            *u.stride(),
            *delta.stride(),
            *a.stride(),
            *b.stride(),
            *c.stride(),
            *((0, 0, 0) if z is None else z.stride()),
        ),
        (B * K * G * blocks,),
        blocks,
        tiles,
        {
            "BACKWARDS": sum(backwards << k for k, (_, backwards) in enumerate(orders)),
            "BY_COLUMN": sum(column << k for k, (column, _) in enumerate(orders)),
            "SOFTPLUS": softplus,
            "HAS_Z": z is not None,
            "BLOCK_D": tiles.channels,
            "BLOCK_S": triton.next_power_of_2(S),
            "num_warps": tiles.warps,
            "num_stages": 1,
            **has,
        },
    )


def forward(
    u, delta, a, b, c, d, z, delta_bias, state, height, width, scan, softplus, launch=None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D), last state (B, K, D, S), states before the chunks (B, K, chunks - 1, S, D).

    launch: what takes the place of the Triton kernel, called with the arguments and what it is to fill."""
    (B, L, D), K, S = u.shape, len(scan), a.shape[1]
    d, delta_bias, state = (None if t is None else t.contiguous() for t in (d, delta_bias, state))
    has = {"HAS_D": d is not None, "HAS_BIAS": delta_bias is not None, "HAS_STATE": state is not None}
    call = _call(u, delta, a, b, c, z, height, width, scan, softplus, **has)
    made = {"dtype": torch.float32, "device": u.device}
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    parts = y if K == 1 else torch.empty((K, B, L, D), **made)
    last = torch.empty((B, K, D, S), **made)
    states = torch.empty((B, K, triton.cdiv(L, chunk_length(L)) - 1, S, D), **made)
    if B and launch is not None:
        launch(u, delta, a, b, c, d, z, delta_bias, state, height, width, scan, softplus, parts, last, states)
        _merge(parts, y, K)
    elif B:
        selective_scan_2d_fwd_kernel[call.grid](
            u, delta, a, b, c, d, z, delta_bias, state, parts, last, states, *call.dims, *call.strides, **call.constants
        )
        _merge(parts, y, K)
    return y, last, states


def backward(dy, dlast, saved, needs, height, width, scan, softplus, launch=None) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed. launch: as forward's."""
    names = ("u", "delta", "a", "b", "c", "d", "z", "delta_bias", "state", "states")
    u, delta, a, b, c, d, z, delta_bias, state, states = (saved[n] for n in names)
    (B, L, D), (K, G, S) = u.shape, b.shape[2:]
    tensors = {n: saved[n] for n in names[:-1] if needs[n]}
    if B == 0:
        return {n: torch.zeros_like(t, memory_format=torch.contiguous_format) for n, t in tensors.items()}
    d, delta_bias, state, dlast = (None if t is None else t.contiguous() for t in (d, delta_bias, state, dlast))
    has = {"HAS_D": d is not None, "HAS_BIAS": delta_bias is not None, "HAS_STATE": state is not None}
    has |= {"HAS_DY": dy is not None, "HAS_DLAST": dlast is not None}
    call = _call(u, delta, a, b, c, z, height, width, scan, softplus, **has)
    made = {"dtype": torch.float32, "device": u.device}
    tiles, blocks = call.tiles, call.blocks
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    du_parts = du if K == 1 else torch.empty((K, B, L, D), **made)
    ddelta = torch.empty(delta.shape, dtype=delta.dtype, device=u.device)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=u.device)
    db, dc = (
        torch.empty((blocks if launch is None else triton.cdiv(D // G, 32), B, L, K, G, S), **made) for _ in range(2)
    )
    da, dstate = (torch.empty((B, K, D, S), **made) for _ in range(2))
    dd, dbias = (torch.empty((B, K * D), **made) for _ in range(2))
    if launch is not None:
        given = (u, delta, a, b, c, d, z, delta_bias, state, states, height, width, scan, softplus)
        launch(dy, dlast, *given, du_parts, ddelta, da, db, dc, dd, dbias, dstate, dz)
    else:
        fine = chunk_length(L) // tiles.fine
        scratch = torch.empty((*call.grid, fine, call.constants["BLOCK_S"], tiles.channels), **made)
        selective_scan_2d_bwd_kernel[call.grid](
            dy, dlast, u, delta, a, b, c, d, z, delta_bias, state, states, scratch, du_parts, ddelta, da, db, dc, dd,
            dz, dbias, dstate, *call.dims, *((0, 0, 0) if dy is None else dy.stride()), *call.strides, FINE=tiles.fine,
            **call.constants,
        )  # fmt: skip
    if needs["u"]:
        _merge(du_parts, du, K)
    sums = {"a": da.flatten(1, 2), "b": db, "c": dc, "d": dd, "delta_bias": dbias}
    made = {"u": du, "delta": ddelta, "z": dz, "state": dstate}
    return {n: (made[n] if n in made else _added(sums[n])).to(t.dtype) for n, t in tensors.items()}


def _added(parts: Tensor) -> Tensor:
    return parts.sum(0) if parts.shape[0] > 1 else parts[0]


def _merge(parts: Tensor, out: Tensor, K: int) -> None:
    """out = the sum of the K directions' parts, unless there is one and it is out itself."""
    if K > 1:
        n = out.numel()
        selective_scan_2d_merge_kernel[(triton.cdiv(n, MERGED),)](parts, out, n, K=K, BLOCK=MERGED, num_warps=4)
