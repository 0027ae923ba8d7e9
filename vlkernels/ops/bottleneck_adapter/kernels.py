"""The kernels of a row tile: everything from x to y, and everything from dy to dx, with nothing R wide kept between."""

import triton
import triton.language as tl

from .. import _tl


@triton.jit
def bottleneck_adapter_stats(
    x_ptr, offs_t, mask_t, D, stride_x, eps, NORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Mean (0 for RMSNorm) and 1 / deviation of each row, from one read: blocks of columns are merged as Chan's."""
    mean = tl.zeros((BLOCK_T,), tl.float32)
    square = tl.zeros((BLOCK_T,), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        # (BLOCK_T, BLOCK_D)
        x = tl.load(x_ptr + offs_t[:, None] * stride_x + offs_d[None, :], mask_t[:, None] & mask_d[None, :], 0.0)
        x = x.to(tl.float32)
        if NORM == "layer":
            count = tl.minimum(D - d, BLOCK_D)
            level = tl.sum(x, 1) / count
            x = tl.where(mask_d[None, :], x - level[:, None], 0.0)
            share = count / (d + count)
            square += (level - mean) * (level - mean) * (d * share)
            mean += (level - mean) * share
        square += tl.sum(x * x, 1)
    return mean, 1.0 / tl.sqrt(square / D + eps)


@triton.jit
def bottleneck_adapter_pre(
    x_ptr, down_ptr, norm_weight_ptr, norm_bias_ptr, mean, rstd, offs_t, mask_t, offs_r, mask_r, D, R, stride_x,
    stride_dr, stride_dd, NORM: tl.constexpr, HAS_NW: tl.constexpr, HAS_NB: tl.constexpr, FOLDS: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """norm(x) downᵀ, and with FOLDS down norm_weight, down norm_bias (BLOCK_R); column j is that of down's row j % R"""
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    fold_weight = tl.zeros((BLOCK_R,), tl.float32)
    fold_bias = tl.zeros((BLOCK_R,), tl.float32)
    rows_r = (offs_r % R).to(tl.int64) * stride_dr
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        # (BLOCK_T, BLOCK_D)
        x = tl.load(x_ptr + offs_t[:, None] * stride_x + offs_d[None, :], mask_t[:, None] & mask_d[None, :], 0.0)
        # (BLOCK_D, BLOCK_R)
        down = tl.load(
            down_ptr + offs_d[:, None].to(tl.int64) * stride_dd + rows_r[None, :], mask_d[:, None] & mask_r[None, :],
            0.0,
        )  # fmt: skip
        down = _tl.cast(down, PRODUCT)
        if NORM != "none":
            x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            if HAS_NW:
                weight = tl.load(norm_weight_ptr + offs_d, mask_d, 0.0).to(tl.float32)
                x *= weight[None, :]
                if FOLDS and NORM == "layer":
                    fold_weight += tl.sum(down.to(tl.float32) * weight[:, None], 0)
            elif FOLDS and NORM == "layer":
                fold_weight += tl.sum(down.to(tl.float32), 0)
            if HAS_NB:
                bias = tl.load(norm_bias_ptr + offs_d, mask_d, 0.0).to(tl.float32)
                x += bias[None, :]
                if FOLDS:
                    fold_bias += tl.sum(down.to(tl.float32) * bias[:, None], 0)
        acc = _tl.dot(_tl.cast(x, PRODUCT), down, acc, PRECISION)
    return acc, fold_weight, fold_bias


@triton.jit
def bottleneck_adapter_keep(
    seed, offs_t, offs_r, R, drop_below, SEVERAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr
):
    """What dropout keeps of column j % R: with SEVERAL experts' columns in one tile a Philox call for each element"""
    if SEVERAL:
        zero = tl.zeros((BLOCK_T, BLOCK_R), tl.uint32)
        col = (offs_r % R)[None, :]
        w0, w1, w2, w3 = _tl.philox7(
            zero + (col // 8).to(tl.uint32), zero + offs_t.to(tl.uint32)[:, None],
            zero + (offs_t >> 32).to(tl.uint32)[:, None], zero,
            zero + (seed & 0xFFFFFFFF).to(tl.uint32), zero + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
        )  # fmt: skip
        half = col % 8
        word = tl.where(half < 4, tl.where(half < 2, w0, w1), tl.where(half < 6, w2, w3))
        keep = tl.where(half % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32) >= drop_below
    else:
        keep = _tl.dropout_keep(seed, offs_t, 0, drop_below, BLOCK_T, BLOCK_R)
    return keep


@triton.jit
def bottleneck_adapter_level(gate_ptr, at, mask, SIGMOID: tl.constexpr):
    """The gate, or its sigmoid, in float32"""
    level = tl.load(gate_ptr + at, mask, 0.0).to(tl.float32)
    if SIGMOID:
        level = tl.sigmoid(level)
    return level


@triton.jit
def bottleneck_adapter_bias(
    up_bias_ptr, route_ptr, sample, offs_n, mask_t, mask_n, N, E, stride_ub, ROUTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """up_bias (1, BLOCK_N), or the experts' in each row's proportions (BLOCK_T, BLOCK_N)"""
    if ROUTED:
        bias = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for e in range(0, E):
            share = tl.load(route_ptr + sample * E + e, mask_t, 0.0).to(tl.float32)
            bias += share[:, None] * tl.load(up_bias_ptr + e * stride_ub + offs_n, mask_n, 0.0).to(tl.float32)[None, :]
    else:
        bias = tl.load(up_bias_ptr + offs_n, mask_n, 0.0).to(tl.float32)[None, :]
    return bias


@triton.jit
def bottleneck_adapter_ended(
    b, level, x_ptr, base_ptr, residual_ptr, gate_ptr, offs_t, offs_n, mask, mask_n, stride_x, stride_base,
    stride_residual, stride_gate, scale, GATE: tl.constexpr, SIGMOID: tl.constexpr, SKIP: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """scale G b + x + base + residual of one tile; level: a gate of rows (BLOCK_T), ones without"""
    if SKIP != "none":
        x = tl.load(x_ptr + offs_t[:, None] * stride_x + offs_n[None, :], mask, 0.0).to(tl.float32)
    if SKIP == "gated":
        b += x
    if GATE == "element":
        b *= bottleneck_adapter_level(gate_ptr, offs_t[:, None] * stride_gate + offs_n[None, :], mask, SIGMOID)
    elif GATE == "channel":
        b *= bottleneck_adapter_level(gate_ptr, offs_n, mask_n, SIGMOID)[None, :]
    elif GATE == "row":
        b *= level[:, None]
    b *= scale
    if SKIP == "add":
        b += x
    if HAS_BASE:
        b += tl.load(base_ptr + offs_t[:, None] * stride_base + offs_n[None, :], mask, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b += tl.load(residual_ptr + offs_t[:, None] * stride_residual + offs_n[None, :], mask, 0.0).to(tl.float32)
    return b


@triton.jit
def bottleneck_adapter_fwd_kernel(
    x_ptr, down_ptr, up_ptr, down_bias_ptr, up_bias_ptr, norm_weight_ptr, norm_bias_ptr, base_ptr, residual_ptr,
    gate_ptr, route_ptr, seed_ptr, y_ptr, T, D, N, R, E, per_gate, per_sample, stride_x, stride_dr, stride_dd,
    stride_un, stride_ur, stride_ub, stride_base, stride_residual, stride_gate, eps, scale, drop_below, keep_factor,
    ACT: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, SKIP: tl.constexpr,
    ROUTED: tl.constexpr, HAS_DB: tl.constexpr, HAS_UB: tl.constexpr, HAS_NW: tl.constexpr, HAS_NB: tl.constexpr,
    HAS_BASE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = base + residual + scale G (z upᵀ + up_bias) + x for one tile of rows; GATE: none, row, channel, element"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R * E
    sample = offs_t // per_sample
    mean = tl.zeros((BLOCK_T,), tl.float32)
    rstd = mean
    if NORM != "none":
        mean, rstd = bottleneck_adapter_stats(x_ptr, offs_t, mask_t, D, stride_x, eps, NORM, BLOCK_T, BLOCK_D)
    z, _, _ = bottleneck_adapter_pre(
        x_ptr, down_ptr, norm_weight_ptr, norm_bias_ptr, mean, rstd, offs_t, mask_t, offs_r, mask_r, D, R, stride_x,
        stride_dr, stride_dd, NORM, HAS_NW, HAS_NB, False, PRODUCT, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
    )  # fmt: skip
    # (BLOCK_T, BLOCK_R)
    if HAS_DB:
        z += tl.load(down_bias_ptr + offs_r % R, mask_r, 0.0).to(tl.float32)[None, :]
    if ACT != "none":
        z = _tl.act(z, ACT)
    if HAS_DROPOUT:
        keep = bottleneck_adapter_keep(tl.load(seed_ptr), offs_t, offs_r, R, drop_below, ROUTED, BLOCK_T, BLOCK_R)
        z *= keep.to(tl.float32) * keep_factor
    if ROUTED:
        shares = route_ptr + sample[:, None] * E + (offs_r // R)[None, :]
        z *= tl.load(shares, mask_t[:, None] & mask_r[None, :], 0.0).to(tl.float32)
    z = _tl.cast(z, PRODUCT)
    level = tl.full((BLOCK_T,), 1.0, tl.float32)
    if GATE == "row":
        level = bottleneck_adapter_level(gate_ptr, offs_t // per_gate, mask_t, SIGMOID)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        mask = mask_t[:, None] & mask_n[None, :]
        # (BLOCK_R, BLOCK_N)
        up = tl.load(
            up_ptr + offs_n[None, :].to(tl.int64) * stride_un + offs_r[:, None].to(tl.int64) * stride_ur,
            mask_r[:, None] & mask_n[None, :], 0.0,
        )  # fmt: skip
        b = _tl.dot(z, _tl.cast(up, PRODUCT), tl.zeros((BLOCK_T, BLOCK_N), tl.float32), PRECISION)
        if HAS_UB:
            b += bottleneck_adapter_bias(
                up_bias_ptr, route_ptr, sample, offs_n, mask_t, mask_n, N, E, stride_ub, ROUTED, BLOCK_T, BLOCK_N
            )
        b = bottleneck_adapter_ended(
            b, level, x_ptr, base_ptr, residual_ptr, gate_ptr, offs_t, offs_n, mask, mask_n, stride_x, stride_base,
            stride_residual, stride_gate, scale, GATE, SIGMOID, SKIP, HAS_BASE, HAS_RESIDUAL,
        )  # fmt: skip
        tl.store(y_ptr + offs_t[:, None] * N + offs_n[None, :], _tl.cast(b, y_ptr.dtype.element_ty), mask)


@triton.jit
def bottleneck_adapter_bwd_kernel(
    dy_ptr, x_ptr, down_ptr, up_ptr, down_bias_ptr, up_bias_ptr, norm_weight_ptr, norm_bias_ptr, gate_ptr, route_ptr,
    seed_ptr, dx_ptr, z_ptr, dpre_ptr, stats_ptr, dgate_ptr, dots_ptr, droute_ptr, T, D, N, R, E, per_gate, per_sample,
    stride_dy, stride_x, stride_dr, stride_dd, stride_un, stride_ur, stride_ub, stride_gate, eps, scale, drop_below,
    keep_factor, ACT: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, SKIP: tl.constexpr,
    ROUTED: tl.constexpr, HAS_DB: tl.constexpr, HAS_UB: tl.constexpr, HAS_NW: tl.constexpr, HAS_NB: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_DX: tl.constexpr, HAS_SCRATCH: tl.constexpr, HAS_DGATE: tl.constexpr,
    HAS_DROUTE: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of one tile of rows; z (times route), dpre (T, E R) and the norm's statistics for the weights' gradients.

    dgate: of a gate of each element; dots[t] = scale <dy, b> for one of rows; droute[t, e] = scale G <z, dy up_e>.
    """
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R * E
    mask_tr = mask_t[:, None] & mask_r[None, :]
    sample = offs_t // per_sample
    mean = tl.zeros((BLOCK_T,), tl.float32)
    rstd = mean
    if NORM != "none":
        mean, rstd = bottleneck_adapter_stats(x_ptr, offs_t, mask_t, D, stride_x, eps, NORM, BLOCK_T, BLOCK_D)
        if HAS_SCRATCH:
            tl.store(stats_ptr + 2 * offs_t, mean, mask_t)
            tl.store(stats_ptr + 2 * offs_t + 1, rstd, mask_t)
    # (BLOCK_T, BLOCK_R)
    pre, fold_weight, fold_bias = bottleneck_adapter_pre(
        x_ptr, down_ptr, norm_weight_ptr, norm_bias_ptr, mean, rstd, offs_t, mask_t, offs_r, mask_r, D, R, stride_x,
        stride_dr, stride_dd, NORM, HAS_NW, HAS_NB, HAS_DX, PRODUCT, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
    )  # fmt: skip
    # sum over d of down (norm_weight xhat), for the norm's gradient
    along = pre - fold_bias[None, :]
    if HAS_DB:
        pre += tl.load(down_bias_ptr + offs_r % R, mask_r, 0.0).to(tl.float32)[None, :]
    z = pre
    if ACT != "none":
        z = _tl.act(pre, ACT)
    factor = tl.full((BLOCK_T, BLOCK_R), 1.0, tl.float32)
    if HAS_DROPOUT:
        keep = bottleneck_adapter_keep(tl.load(seed_ptr), offs_t, offs_r, R, drop_below, ROUTED, BLOCK_T, BLOCK_R)
        factor = keep.to(tl.float32) * keep_factor
        z *= factor
    route = factor
    if ROUTED:
        shares = route_ptr + sample[:, None] * E + (offs_r // R)[None, :]
        route = tl.load(shares, mask_tr, 0.0).to(tl.float32)
        factor *= route
        mixed = _tl.cast(z * route, PRODUCT)
    else:
        mixed = _tl.cast(z, PRODUCT)
    level = tl.full((BLOCK_T,), 1.0, tl.float32)
    if GATE == "row":
        level = bottleneck_adapter_level(gate_ptr, offs_t // per_gate, mask_t, SIGMOID)
    dots = tl.zeros((BLOCK_T,), tl.float32)
    # h = (dy G) up, G of rows left for later
    h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        mask = mask_t[:, None] & mask_n[None, :]
        # (BLOCK_T, BLOCK_N)
        g = tl.load(dy_ptr + offs_t[:, None] * stride_dy + offs_n[None, :], mask, 0.0).to(tl.float32)
        # (BLOCK_N, BLOCK_R)
        up = tl.load(
            up_ptr + offs_n[:, None].to(tl.int64) * stride_un + offs_r[None, :].to(tl.int64) * stride_ur,
            mask_n[:, None] & mask_r[None, :], 0.0,
        )  # fmt: skip
        up = _tl.cast(up, PRODUCT)
        if HAS_DGATE and (GATE == "element" or GATE == "row"):
            b = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            if GATE == "element":
                b = _tl.dot(mixed, tl.trans(up), b, PRECISION)
            if HAS_UB:
                b += bottleneck_adapter_bias(
                    up_bias_ptr, route_ptr, sample, offs_n, mask_t, mask_n, N, E, stride_ub, ROUTED, BLOCK_T, BLOCK_N
                )
            if SKIP == "gated":
                b += tl.load(x_ptr + offs_t[:, None] * stride_x + offs_n[None, :], mask, 0.0).to(tl.float32)
            if GATE == "row":
                dots += tl.sum(g * b, 1)
        if GATE == "element":
            at = offs_t[:, None] * stride_gate + offs_n[None, :]
            opened = bottleneck_adapter_level(gate_ptr, at, mask, SIGMOID)
            if HAS_DGATE:
                d = g * b * scale
                if SIGMOID:
                    d *= opened * (1.0 - opened)
                d_ptrs = dgate_ptr + offs_t[:, None] * N + offs_n[None, :]
                tl.store(d_ptrs, _tl.cast(d, dgate_ptr.dtype.element_ty), mask)
            g *= opened
        elif GATE == "channel":
            g *= bottleneck_adapter_level(gate_ptr, offs_n, mask_n, SIGMOID)[None, :]
        h = _tl.dot(_tl.cast(g, PRODUCT), up, h, PRECISION)
    h *= scale
    if HAS_DGATE and GATE == "row":
        tl.store(dots_ptr + offs_t, scale * dots + tl.sum(mixed.to(tl.float32) * h, 1), mask_t)
    h *= level[:, None]
    if HAS_DROUTE:
        for e in range(0, E):
            of_e = (offs_r // R == e)[None, :]
            tl.store(droute_ptr + offs_t * E + e, tl.sum(tl.where(of_e, z * h, 0.0), 1), mask_t)
    dpre = h * factor
    if ACT != "none":
        dpre *= _tl.act_derivative(pre, ACT)
    dpre = _tl.cast(dpre, PRODUCT)
    if HAS_SCRATCH:
        wide = offs_t[:, None] * (R * E) + offs_r[None, :]
        tl.store(z_ptr + wide, mixed, mask_tr)
        tl.store(dpre_ptr + wide, dpre, mask_tr)
    if HAS_DX:
        # means over the row of dn norm_weight and of that times xhat: <dpre, down norm_weight>, <dpre, along>
        mean_g = mean
        mean_gx = mean
        if NORM == "layer":
            mean_g = tl.sum(dpre.to(tl.float32) * fold_weight[None, :], 1) / D
        if NORM != "none":
            mean_gx = tl.sum(dpre.to(tl.float32) * along, 1) / D
        rows_r = (offs_r % R).to(tl.int64) * stride_dr
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            mask = mask_t[:, None] & mask_d[None, :]
            # (BLOCK_R, BLOCK_D)
            down = tl.load(
                down_ptr + offs_d[None, :].to(tl.int64) * stride_dd + rows_r[:, None],
                mask_r[:, None] & mask_d[None, :], 0.0,
            )  # fmt: skip
            dx = _tl.dot(dpre, _tl.cast(down, PRODUCT), tl.zeros((BLOCK_T, BLOCK_D), tl.float32), PRECISION)
            if NORM != "none":
                if HAS_NW:
                    dx *= tl.load(norm_weight_ptr + offs_d, mask_d, 0.0).to(tl.float32)[None, :]
                x = tl.load(x_ptr + offs_t[:, None] * stride_x + offs_d[None, :], mask, 0.0).to(tl.float32)
                xhat = (x - mean[:, None]) * rstd[:, None]
                if NORM == "layer":
                    dx -= mean_g[:, None]
                dx = rstd[:, None] * (dx - xhat * mean_gx[:, None])
            if SKIP != "none":
                g = tl.load(dy_ptr + offs_t[:, None] * stride_dy + offs_d[None, :], mask, 0.0).to(tl.float32)
                if SKIP == "gated":
                    g *= scale
                    if GATE == "element":
                        at = offs_t[:, None] * stride_gate + offs_d[None, :]
                        g *= bottleneck_adapter_level(gate_ptr, at, mask, SIGMOID)
                    elif GATE == "channel":
                        g *= bottleneck_adapter_level(gate_ptr, offs_d, mask_d, SIGMOID)[None, :]
                    elif GATE == "row":
                        g *= level[:, None]
                dx += g
            tl.store(dx_ptr + offs_t[:, None] * D + offs_d[None, :], _tl.cast(dx, dx_ptr.dtype.element_ty), mask)
