"""mlp_projector in Triton: cuBLAS runs the products; norm with shuffle, and the activation, are a pass each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import _norm, _refuse, _tl
from .._device import arch, multiprocessors


def refuses(
    x, w1, w2, b1, b2, norm_weight, norm_bias, wg, act, gated, norm, norm_act, eps, shuffle, merge, level, dtype
) -> str | None:
    if (reason := _refuse.common(x, dtype, w1=w1, w2=w2)) is not None:
        return reason
    if w1.shape[0] == 0 or w2.shape[0] == 0 or w1.shape[1] == 0:
        return f"zero channels: w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)}"
    return _norm.refuses(x, norm, shuffle)


def declines(*values) -> str | None:
    return None


def forward(
    x, w1, w2, b1, b2, norm_weight, norm_bias, wg, act, gated, norm, norm_act, eps, shuffle, merge, level, dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., N), pre (T, F or 2F) at level 0, stats (rows, 2) with a norm."""
    out_dtype = dtype or x.dtype
    xn, stats = _norm.normed(x, norm_weight, norm_bias, norm, eps, shuffle, out_dtype, norm_act)
    pre = _first(xn.reshape(-1, w1.shape[1]), w1, b1, wg, out_dtype)
    h = _act(pre, act, gated or wg is not None)
    y = F.linear(h, w2.to(out_dtype), _to(b2, out_dtype))
    shape = _out_shape(x, shuffle, merge)
    return y.view(*shape, w2.shape[0]), pre if level == 0 else pre.new_empty(0), stats


def backward(dy, saved, needs, act, gated, norm, norm_act, eps, shuffle, merge, level, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, w1, w2, b1, b2, norm_weight, norm_bias, wg, pre, stats = (saved[n] for n in (
        "x", "w1", "w2", "b1", "b2", "norm_weight", "norm_bias", "wg", "pre", "stats"))  # fmt: skip
    out_dtype = dtype or x.dtype
    grads: dict[str, Tensor] = {}
    dy2 = dy.reshape(-1, w2.shape[0]).to(out_dtype)
    xn = None
    if needs["w1"] or needs["wg"] or level == 1:
        xn = _norm.normed(x, norm_weight, norm_bias, norm, eps, shuffle, out_dtype, norm_act)[0]
        xn = xn.reshape(-1, w1.shape[1])
    if level == 1:
        pre = _first(xn, w1, b1, wg, out_dtype)
    if needs["b2"]:
        grads["b2"] = dy2.sum(0, dtype=torch.float32).to(b2.dtype)
    need_norm = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    need_pre = needs["w1"] or needs["wg"] or needs["b1"] or need_norm
    dh = dy2 @ w2.to(out_dtype) if need_pre else None
    dpre, h, db1 = _act_backward(pre, dh, act, gated or wg is not None, h_too=needs["w2"], sums=needs["b1"])
    if needs["w2"]:
        grads["w2"] = (dy2.t() @ h).to(w2.dtype)
    if needs["b1"]:
        grads["b1"] = db1.to(b1.dtype)
    # with a gate of its own, the halves of dpre belong to two weights
    halves = (
        [(dpre, "w1", w1)] if wg is None or dpre is None else zip(dpre.chunk(2, 1), ("w1", "wg"), (w1, wg), strict=True)
    )
    dxn = None
    for part, name, weight in halves:
        if needs[name]:
            grads[name] = (part.t() @ xn).to(weight.dtype)
        if need_norm:
            weight = weight.to(out_dtype)
            dxn = part @ weight if dxn is None else torch.addmm(dxn, part, weight)
    if need_norm:
        grads |= _norm.norm_backward(dxn, x, norm_weight, norm_bias, stats, norm, shuffle, needs, norm_act)
    return grads


# -- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tiles of rows x cols of the activation; splits: row ranges with a partial sum each."""

    rows: int
    cols: int
    splits: int


def config(rows: int, inner: int, device_arch: int) -> Config:
    """None of the steps below has been timed on a GPU yet."""
    sms = multiprocessors(device_arch)
    cols = min(128, max(16, triton.next_power_of_2(inner)))
    blocks = triton.cdiv(inner, cols)
    # 64 rows a range at least: a partial sum costs 8 bytes a column against 6 a row and column of the pass itself
    splits = max(1, min(triton.cdiv(8 * sms, blocks), rows // 64))
    return Config(16, cols, splits)


# -- launches ------------------------------------------------------------------------------------------------------


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _first(x: Tensor, w1: Tensor, b1: Tensor | None, wg: Tensor | None, dtype: torch.dtype) -> Tensor:
    """pre = x W1ᵀ + b1 (T, F or 2F); with a gate's own weight its product is the second half."""
    if wg is None:
        return F.linear(x, w1.to(dtype), _to(b1, dtype))
    pre = torch.empty((x.shape[0], 2 * w1.shape[0]), dtype=dtype, device=x.device)
    for half, weight in zip(pre.chunk(2, 1), (w1, wg), strict=True):
        torch.mm(x, weight.to(dtype).t(), out=half)
    return pre


def _out_shape(x: Tensor, shuffle: int, merge: int) -> tuple[int, ...]:
    lead = (x.shape[0], x.shape[1] * x.shape[2] // (shuffle * shuffle)) if shuffle > 1 else tuple(x.shape[:-1])
    return lead if merge == 1 else (*lead[:-1], lead[-1] // merge)


def _act(pre: Tensor, act: str, gated: bool) -> Tensor:
    rows, inner = pre.shape[0], pre.shape[1] // (2 if gated else 1)
    h = torch.empty((rows, inner), dtype=pre.dtype, device=pre.device)
    tiles = config(rows, inner, arch(pre))
    if rows:
        mlp_projector_act_kernel[(triton.cdiv(rows, tiles.rows), triton.cdiv(inner, tiles.cols))](
            pre, h, rows, inner, ACT=act, GATED=gated, BLOCK_T=tiles.rows, BLOCK_F=tiles.cols, num_warps=4
        )
    return h


def _act_backward(pre, dh, act: str, gated: bool, h_too: bool, sums: bool):
    """dpre over dh's memory (or its own when gated), h again, and the column sums of dpre in float32."""
    rows, inner = pre.shape[0], pre.shape[1] // (2 if gated else 1)
    tiles = config(rows, inner, arch(pre))
    h = torch.empty((rows, inner), dtype=pre.dtype, device=pre.device) if h_too else None
    dpre = None if dh is None else torch.empty_like(pre) if gated else dh
    parts = torch.empty((tiles.splits, pre.shape[1]), dtype=torch.float32, device=pre.device) if sums else None
    if rows == 0:
        return dpre, h, torch.zeros(pre.shape[1], device=pre.device) if sums else None
    if dh is not None or h_too:
        mlp_projector_act_bwd_kernel[(triton.cdiv(inner, tiles.cols), tiles.splits)](
            pre, dh, dpre, h, parts, rows, inner, triton.cdiv(rows, tiles.splits),
            ACT=act, GATED=gated, HAS_DH=dh is not None, HAS_H=h_too, HAS_SUMS=sums,
            BLOCK_T=tiles.rows, BLOCK_F=tiles.cols, num_warps=4,
        )  # fmt: skip
    return dpre, h, None if parts is None else parts.sum(0)


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def mlp_projector_act_kernel(
    pre_ptr, h_ptr, T, F, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    """h = act(pre), or act(second half) * first half"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (offs_t < T)[:, None] & (offs_f < F)[None, :]
    if GATED:
        pre_ptrs = pre_ptr + offs_t[:, None] * (2 * F) + offs_f[None, :]
        h = _tl.act(tl.load(pre_ptrs + F, mask, 0.0).to(tl.float32), ACT) * tl.load(pre_ptrs, mask, 0.0).to(tl.float32)
    else:
        h = _tl.act(tl.load(pre_ptr + offs_t[:, None] * F + offs_f[None, :], mask, 0.0).to(tl.float32), ACT)
    tl.store(h_ptr + offs_t[:, None] * F + offs_f[None, :], _tl.cast(h, h_ptr.dtype.element_ty), mask)


@triton.jit
def mlp_projector_act_bwd_kernel(
    pre_ptr, dh_ptr, dpre_ptr, h_ptr, parts_ptr, T, F, rows_per_split,
    ACT: tl.constexpr, GATED: tl.constexpr, HAS_DH: tl.constexpr, HAS_H: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dpre = dh act'(pre), h = act(pre), and the sums of dpre over the split's rows"""
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(1).to(tl.int64)
    mask_f = offs_f < F
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, T)
    sums = tl.zeros((BLOCK_F,), tl.float32)
    gate_sums = tl.zeros((BLOCK_F,), tl.float32)
    width = F * (2 if GATED else 1)
    for t in range(begin, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < end)[:, None] & mask_f[None, :]
        offs = offs_t[:, None] * F + offs_f[None, :]
        offs_pre = offs_t[:, None] * width + offs_f[None, :]
        first = tl.load(pre_ptr + offs_pre, mask, 0.0).to(tl.float32)
        if GATED:
            gate = tl.load(pre_ptr + offs_pre + F, mask, 0.0).to(tl.float32)
            opened = _tl.act(gate, ACT)
            if HAS_H:
                tl.store(h_ptr + offs, _tl.cast(opened * first, h_ptr.dtype.element_ty), mask)
            if HAS_DH:
                dh = tl.load(dh_ptr + offs, mask, 0.0).to(tl.float32)
                dfirst = dh * opened
                dgate = dh * first * _tl.act_derivative(gate, ACT)
                tl.store(dpre_ptr + offs_pre, _tl.cast(dfirst, dpre_ptr.dtype.element_ty), mask)
                tl.store(dpre_ptr + offs_pre + F, _tl.cast(dgate, dpre_ptr.dtype.element_ty), mask)
                sums += tl.sum(dfirst, 0)
                gate_sums += tl.sum(dgate, 0)
        else:
            if HAS_H:
                tl.store(h_ptr + offs, _tl.cast(_tl.act(first, ACT), h_ptr.dtype.element_ty), mask)
            if HAS_DH:
                dfirst = tl.load(dh_ptr + offs, mask, 0.0).to(tl.float32) * _tl.act_derivative(first, ACT)
                tl.store(dpre_ptr + offs_pre, _tl.cast(dfirst, dpre_ptr.dtype.element_ty), mask)
                sums += tl.sum(dfirst, 0)
    if HAS_SUMS:
        tl.store(parts_ptr + split * width + offs_f, sums, mask_f)
        if GATED:
            tl.store(parts_ptr + split * width + F + offs_f, gate_sums, mask_f)
