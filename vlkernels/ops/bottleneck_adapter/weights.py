"""Gradients of what all rows share: weights, biases, the norm's and a gate of each channel, in a fixed order.

One product over the rows for each weight, Q = xhatᵀ dpre (D, E R) and W = (dy G)ᵀ z (N, E R), and sums of columns on
the way; everything else follows from them at the size of a weight, so that no row is read for it again:

    ddown_rd        = norm_weight_d Q_dr + norm_bias_d sum_t dpre_tr
    dnorm_weight_d  = sum_r down_rd Q_dr               dnorm_bias_d = sum_r down_rd sum_t dpre_tr
    dup_nr          = scale G_n W_nr                   dup_bias_n   = scale G_n sum_t dy_tn
    dG_n            = scale (sum_r up_nr W_nr + up_bias_n sum_t dy_tn + sum_t dy_tn x_tn)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _tl
from .kernels import bottleneck_adapter_level


@dataclass(frozen=True)
class Tile:
    """rows, channels and ranks held at once; splits: ranges of the rows with a partial sum each."""

    rows: int
    cols: int
    rank: int
    warps: int
    stages: int = 3
    splits: int = 1


def outer(
    source: Tensor, side: Tensor | None, tile: Tile, stats: Tensor | None = None, layer: bool = False,
    gate: tuple | None = None, sums: bool = False, x: Tensor | None = None, ranges: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Partial sums over ranges of the rows: sourceᵀ side (S, C, ER), and of source and source x (2, S, C).

    stats: of a norm; source is then normalised. gate: (tensor, kind "row" or "element", rows of an entry, sigmoid),
    which multiplies source. side None: the sums alone. ranges: so many of equal length, else tile.splits.
    """
    count, C = source.shape
    splits = ranges or tile.splits
    made = {"dtype": torch.float32, "device": source.device}
    ER = 1 if side is None else side.shape[1]
    parts = None if side is None else torch.empty((splits, C, ER), **made)
    totals = torch.empty((2 if x is not None else 1, splits, C), **made) if sums else None
    level, kind, per, sigmoid = gate or (None, "none", 1, False)
    grid = (splits, triton.cdiv(C, tile.cols), triton.cdiv(ER, tile.rank))
    product = _tl.product(source.dtype if side is None else side.dtype)
    bottleneck_adapter_outer_kernel[grid](
        source, side, stats, level, x, parts, totals, count, C, ER, triton.cdiv(count, splits), per, source.stride(0),
        0 if level is None or kind == "row" else level.stride(0), 0 if x is None else x.stride(0),
        NORM=stats is not None, CENTRED=layer, GATE=kind, SIGMOID=sigmoid, HAS_SIDE=side is not None, HAS_SUMS=sums,
        HAS_CROSS=x is not None, BLOCK_T=tile.rows, BLOCK_C=tile.cols, BLOCK_R=tile.rank, num_warps=tile.warps,
        num_stages=tile.stages, **product,
    )  # fmt: skip
    return parts, totals


def levels(c, gate: Tensor | None) -> tuple | None:
    """The gate as `outer` multiplies it in: those of a channel join later."""
    return (gate, c.gate, c.per_gate, c.sigmoid) if c.gate in ("row", "element") else None


def wanted(c, needs: dict) -> tuple[bool, bool]:
    """Whether gradients follow from dpre, and from dyᵀ z."""
    return (
        any(needs[n] for n in ("down", "down_bias", "norm_weight", "norm_bias")),
        needs["up"] or (needs["gate"] and c.gate == "channel"),
    )


def of_rows(dots: Tensor, gate: Tensor, sigmoid: bool) -> Tensor:
    """The gradient of a gate of rows, of samples or of all from that of the level of each row."""
    d = dots.view(gate.numel(), -1).sum(1)
    if sigmoid:
        level = gate.float().sigmoid()
        d = d * (level * (1.0 - level))
    return d


def of_up(
    c, dy: Tensor, x: Tensor, t: dict, needs: dict, z: Tensor | None, product: Callable | None, tile: Tile, grads: dict
) -> dict[str, Tensor]:
    """grads with those of up, up_bias and of a gate of each channel, and up_bias' part in the route's (B, E).

    z: None where W is not needed. product(): W (1, N, E R), where cuBLAS makes it. grads["route"]: of each row (T, E).
    """
    up_bias, route, channel = t["up_bias"], t["route"], needs["gate"] and c.gate == "channel"
    gate, opened = t["gate"] if c.gate == "channel" else None, levels(c, t["gate"])
    extra = None
    if needs["route"]:
        grads["route"] = grads["route"].view(route.shape[0], -1, c.E).sum(1)
    if c.routed and up_bias is not None and (needs["up_bias"] or needs["route"] or channel):
        # sums of dy over each sample (B, N): what the experts' biases see
        sums = outer(dy, None, tile, gate=opened, sums=True, ranges=route.shape[0])[1][0]
        share, bias, level = route.float()[:, :, None], up_bias.float(), c.scale
        if channel:
            extra = (sums * (share * bias).sum(1)).sum(0)
        if gate is not None:
            level = c.scale * (gate.float().sigmoid() if c.sigmoid else gate.float())
        sums = (sums * level)[:, None, :]
        if needs["up_bias"]:
            grads["up_bias"] = (share * sums).sum(0)
        if needs["route"]:
            grads["route"] += (sums * bias).sum(2)
    plain_bias = None if c.routed else up_bias
    total = (needs["up_bias"] and not c.routed) or (channel and plain_bias is not None)
    cross = x if channel and c.skip == "gated" else None
    if z is None and not total:
        return grads
    summed, side = total or cross is not None, z if product is None else None
    parts = sums = None
    if summed or side is not None:
        parts, sums = outer(dy, side, tile, gate=opened, sums=summed, x=cross)
    if z is not None and product is not None:
        parts = product()
    wanted = {"up": needs["up"], "up_bias": needs["up_bias"] and not c.routed, "gate": channel}
    return grads | finish_up(parts, sums, extra, t["up"], plain_bias, gate, c.sigmoid, c.scale, wanted)


FINISH = 32, 16  # channels and ranks of a tile; not timed on a GPU yet


def finish_down(parts, bias_sums, down, norm_weight, norm_bias, R: int, needs: dict[str, bool]) -> dict[str, Tensor]:
    """ddown, dnorm_weight, dnorm_bias from Q's partial sums; bias_sums: sum_t dpre (R) in float32, with norm_bias."""
    splits, D, ER = parts.shape
    grads = {
        name: torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for name, t in (("down", down), ("norm_weight", norm_weight), ("norm_bias", norm_bias))
        if needs[name]
    }
    bottleneck_adapter_finish_down_kernel[(triton.cdiv(D, FINISH[0]),)](
        parts, bias_sums, down, norm_weight, norm_bias, grads.get("down"), grads.get("norm_weight"),
        grads.get("norm_bias"), D, R, ER // R, splits, down.stride(0), down.stride(1),
        HAS_NW=norm_weight is not None, HAS_NB=norm_bias is not None, HAS_DDOWN=needs["down"],
        HAS_DNW=needs["norm_weight"], HAS_DNB=needs["norm_bias"], BLOCK_C=FINISH[0], BLOCK_R=FINISH[1], num_warps=4,
    )  # fmt: skip
    return grads


def finish_up(
    parts, sums, extra, up, up_bias, gate, sigmoid: bool, scale: float, needs: dict[str, bool]
) -> dict[str, Tensor]:
    """dup, dup_bias and the gradient of a gate of each channel from W's partial sums and those of dy, dy x.

    gate: of each channel, or None. up_bias: without a route; with one `extra` (N) is what it adds to dG / scale.
    """
    N, ER = up.shape
    grads = {
        name: torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for name, t in (("up", up), ("up_bias", up_bias), ("gate", gate))
        if needs[name]
    }
    bottleneck_adapter_finish_up_kernel[(triton.cdiv(N, FINISH[0]),)](
        parts, sums, extra, up, up_bias, gate, grads.get("up"), grads.get("up_bias"), grads.get("gate"), N, ER,
        0 if parts is None else parts.shape[0], 0 if sums is None else sums.shape[1], up.stride(0), up.stride(1), scale,
        HAS_GATE=gate is not None, HAS_EXTRA=extra is not None, SIGMOID=sigmoid, HAS_SIDE=parts is not None,
        HAS_SUMS=sums is not None, HAS_CROSS=sums is not None and sums.shape[0] > 1, HAS_UB=up_bias is not None,
        HAS_DUP=needs["up"], HAS_DUB=needs["up_bias"], HAS_DGATE=needs["gate"], BLOCK_C=FINISH[0], BLOCK_R=FINISH[1],
        num_warps=4,
    )  # fmt: skip
    return grads


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def bottleneck_adapter_outer_kernel(
    source_ptr, side_ptr, stats_ptr, gate_ptr, x_ptr, parts_ptr, sums_ptr, T, C, ER, rows_per_split, per_gate,
    stride_source, stride_gate, stride_x, NORM: tl.constexpr, CENTRED: tl.constexpr, GATE: tl.constexpr,
    SIGMOID: tl.constexpr, HAS_SIDE: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_CROSS: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts[split] = aᵀ side over the rows of the split, a = norm(source) or G source; sums of a and of a x"""
    split = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c = offs_c < C
    mask_r = offs_r < ER
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, T)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    cross = tl.zeros((BLOCK_C,), tl.float32)
    for t in range(begin, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        mask = mask_t[:, None] & mask_c[None, :]
        # (BLOCK_T, BLOCK_C)
        a = tl.load(source_ptr + offs_t[:, None] * stride_source + offs_c[None, :], mask, 0.0)
        if NORM:
            rstd = tl.load(stats_ptr + 2 * offs_t + 1, mask_t, 0.0)
            a = a.to(tl.float32)
            if CENTRED:
                a -= tl.load(stats_ptr + 2 * offs_t, mask_t, 0.0)[:, None]
            a *= rstd[:, None]
        if GATE == "row":
            a = a.to(tl.float32) * bottleneck_adapter_level(gate_ptr, offs_t // per_gate, mask_t, SIGMOID)[:, None]
        elif GATE == "element":
            at = offs_t[:, None] * stride_gate + offs_c[None, :]
            a = a.to(tl.float32) * bottleneck_adapter_level(gate_ptr, at, mask, SIGMOID)
        if HAS_SUMS:
            sums += tl.sum(a.to(tl.float32), 0)
        if HAS_CROSS:
            x = tl.load(x_ptr + offs_t[:, None] * stride_x + offs_c[None, :], mask, 0.0).to(tl.float32)
            cross += tl.sum(a.to(tl.float32) * x, 0)
        if HAS_SIDE:
            # (BLOCK_T, BLOCK_R)
            side = tl.load(
                side_ptr + offs_t[:, None] * ER + offs_r[None, :], mask_t[:, None] & mask_r[None, :], 0.0
            )  # fmt: skip
            acc = _tl.dot(tl.trans(_tl.cast(a, PRODUCT)), side, acc, PRECISION)
    if HAS_SIDE:
        ptrs = parts_ptr + split * C * ER + offs_c[:, None].to(tl.int64) * ER + offs_r[None, :]
        tl.store(ptrs, acc, mask_c[:, None] & mask_r[None, :])
    first = tl.program_id(2) == 0
    if HAS_SUMS:
        tl.store(sums_ptr + split * C + offs_c, sums, mask_c & first)
    if HAS_CROSS:
        tl.store(sums_ptr + (tl.num_programs(0) + split) * C + offs_c, cross, mask_c & first)


@triton.jit
def bottleneck_adapter_parts(
    parts_ptr, offs_c, offs_j, mask, C, ER, splits, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr
):
    """(BLOCK_C, BLOCK_R) of the product: its partial sums, in order"""
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    ptrs = parts_ptr + offs_c[:, None].to(tl.int64) * ER + offs_j[None, :]
    for _ in range(0, splits):
        acc += tl.load(ptrs, mask, 0.0)
        ptrs += C * ER
    return acc


@triton.jit
def bottleneck_adapter_finish_down_kernel(
    parts_ptr, bias_sums_ptr, down_ptr, norm_weight_ptr, norm_bias_ptr, ddown_ptr, dnorm_weight_ptr, dnorm_bias_ptr,
    D, R, E, splits, stride_dr, stride_dd, HAS_NW: tl.constexpr, HAS_NB: tl.constexpr, HAS_DDOWN: tl.constexpr,
    HAS_DNW: tl.constexpr, HAS_DNB: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """ddown (R, D), dnorm_weight, dnorm_bias (D) of BLOCK_C channels, as above; Q's experts add up"""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < D
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        mask = mask_c[:, None] & mask_r[None, :]
        q = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
        for e in range(0, E):
            q += bottleneck_adapter_parts(parts_ptr, offs_c, e * R + offs_r, mask, D, R * E, splits, BLOCK_C, BLOCK_R)
        if HAS_NB or HAS_DNB:
            total = tl.load(bias_sums_ptr + offs_r, mask_r, 0.0)
        if HAS_DNW or HAS_DNB:
            at = offs_c[:, None].to(tl.int64) * stride_dd + offs_r[None, :].to(tl.int64) * stride_dr
            down = tl.load(down_ptr + at, mask, 0.0).to(tl.float32)
            if HAS_DNW:
                dweight += tl.sum(down * q, 1)
            if HAS_DNB:
                dbias += tl.sum(down * total[None, :], 1)
        if HAS_DDOWN:
            if HAS_NW:
                q *= tl.load(norm_weight_ptr + offs_c, mask_c, 0.0).to(tl.float32)[:, None]
            if HAS_NB:
                q += tl.load(norm_bias_ptr + offs_c, mask_c, 0.0).to(tl.float32)[:, None] * total[None, :]
            ptrs = ddown_ptr + offs_r[None, :].to(tl.int64) * D + offs_c[:, None]
            tl.store(ptrs, _tl.cast(q, ddown_ptr.dtype.element_ty), mask)
    if HAS_DNW:
        tl.store(dnorm_weight_ptr + offs_c, _tl.cast(dweight, dnorm_weight_ptr.dtype.element_ty), mask_c)
    if HAS_DNB:
        tl.store(dnorm_bias_ptr + offs_c, _tl.cast(dbias, dnorm_bias_ptr.dtype.element_ty), mask_c)


@triton.jit
def bottleneck_adapter_finish_up_kernel(
    parts_ptr, sums_ptr, extra_ptr, up_ptr, up_bias_ptr, gate_ptr, dup_ptr, dup_bias_ptr, dgate_ptr, N, ER, splits,
    sums_splits, stride_un, stride_ur, scale, HAS_GATE: tl.constexpr, HAS_EXTRA: tl.constexpr, SIGMOID: tl.constexpr,
    HAS_SIDE: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_CROSS: tl.constexpr, HAS_UB: tl.constexpr,
    HAS_DUP: tl.constexpr, HAS_DUB: tl.constexpr, HAS_DGATE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dup (N, E R), dup_bias and dgate (N) of BLOCK_C channels, as above"""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < N
    factor = tl.full((BLOCK_C,), 1.0, tl.float32)
    if HAS_GATE:
        factor = bottleneck_adapter_level(gate_ptr, offs_c, mask_c, SIGMOID)
    dgate = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_EXTRA:
        dgate += tl.load(extra_ptr + offs_c, mask_c, 0.0)
    if HAS_SUMS:
        total = tl.zeros((BLOCK_C,), tl.float32)
        for s in range(0, sums_splits):
            total += tl.load(sums_ptr + s * N + offs_c, mask_c, 0.0)
            if HAS_CROSS:
                dgate += tl.load(sums_ptr + (sums_splits + s) * N + offs_c, mask_c, 0.0)
        if HAS_UB:
            dgate += total * tl.load(up_bias_ptr + offs_c, mask_c, 0.0).to(tl.float32)
        if HAS_DUB:
            tl.store(dup_bias_ptr + offs_c, _tl.cast(scale * factor * total, dup_bias_ptr.dtype.element_ty), mask_c)
    if HAS_SIDE:
        for r in range(0, ER, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            mask = mask_c[:, None] & (offs_r < ER)[None, :]
            w = bottleneck_adapter_parts(parts_ptr, offs_c, offs_r, mask, N, ER, splits, BLOCK_C, BLOCK_R)
            if HAS_DGATE:
                at = offs_c[:, None].to(tl.int64) * stride_un + offs_r[None, :].to(tl.int64) * stride_ur
                dgate += tl.sum(w * tl.load(up_ptr + at, mask, 0.0).to(tl.float32), 1)
            if HAS_DUP:
                ptrs = dup_ptr + offs_c[:, None].to(tl.int64) * ER + offs_r[None, :]
                tl.store(ptrs, _tl.cast(w * (scale * factor)[:, None], dup_ptr.dtype.element_ty), mask)
    if HAS_DGATE:
        dgate *= scale
        if SIGMOID:
            dgate *= factor * (1.0 - factor)
        tl.store(dgate_ptr + offs_c, _tl.cast(dgate, dgate_ptr.dtype.element_ty), mask_c)
