"""gated_residual in Triton: one pass each way, a row a program; sums over rows in a fixed order.

A branch that is a product goes through cuBLAS with the gate in a copy of its weight, so that the residual is the
product's own addition and the gate's gradient falls off the weight's.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _norm, _refuse, _tl
from .._device import arch
from .._dropout import keep_factor, threshold


def refuses(
    x, gate, branch, inner, weight, row_mask, norm_weight, norm_bias, seed, tanh, norm, eps, p, dtype
) -> str | None:
    given = {"gate": gate, "branch": branch, "inner": inner, "weight": weight, "norm_weight": norm_weight}
    if (reason := _refuse.common(x, dtype, **given, norm_bias=norm_bias)) is not None:
        return reason
    if x.shape[-1] > _norm.MAX_CHANNELS:
        return f"{x.shape[-1]} channels; kernels take up to {_norm.MAX_CHANNELS}"
    if inner is not None and inner.shape[-1] == 0:
        return "inner has no channels"
    return None


def declines(*values) -> str | None:
    return None


def forward(
    x, gate, branch, inner, weight, row_mask, norm_weight, norm_bias, seed, tanh, norm, eps, p, dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y and n (..., C), n empty without a norm; stats (rows, 2) with one."""
    C = x.shape[-1]
    rows = x.numel() // C
    if inner is not None:
        y = _product(x, gate, inner, weight, row_mask, tanh, dtype or inner.dtype)
        n, stats = _norm.normed(y, norm_weight, norm_bias, norm, eps, 1, y.dtype)
        return y, n.view(y.shape) if norm != "none" else y.new_empty(0), stats
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device)
    n = torch.empty_like(y) if norm != "none" else y.new_empty(0)
    stats = torch.empty((rows, 2) if norm != "none" else (0,), dtype=torch.float32, device=x.device)
    if rows:
        x, branch = _rows(x), _rows(branch)
        tiles = config(rows, C, arch(x), branch.dtype == torch.float32)
        gated_residual_fwd_kernel[(rows,)](
            x, branch, gate.reshape(-1), _mask(row_mask), norm_weight, norm_bias, seed, y, n, stats, C,
            C // gate.numel(), x.stride(0), branch.stride(0), eps, threshold(p), keep_factor(p), TANH=tanh, NORM=norm,
            HAS_MASK=row_mask is not None, HAS_WEIGHT=norm_weight is not None, HAS_BIAS=norm_bias is not None,
            HAS_DROPOUT=p > 0.0, BLOCK=tiles.block, num_warps=tiles.warps,
        )  # fmt: skip
    return y, n, stats


def backward(dy, dn, saved, needs, tanh, norm, eps, p, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed; x's in dy's dtype, which autograd makes its own."""
    gate, branch, inner, weight, row_mask, norm_weight, norm_bias, seed, y, stats = (saved[n] for n in (
        "gate", "branch", "inner", "weight", "row_mask", "norm_weight", "norm_bias", "seed", "y", "stats"))  # fmt: skip
    given = dy if dy is not None else dn
    dn = None if norm == "none" else dn
    C = given.shape[-1]
    affine = {n: saved[n] for n in ("norm_weight", "norm_bias") if needs[n]}
    if given.numel() == 0 or (dy is None and dn is None):
        like = {"x": given, "branch": branch, "inner": inner, "weight": weight, "gate": gate, **affine}
        return {n: torch.zeros_like(t, memory_format=torch.contiguous_format) for n, t in like.items() if needs[n]}
    if inner is not None:
        grads = {} if dn is not None else {n: torch.zeros_like(t) for n, t in affine.items()}
        if dn is not None:
            skip = None if dy is None else dy.reshape(-1, C)
            wanted = {"x": True, "norm_weight": needs["norm_weight"], "norm_bias": needs["norm_bias"]}
            grads = _norm.norm_backward(
                dn.reshape(-1, C).contiguous(), y, norm_weight, norm_bias, stats, norm, 1, wanted, skip=skip
            )
            dy = grads.pop("x")
        found = _product_backward(dy, gate, inner, weight, row_mask, tanh, dtype or inner.dtype, needs)
        return grads | found | ({"x": dy} if needs["x"] else {})
    return _branch_backward(
        dy, dn, gate, branch, row_mask, norm_weight, norm_bias, seed, y, stats, needs, affine, tanh, norm, p
    )


def _branch_backward(
    dy, dn, gate, branch, row_mask, norm_weight, norm_bias, seed, y, stats, needs, affine, tanh, norm, p
) -> dict[str, Tensor]:
    given = dy if dy is not None else dn
    C, G = given.shape[-1], gate.numel()
    rows, grads = given.numel() // C, {}
    if needs["x"]:
        # without a norm autograd hands dy on and asks for none
        grads["x"] = torch.empty(given.shape, dtype=given.dtype, device=given.device) if dn is not None else dy
    if needs["branch"]:
        grads["branch"] = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    tiles = config(rows, C, arch(given), branch.dtype == torch.float32)
    made = {"dtype": torch.float32, "device": given.device}
    gate_parts = torch.empty((tiles.programs, 1 if G == 1 else C), **made) if needs["gate"] else None
    sums = bool(affine) and dn is not None
    parts = torch.empty((2, tiles.programs, C), **made) if sums else None
    y = None if dn is None else y
    dy, dn, y, branch = (t if t is None else _rows(t) for t in (dy, dn, y, branch))
    # as in _norm: past so many channels the gradients and the norm's sums are two launches
    together = C <= TOGETHER
    for first, with_sums in ((True, sums),) if together else ((True, False), (False, sums)):
        if first or with_sums:
            gated_residual_bwd_kernel[(tiles.programs,)](
                dy, dn, y, branch, gate.reshape(-1), _mask(row_mask), norm_weight, seed, stats,
                grads.get("x") if dn is not None else None, grads.get("branch"), gate_parts, parts, rows,
                triton.cdiv(rows, tiles.programs), C, C // G, *(0 if t is None else t.stride(0) for t in (dy, dn)),
                0 if y is None else y.stride(0), branch.stride(0), threshold(p), keep_factor(p), TANH=tanh,
                NORM=norm if dn is not None else "none", HAS_DY=dy is not None, HAS_MASK=row_mask is not None,
                HAS_WEIGHT=norm_weight is not None, HAS_DX=first and dn is not None and needs["x"],
                HAS_DBRANCH=first and needs["branch"], HAS_DGATE=first and needs["gate"], ONE_GATE=G == 1,
                HAS_SUMS=with_sums, HAS_DROPOUT=p > 0.0, BLOCK=tiles.block, num_warps=tiles.warps,
            )  # fmt: skip
    if needs["gate"]:
        grads["gate"] = _through_tanh(gate_parts.sum(0), gate, tanh)
    for i, name in enumerate(("norm_weight", "norm_bias")):
        if name in affine:
            grads[name] = parts[i].sum(0).to(affine[name].dtype) if sums else torch.zeros_like(affine[name])
    return grads


def _through_tanh(d: Tensor, gate: Tensor, tanh: bool) -> Tensor:
    """The gate's gradient from that of tanh(gate) at each channel, or their sum."""
    d = d.view(gate.numel(), -1).sum(1).view(gate.shape)
    return (d * (1 - gate.float().tanh().square()) if tanh else d).to(gate.dtype)


TOGETHER = 2048  # channels up to which the gate's and the norm's sums share a launch


def config(rows: int, channels: int, device_arch: int, single: bool = False) -> _norm.Config:
    """As norm_residual's; with a float32 branch 16 columns a thread, for at 8 its dropout spills. Not timed on a GPU
    yet."""
    tiles = _norm.config(rows, max(8, channels), device_arch)
    return dataclasses.replace(tiles, warps=max(4, min(16, tiles.block // (512 if single else 128))))


def _rows(t: Tensor) -> Tensor:
    """(..., C) as (rows, C) with contiguous columns; a view where there is one."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _mask(row_mask: Tensor | None) -> Tensor | None:
    if row_mask is None:
        return None
    row_mask = row_mask.reshape(-1)
    return row_mask.view(torch.uint8) if row_mask.dtype == torch.bool else row_mask


# -- a branch that is a product ------------------------------------------------------------------------------------


def _masked(inner: Tensor, row_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    inner = inner if row_mask is None else inner.masked_fill((row_mask == 0)[..., None], 0.0)
    return inner.reshape(-1, inner.shape[-1]).to(dtype)


def _scaled(weight: Tensor, gate: Tensor, tanh: bool, dtype: torch.dtype) -> Tensor:
    """tanh(gate) weight (C, I) in `dtype`"""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _weight_kernel(weight, gate, tanh, None, out, None)
    return out


def _weight_kernel(weight, gate, tanh: bool, dweight, out, dots) -> None:
    C, width = weight.shape
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    gated_residual_weight_kernel[(C,)](
        weight, gate.reshape(-1), dweight, out, dots, width, C // gate.numel(), weight.stride(0), TANH=tanh,
        BACKWARD=dweight is not None, HAS_OUT=out is not None, BLOCK=min(1024, triton.next_power_of_2(width)),
        num_warps=4,
    )  # fmt: skip


def _product(x, gate, inner, weight, row_mask, tanh, dtype) -> Tensor:
    """x + inner (tanh(gate) weight)ᵀ, in one product where nothing is rounded for it"""
    scaled, flat = _scaled(weight, gate, tanh, dtype), x.reshape(-1, x.shape[-1])
    inner = _masked(inner, row_mask, dtype)
    if x.dtype == dtype:
        return torch.addmm(flat, inner, scaled.t()).view(x.shape)
    return (flat + inner @ scaled.t()).view(x.shape)


def _product_backward(dy, gate, inner, weight, row_mask, tanh, dtype, needs) -> dict[str, Tensor]:
    grads, dy = {}, dy.reshape(-1, weight.shape[0]).to(dtype)
    if needs["inner"]:
        d = (dy @ _scaled(weight, gate, tanh, dtype)).view(inner.shape)
        d = d if row_mask is None else d.masked_fill_((row_mask == 0)[..., None], 0.0)
        grads["inner"] = d.to(inner.dtype)
    if needs["weight"] or needs["gate"]:
        raw = dy.t() @ _masked(inner, row_mask, dtype)
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if needs["weight"] else None
        dots = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
        _weight_kernel(weight, gate, tanh, raw, out, dots)
        grads["weight"] = out
        if needs["gate"]:
            grads["gate"] = _through_tanh(dots, gate, tanh)
    return grads


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def gated_residual_level(gate_ptr, at, mask, TANH: tl.constexpr):
    """tanh(gate), or the gate, in float32"""
    level = tl.load(gate_ptr + at, mask, 0.0).to(tl.float32)
    if TANH:
        level = _tl.tanh(level)
    return level


@triton.jit
def gated_residual_open(g, mask_ptr, seed_ptr, row, drop_below, keep_factor, HAS_MASK: tl.constexpr,
                        HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """row_mask keep / (1 - p) g of one row"""
    if HAS_DROPOUT:
        keep = _tl.dropout_keep(tl.load(seed_ptr), row + tl.arange(0, 1), 0, drop_below, 1, BLOCK)
        g = g * (tl.reshape(keep, (BLOCK,)).to(tl.float32) * keep_factor)
    if HAS_MASK:
        g = tl.where(tl.load(mask_ptr + row) != 0, g, 0.0)
    return g


@triton.jit
def gated_residual_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, mask_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, n_ptr, stats_ptr, C, per, stride_x,
    stride_branch, eps, drop_below, keep_factor, TANH: tl.constexpr, NORM: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x + level branch of one row; n = norm(y), stats[row] = (mean, 1 / deviation)"""
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK)
    mask_c = offs_c < C
    x = tl.load(x_ptr + row * stride_x + offs_c, mask_c, 0.0).to(tl.float32)
    branch = tl.load(branch_ptr + row * stride_branch + offs_c, mask_c, 0.0).to(tl.float32)
    branch = gated_residual_open(branch, mask_ptr, seed_ptr, row, drop_below, keep_factor, HAS_MASK, HAS_DROPOUT, BLOCK)
    y = _tl.cast(x + gated_residual_level(gate_ptr, offs_c // per, mask_c, TANH) * branch, y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * C + offs_c, y, mask_c)
    if NORM != "none":
        # of the rounded y, as backward reads it
        n, mean, rstd = _norm.norm_row(y.to(tl.float32), mask_c, C, eps, NORM)
        tl.store(stats_ptr + 2 * row, mean)
        tl.store(stats_ptr + 2 * row + 1, rstd)
        if HAS_WEIGHT:
            n *= tl.load(weight_ptr + offs_c, mask_c, 0.0).to(tl.float32)
        if HAS_BIAS:
            n += tl.load(bias_ptr + offs_c, mask_c, 0.0).to(tl.float32)
        tl.store(n_ptr + row * C + offs_c, _tl.cast(n, n_ptr.dtype.element_ty), mask_c)


@triton.jit
def gated_residual_bwd_kernel(
    dy_ptr, dn_ptr, y_ptr, branch_ptr, gate_ptr, mask_ptr, weight_ptr, seed_ptr, stats_ptr, dx_ptr, dbranch_ptr,
    gate_parts_ptr, parts_ptr, rows, rows_per_program, C, per, stride_dy, stride_dn, stride_y, stride_branch,
    drop_below, keep_factor, TANH: tl.constexpr, NORM: tl.constexpr, HAS_DY: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_DX: tl.constexpr, HAS_DBRANCH: tl.constexpr, HAS_DGATE: tl.constexpr,
    ONE_GATE: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dy + the norm's gradient from dn; dbranch = level dx; sums of dx branch, dn xhat, dn over the rows"""
    program = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK)
    mask_c = offs_c < C
    sum_gate = tl.zeros((BLOCK,), tl.float32)
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for row in range(begin, end):
        g = tl.zeros((BLOCK,), tl.float32)
        if NORM != "none":
            mean = tl.load(stats_ptr + 2 * row)
            rstd = tl.load(stats_ptr + 2 * row + 1)
            xhat = (tl.load(y_ptr + row * stride_y + offs_c, mask_c, 0.0).to(tl.float32) - mean) * rstd
            xhat = tl.where(mask_c, xhat, 0.0)
            g = tl.load(dn_ptr + row * stride_dn + offs_c, mask_c, 0.0).to(tl.float32)
            if HAS_SUMS:
                sum_weight += g * xhat
                sum_bias += g
            if HAS_DX or HAS_DBRANCH or HAS_DGATE:
                if HAS_WEIGHT:
                    g *= tl.load(weight_ptr + offs_c, mask_c, 0.0).to(tl.float32)
                g = _norm.norm_row_backward(g, xhat, rstd, C, NORM)
        if HAS_DX or HAS_DBRANCH or HAS_DGATE:
            if HAS_DY:
                g += tl.load(dy_ptr + row * stride_dy + offs_c, mask_c, 0.0).to(tl.float32)
            if HAS_DX:
                tl.store(dx_ptr + row * C + offs_c, _tl.cast(g, dx_ptr.dtype.element_ty), mask_c)
            g = gated_residual_open(g, mask_ptr, seed_ptr, row, drop_below, keep_factor, HAS_MASK, HAS_DROPOUT, BLOCK)
            if HAS_DGATE:
                sum_gate += g * tl.load(branch_ptr + row * stride_branch + offs_c, mask_c, 0.0).to(tl.float32)
            if HAS_DBRANCH:
                g *= gated_residual_level(gate_ptr, offs_c // per, mask_c, TANH)
                tl.store(dbranch_ptr + row * C + offs_c, _tl.cast(g, dbranch_ptr.dtype.element_ty), mask_c)
    if HAS_DGATE:
        if ONE_GATE:
            tl.store(gate_parts_ptr + program, tl.sum(tl.where(mask_c, sum_gate, 0.0), 0))
        else:
            tl.store(gate_parts_ptr + program * C + offs_c, sum_gate, mask_c)
    if HAS_SUMS:
        tl.store(parts_ptr + program * C + offs_c, sum_weight, mask_c)
        tl.store(parts_ptr + (tl.num_programs(0) + program) * C + offs_c, sum_bias, mask_c)


@triton.jit
def gated_residual_weight_kernel(
    weight_ptr, gate_ptr, dweight_ptr, out_ptr, dots_ptr, width, per, stride_w, TANH: tl.constexpr,
    BACKWARD: tl.constexpr, HAS_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = level weight of one row; backward: out = level dweight and dots[row] = <weight, dweight>"""
    row = tl.program_id(0).to(tl.int64)
    level = gated_residual_level(gate_ptr, row // per + tl.arange(0, 1), tl.arange(0, 1) == 0, TANH)
    dots = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < width
        w = tl.load(weight_ptr + row * stride_w + offs, mask, 0.0).to(tl.float32)
        if BACKWARD:
            d = tl.load(dweight_ptr + row * width + offs, mask, 0.0).to(tl.float32)
            dots += w * d
            w = d
        if HAS_OUT:
            tl.store(out_ptr + row * width + offs, _tl.cast(level * w, out_ptr.dtype.element_ty), mask)
    if BACKWARD:
        tl.store(dots_ptr + row, tl.sum(dots, 0))
