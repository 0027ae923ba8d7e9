"""A large product and a low-rank one on the same float32 accumulator: one read of x and of w, one write of y.

    y = keep / (1 - p) * scale * (s bᵀ + lora_bias) + x wᵀ + bias

Forward of a LoRA linear as it stands, and its dx with dy for x, wᵀ for w, ds for s and aᵀ for b. The low-rank term
comes first, so that the mask multiplies it in registers before the main loop adds to it; nothing is rounded before the
sum.
Dims: T all rows, K width of x, N width of y, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tl
from ._dropout import keep_factor, threshold


@dataclass(frozen=True)
class Tile:
    """rows and cols of y, depth of x and w, and columns of s (rank) held at once; group: row blocks run together."""

    rows: int
    cols: int
    depth: int
    rank: int
    warps: int
    stages: int
    group: int = 8


def tile(rows: int, width: int, rank: int, dtype: torch.dtype, low: torch.dtype, arch: int, masked: bool) -> Tile:
    """By shape; dtype of x and w, low of s and b. The steps follow the compiler's registers, no timing yet."""
    tall, wide = cover(rows, 128), cover(width, 128)
    # sm_90 and sm_100 multiply from shared memory; before and beside them operands take registers too
    large = arch in (0, 90, 100)
    if dtype == torch.float32:
        # three tf32 passes hold every operand twice: 128x128 takes 255 registers of sm_80, 64x64 takes 183
        if large:
            return Tile(tall, wide, 32, cover(rank, 32), warps=8, stages=3)
        return Tile(cover(rows, 64), cover(width, 64), 32, cover(rank, 32), warps=4, stages=3)
    if low == torch.float32:
        # the float32 term in tf32 passes spills at 256 columns, on sm_80 also at 128x128 with 32 of the rank
        return Tile(tall, wide, 64, cover(rank, 32 if large else 16), warps=8, stages=3)
    # 256 columns read x half as often; sm_80 spills there, sm_100 beside the mask's integers
    wide = cover(width, 256) if arch in (0, 90) or (arch == 100 and not masked) else wide
    return Tile(tall, wide, 64, cover(rank, 64), warps=8, stages=3)


def cover(size: int, most: int) -> int:
    """The smallest power of two from 16 to `most` that holds size, or `most`."""
    return max(16, min(most, triton.next_power_of_2(size)))


def product(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    b: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    out: Tensor,
    tile: Tile,
) -> None:
    """out (T, N) = keep / (1 - p) * scale * (s bᵀ + lora_bias) + x wᵀ + bias.

    x (T, K) with contiguous columns and w (N, K) of any strides, in one dtype; s (T, R) contiguous; b (N, R), any
    strides, rounded to s's dtype; lora_bias only without dropout; out (T, N) with contiguous columns.
    """
    (count, depth), width, rank = x.shape, w.shape[0], s.shape[1]
    grid, low = (triton.cdiv(count, tile.rows) * triton.cdiv(width, tile.cols),), _tl.product(s.dtype)
    lora_two_source_product_kernel[grid](
        x, w, s, b, bias, lora_bias, seed, out, count, depth, width, rank,
        x.stride(0), w.stride(0), w.stride(1), b.stride(0), b.stride(1), out.stride(0),
        scale * (1.0 if seed is None else keep_factor(p)), threshold(p),
        HAS_BIAS=bias is not None, HAS_LORA_BIAS=lora_bias is not None, HAS_DROPOUT=seed is not None,
        LOW=low["PRODUCT"], LOW_PRECISION=low["PRECISION"], **_tl.product(x.dtype),
        BLOCK_T=tile.rows, BLOCK_N=tile.cols, BLOCK_K=tile.depth, BLOCK_R=tile.rank, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def lora_two_source_product_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, bias_ptr, lora_bias_ptr, seed_ptr, out_ptr, T, K, N, R,
    stride_xt, stride_wn, stride_wk, stride_bn, stride_br, stride_out, factor, drop_below,
    HAS_BIAS: tl.constexpr, HAS_LORA_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr, LOW_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = factor * keep * (s bᵀ + lora_bias) + x wᵀ + bias"""
    # GROUP row blocks go through the columns together: their x and each block of w are read while the cache holds them
    program = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * blocks_n)
    rows_here = tl.minimum(tl.cdiv(T, BLOCK_T) - group * GROUP, GROUP)
    inside = program % (GROUP * blocks_n)
    offs_t = (group * GROUP + inside % rows_here).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_n = inside // rows_here * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_t = offs_t < T
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        # (BLOCK_T, BLOCK_R)
        s = tl.load(s_ptr + offs_t[:, None] * R + offs_r[None, :], mask_t[:, None] & mask_r[None, :], 0.0)
        # (BLOCK_R, BLOCK_N)
        b = tl.load(
            b_ptr + offs_n[None, :].to(tl.int64) * stride_bn + offs_r[:, None].to(tl.int64) * stride_br,
            mask_r[:, None] & mask_n[None, :], 0.0,
        )  # fmt: skip
        acc = _tl.dot(s, _tl.cast(b, LOW), acc, LOW_PRECISION)
    if HAS_LORA_BIAS:
        acc += tl.load(lora_bias_ptr + offs_n, mask_n, 0.0).to(tl.float32)[None, :]
    acc *= factor
    if HAS_DROPOUT:
        keep = _tl.dropout_keep(tl.load(seed_ptr), offs_t, first_n, drop_below, BLOCK_T, BLOCK_N)
        acc *= keep.to(tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_t[:, None] * stride_xt + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
    step_w = tl.full((), BLOCK_K, tl.int64) * stride_wk
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        # (BLOCK_T, BLOCK_K)
        x = tl.load(x_ptrs, mask_t[:, None] & mask_k[None, :], 0.0)
        # (BLOCK_K, BLOCK_N)
        w = tl.load(w_ptrs, mask_k[:, None] & mask_n[None, :], 0.0)
        acc = _tl.dot(x, w, acc, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += step_w
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask_n, 0.0).to(tl.float32)[None, :]
    out = _tl.cast(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_t[:, None] * stride_out + offs_n[None, :], out, mask_t[:, None] & mask_n[None, :])
