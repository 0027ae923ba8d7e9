"""norm_residual in Triton: one pass each way, a row a program; the normalised row and the mask are never in memory."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _norm, _refuse, _tl
from .._device import arch
from .._dropout import keep_factor, threshold


def refuses(x, branch, weight, bias, seed, norm, eps, p) -> str | None:
    if (reason := _refuse.common(x, None, branch=branch, weight=weight, bias=bias)) is not None:
        return reason
    if x.shape[-1] > _norm.MAX_CHANNELS:
        return f"{x.shape[-1]} channels; kernels take up to {_norm.MAX_CHANNELS}"
    return None


def declines(x, branch, weight, bias, seed, norm, eps, p) -> str | None:
    return "without a norm and without dropout it is one addition" if norm == "none" and p == 0.0 else None


def forward(x, branch, weight, bias, seed, norm, eps, p) -> tuple[Tensor, Tensor]:
    """y (..., C), stats (rows, 2) with a norm."""
    C = x.shape[-1]
    rows = x.numel() // C
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device)
    stats = torch.empty((rows, 2) if norm != "none" else (0,), dtype=torch.float32, device=x.device)
    if rows:
        x, branch = _rows(x), _rows(branch)
        tiles = config(rows, C, arch(x))
        norm_residual_fwd_kernel[(rows,)](
            x, branch, weight, bias, seed, y, stats, C, x.stride(0), branch.stride(0), eps, threshold(p),
            keep_factor(p), NORM=norm, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_DROPOUT=p > 0.0,
            BLOCK=tiles.block, num_warps=tiles.warps,
        )  # fmt: skip
    return y, stats


def backward(dy, saved, needs, norm, eps, p) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed; the branch's in dy's dtype, which autograd makes its own.

    An operator's result shares no memory with its arguments, so at p = 0 dbranch is dy once more: it is written by the
    pass that reads dy in any case, T C elements and no launch more.
    """
    x, weight, bias, seed, stats = (saved[n] for n in ("x", "weight", "bias", "seed", "stats"))
    C = x.shape[-1]
    rows = x.numel() // C
    grads: dict[str, Tensor] = {}
    if needs["x"]:
        grads["x"] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if needs["branch"]:
        grads["branch"] = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    affine = {n: t for n, t in (("weight", weight), ("bias", bias)) if needs[n]}
    if rows == 0:
        return grads | {n: torch.zeros_like(t, memory_format=torch.contiguous_format) for n, t in affine.items()}
    x, dy = _rows(x), _rows(dy)
    tiles = config(rows, C, arch(x))
    parts = torch.empty((2, tiles.programs, C), dtype=torch.float32, device=x.device) if affine else None
    gives = needs["x"] or needs["branch"]
    # as in _norm: past so many channels the gradients and the sums are two launches
    together = C <= _norm.TOGETHER
    for with_rows, with_sums in ((gives, bool(affine)),) if together else ((gives, False), (False, bool(affine))):
        if with_rows or with_sums:
            norm_residual_bwd_kernel[(tiles.programs,)](
                dy, x, weight, seed, stats, grads.get("x"), grads.get("branch"), parts, rows,
                triton.cdiv(rows, tiles.programs), C, dy.stride(0), x.stride(0), threshold(p), keep_factor(p),
                NORM=norm, HAS_WEIGHT=weight is not None, HAS_DX=with_rows and needs["x"],
                HAS_DBRANCH=with_rows and needs["branch"], HAS_SUMS=with_sums, HAS_DROPOUT=p > 0.0,
                BLOCK=tiles.block, num_warps=tiles.warps,
            )  # fmt: skip
    for i, name in enumerate(("weight", "bias")):
        if name in affine:
            grads[name] = parts[i].sum(0).to(affine[name].dtype)
    return grads


def config(rows: int, channels: int, device_arch: int) -> _norm.Config:
    """As the norm's kernels with half the channels a warp: a second result beside the sums spills at 8 a thread.

    One Philox call serves 8 columns, so a block has no fewer. Not timed on a GPU yet.
    """
    tiles = _norm.config(rows, max(8, channels), device_arch)
    return dataclasses.replace(tiles, warps=max(4, min(16, tiles.block // 128)))


def _rows(t: Tensor) -> Tensor:
    """(..., C) as (rows, C) with contiguous columns; a view where there is one."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def norm_residual_dropped(g, seed_ptr, row, drop_below, keep_factor, BLOCK: tl.constexpr):
    """g * keep / (1 - p) of one row"""
    keep = _tl.dropout_keep(tl.load(seed_ptr), row + tl.arange(0, 1), 0, drop_below, 1, BLOCK)
    return g * (tl.reshape(keep, (BLOCK,)).to(tl.float32) * keep_factor)


@triton.jit
def norm_residual_fwd_kernel(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, stats_ptr, C, stride_x, stride_branch, eps, drop_below,
    keep_factor, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = norm of one row + dropout(branch); stats[row] = (mean, 1 / deviation)"""
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK)
    mask_c = offs_c < C
    y = tl.load(x_ptr + row * stride_x + offs_c, mask_c, 0.0).to(tl.float32)
    branch = tl.load(branch_ptr + row * stride_branch + offs_c, mask_c, 0.0).to(tl.float32)
    if NORM != "none":
        y, mean, rstd = _norm.norm_row(y, mask_c, C, eps, NORM)
        tl.store(stats_ptr + 2 * row, mean)
        tl.store(stats_ptr + 2 * row + 1, rstd)
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + offs_c, mask_c, 0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_c, mask_c, 0.0).to(tl.float32)
    if HAS_DROPOUT:
        branch = norm_residual_dropped(branch, seed_ptr, row, drop_below, keep_factor, BLOCK)
    tl.store(y_ptr + row * C + offs_c, _tl.cast(y + branch, y_ptr.dtype.element_ty), mask_c)


@triton.jit
def norm_residual_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, seed_ptr, stats_ptr, dx_ptr, dbranch_ptr, parts_ptr, rows, rows_per_program, C,
    stride_dy, stride_x, drop_below, keep_factor,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DX: tl.constexpr, HAS_DBRANCH: tl.constexpr,
    HAS_SUMS: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = the norm's gradient from dy weight; dbranch = dy keep / (1 - p). Sums of dy xhat, dy over the rows."""
    program = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK)
    mask_c = offs_c < C
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for row in range(begin, end):
        dy = tl.load(dy_ptr + row * stride_dy + offs_c, mask_c, 0.0).to(tl.float32)
        if HAS_DBRANCH:
            g = dy
            if HAS_DROPOUT:
                g = norm_residual_dropped(dy, seed_ptr, row, drop_below, keep_factor, BLOCK)
            tl.store(dbranch_ptr + row * C + offs_c, _tl.cast(g, dbranch_ptr.dtype.element_ty), mask_c)
        if NORM != "none" and (HAS_DX or HAS_SUMS):
            mean = tl.load(stats_ptr + 2 * row)
            rstd = tl.load(stats_ptr + 2 * row + 1)
            x = tl.load(x_ptr + row * stride_x + offs_c, mask_c, 0.0).to(tl.float32)
            xhat = tl.where(mask_c, (x - mean) * rstd, 0.0)
            if HAS_SUMS:
                sum_weight += dy * xhat
                sum_bias += dy
            if HAS_DX:
                if HAS_WEIGHT:
                    dy *= tl.load(weight_ptr + offs_c, mask_c, 0.0).to(tl.float32)
                dy = _norm.norm_row_backward(dy, xhat, rstd, C, NORM)
        if HAS_DX:
            tl.store(dx_ptr + row * C + offs_c, _tl.cast(dy, dx_ptr.dtype.element_ty), mask_c)
    if HAS_SUMS:
        tl.store(parts_ptr + program * C + offs_c, sum_weight, mask_c)
        tl.store(parts_ptr + (tl.num_programs(0) + program) * C + offs_c, sum_bias, mask_c)
