"""deformable_attention in Triton: softmax, coordinates, bilinear sampling and weighted sum in one pass each way.

The gradient of value goes by position and not by sample: a program owns some positions of a map and walks over all
queries in their order, building the weights with which these read its positions, a tile of the bilinear matrix A; Aᵀ dy
is a product on the tensor cores. No two programs write one address, so that there is no atomic and every run gives the
same bits. Its work grows with positions times queries; on maps of more than SKIP_FROM positions a program first looks
whether any point of a tile of queries comes near its rows, and passes over it otherwise.
A dy that is NaN or infinite reaches all positions of its image, head and channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .. import _refuse, _tl
from .._device import arch
from .kernels import (
    MAX_LEVELS,
    deformable_attention_bwd_points_kernel,
    deformable_attention_bwd_value_kernel,
    deformable_attention_fwd_kernel,
)

MAX_CHANNELS = 256
MAX_POINTS = 128  # of all levels together, in a tile
SKIP_FROM = 1024


def refuses(value, points, weights, reference, shapes, softmax, dtype) -> str | None:
    if (reason := _refuse.common(value, dtype, points=points, weights=weights, reference=reference)) is not None:
        return "value" + reason[1:] if reason.startswith("x is") else reason
    if value.shape[3] > MAX_CHANNELS:
        return f"heads of {value.shape[3]} channels; kernels take up to {MAX_CHANNELS}"
    L, P = weights.shape[3:]
    if L > MAX_LEVELS or L * P > MAX_POINTS:
        return f"{L} levels of {P} points; kernels take up to {MAX_LEVELS} levels and {MAX_POINTS} points of all levels"
    if max(value.shape[1], weights.shape[1]) >= 2**31 - 256:
        return f"{value.shape[1]} positions, {weights.shape[1]} queries; kernels take fewer than 2^31"
    return None


def declines(value, points, weights, reference, shapes, softmax, dtype) -> str | None:
    return None


# -- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Queries a program of the passes over points; tiles of the pass over positions, and its warps."""

    q: int
    warps: int
    value_q: int
    value_s: int
    value_warps: int


def config(channels: int, points: int, single: bool, device_arch: int) -> Config:
    """None of the steps below has been timed on a GPU yet. channels: of a head; points: of all levels.

    single: products of float32 operands in three tf32 terms.
    """
    block_k = max(16, triton.next_power_of_2(channels))
    # four corners of 2048 elements are under way at a time: 64 registers a thread of 128; 32 queries of 16 points spill
    q = max(4, min(32 if points <= 4 else 16, 2048 // block_k))
    # A and its two distances are 8 elements each a thread of 256; 64 x 64 tiles spill
    value_s = 64 if block_k <= 128 and not single else 32
    return Config(q, 4, 32, value_s, 8)


# -- forward and backward ------------------------------------------------------------------------------------------


def forward(value, points, weights, reference, shapes, softmax, dtype) -> tuple[Tensor, Tensor]:
    """y (B, M, H, K); stats (B, M, H, 2): the softmax's maximum and denominator."""
    B, S, H, K = value.shape
    M, L, P = weights.shape[1], *weights.shape[3:]
    y = torch.empty((B, M, H, K), dtype=dtype or value.dtype, device=value.device)
    shape = (B, M, H, 2) if softmax else (0,)
    stats = torch.empty(shape, dtype=torch.float32, device=value.device)
    if y.numel() == 0:
        return y, stats
    value, points, weights, reference = laid_out(value, points, weights, reference)
    tiles = config(K, L * P, False, arch(value))
    blocks = triton.cdiv(M, tiles.q)
    deformable_attention_fwd_kernel[(B * H * blocks,)](
        value, points, weights, reference, y, stats, M, H, P, *_sizes(shapes), *value.stride()[:3],
        *_strides(points, weights, reference), blocks,
        HAS_REFERENCE=reference is not None, SOFTMAX=softmax, L=L, K=K, **_blocks(tiles, K, L * P),
        num_warps=tiles.warps,
    )  # fmt: skip
    return y, stats


def backward(dy, saved, needs, shapes, softmax, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    value, points, weights, reference, stats = (saved[n] for n in ("value", "points", "weights", "reference", "stats"))
    grads = {
        n: torch.empty(saved[n].shape, dtype=saved[n].dtype, device=dy.device) for n, need in needs.items() if need
    }
    if dy.numel() == 0:
        return {n: grad.zero_() for n, grad in grads.items()}
    dy = dy if dy.stride(3) == 1 else dy.contiguous()
    value, points, weights, reference = laid_out(value, points, weights, reference)
    if needs["points"] or needs["weights"] or needs["reference"]:
        _backward_points(grads, dy, value, points, weights, reference, stats, shapes, softmax)
    if needs["value"]:
        _backward_value(grads["value"], dy, points, weights, reference, stats, shapes, softmax)
    return grads


def _backward_points(grads, dy, value, points, weights, reference, stats, shapes, softmax) -> None:
    """The gradients of points, weights and reference, written into grads."""
    B, M, H, K = dy.shape
    L, P = weights.shape[3:]
    tiles = config(K, L * P, False, arch(dy))
    blocks = triton.cdiv(M, tiles.q)
    made = {"device": dy.device}
    dpoints = grads.get("points", None)
    dpoints = torch.empty(points.shape, dtype=points.dtype, **made) if dpoints is None else dpoints
    dweights = grads.get("weights", None)
    dweights = torch.empty(weights.shape, dtype=weights.dtype, **made) if dweights is None else dweights
    parts = None
    if "reference" in grads:
        parts = torch.empty((B, M, H, reference.shape[2], 2), dtype=torch.float32, **made)
    deformable_attention_bwd_points_kernel[(B * H * blocks,)](
        dy, value, points, weights, reference, stats, dpoints, dweights, parts, M, H, P, *_sizes(shapes),
        *value.stride()[:3], *_strides(points, weights, reference), *dy.stride()[:3], blocks,
        HAS_REFERENCE=reference is not None, HAS_DREFERENCE=parts is not None,
        OWN_LEVELS=parts is not None and parts.shape[3] > 1, SOFTMAX=softmax, L=L, K=K,
        **_blocks(tiles, K, L * P), num_warps=tiles.warps,
    )  # fmt: skip
    if parts is not None:
        grads["reference"] = summed(parts, reference)


def _backward_value(dvalue, dy, points, weights, reference, stats, shapes, softmax) -> None:
    """The gradient of value, a launch for each level."""
    B, M, H, K = dy.shape
    L, P = weights.shape[3:]
    compute = dvalue.dtype
    tiles = config(K, L * P, compute == torch.float32, arch(dy))
    first = 0
    strides = _strides(points, weights, reference)
    for level in range(L):
        h, w = shapes[2 * level], shapes[2 * level + 1]
        blocks = triton.cdiv(h * w, tiles.value_s)
        # the level's own points, logits and reference
        of_level = (points[:, :, :, level], weights[:, :, :, level], None if reference is None else
                    reference[:, :, level if reference.shape[2] > 1 else 0])  # fmt: skip
        deformable_attention_bwd_value_kernel[(B * H * blocks,)](
            dy, *of_level, stats, dvalue, dvalue.shape[1], M, H, P, h, w, first, *strides[:6], *dy.stride()[:3], blocks,
            HAS_REFERENCE=reference is not None, SOFTMAX=softmax, SKIP=h * w > SKIP_FROM, LP=L * P, K=K,
            **_tl.product(compute), BLOCK_Q=tiles.value_q, BLOCK_S=tiles.value_s,
            BLOCK_K=max(16, triton.next_power_of_2(K)), num_warps=tiles.value_warps, num_stages=1,
        )  # fmt: skip
        first += h * w


# -- arguments of the kernels --------------------------------------------------------------------------------------


def laid_out(value, points, weights, reference) -> tuple:
    """The tensors with what belongs to one query side by side, channels, points and coordinates; mostly as they are."""
    value = value if value.stride(3) == 1 or value.shape[3] == 1 else value.contiguous()
    points, weights = (t if t[0, 0].is_contiguous() else t.contiguous() for t in (points, weights))
    if reference is not None and reference.stride(3) != 1:
        reference = reference.contiguous()
    return value, points, weights, reference


def summed(parts: Tensor, reference: Tensor) -> Tensor:
    """The reference's gradient from each head's share (B, M, H, L or 1, 2)."""
    once = reference.shape[0] == 1 and parts.shape[0] > 1
    return parts.sum((0, 2) if once else 2).view(reference.shape).to(reference.dtype)


def _sizes(shapes: list[int]) -> list[int]:
    """Heights, then widths, of MAX_LEVELS levels."""
    none = [0] * (MAX_LEVELS - len(shapes) // 2)
    return [*shapes[::2], *none, *shapes[1::2], *none]


def _strides(points, weights, reference) -> list[int]:
    """Of the batch and the query in points and weights; of the batch, the query and the level in the reference."""
    strides = [*points.stride()[:2], *weights.stride()[:2]]
    if reference is None:
        return [*strides, 0, 0, 0]
    return [*strides, *(0 if reference.shape[axis] == 1 and axis != 1 else reference.stride(axis) for axis in range(3))]


def _blocks(tiles: Config, channels: int, points: int) -> dict[str, int]:
    return {
        "BLOCK_Q": tiles.q,
        "BLOCK_P": triton.next_power_of_2(points),
        "BLOCK_K": max(16, triton.next_power_of_2(channels)),
    }
