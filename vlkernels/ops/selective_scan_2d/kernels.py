"""Kernels of selective_scan_2d. A program takes one image, one direction and a block of channels of one group; its
states, (state, channel) with a channel a lane, stay in registers, so that sums over the state need no other lane."""

import triton
import triton.language as tl

from .. import _tl


@triton.jit
def selective_scan_2d_token(t, L, height, width, BACKWARDS: tl.constexpr, BY_COLUMN: tl.constexpr, k):
    """Which token direction k reads at step t; bit k of the constants says how it runs."""
    t = tl.where(((BACKWARDS >> k) & 1) == 1, L - 1 - t, t)
    return tl.where(((BY_COLUMN >> k) & 1) == 1, t % height * width + t // height, t).to(tl.int64)


@triton.jit
def selective_scan_2d_softplus(x):
    """max(x, 0) + log(1 + exp(-|x|)); log(1 + e) = 2 atanh(e / (2 + e)), whose series keeps its digits at small e where
    the device's logarithm near 1 loses them. The term after the last is below 2^-29 of the sum."""
    e = tl.exp(-tl.abs(x))
    r = e / (2.0 + e)
    q = r * r
    p = 0.06666667 * q + 0.07692308
    p = p * q + 0.09090909
    p = p * q + 0.11111111
    p = p * q + 0.14285715
    p = p * q + 0.2
    p = p * q + 0.33333334
    return tl.maximum(x, 0.0) + 2.0 * r * (p * q + 1.0)


@triton.jit
def selective_scan_2d_lanes(offs):
    """offs, whose neighbours the compiler no longer sees to be neighbours. Otherwise it would load (state, channel)
    tiles in vectors of 4 and lay the tiles out so in registers, beside the layout that the recurrence wants, a lane's
    16 states of one channel: all 255 registers would be full."""
    return offs * 3 // 3


@triton.jit
def selective_scan_2d_place(pid, K, G, blocks, group, BLOCK_D: tl.constexpr):
    """image, direction, group, block of the group, channels, which of them exist"""
    block = pid % blocks
    g = pid // blocks % G
    k = (pid // (blocks * G) % K).to(tl.int64)
    image = (pid // (blocks * G * K)).to(tl.int64)
    inside = block * BLOCK_D + tl.arange(0, BLOCK_D)
    return image, k, g, block, (g * group + inside).to(tl.int64), inside < group


@triton.jit
def selective_scan_2d_fwd_kernel(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, state_ptr, y_ptr, last_ptr, states_ptr,
    B, L, height, width, K, G, D, S, group, blocks, chunk, chunks,
    stride_ub, stride_ul, stride_ud, stride_db, stride_dl, stride_dk, stride_dd, stride_ar, stride_as,
    stride_bb, stride_bl, stride_bk, stride_bg, stride_bs, stride_cb, stride_cl, stride_ck, stride_cg, stride_cs,
    stride_zb, stride_zl, stride_zd,
    BACKWARDS: tl.constexpr, BY_COLUMN: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y[k, image, token, channels] of one direction, its states before each chunk but the first, its last state."""
    image, k, g, block, offs_d, mask_d = selective_scan_2d_place(tl.program_id(0), K, G, blocks, group, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < S
    tile_s = selective_scan_2d_lanes(offs_s)[:, None]
    tile_d = selective_scan_2d_lanes(offs_d)[None, :]
    mask = mask_s[:, None] & mask_d[None, :]
    rows = k * D + offs_d  # of a, d, delta_bias
    # (S, D); log2(e) a, for 2^x is the device's exponential
    a = tl.load(a_ptr + (k * D + tile_d) * stride_ar + tile_s * stride_as, mask, 0.0).to(tl.float32)
    a *= 1.4426950408889634
    skip = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_D:
        skip = tl.load(d_ptr + rows, mask_d, 0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask_d, 0.0).to(tl.float32)
    u_ptr += image * stride_ub + offs_d * stride_ud
    delta_ptr += image * stride_db + k * stride_dk + offs_d * stride_dd
    b_ptr += image * stride_bb + k * stride_bk + g * stride_bg + offs_s * stride_bs
    c_ptr += image * stride_cb + k * stride_ck + g * stride_cg + offs_s * stride_cs
    if HAS_Z:
        z_ptr += image * stride_zb + offs_d * stride_zd
    y_ptr += (k * B + image) * L * D + offs_d
    plane = image * K + k
    states_ptr += tile_s * D + tile_d
    h = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    if HAS_STATE:
        h = tl.load(state_ptr + (plane * D + tile_d) * S + tile_s, mask, 0.0).to(tl.float32)
    for j in range(chunks):
        if j > 0:
            tl.store(states_ptr + (plane * (chunks - 1) + j - 1) * S * D, h, mask)
        for t in range(j * chunk, tl.minimum(L, (j + 1) * chunk)):
            p = selective_scan_2d_token(t, L, height, width, BACKWARDS, BY_COLUMN, k)
            u = tl.load(u_ptr + p * stride_ul, mask_d, 0.0).to(tl.float32)
            dt = tl.load(delta_ptr + p * stride_dl, mask_d, 0.0).to(tl.float32) + bias
            if SOFTPLUS:
                dt = selective_scan_2d_softplus(dt)
            b = tl.load(b_ptr + p * stride_bl, mask_s, 0.0).to(tl.float32)
            c = tl.load(c_ptr + p * stride_cl, mask_s, 0.0).to(tl.float32)
            # h = exp(dt a) h + dt b u
            h = tl.exp2(dt[None, :] * a) * h + b[:, None] * (dt * u)[None, :]
            y = tl.sum(h * c[:, None], 0) + skip * u
            if HAS_Z:
                z = tl.load(z_ptr + p * stride_zl, mask_d, 0.0).to(tl.float32)
                y *= z * tl.sigmoid(z)
            tl.store(y_ptr + p * D, _tl.cast(y, y_ptr.dtype.element_ty), mask_d)
    tl.store(last_ptr + (plane * D + tile_d) * S + tile_s, h, mask)


@triton.jit
def selective_scan_2d_merge_kernel(parts_ptr, out_ptr, n, K: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of K directions, in their order"""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    total = tl.load(parts_ptr + offs, mask, 0.0)
    for k in tl.static_range(1, K):
        total += tl.load(parts_ptr + k * n + offs, mask, 0.0)
    tl.store(out_ptr + offs, _tl.cast(total, out_ptr.dtype.element_ty), mask)


@triton.jit
def selective_scan_2d_bwd_kernel(
    dy_ptr, dlast_ptr, u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, state_ptr, states_ptr,
    scratch_ptr, du_ptr, ddelta_ptr, da_ptr, db_ptr, dc_ptr, dd_ptr, dz_ptr, dbias_ptr, dstate_ptr,
    B, L, height, width, K, G, D, S, group, blocks, chunk, chunks,
    stride_yb, stride_yl, stride_yd,
    stride_ub, stride_ul, stride_ud, stride_db, stride_dl, stride_dk, stride_dd, stride_ar, stride_as,
    stride_bb, stride_bl, stride_bk, stride_bg, stride_bs, stride_cb, stride_cl, stride_ck, stride_cg, stride_cs,
    stride_zb, stride_zl, stride_zd,
    BACKWARDS: tl.constexpr, BY_COLUMN: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_DY: tl.constexpr,
    HAS_DLAST: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    FINE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Gradients of one direction. Chunks from the last on: the states at every FINE-th step of the chunk are computed
    from its first state, the states of FINE steps from those, and stay in registers while the steps run backwards.

    du, ddelta, dz are those of the direction; db, dc sums over the program's channels; da, dd, dbias over its tokens.
    """
    pid = tl.program_id(0)
    image, k, g, block, offs_d, mask_d = selective_scan_2d_place(pid, K, G, blocks, group, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < S
    tile_s = selective_scan_2d_lanes(offs_s)[:, None]
    tile_d = selective_scan_2d_lanes(offs_d)[None, :]
    mask = mask_s[:, None] & mask_d[None, :]
    rows = k * D + offs_d
    a = tl.load(a_ptr + (k * D + tile_d) * stride_ar + tile_s * stride_as, mask, 0.0).to(tl.float32)
    a *= 1.4426950408889634
    skip = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_D:
        skip = tl.load(d_ptr + rows, mask_d, 0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask_d, 0.0).to(tl.float32)
    if HAS_DY:
        dy_ptr += image * stride_yb + offs_d * stride_yd
    u_ptr += image * stride_ub + offs_d * stride_ud
    delta_ptr += image * stride_db + k * stride_dk + offs_d * stride_dd
    b_ptr += image * stride_bb + k * stride_bk + g * stride_bg + offs_s * stride_bs
    c_ptr += image * stride_cb + k * stride_ck + g * stride_cg + offs_s * stride_cs
    if HAS_Z:
        z_ptr += image * stride_zb + offs_d * stride_zd
        dz_ptr += image * L * D + offs_d
    plane = image * K + k
    du_ptr += (k * B + image) * L * D + offs_d
    ddelta_ptr += (image * L * K + k) * D + offs_d  # + token K D
    part = ((block.to(tl.int64) * B + image) * L * K + k) * G + g  # + token K G
    db_ptr += part * S + offs_s
    dc_ptr += part * S + offs_s
    states_ptr += tile_s * D + tile_d
    own = tile_s * BLOCK_D + selective_scan_2d_lanes(tl.arange(0, BLOCK_D))[None, :]
    scratch_ptr += pid.to(tl.int64) * (chunk // FINE) * BLOCK_S * BLOCK_D + own

    first = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    at_state = (plane * D + tile_d) * S + tile_s
    if HAS_STATE:
        first = tl.load(state_ptr + at_state, mask, 0.0).to(tl.float32)
    dh = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    if HAS_DLAST:
        dh = tl.load(dlast_ptr + at_state, mask, 0.0).to(tl.float32)
    da = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dd = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    for back in range(chunks):
        j = chunks - 1 - back
        begin = j * chunk
        end = tl.minimum(L, begin + chunk)
        h = first
        if j > 0:
            h = tl.load(states_ptr + (plane * (chunks - 1) + j - 1) * S * D, mask, 0.0)
        parts = (end - begin + FINE - 1) // FINE
        tl.store(scratch_ptr, h)
        for f in range(1, parts):
            for t in range(begin + (f - 1) * FINE, begin + f * FINE):
                p = selective_scan_2d_token(t, L, height, width, BACKWARDS, BY_COLUMN, k)
                u = tl.load(u_ptr + p * stride_ul, mask_d, 0.0).to(tl.float32)
                dt = tl.load(delta_ptr + p * stride_dl, mask_d, 0.0).to(tl.float32) + bias
                if SOFTPLUS:
                    dt = selective_scan_2d_softplus(dt)
                b = tl.load(b_ptr + p * stride_bl, mask_s, 0.0).to(tl.float32)
                h = tl.exp2(dt[None, :] * a) * h + b[:, None] * (dt * u)[None, :]
            tl.store(scratch_ptr + f * BLOCK_S * BLOCK_D, h)
        # the program's own stores, read by other lanes where the compiler lays the tile out anew
        tl.debug_barrier()
        for f_back in range(parts):
            start = begin + (parts - 1 - f_back) * FINE
            h = tl.load(scratch_ptr + (parts - 1 - f_back) * BLOCK_S * BLOCK_D)
            before = (h,)  # the states before each of FINE steps
            for i in tl.static_range(FINE - 1):
                live = start + i < end
                p = selective_scan_2d_token(tl.minimum(start + i, L - 1), L, height, width, BACKWARDS, BY_COLUMN, k)
                u = tl.load(u_ptr + p * stride_ul, mask_d & live, 0.0).to(tl.float32)
                dt = tl.load(delta_ptr + p * stride_dl, mask_d & live, 0.0).to(tl.float32) + bias
                if SOFTPLUS:
                    dt = selective_scan_2d_softplus(dt)
                dt = tl.where(mask_d & live, dt, 0.0)
                b = tl.load(b_ptr + p * stride_bl, mask_s & live, 0.0).to(tl.float32)
                h = tl.exp2(dt[None, :] * a) * h + b[:, None] * (dt * u)[None, :]
                before = before + (h,)
            for i in tl.static_range(FINE - 1, -1, -1):
                live = start + i < end
                p = selective_scan_2d_token(tl.minimum(start + i, L - 1), L, height, width, BACKWARDS, BY_COLUMN, k)
                here = mask_d & live
                u = tl.load(u_ptr + p * stride_ul, here, 0.0).to(tl.float32)
                raw = tl.load(delta_ptr + p * stride_dl, here, 0.0).to(tl.float32) + bias
                dt = raw
                if SOFTPLUS:
                    dt = selective_scan_2d_softplus(raw)
                dt = tl.where(here, dt, 0.0)
                b = tl.load(b_ptr + p * stride_bl, mask_s & live, 0.0).to(tl.float32)
                c = tl.load(c_ptr + p * stride_cl, mask_s & live, 0.0).to(tl.float32)
                dy = tl.zeros((BLOCK_D,), tl.float32)
                if HAS_DY:
                    dy = tl.load(dy_ptr + p * stride_yl, here, 0.0).to(tl.float32)
                decay = tl.exp2(dt[None, :] * a)
                carried = decay * before[i]
                h = carried + b[:, None] * (dt * u)[None, :]
                if HAS_Z:
                    z = tl.load(z_ptr + p * stride_zl, here, 0.0).to(tl.float32)
                    gate = tl.sigmoid(z)
                    dz = dy * (tl.sum(h * c[:, None], 0) + skip * u) * gate * (1.0 + z * (1.0 - gate))
                    tl.store(dz_ptr + p * D, _tl.cast(dz, dz_ptr.dtype.element_ty), here)
                    dy *= z * gate
                # dh is the gradient of h from here on
                dh += c[:, None] * dy[None, :]
                tl.store(dc_ptr + p * K * G * S, tl.sum(h * dy[None, :], 1), mask_s & live)
                tl.store(db_ptr + p * K * G * S, tl.sum(dh * (dt * u)[None, :], 1), mask_s & live)
                through = tl.sum(dh * b[:, None], 0)
                slope = dh * carried  # d exp(dt a) exp(dt a)
                da += slope * dt[None, :]
                ddt = through * u + tl.sum(slope * a, 0) * 0.6931471805599453
                if SOFTPLUS:
                    ddt *= tl.sigmoid(raw)
                ddt = tl.where(here, ddt, 0.0)
                dbias += ddt
                dd += dy * u
                tl.store(ddelta_ptr + p * K * D, _tl.cast(ddt, ddelta_ptr.dtype.element_ty), here)
                du = through * dt + skip * dy
                tl.store(du_ptr + p * D, _tl.cast(du, du_ptr.dtype.element_ty), here)
                dh *= decay
        tl.debug_barrier()
    tl.store(da_ptr + at_state, da, mask)
    tl.store(dd_ptr + plane * D + offs_d, dd, mask_d)
    tl.store(dbias_ptr + plane * D + offs_d, dbias, mask_d)
    tl.store(dstate_ptr + at_state, dh, mask)
