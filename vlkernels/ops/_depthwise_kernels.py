"""Triton kernels of depthwise 3 x 3 convolutions of token-major maps, shared by the ops that have one.

A program owns consecutive tokens of one image and a block of channels; with a norm that block holds all of them. What
is summed over tokens is kept per thread and added up once, at the program's end.
"""

import triton
import triton.language as tl

from . import _tl


@triton.jit
def depthwise_act(x, ACT: tl.constexpr):
    if ACT != "none":
        x = _tl.act(x, ACT)
    return x


@triton.jit
def depthwise_weights(weight_ptr, offs_c, mask_c, SKIP: tl.constexpr):
    """The nine taps' weights; a skip is 1 at the centre."""
    ptrs = weight_ptr + offs_c * 9
    w0 = tl.load(ptrs, mask_c, 0.0).to(tl.float32)
    w1 = tl.load(ptrs + 1, mask_c, 0.0).to(tl.float32)
    w2 = tl.load(ptrs + 2, mask_c, 0.0).to(tl.float32)
    w3 = tl.load(ptrs + 3, mask_c, 0.0).to(tl.float32)
    w4 = tl.load(ptrs + 4, mask_c, 0.0).to(tl.float32)
    w5 = tl.load(ptrs + 5, mask_c, 0.0).to(tl.float32)
    w6 = tl.load(ptrs + 6, mask_c, 0.0).to(tl.float32)
    w7 = tl.load(ptrs + 7, mask_c, 0.0).to(tl.float32)
    w8 = tl.load(ptrs + 8, mask_c, 0.0).to(tl.float32)
    if SKIP:
        w4 += 1.0
    return w0, w1, w2, w3, w4, w5, w6, w7, w8


@triton.jit
def depthwise_weight(held, weight_ptr, offs_c, mask_c, C, TAP: tl.constexpr, SKIP: tl.constexpr, HELD: tl.constexpr):
    """One tap's weights, (1, BLOCK_C): held, or loaded from (9, C)."""
    weight = held
    if not HELD:
        weight = tl.load(weight_ptr + TAP * C + offs_c, mask_c, 0.0).to(tl.float32)
        if SKIP and TAP == 4:
            weight += 1.0
    return weight[None, :]


@triton.jit
def depthwise_tap(x_ptr, i, j, h, w, stride_t, offs_c, mask_t, mask_c, COMPUTE: tl.constexpr):
    """The map at rows i, columns j, rounded to the compute dtype; zero outside. (BLOCK_T, BLOCK_C) float32"""
    inside = mask_t & (i >= 0) & (i < h) & (j >= 0) & (j < w)
    ptrs = x_ptr + (i * w + j).to(tl.int64)[:, None] * stride_t + offs_c[None, :]
    return _tl.cast(tl.load(ptrs, inside[:, None] & mask_c[None, :], 0.0).to(tl.float32), COMPUTE).to(tl.float32)


@triton.jit
def depthwise_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, beta_ptr, y_ptr, c_ptr, stats_ptr, parts_ptr, h, w, out_w, tokens, C,
    chunks, chunk, stride_b, stride_t, eps,
    STRIDE: tl.constexpr, SKIP: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, COMPUTE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_Y: tl.constexpr, HAS_C: tl.constexpr,
    HAS_SUMS: tl.constexpr, HELD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """c = conv(x) [+ x]; y = act(norm(c)); stats = (mean, 1 / deviation) of a row; parts = sums of y over the tokens

    HELD: the nine weights of a channel lie side by side and stay in registers; else they lie as (9, C)."""
    program = tl.program_id(0)
    image = (program // chunks).to(tl.int64)
    begin = program % chunks * chunk
    end = tl.minimum(begin + chunk, tokens)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = mask_c, mask_c, mask_c, mask_c, mask_c, mask_c, mask_c, mask_c, mask_c
    if HELD:
        w0, w1, w2, w3, w4, w5, w6, w7, w8 = depthwise_weights(weight_ptr, offs_c, mask_c, SKIP)
    x_ptr += image * stride_b
    sums = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for t in range(begin, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        mask = mask_t[:, None] & mask_c[None, :]
        i = offs_t // out_w * STRIDE
        j = offs_t % out_w * STRIDE
        tap = depthwise_tap(x_ptr, i - 1, j - 1, h, w, stride_t, offs_c, mask_t, mask_c, COMPUTE)
        acc = tap * depthwise_weight(w0, weight_ptr, offs_c, mask_c, C, 0, SKIP, HELD)
        tap = depthwise_tap(x_ptr, i - 1, j, h, w, stride_t, offs_c, mask_t, mask_c, COMPUTE)
        acc += tap * depthwise_weight(w1, weight_ptr, offs_c, mask_c, C, 1, SKIP, HELD)
        tap = depthwise_tap(x_ptr, i - 1, j + 1, h, w, stride_t, offs_c, mask_t, mask_c, COMPUTE)
        acc += tap * depthwise_weight(w2, weight_ptr, offs_c, mask_c, C, 2, SKIP, HELD)
        tap = depthwise_tap(x_ptr, i, j - 1, h, w, stride_t, offs_c, mask_t, mask_c, COMPUTE)
        acc += tap * depthwise_weight(w3, weight_ptr, offs_c, mask_c, C, 3, SKIP, HELD)
        tap = depthwise_tap(x_ptr, i, j, h, w, stride_t, offs_c, mask_t, mask_c, COMPUTE)
        acc += tap * depthwise_weight(w4, weight_ptr, offs_c, mask_c, C, 4, SKIP, HELD)
        tap = depthwise_tap(x_ptr, i, j + 1, h, w, stride_t, offs_c, mask_t, mask_c, COMPUTE)
        acc += tap * depthwise_weight(w5, weight_ptr, offs_c, mask_c, C, 5, SKIP, HELD)
        tap = depthwise_tap(x_ptr, i + 1, j - 1, h, w, stride_t, offs_c, mask_t, mask_c, COMPUTE)
        acc += tap * depthwise_weight(w6, weight_ptr, offs_c, mask_c, C, 6, SKIP, HELD)
        tap = depthwise_tap(x_ptr, i + 1, j, h, w, stride_t, offs_c, mask_t, mask_c, COMPUTE)
        acc += tap * depthwise_weight(w7, weight_ptr, offs_c, mask_c, C, 7, SKIP, HELD)
        tap = depthwise_tap(x_ptr, i + 1, j + 1, h, w, stride_t, offs_c, mask_t, mask_c, COMPUTE)
        acc += tap * depthwise_weight(w8, weight_ptr, offs_c, mask_c, C, 8, SKIP, HELD)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_c, mask_c, 0.0).to(tl.float32)[None, :]
        row = image * tokens + offs_t
        offs = row[:, None] * C + offs_c[None, :]
        # what follows starts from the rounded result, as backward does
        c = _tl.cast(acc, COMPUTE)
        if HAS_C:
            tl.store(c_ptr + offs, c, mask)
        u = c.to(tl.float32)
        if NORM:
            mean = tl.sum(u, 1) / C
            u = tl.where(mask_c[None, :], u - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(u * u, 1) / C + eps)
            tl.store(stats_ptr + 2 * row, mean, mask_t)
            tl.store(stats_ptr + 2 * row + 1, rstd, mask_t)
            u *= rstd[:, None]
            if HAS_GAMMA:
                u *= tl.load(gamma_ptr + offs_c, mask_c, 0.0).to(tl.float32)[None, :]
            if HAS_BETA:
                u += tl.load(beta_ptr + offs_c, mask_c, 0.0).to(tl.float32)[None, :]
        y = _tl.cast(depthwise_act(u, ACT), COMPUTE)
        if HAS_Y:
            tl.store(y_ptr + offs, y, mask)
        if HAS_SUMS:
            sums += tl.where(mask, y.to(tl.float32), 0.0)
    if HAS_SUMS:
        tl.store(parts_ptr + program.to(tl.int64) * C + offs_c, tl.sum(sums, 0), mask_c)


@triton.jit
def depthwise_normed(
    c_ptr, stats_ptr, gamma_ptr, beta_ptr, row, offs_c, mask_t, mask_c, C,
    NORM: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
):  # fmt: skip
    """(c - mean) / deviation of a tile's rows, 1 / deviation, and what enters the activation"""
    mask = mask_t[:, None] & mask_c[None, :]
    xhat = tl.load(c_ptr + row[:, None] * C + offs_c[None, :], mask, 0.0).to(tl.float32)
    rstd = tl.full((xhat.shape[0],), 1.0, tl.float32)
    if NORM:
        mean = tl.load(stats_ptr + 2 * row, mask_t, 0.0)
        rstd = tl.load(stats_ptr + 2 * row + 1, mask_t, 0.0)
        xhat = tl.where(mask, (xhat - mean[:, None]) * rstd[:, None], 0.0)
    u = xhat
    if HAS_GAMMA:
        u = u * tl.load(gamma_ptr + offs_c, mask_c, 0.0).to(tl.float32)[None, :]
    if HAS_BETA:
        u = u + tl.load(beta_ptr + offs_c, mask_c, 0.0).to(tl.float32)[None, :]
    return xhat, rstd, u


@triton.jit
def depthwise_excite_kernel(
    c_ptr, stats_ptr, gamma_ptr, beta_ptr, scale_ptr, dys_ptr, ys_ptr, parts_ptr, tokens, C, chunks, chunk,
    ACT: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_YS: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From c again: y = act(norm(c)); ys = y scale, of the image; parts = sums of dys y over the tokens"""
    program = tl.program_id(0)
    image = (program // chunks).to(tl.int64)
    begin = program % chunks * chunk
    end = tl.minimum(begin + chunk, tokens)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    scale = tl.load(scale_ptr + image * C + offs_c, mask_c, 0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for t in range(begin, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        mask = mask_t[:, None] & mask_c[None, :]
        row = image * tokens + offs_t
        offs = row[:, None] * C + offs_c[None, :]
        _, _, u = depthwise_normed(
            c_ptr, stats_ptr, gamma_ptr, beta_ptr, row, offs_c, mask_t, mask_c, C, True, HAS_GAMMA, HAS_BETA
        )
        y = _tl.cast(depthwise_act(u, ACT), c_ptr.dtype.element_ty).to(tl.float32)
        if HAS_YS:
            tl.store(ys_ptr + offs, _tl.cast(y * scale[None, :], c_ptr.dtype.element_ty), mask)
        if HAS_SUMS:
            sums += y * tl.load(dys_ptr + offs, mask, 0.0).to(tl.float32)
    if HAS_SUMS:
        tl.store(parts_ptr + program.to(tl.int64) * C + offs_c, tl.sum(sums, 0), mask_c)


@triton.jit
def depthwise_rows_bwd_kernel(
    dy_ptr, scale_ptr, dmeans_ptr, c_ptr, stats_ptr, gamma_ptr, beta_ptr, dc_ptr, parts_ptr, tokens, C, chunks, chunk,
    stride_b, stride_t, inverse,
    NORM: tl.constexpr, ACT: tl.constexpr, HAS_DY: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_DMEANS: tl.constexpr,
    HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_DC: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dc from dy [scale] [+ dmeans / tokens], through activation and norm; parts = sums of g xhat and g over tokens"""
    program = tl.program_id(0)
    image = (program // chunks).to(tl.int64)
    begin = program % chunks * chunk
    end = tl.minimum(begin + chunk, tokens)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    sum_gamma = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    sum_beta = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for t in range(begin, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        mask = mask_t[:, None] & mask_c[None, :]
        row = image * tokens + offs_t
        g = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        if HAS_DY:
            ptrs = dy_ptr + image * stride_b + offs_t.to(tl.int64)[:, None] * stride_t + offs_c[None, :]
            g = tl.load(ptrs, mask, 0.0).to(tl.float32)
        if HAS_SCALE:
            g *= tl.load(scale_ptr + image * C + offs_c, mask_c, 0.0).to(tl.float32)[None, :]
        if HAS_DMEANS:
            g += tl.load(dmeans_ptr + image * C + offs_c, mask_c, 0.0).to(tl.float32)[None, :] * inverse
        g = tl.where(mask, g, 0.0)
        if NORM or ACT != "none":
            xhat, rstd, u = depthwise_normed(
                c_ptr, stats_ptr, gamma_ptr, beta_ptr, row, offs_c, mask_t, mask_c, C, NORM, HAS_GAMMA, HAS_BETA
            )
            if ACT != "none":
                g *= _tl.act_derivative(u, ACT)
            if HAS_SUMS:
                sum_gamma += g * xhat
                sum_beta += g
            if NORM and HAS_DC:
                if HAS_GAMMA:
                    g *= tl.load(gamma_ptr + offs_c, mask_c, 0.0).to(tl.float32)[None, :]
                along = tl.sum(g * xhat, 1) / C
                level = tl.sum(g, 1) / C
                g = rstd[:, None] * (g - level[:, None] - xhat * along[:, None])
        if HAS_DC:
            tl.store(dc_ptr + row[:, None] * C + offs_c[None, :], _tl.cast(g, dc_ptr.dtype.element_ty), mask)
    if HAS_SUMS:
        at = program.to(tl.int64) * C + offs_c
        tl.store(parts_ptr + at, tl.sum(sum_gamma, 0), mask_c)
        tl.store(parts_ptr + tl.num_programs(0).to(tl.int64) * C + at, tl.sum(sum_beta, 0), mask_c)


@triton.jit
def depthwise_back(i, j, di, dj, STRIDE: tl.constexpr):
    """The outputs that read the input at (i, j) through the tap (di, dj); -1 where there is none"""
    a = i + 1 - di
    b = j + 1 - dj
    if STRIDE > 1:
        # -1 % 2 is -1 here and 1 in Python: neither is 0
        fits = (a % STRIDE == 0) & (b % STRIDE == 0) & (a >= 0) & (b >= 0)
        a = tl.where(fits, a // STRIDE, -1)
        b = tl.where(fits, b // STRIDE, -1)
    return a, b


@triton.jit
def depthwise_bwd_kernel(
    dc_ptr, x_ptr, weight_ptr, dx_ptr, parts_ptr, w, out_h, out_w, tokens, C, chunks, chunk, stride_b, stride_t,
    stride_db, stride_dt,
    STRIDE: tl.constexpr, SKIP: tl.constexpr, COMPUTE: tl.constexpr, HAS_DX: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = dc through the taps; parts = sums of dc x, nine of a channel together, and then of dc. tokens: of x"""
    program = tl.program_id(0)
    image = (program // chunks).to(tl.int64)
    begin = program % chunks * chunk
    end = tl.minimum(begin + chunk, tokens)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = depthwise_weights(weight_ptr, offs_c, mask_c, SKIP)
    dc_ptr += image * stride_db
    x_ptr += image * stride_b
    zero = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    for t in range(begin, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        mask = mask_t[:, None] & mask_c[None, :]
        i = offs_t // w
        j = offs_t % w
        x = zero
        if HAS_SUMS:
            x = tl.load(x_ptr + offs_t.to(tl.int64)[:, None] * stride_t + offs_c[None, :], mask, 0.0).to(tl.float32)
            x = _tl.cast(x, COMPUTE).to(tl.float32)
        a, b = depthwise_back(i, j, 0, 0, STRIDE)
        g = depthwise_tap(dc_ptr, a, b, out_h, out_w, stride_dt, offs_c, mask_t, mask_c, COMPUTE)
        acc = g * w0[None, :]
        s0 += g * x
        a, b = depthwise_back(i, j, 0, 1, STRIDE)
        g = depthwise_tap(dc_ptr, a, b, out_h, out_w, stride_dt, offs_c, mask_t, mask_c, COMPUTE)
        acc += g * w1[None, :]
        s1 += g * x
        a, b = depthwise_back(i, j, 0, 2, STRIDE)
        g = depthwise_tap(dc_ptr, a, b, out_h, out_w, stride_dt, offs_c, mask_t, mask_c, COMPUTE)
        acc += g * w2[None, :]
        s2 += g * x
        a, b = depthwise_back(i, j, 1, 0, STRIDE)
        g = depthwise_tap(dc_ptr, a, b, out_h, out_w, stride_dt, offs_c, mask_t, mask_c, COMPUTE)
        acc += g * w3[None, :]
        s3 += g * x
        # the centre's outputs are all of them
        a, b = depthwise_back(i, j, 1, 1, STRIDE)
        g = depthwise_tap(dc_ptr, a, b, out_h, out_w, stride_dt, offs_c, mask_t, mask_c, COMPUTE)
        acc += g * w4[None, :]
        s4 += g * x
        s9 += g
        a, b = depthwise_back(i, j, 1, 2, STRIDE)
        g = depthwise_tap(dc_ptr, a, b, out_h, out_w, stride_dt, offs_c, mask_t, mask_c, COMPUTE)
        acc += g * w5[None, :]
        s5 += g * x
        a, b = depthwise_back(i, j, 2, 0, STRIDE)
        g = depthwise_tap(dc_ptr, a, b, out_h, out_w, stride_dt, offs_c, mask_t, mask_c, COMPUTE)
        acc += g * w6[None, :]
        s6 += g * x
        a, b = depthwise_back(i, j, 2, 1, STRIDE)
        g = depthwise_tap(dc_ptr, a, b, out_h, out_w, stride_dt, offs_c, mask_t, mask_c, COMPUTE)
        acc += g * w7[None, :]
        s7 += g * x
        a, b = depthwise_back(i, j, 2, 2, STRIDE)
        g = depthwise_tap(dc_ptr, a, b, out_h, out_w, stride_dt, offs_c, mask_t, mask_c, COMPUTE)
        acc += g * w8[None, :]
        s8 += g * x
        if HAS_DX:
            offs = (image * tokens + offs_t)[:, None] * C + offs_c[None, :]
            tl.store(dx_ptr + offs, _tl.cast(acc, dx_ptr.dtype.element_ty), mask)
    if HAS_SUMS:
        at = parts_ptr + program.to(tl.int64) * 10 * C + offs_c * 9
        tl.store(at, tl.sum(s0, 0), mask_c)
        tl.store(at + 1, tl.sum(s1, 0), mask_c)
        tl.store(at + 2, tl.sum(s2, 0), mask_c)
        tl.store(at + 3, tl.sum(s3, 0), mask_c)
        tl.store(at + 4, tl.sum(s4, 0), mask_c)
        tl.store(at + 5, tl.sum(s5, 0), mask_c)
        tl.store(at + 6, tl.sum(s6, 0), mask_c)
        tl.store(at + 7, tl.sum(s7, 0), mask_c)
        tl.store(at + 8, tl.sum(s8, 0), mask_c)
        tl.store(parts_ptr + program.to(tl.int64) * 10 * C + 9 * C + offs_c, tl.sum(s9, 0), mask_c)
