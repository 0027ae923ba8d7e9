"""conv_se_linear's own kernels: the product of scaled rows, and norm, shortcut and activation after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _norm, _tl
from .._depthwise_kernels import depthwise_act
from .._device import arch, multiprocessors


@dataclass(frozen=True)
class Product:
    """Tiles: rows x cols of the result, depth of both operands; group: row blocks that go through together."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8


def product_config(rows: int, cols: int, depth: int, dtype: torch.dtype) -> Product | None:
    """None where cuBLAS multiplies scaled rows that were written for it.

    A model, for one H200 and not timed yet: Triton's product at 0.80 and cuBLAS's at 0.93 of 790 TFLOP/s, so 0.44 fs a
    column of the result and one of y; the pass that it saves writes and reads 2 bytes an element again at 4.3 TB/s and
    reads y, 1400 fs. They are equal at 3,200 columns. In float32 three tf32 passes would be slower at any width.
    """
    if dtype == torch.float32 or cols > 3072:
        return None
    return Product(
        max(16, min(128, triton.next_power_of_2(max(1, rows)))),
        max(16, min(128, triton.next_power_of_2(cols))),
        max(16, min(64, triton.next_power_of_2(depth))),
        warps=8,
        stages=3,
    )


def scaled_product(y: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """d = (y scale) weightᵀ (B tokens, N): y (B, tokens, C), scale (B, C), weight (N, C)."""
    (B, count, C), N = y.shape, weight.shape[0]
    rows = B * count
    tile = product_config(rows, N, C, y.dtype)
    if tile is None or rows == 0:
        return (y * scale[:, None]).view(rows, C) @ weight.t()
    d = torch.empty((rows, N), dtype=y.dtype, device=y.device)
    conv_se_linear_product_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(N, tile.cols),)](
        y, scale, weight, d, rows, count, C, N, weight.stride(0), weight.stride(1),
        PRODUCT=_tl.TL_DTYPE[y.dtype], PRECISION="ieee", BLOCK_T=tile.rows, BLOCK_N=tile.cols, BLOCK_K=tile.depth,
        GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return d


def out_config(rows: int, channels: int, device_arch: int) -> tuple[int, int, int]:
    """(channels held by a program, warps, programs of the backward kernel); not timed yet."""
    block = triton.next_power_of_2(channels)
    programs = max(1, min(2 * multiprocessors(device_arch), triton.cdiv(rows, 4)))
    # 8 channels a thread, as norm_residual: two sums and two results beside them
    return block, max(4, min(16, block // 128)), programs


def out_fwd_launch(d, gamma, beta, shortcut, act: str, eps: float) -> tuple[Tensor, Tensor]:
    """act(norm(d) + shortcut) (rows, N), and the statistics (rows, 2)."""
    rows, N = d.shape
    out, stats = torch.empty_like(d), torch.empty((rows, 2), dtype=torch.float32, device=d.device)
    if rows:
        block, warps, _ = out_config(rows, N, arch(d))
        shortcut, *strides = _strided(shortcut)
        conv_se_linear_out_fwd_kernel[(rows,)](
            d, gamma, beta, shortcut, out, stats, N, *strides, eps,
            ACT=act, HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None, HAS_SHORTCUT=shortcut is not None,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out, stats


def out_bwd_launch(dout, d, stats, gamma, beta, shortcut, act: str, needs: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """dd (rows, N), and the gradients of out_norm_weight, out_norm_bias and shortcut where needed."""
    rows, N = d.shape
    dd, grads = torch.empty_like(d), {}
    want = needs["shortcut"]
    dshortcut = torch.empty(shortcut.shape, dtype=shortcut.dtype, device=d.device) if want else None
    sums = needs["out_norm_weight"] or needs["out_norm_bias"]
    block, warps, programs = out_config(rows, N, arch(d))
    parts = torch.empty((2, programs if rows else 0, N), dtype=torch.float32, device=d.device) if sums else None
    if rows:
        dout, *dout_strides = _strided(dout)
        # without an activation after it the sum itself is not needed
        shortcut, *strides = _strided(shortcut if act != "none" else None)
        conv_se_linear_out_bwd_kernel[(programs,)](
            dout, d, stats, gamma, beta, shortcut, dd, dshortcut, parts, rows, triton.cdiv(rows, programs), N,
            *dout_strides, *strides[1:],
            ACT=act, HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None, HAS_SHORTCUT=shortcut is not None,
            HAS_DSHORTCUT=want, HAS_SUMS=sums, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    if want:
        grads["shortcut"] = dshortcut
    for i, (name, t) in enumerate((("out_norm_weight", gamma), ("out_norm_bias", beta))):
        if needs[name]:
            grads[name] = parts[i].sum(0).to(t.dtype)
    return dd, grads


def _strided(t: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """A map (B, tokens, N), its tokens and strides of images and tokens."""
    if t is None:
        return None, 1, 0, 0
    t = t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()
    return t, t.shape[1], t.stride(0), t.stride(1)


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def conv_se_linear_product_kernel(
    y_ptr, scale_ptr, w_ptr, d_ptr, T, tokens, K, N, stride_wn, stride_wk,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """d = (y scale of the row's image) wᵀ"""
    # GROUP row blocks go through the columns together: their y and each block of w are read while the cache holds them
    program = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * blocks_n)
    rows_here = tl.minimum(tl.cdiv(T, BLOCK_T) - group * GROUP, GROUP)
    inside = program % (GROUP * blocks_n)
    first_t = (group * GROUP + inside % rows_here).to(tl.int64) * BLOCK_T
    first_n = inside // rows_here * BLOCK_N
    offs_t = first_t + tl.arange(0, BLOCK_T)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_t = offs_t < T
    mask_n = offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    y_ptrs = y_ptr + offs_t[:, None] * K + offs_k[None, :]
    # a block of rows may belong to two images
    scale_ptrs = scale_ptr + (offs_t // tokens)[:, None] * K + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
    step_w = tl.full((), BLOCK_K, tl.int64) * stride_wk
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        mask = mask_t[:, None] & mask_k[None, :]
        # (BLOCK_T, BLOCK_K)
        y = tl.load(y_ptrs, mask, 0.0).to(tl.float32) * tl.load(scale_ptrs, mask, 0.0).to(tl.float32)
        # (BLOCK_K, BLOCK_N)
        w = tl.load(w_ptrs, mask_k[:, None] & mask_n[None, :], 0.0)
        acc = _tl.dot(_tl.cast(y, PRODUCT), w, acc, PRECISION)
        y_ptrs += BLOCK_K
        scale_ptrs += BLOCK_K
        w_ptrs += step_w
    mask = mask_t[:, None] & mask_n[None, :]
    tl.store(d_ptr + offs_t[:, None] * N + offs_n[None, :], _tl.cast(acc, PRODUCT), mask)


@triton.jit
def conv_se_linear_out_fwd_kernel(
    d_ptr, gamma_ptr, beta_ptr, shortcut_ptr, out_ptr, stats_ptr, N, tokens, stride_b, stride_t, eps,
    ACT: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_SHORTCUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = act(norm of one row + shortcut); stats[row] = (mean, 1 / deviation)"""
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK)
    mask_n = offs_n < N
    d = tl.load(d_ptr + row * N + offs_n, mask_n, 0.0).to(tl.float32)
    d, mean, rstd = _norm.norm_row(d, mask_n, N, eps, "layer")
    tl.store(stats_ptr + 2 * row, mean)
    tl.store(stats_ptr + 2 * row + 1, rstd)
    if HAS_GAMMA:
        d *= tl.load(gamma_ptr + offs_n, mask_n, 0.0).to(tl.float32)
    if HAS_BETA:
        d += tl.load(beta_ptr + offs_n, mask_n, 0.0).to(tl.float32)
    if HAS_SHORTCUT:
        at = row // tokens * stride_b + row % tokens * stride_t
        d += tl.load(shortcut_ptr + at + offs_n, mask_n, 0.0).to(tl.float32)
    tl.store(out_ptr + row * N + offs_n, _tl.cast(depthwise_act(d, ACT), out_ptr.dtype.element_ty), mask_n)


@triton.jit
def conv_se_linear_out_bwd_kernel(
    dout_ptr, d_ptr, stats_ptr, gamma_ptr, beta_ptr, shortcut_ptr, dd_ptr, dshortcut_ptr, parts_ptr, rows,
    rows_per_program, N, tokens, stride_gb, stride_gt, stride_b, stride_t,
    ACT: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_SHORTCUT: tl.constexpr,
    HAS_DSHORTCUT: tl.constexpr, HAS_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g = dout act'; dshortcut = g; dd = the norm's gradient of g gamma. Sums of g dhat, g over the rows."""
    program = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK)
    mask_n = offs_n < N
    sum_gamma = tl.zeros((BLOCK,), tl.float32)
    sum_beta = tl.zeros((BLOCK,), tl.float32)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for row in range(begin, end):
        image = row // tokens
        token = row % tokens
        mean = tl.load(stats_ptr + 2 * row)
        rstd = tl.load(stats_ptr + 2 * row + 1)
        dhat = tl.load(d_ptr + row * N + offs_n, mask_n, 0.0).to(tl.float32)
        dhat = tl.where(mask_n, (dhat - mean) * rstd, 0.0)
        g = tl.load(dout_ptr + image * stride_gb + token * stride_gt + offs_n, mask_n, 0.0).to(tl.float32)
        if ACT != "none":
            p = dhat
            if HAS_GAMMA:
                p *= tl.load(gamma_ptr + offs_n, mask_n, 0.0).to(tl.float32)
            if HAS_BETA:
                p += tl.load(beta_ptr + offs_n, mask_n, 0.0).to(tl.float32)
            if HAS_SHORTCUT:
                at = image * stride_b + token * stride_t
                p += tl.load(shortcut_ptr + at + offs_n, mask_n, 0.0).to(tl.float32)
            g *= _tl.act_derivative(p, ACT)
        if HAS_DSHORTCUT:
            tl.store(dshortcut_ptr + row * N + offs_n, _tl.cast(g, dshortcut_ptr.dtype.element_ty), mask_n)
        if HAS_SUMS:
            sum_gamma += g * dhat
            sum_beta += g
        if HAS_GAMMA:
            g *= tl.load(gamma_ptr + offs_n, mask_n, 0.0).to(tl.float32)
        g = _norm.norm_row_backward(g, dhat, rstd, N, "layer")
        tl.store(dd_ptr + row * N + offs_n, _tl.cast(g, dd_ptr.dtype.element_ty), mask_n)
    if HAS_SUMS:
        tl.store(parts_ptr + program * N + offs_n, sum_gamma, mask_n)
        tl.store(parts_ptr + (tl.num_programs(0) + program) * N + offs_n, sum_beta, mask_n)
