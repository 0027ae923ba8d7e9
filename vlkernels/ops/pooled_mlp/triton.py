"""pooled_mlp in Triton: cuBLAS runs the products; activation and pooling are one pass between them, each way.

Backward makes the pooled activations again from the first product, so that they are not kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import _refuse, _tl
from .._conv import cell_counts, cells_over
from .._device import arch, multiprocessors


def refuses(x, w1, w2, h, w, out_h, out_w, b1, b2, act, level, dtype) -> str | None:
    return _refuse.common(x, dtype, w1=w1, w2=w2, b1=b1, b2=b2)


def declines(*values) -> str | None:
    return None


def forward(x, w1, w2, h, w, out_h, out_w, b1, b2, act, level, dtype) -> tuple[Tensor, Tensor]:
    """y (B, out_h out_w, N), pre (B h w, F) at level 0."""
    grid = Grid(x.shape[0], h, w, out_h, out_w)
    pre = _first(x, w1, b1, dtype or x.dtype)
    y = F.linear(_pool(pre, grid, act), _to(w2, pre.dtype), _to(b2, pre.dtype))
    return y, pre if level == 0 else pre.new_empty(0)


def backward(dy, saved, needs, h, w, out_h, out_w, act, level, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, w1, w2, b1, b2, pre = (saved[n] for n in ("x", "w1", "w2", "b1", "b2", "pre"))
    out_dtype, grid = dtype or x.dtype, Grid(x.shape[0], h, w, out_h, out_w)
    grads: dict[str, Tensor] = {}
    dy = dy.reshape(-1, w2.shape[0])
    if needs["b2"]:
        grads["b2"] = dy.sum(0, dtype=torch.float32).to(b2.dtype)
    if level == 1:
        pre = _first(x, w1, b1, out_dtype)
    if needs["w2"]:
        pooled = _pool(pre, grid, act).view(-1, w2.shape[1])
        grads["w2"] = (dy.t() @ pooled).to(w2.dtype)
        del pooled
    if not (needs["x"] or needs["w1"] or needs["b1"]):
        return grads
    dpre, db1 = _pool_backward(pre, dy @ w2.to(out_dtype), grid, act, needs["b1"])
    if needs["b1"]:
        grads["b1"] = db1.to(b1.dtype)
    if needs["w1"]:
        grads["w1"] = (dpre.t() @ x.reshape(-1, x.shape[2]).to(out_dtype)).to(w1.dtype)
    if needs["x"]:
        grads["x"] = (dpre @ w1.to(out_dtype)).view(x.shape).to(x.dtype)
    return grads


# -- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """images of h x w tokens that become out_h x out_w."""

    images: int
    h: int
    w: int
    out_h: int
    out_w: int


@dataclass(frozen=True)
class Config:
    """Tiles of rows x cols; splits: row ranges of the backward pass with a partial sum each."""

    rows: int
    cols: int
    splits: int


def config(rows: int, inner: int, device_arch: int) -> Config:
    """None of the steps below has been timed on a GPU yet."""
    cols = min(128, max(16, triton.next_power_of_2(inner)))
    wanted = triton.cdiv(8 * multiprocessors(device_arch), triton.cdiv(inner, cols))
    # 64 rows a range at least: a partial sum costs 8 bytes a column against 4 a row and column of the pass itself
    return Config(16, cols, max(1, min(wanted, rows // 64)))


# -- launches ------------------------------------------------------------------------------------------------------


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _first(x: Tensor, w1: Tensor, b1: Tensor | None, dtype: torch.dtype) -> Tensor:
    """pre = x W1ᵀ + b1 (B h w, F)"""
    return F.linear(x.reshape(-1, x.shape[2]).to(dtype), w1.to(dtype), _to(b1, dtype))


def _pool(pre: Tensor, grid: Grid, act: str) -> Tensor:
    """pool(act(pre)) (B, out_h out_w, F)"""
    inner, cells = pre.shape[1], grid.out_h * grid.out_w
    out = torch.empty((grid.images, cells, inner), dtype=pre.dtype, device=pre.device)
    rows = grid.images * cells
    if rows:
        tiles = config(rows, inner, arch(pre))
        window = [max(n for _, n in cell_counts(*sides)) for sides in ((grid.h, grid.out_h), (grid.w, grid.out_w))]
        pooled_mlp_pool_kernel[(triton.cdiv(rows, tiles.rows), triton.cdiv(inner, tiles.cols))](
            pre, out, rows, inner, grid.h, grid.w, grid.out_h, grid.out_w, *window,
            ACT=act, BLOCK_T=tiles.rows, BLOCK_F=tiles.cols, num_warps=4,
        )  # fmt: skip
    return out


def _pool_backward(pre, dpooled, grid: Grid, act: str, sums: bool) -> tuple[Tensor, Tensor | None]:
    """dpre (B h w, F), and its column sums in float32."""
    rows, inner = pre.shape
    dpre = torch.empty_like(pre)
    if rows == 0:
        return dpre, torch.zeros(inner, device=pre.device) if sums else None
    tiles = config(rows, inner, arch(pre))
    parts = torch.empty((tiles.splits, inner), dtype=torch.float32, device=pre.device) if sums else None
    over = [cells_over(*sides) for sides in ((grid.h, grid.out_h), (grid.w, grid.out_w))]
    pooled_mlp_pool_bwd_kernel[(triton.cdiv(inner, tiles.cols), tiles.splits)](
        pre, dpooled, dpre, parts, rows, inner, triton.cdiv(rows, tiles.splits), grid.h, grid.w, grid.out_h,
        grid.out_w, *over,
        ACT=act, HAS_SUMS=sums, BLOCK_T=tiles.rows, BLOCK_F=tiles.cols, num_warps=4,
    )  # fmt: skip
    return dpre, None if parts is None else parts.sum(0)


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def pooled_mlp_cell(i, side, out):
    """First row, and number of rows, that pooled row i averages."""
    first = i * side // out
    return first, ((i + 1) * side + out - 1) // out - first


@triton.jit
def pooled_mlp_pool_kernel(
    pre_ptr, out_ptr, T, F, h, w, out_h, out_w, window_h, window_w,
    ACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out = mean of act(pre) over each pooled token's window; T: pooled tokens of all images"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_t = offs_t < T
    mask_f = offs_f < F
    image = offs_t // (out_h * out_w)
    i, rows = pooled_mlp_cell(offs_t // out_w % out_h, h, out_h)
    j, cols = pooled_mlp_cell(offs_t % out_w, w, out_w)
    acc = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for a in range(window_h):
        for b in range(window_w):
            inside = mask_t & (a < rows) & (b < cols)
            token = (image * h + i + a) * w + j + b
            mask = inside[:, None] & mask_f[None, :]
            pre = tl.load(pre_ptr + token[:, None] * F + offs_f[None, :], mask, 0.0).to(tl.float32)
            acc += tl.where(mask, _tl.act(pre, ACT), 0.0)
    acc = acc / (rows * cols).to(tl.float32)[:, None]
    out_ptrs = out_ptr + offs_t[:, None] * F + offs_f[None, :]
    tl.store(out_ptrs, _tl.cast(acc, out_ptr.dtype.element_ty), mask_t[:, None] & mask_f[None, :])


@triton.jit
def pooled_mlp_pool_bwd_kernel(
    pre_ptr, dpooled_ptr, dpre_ptr, parts_ptr, T, F, rows_per_split, h, w, out_h, out_w, over_h, over_w,
    ACT: tl.constexpr, HAS_SUMS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dpre = act'(pre) * (sum of dpooled / count over the windows that hold the token); sums of dpre over the rows"""
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(1).to(tl.int64)
    mask_f = offs_f < F
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, T)
    sums = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for t in range(begin, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        mask = mask_t[:, None] & mask_f[None, :]
        image = offs_t // (h * w)
        y = offs_t // w % h
        x = offs_t % w
        # the first window that holds row y; windows may overlap, and repeat a row where there are more of them
        first_i = y * out_h // h
        first_j = x * out_w // w
        g = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        for a in range(over_h):
            i = first_i + a
            top, rows = pooled_mlp_cell(i, h, out_h)
            for b in range(over_w):
                j = first_j + b
                left, cols = pooled_mlp_cell(j, w, out_w)
                inside = mask_t & (i < out_h) & (top <= y) & (y < top + rows)
                inside = inside & (j < out_w) & (left <= x) & (x < left + cols)
                cell = (image * out_h + i) * out_w + j
                ptrs = dpooled_ptr + cell[:, None] * F + offs_f[None, :]
                dpooled = tl.load(ptrs, inside[:, None] & mask_f[None, :], 0.0).to(tl.float32)
                g += dpooled / (rows * cols).to(tl.float32)[:, None]
        offs = offs_t[:, None] * F + offs_f[None, :]
        g *= _tl.act_derivative(tl.load(pre_ptr + offs, mask, 0.0).to(tl.float32), ACT)
        g = tl.where(mask, g, 0.0)
        tl.store(dpre_ptr + offs, _tl.cast(g, dpre_ptr.dtype.element_ty), mask)
        sums += g
    if HAS_SUMS:
        tl.store(parts_ptr + split * F + offs_f, tl.sum(sums, 0), mask_f)
