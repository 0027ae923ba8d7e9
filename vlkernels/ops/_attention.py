"""What the attention ops share: rows of keys and queries in Triton, and the norm of each head before the scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tl
from ._device import arch, multiprocessors

NORM_ROWS = 16  # heads that one program normalises at a time; not timed on a GPU yet


def heads_normed(t, weight, bias, norm: str, eps: float, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """norm over K of each head of t (B, N, G, K), in `dtype`, and its statistics; t itself without a norm."""
    if t is None or norm == "none":
        return t, None
    t = t if t.stride(3) == 1 else t.contiguous()
    out = torch.empty(t.shape, dtype=dtype, device=t.device)
    rows, K = t.numel() // t.shape[3], t.shape[3]
    stats = torch.empty((rows, 2), dtype=torch.float32, device=t.device)
    if rows:
        cross_attention_norm_fwd_kernel[(triton.cdiv(rows, NORM_ROWS),)](
            t, weight, bias, out, stats, rows, t.shape[1], t.shape[2], *t.stride()[:3], eps,
            NORM=norm, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **_norm_tile(K),
        )  # fmt: skip
    return out, stats


def _norm_tile(K: int) -> dict[str, int]:
    return {"K": K, "BLOCK_K": triton.next_power_of_2(K), "BLOCK_T": NORM_ROWS, "num_warps": 4}


def through_norms(grads, raw, norms, stats, norm: str) -> dict[str, Tensor]:
    """grads of q, k, k2 become those before their norms, in place; returned are those of the norms' weights, which
    both sources share."""
    found: dict[str, Tensor] = {}
    for name, t in raw.items():
        if t is None or norm == "none":
            continue
        d, weight = grads[name], norms[name[0]][0]
        t = t if t.stride(3) == 1 else t.contiguous()
        rows, K = t.numel() // t.shape[3], t.shape[3]
        blocks = triton.cdiv(rows, NORM_ROWS)
        programs = max(1, min(2 * multiprocessors(arch(t)), blocks))
        tiles = triton.cdiv(blocks, programs)
        programs = max(1, triton.cdiv(blocks, max(1, tiles)))
        parts = torch.empty((programs, 2, K), dtype=torch.float32, device=t.device)
        cross_attention_norm_bwd_kernel[(programs,)](
            d, t, weight, stats[name], parts, rows, max(1, t.shape[1]), t.shape[2], *d.stride()[:3], *t.stride()[:3],
            tiles, NORM=norm, HAS_WEIGHT=weight is not None, **_norm_tile(K),
        )  # fmt: skip
        for i, part in enumerate(("norm_weight", "norm_bias")):
            key, grad = f"{name[0]}_{part}", parts[:, i].sum(0)
            found[key] = grad if key not in found else found[key] + grad
    return found


def batch_stride(t: Tensor | None, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of the axes, 0 where there is but one entry: it serves all."""
    return tuple(0 if t is None or t.shape[a] == 1 else t.stride(a) for a in axes)


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def attention_keys(ptr, offs_n, mask_n, stride_n, K: tl.constexpr, BLOCK_K: tl.constexpr, PRODUCT: tl.constexpr):
    """(BLOCK_N, BLOCK_K) rows of keys or values"""
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.load(
        ptr + offs_n[:, None].to(tl.int64) * stride_n + offs_k[None, :], mask_n[:, None] & (offs_k < K)[None, :], 0.0
    )
    return _tl.cast(rows, PRODUCT)


@triton.jit
def attention_rows(ptr, offs_m, mask_m, stride_m, K: tl.constexpr, BLOCK_K: tl.constexpr, PRODUCT: tl.constexpr):
    """(BLOCK_M, BLOCK_K) rows of q, y or dy"""
    return attention_keys(ptr, offs_m, mask_m, stride_m, K, BLOCK_K, PRODUCT)


@triton.jit
def attention_bwd_rows(
    q_ptr, dy_ptr, y_ptr, stats_ptr, b, h, offs_m, M, H, stride_qb, stride_qm, stride_qh, stride_dyb, stride_dym,
    stride_dyh, PRODUCT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(q, dy, delta, maximum, 1 / denominator, which rows exist, their dropout rows) of one head's queries"""
    mask_m = offs_m < M
    q = attention_rows(q_ptr + b * stride_qb + h * stride_qh, offs_m, mask_m, stride_qm, K, BLOCK_K, PRODUCT)
    dy = attention_rows(dy_ptr + b * stride_dyb + h * stride_dyh, offs_m, mask_m, stride_dym, K, BLOCK_K, PRODUCT)
    y = attention_rows(y_ptr + (b * M * H + h) * K, offs_m, mask_m, H * K, K, BLOCK_K, tl.float32)
    delta = tl.sum(dy.to(tl.float32) * y, 1)
    rows = (b * H + h) * M + offs_m
    top = tl.load(stats_ptr + 2 * rows, mask_m, 0.0)
    total = tl.load(stats_ptr + 2 * rows + 1, mask_m, float("inf"))
    return q, dy, delta, top, 1.0 / total, mask_m, rows


@triton.jit
def cross_attention_norm_fwd_kernel(
    t_ptr, weight_ptr, bias_ptr, out_ptr, stats_ptr, T, N, G, stride_tb, stride_tn, stride_tg, eps,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out[row] = norm(t[b, n, g]) weight + bias over K; stats[row] = (mean, 1 / deviation)"""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = rows < T
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    mask = mask_t[:, None] & mask_k[None, :]
    at = (rows // G // N) * stride_tb + (rows // G % N) * stride_tn + (rows % G) * stride_tg
    x = tl.load(t_ptr + at[:, None] + offs_k[None, :], mask, 0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_T,), tl.float32)
    if NORM == "layer":
        mean = tl.sum(x, 1) / K
    x = tl.where(mask_k[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / K + eps)
    x *= rstd[:, None]
    if HAS_WEIGHT:
        x *= tl.load(weight_ptr + offs_k, mask_k, 0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs_k, mask_k, 0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + rows[:, None] * K + offs_k[None, :], _tl.cast(x, out_ptr.dtype.element_ty), mask)
    tl.store(stats_ptr + 2 * rows, mean, mask_t)
    tl.store(stats_ptr + 2 * rows + 1, rstd, mask_t)


@triton.jit
def cross_attention_norm_bwd_kernel(
    d_ptr, t_ptr, weight_ptr, stats_ptr, parts_ptr, T, N, G, stride_db, stride_dn, stride_dg, stride_tb, stride_tn,
    stride_tg, tiles,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """d, the gradient of the normalised rows, becomes that of t; sums of d xhat and of d over the program's rows"""
    program = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    sum_weight = tl.zeros((BLOCK_K,), tl.float32)
    sum_bias = tl.zeros((BLOCK_K,), tl.float32)
    for tile in range(program * tiles, program * tiles + tiles):
        rows = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask_t = rows < T
        mask = mask_t[:, None] & mask_k[None, :]
        b = rows // G // N
        n = rows // G % N
        g = rows % G
        at = (b * stride_tb + n * stride_tn + g * stride_tg)[:, None] + offs_k[None, :]
        out = d_ptr + (b * stride_db + n * stride_dn + g * stride_dg)[:, None] + offs_k[None, :]
        mean = tl.load(stats_ptr + 2 * rows, mask_t, 0.0)
        rstd = tl.load(stats_ptr + 2 * rows + 1, mask_t, 0.0)
        xhat = (tl.load(t_ptr + at, mask, 0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        xhat = tl.where(mask, xhat, 0.0)
        d = tl.load(out, mask, 0.0).to(tl.float32)
        sum_weight += tl.sum(d * xhat, 0)
        sum_bias += tl.sum(d, 0)
        if HAS_WEIGHT:
            d *= tl.load(weight_ptr + offs_k, mask_k, 0.0).to(tl.float32)[None, :]
        along = tl.sum(d * xhat, 1) / K
        level = tl.zeros((BLOCK_T,), tl.float32)
        if NORM == "layer":
            level = tl.sum(d, 1) / K
        d = rstd[:, None] * (d - level[:, None] - xhat * along[:, None])
        tl.store(out, _tl.cast(d, d_ptr.dtype.element_ty), mask)
    parts = parts_ptr + program * 2 * K + offs_k
    tl.store(parts, sum_weight, mask_k)
    tl.store(parts + K, sum_bias, mask_k)
