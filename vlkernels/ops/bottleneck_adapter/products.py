"""The plan of a large rank, as MAGMA's: cuBLAS runs the products, one pass lies between them and one after.

Nothing R wide is kept from forward to backward here either: the first product is run again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _norm, _tl
from .._dropout import keep_factor, threshold
from . import weights
from .kernels import bottleneck_adapter_bias, bottleneck_adapter_ended, bottleneck_adapter_level

ROWS, COLS = 16, 128  # a tile of the passes; not timed on a GPU yet


def forward(
    c, x, down, up, down_bias, up_bias, norm_weight, norm_bias, base, residual, gate, route, seed, y
) -> None:  # fmt: skip
    """Fill y (T, N)."""
    n, _ = _norm.normed(x, norm_weight, norm_bias, c.norm, c.eps, 1, c.compute)
    z = n @ down.to(c.compute).t()
    if not (c.act == "none" and c.p == 0.0 and down_bias is None and not c.routed):
        out = z if c.E == 1 else torch.empty((c.T, c.E * c.R), dtype=c.compute, device=x.device)
        bottleneck_adapter_mid_kernel[_grid(c.T, c.R)](
            z, down_bias, route, seed, out, c.T, c.R, c.E, c.per_sample, threshold(c.p), keep_factor(c.p),
            ACT=c.act, ROUTED=c.routed, HAS_DB=down_bias is not None, HAS_DROPOUT=c.p > 0.0, **_blocks(),
        )  # fmt: skip
        z = out
    b = z @ up.to(c.compute).t()
    bottleneck_adapter_sum_kernel[_grid(c.T, c.N)](
        b, x, up_bias, base, residual, gate, route, y, c.T, c.N, c.E, c.per_gate, c.per_sample, x.stride(0), c.N,
        *(0 if t is None else t.stride(0) for t in (base, residual, gate)), c.scale,
        GATE=c.gate, SIGMOID=c.sigmoid, SKIP=c.skip, ROUTED=c.routed, HAS_UB=up_bias is not None,
        HAS_BASE=base is not None, HAS_RESIDUAL=residual is not None, **_blocks(),
    )  # fmt: skip


def backward(c, dy, x, t, needs) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    down, up, gate, route = (t[n] for n in ("down", "up", "gate", "route"))
    need_down, need_w = weights.wanted(c, needs)
    need_mid = need_down or needs["x"] or needs["route"] or needs["gate"] or needs["up"]
    grads: dict[str, Tensor] = {}
    tile = weights.Tile(64, 64, 16, 4, splits=max(1, c.T // 1024))
    z = source = extra = None
    if need_mid:
        n, stats = _norm.normed(x, t["norm_weight"], t["norm_bias"], c.norm, c.eps, 1, c.compute)
        pre = n @ down.to(c.compute).t()
        source, extra, dots = _through_gate(c, dy, x, t, needs, pre)
        h = source @ _opened(c, up, gate)
        z, dpre, more, droute = _middle(c, pre, h, t, needs)
        grads["route"] = droute
        if more is not None:
            grads["gate"] = weights.of_rows(more if dots is None else dots + more, gate, c.sigmoid)
        if c.gate == "element" and needs["gate"]:
            grads["gate"] = t["dgate"]
    grads = weights.of_up(
        c, dy, x, t, needs, z if need_w else None, lambda: (source.t() @ z)[None], tile, grads
    )  # fmt: skip
    if need_down:
        if needs["down_bias"]:
            grads["down_bias"] = dpre.sum(0, dtype=torch.float32)
        if needs["down"]:
            grads["down"] = dpre.t() @ n
    if needs["x"] or needs["norm_weight"] or needs["norm_bias"]:
        skip = {"add": dy, "gated": extra, "none": None}[c.skip] if needs["x"] else None
        down = down.to(c.compute)
        if c.norm == "none":
            same = skip is not None and skip.dtype == c.compute == x.dtype
            grads["x"] = torch.addmm(skip, dpre, down) if same else _plus(dpre @ down, skip)
        else:
            grads |= _norm.norm_backward(
                dpre @ down, x, t["norm_weight"], t["norm_bias"], stats, c.norm, 1, needs, skip=skip
            )
    return grads


def _plus(dx: Tensor, skip: Tensor | None) -> Tensor:
    return dx if skip is None else dx + skip


def _opened(c, up: Tensor, gate: Tensor | None) -> Tensor:
    """up, with a gate of each channel in it."""
    if c.gate != "channel":
        return up.to(c.compute)
    level = gate.float().sigmoid() if c.sigmoid else gate.float()
    return (up * level[:, None]).to(c.compute)


def _through_gate(c, dy, x, t, needs, pre) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy, or G dy for a gate of each element (whose gradient goes to t["dgate"]); scale G dy where x is under the gate
    too; and <dy, up_bias + x> scale of each row, for a gate of rows."""
    made = {"device": dy.device}
    dgate_of = c.gate if needs["gate"] else "none"
    gated = c.skip == "gated" and needs["x"]
    with_dots = dgate_of == "row" and (t["up_bias"] is not None or c.skip == "gated")
    element = c.gate == "element"
    source = torch.empty((c.T, c.N), dtype=c.compute, **made) if element else None
    extra = torch.empty((c.T, c.N), dtype=x.dtype, **made) if gated else None
    dots = torch.empty(c.T, dtype=torch.float32, **made) if with_dots else None
    b = None
    if dgate_of == "element":
        t["dgate"] = torch.empty((c.T, c.N), dtype=t["gate"].dtype, **made)
        b = _forward_middle(c, pre, t) @ t["up"].to(c.compute).t()
    if element or gated or with_dots:
        bottleneck_adapter_gate_kernel[(triton.cdiv(c.T, ROWS),)](
            dy, b, x, t["up_bias"], t["gate"], t["route"], source, extra, t.get("dgate"), dots, c.T, c.N, c.E,
            c.per_gate, c.per_sample, dy.stride(0), x.stride(0), c.N, 0 if t["gate"] is None else t["gate"].stride(0),
            c.scale,
            GATE=c.gate, SIGMOID=c.sigmoid, SKIP=c.skip, ROUTED=c.routed, HAS_UB=t["up_bias"] is not None,
            HAS_B=b is not None, HAS_EXTRA=gated, HAS_DOTS=with_dots, **_blocks(),
        )  # fmt: skip
    return dy.to(c.compute) if source is None else source, extra, dots


def _forward_middle(c, pre, t) -> Tensor:
    """z (T, E R), times route."""
    out = torch.empty((c.T, c.E * c.R), dtype=c.compute, device=pre.device)
    bottleneck_adapter_mid_kernel[_grid(c.T, c.R)](
        pre, t["down_bias"], t["route"], t["seed"], out, c.T, c.R, c.E, c.per_sample, threshold(c.p),
        keep_factor(c.p), ACT=c.act, ROUTED=c.routed, HAS_DB=t["down_bias"] is not None, HAS_DROPOUT=c.p > 0.0,
        **_blocks(),
    )  # fmt: skip
    return out


def _middle(c, pre, h, t, needs) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """z (T, E R) times route and a gate of rows, dpre (T, R), scale <z, h> of each row, and the route's gradient."""
    z, dpre = torch.empty_like(h), torch.empty_like(pre)
    made = {"dtype": torch.float32, "device": pre.device}
    dots = torch.empty(c.T, **made) if needs["gate"] and c.gate == "row" else None
    droute = torch.empty((c.T, c.E), **made) if needs["route"] else None
    bottleneck_adapter_mid_bwd_kernel[(triton.cdiv(c.T, ROWS),)](
        pre, h, t["down_bias"], t["gate"], t["route"], t["seed"], z, dpre, dots, droute, c.T, c.R, c.E, c.per_gate,
        c.per_sample, c.scale, threshold(c.p), keep_factor(c.p),
        ACT=c.act, GATE=c.gate, SIGMOID=c.sigmoid, ROUTED=c.routed, HAS_DB=t["down_bias"] is not None,
        HAS_DROPOUT=c.p > 0.0, HAS_DOTS=dots is not None, HAS_DROUTE=droute is not None, **_blocks(),
    )  # fmt: skip
    return z, dpre, dots, droute


def _grid(rows: int, cols: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), triton.cdiv(cols, COLS)


def _blocks() -> dict:
    return {"BLOCK_T": ROWS, "BLOCK_C": COLS, "num_warps": 4}


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def bottleneck_adapter_z(
    pre, down_bias_ptr, seed_ptr, offs_t, offs_r, first_r, mask_r, drop_below, keep_factor, ACT: tl.constexpr,
    HAS_DB: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """pre with its bias, dropout's factor, and z = dropout(act(pre)) of one tile, in float32"""
    if HAS_DB:
        pre += tl.load(down_bias_ptr + offs_r, mask_r, 0.0).to(tl.float32)[None, :]
    factor = tl.full((BLOCK_T, BLOCK_C), 1.0, tl.float32)
    if HAS_DROPOUT:
        keep = _tl.dropout_keep(tl.load(seed_ptr), offs_t, first_r, drop_below, BLOCK_T, BLOCK_C)
        factor = keep.to(tl.float32) * keep_factor
    z = pre
    if ACT != "none":
        z = _tl.act(pre, ACT)
    return pre, factor, z * factor


@triton.jit
def bottleneck_adapter_mid_kernel(
    pre_ptr, down_bias_ptr, route_ptr, seed_ptr, z_ptr, T, R, E, per_sample, drop_below, keep_factor,
    ACT: tl.constexpr, ROUTED: tl.constexpr, HAS_DB: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """z[:, e R + r] = route_e dropout(act(pre + down_bias))"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_r = tl.program_id(1) * BLOCK_C
    offs_r = first_r + tl.arange(0, BLOCK_C)
    mask_t = offs_t < T
    mask_r = offs_r < R
    mask = mask_t[:, None] & mask_r[None, :]
    pre = tl.load(pre_ptr + offs_t[:, None] * R + offs_r[None, :], mask, 0.0).to(tl.float32)
    _, _, z = bottleneck_adapter_z(
        pre, down_bias_ptr, seed_ptr, offs_t, offs_r, first_r, mask_r, drop_below, keep_factor, ACT, HAS_DB,
        HAS_DROPOUT, BLOCK_T, BLOCK_C,
    )  # fmt: skip
    for e in range(0, E):
        out = z
        if ROUTED:
            out = z * tl.load(route_ptr + (offs_t // per_sample) * E + e, mask_t, 0.0).to(tl.float32)[:, None]
        ptrs = z_ptr + offs_t[:, None] * (R * E) + (e * R + offs_r)[None, :]
        tl.store(ptrs, _tl.cast(out, z_ptr.dtype.element_ty), mask)


@triton.jit
def bottleneck_adapter_mid_bwd_kernel(
    pre_ptr, h_ptr, down_bias_ptr, gate_ptr, route_ptr, seed_ptr, z_ptr, dpre_ptr, dots_ptr, droute_ptr, T, R, E,
    per_gate, per_sample, scale, drop_below, keep_factor, ACT: tl.constexpr, GATE: tl.constexpr,
    SIGMOID: tl.constexpr, ROUTED: tl.constexpr, HAS_DB: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_DOTS: tl.constexpr, HAS_DROUTE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """z as in forward times a gate of rows, dpre from h = (dy G) up, scale <z, h>, droute: all of BLOCK_T rows"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    sample = offs_t // per_sample
    level = tl.full((BLOCK_T,), 1.0, tl.float32)
    if GATE == "row":
        level = bottleneck_adapter_level(gate_ptr, offs_t // per_gate, mask_t, SIGMOID)
    dots = tl.zeros((BLOCK_T,), tl.float32)
    for r in range(0, R, BLOCK_C):
        offs_r = r + tl.arange(0, BLOCK_C)
        mask_r = offs_r < R
        mask = mask_t[:, None] & mask_r[None, :]
        pre = tl.load(pre_ptr + offs_t[:, None] * R + offs_r[None, :], mask, 0.0).to(tl.float32)
        pre, factor, z = bottleneck_adapter_z(
            pre, down_bias_ptr, seed_ptr, offs_t, offs_r, r, mask_r, drop_below, keep_factor, ACT, HAS_DB,
            HAS_DROPOUT, BLOCK_T, BLOCK_C,
        )  # fmt: skip
        dz = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for e in range(0, E):
            at = offs_t[:, None] * (R * E) + (e * R + offs_r)[None, :]
            h = scale * tl.load(h_ptr + at, mask, 0.0).to(tl.float32)
            mixed = z
            if ROUTED:
                share = tl.load(route_ptr + sample * E + e, mask_t, 0.0).to(tl.float32)
                mixed = z * share[:, None]
                dz += share[:, None] * h
            else:
                dz += h
            if HAS_DOTS:
                dots += tl.sum(tl.where(mask, mixed * h, 0.0), 1)
            tl.store(z_ptr + at, _tl.cast(mixed * level[:, None], z_ptr.dtype.element_ty), mask)
        dz *= factor * level[:, None]
        if ACT != "none":
            dz *= _tl.act_derivative(pre, ACT)
        ptrs = dpre_ptr + offs_t[:, None] * R + offs_r[None, :]
        tl.store(ptrs, _tl.cast(dz, dpre_ptr.dtype.element_ty), mask)
    if HAS_DOTS:
        tl.store(dots_ptr + offs_t, dots, mask_t)
    if HAS_DROUTE:
        for e in range(0, E):
            droute = tl.zeros((BLOCK_T,), tl.float32)
            for r in range(0, R, BLOCK_C):
                offs_r = r + tl.arange(0, BLOCK_C)
                mask_r = offs_r < R
                mask = mask_t[:, None] & mask_r[None, :]
                pre = tl.load(pre_ptr + offs_t[:, None] * R + offs_r[None, :], mask, 0.0).to(tl.float32)
                _, _, z = bottleneck_adapter_z(
                    pre, down_bias_ptr, seed_ptr, offs_t, offs_r, r, mask_r, drop_below, keep_factor, ACT, HAS_DB,
                    HAS_DROPOUT, BLOCK_T, BLOCK_C,
                )  # fmt: skip
                h = tl.load(h_ptr + offs_t[:, None] * (R * E) + (e * R + offs_r)[None, :], mask, 0.0).to(tl.float32)
                droute += tl.sum(tl.where(mask, z * h, 0.0), 1)
            tl.store(droute_ptr + offs_t * E + e, scale * level * droute, mask_t)


@triton.jit
def bottleneck_adapter_sum_kernel(
    b_ptr, x_ptr, up_bias_ptr, base_ptr, residual_ptr, gate_ptr, route_ptr, y_ptr, T, N, E, per_gate, per_sample,
    stride_x, stride_ub, stride_base, stride_residual, stride_gate, scale, GATE: tl.constexpr, SIGMOID: tl.constexpr,
    SKIP: tl.constexpr, ROUTED: tl.constexpr, HAS_UB: tl.constexpr, HAS_BASE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = base + residual + scale G (b + up_bias) + x of one tile"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_t = offs_t < T
    mask_n = offs_n < N
    mask = mask_t[:, None] & mask_n[None, :]
    b = tl.load(b_ptr + offs_t[:, None] * N + offs_n[None, :], mask, 0.0).to(tl.float32)
    if HAS_UB:
        b += bottleneck_adapter_bias(
            up_bias_ptr, route_ptr, offs_t // per_sample, offs_n, mask_t, mask_n, N, E, stride_ub, ROUTED, BLOCK_T,
            BLOCK_C,
        )  # fmt: skip
    level = tl.full((BLOCK_T,), 1.0, tl.float32)
    if GATE == "row":
        level = bottleneck_adapter_level(gate_ptr, offs_t // per_gate, mask_t, SIGMOID)
    b = bottleneck_adapter_ended(
        b, level, x_ptr, base_ptr, residual_ptr, gate_ptr, offs_t, offs_n, mask, mask_n, stride_x, stride_base,
        stride_residual, stride_gate, scale, GATE, SIGMOID, SKIP, HAS_BASE, HAS_RESIDUAL,
    )  # fmt: skip
    tl.store(y_ptr + offs_t[:, None] * N + offs_n[None, :], _tl.cast(b, y_ptr.dtype.element_ty), mask)


@triton.jit
def bottleneck_adapter_gate_kernel(
    dy_ptr, b_ptr, x_ptr, up_bias_ptr, gate_ptr, route_ptr, source_ptr, extra_ptr, dgate_ptr, dots_ptr, T, N, E,
    per_gate, per_sample, stride_dy, stride_x, stride_ub, stride_gate, scale, GATE: tl.constexpr,
    SIGMOID: tl.constexpr, SKIP: tl.constexpr, ROUTED: tl.constexpr, HAS_UB: tl.constexpr, HAS_B: tl.constexpr,
    HAS_EXTRA: tl.constexpr, HAS_DOTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """source = G dy and dgate of a gate of each element; extra = scale G dy; dots = scale <dy, up_bias + x>"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    dots = tl.zeros((BLOCK_T,), tl.float32)
    for n in range(0, N, BLOCK_C):
        offs_n = n + tl.arange(0, BLOCK_C)
        mask_n = offs_n < N
        mask = mask_t[:, None] & mask_n[None, :]
        at = offs_t[:, None] * N + offs_n[None, :]
        g = tl.load(dy_ptr + offs_t[:, None] * stride_dy + offs_n[None, :], mask, 0.0).to(tl.float32)
        if HAS_B or HAS_DOTS:
            b = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
            if HAS_B:
                b += tl.load(b_ptr + at, mask, 0.0).to(tl.float32)
            if HAS_UB:
                b += bottleneck_adapter_bias(
                    up_bias_ptr, route_ptr, offs_t // per_sample, offs_n, mask_t, mask_n, N, E, stride_ub, ROUTED,
                    BLOCK_T, BLOCK_C,
                )  # fmt: skip
            if SKIP == "gated":
                b += tl.load(x_ptr + offs_t[:, None] * stride_x + offs_n[None, :], mask, 0.0).to(tl.float32)
            if HAS_DOTS:
                dots += tl.sum(g * b, 1)
        if GATE == "element":
            where = offs_t[:, None] * stride_gate + offs_n[None, :]
            level = bottleneck_adapter_level(gate_ptr, where, mask, SIGMOID)
            if HAS_B:
                d = scale * g * b
                if SIGMOID:
                    d *= level * (1.0 - level)
                tl.store(dgate_ptr + at, _tl.cast(d, dgate_ptr.dtype.element_ty), mask)
            g *= level
            tl.store(source_ptr + at, _tl.cast(g, source_ptr.dtype.element_ty), mask)
        elif GATE == "channel":
            g *= bottleneck_adapter_level(gate_ptr, offs_n, mask_n, SIGMOID)[None, :]
        elif GATE == "row":
            g *= bottleneck_adapter_level(gate_ptr, offs_t // per_gate, mask_t, SIGMOID)[:, None]
        if HAS_EXTRA:
            tl.store(extra_ptr + at, _tl.cast(scale * g, extra_ptr.dtype.element_ty), mask)
    if HAS_DOTS:
        tl.store(dots_ptr + offs_t, scale * dots, mask_t)
