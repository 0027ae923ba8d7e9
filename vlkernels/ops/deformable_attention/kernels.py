"""The Triton kernels of deformable_attention; triton.py launches them and picks their tiles.

Heights and widths are arguments of up to MAX_LEVELS levels, so that no device reads them and an image of another size
compiles nothing.
"""

import triton
import triton.language as tl

from .. import _tl

MAX_LEVELS = 8


@triton.jit
def deformable_size(LEVEL: tl.constexpr, n0, n1, n2, n3, n4, n5, n6, n7):
    """Number LEVEL of n0..n7"""
    n = n0
    if LEVEL == 1:
        n = n1
    elif LEVEL == 2:
        n = n2
    elif LEVEL == 3:
        n = n3
    elif LEVEL == 4:
        n = n4
    elif LEVEL == 5:
        n = n5
    elif LEVEL == 6:
        n = n6
    elif LEVEL == 7:
        n = n7
    return n


@triton.jit
def deformable_at(
    points_ptr, reference_ptr, offs_p, offs_r, mask, size, AXIS: tl.constexpr, HAS_REFERENCE: tl.constexpr
):  # fmt: skip
    """x (AXIS 0) or y (1) in positions of the level, for one point of each query"""
    at = tl.load(points_ptr + offs_p + AXIS, mask, 0.0).to(tl.float32)
    if HAS_REFERENCE:
        centre = tl.load(reference_ptr + offs_r + AXIS, mask, 0.0).to(tl.float32)
        at = centre * size + at - 0.5
    else:
        at = at * size - 0.5
    return at


@triton.jit
def deformable_weight(weights_ptr, offs, mask, top, total, SOFTMAX: tl.constexpr):
    """a of one point of each query"""
    a = tl.load(weights_ptr + offs, mask, 0.0).to(tl.float32)
    if SOFTMAX:
        a = tl.exp(a - top) / total
    return a


@triton.jit
def deformable_corner(value_ptr, cx, cy, h, w, stride_s, mask_q, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_Q, BLOCK_K) values of the position (cx, cy) of each query, 0 outside of the map"""
    offs_k = tl.arange(0, BLOCK_K)
    inside = mask_q & (cx >= 0) & (cx < w) & (cy >= 0) & (cy < h)
    row = tl.where(inside, cy, 0.0).to(tl.int64) * w + tl.where(inside, cx, 0.0).to(tl.int64)
    offs = row[:, None] * stride_s + offs_k[None, :]
    return tl.load(value_ptr + offs, inside[:, None] & (offs_k < K)[None, :], 0.0).to(tl.float32)


@triton.jit
def deformable_attention_fwd_kernel(
    value_ptr, points_ptr, weights_ptr, reference_ptr, y_ptr, stats_ptr, M, H, P,
    h0, h1, h2, h3, h4, h5, h6, h7, w0, w1, w2, w3, w4, w5, w6, w7,
    stride_vb, stride_vs, stride_vh, stride_pb, stride_pq, stride_wb, stride_wq, stride_rb, stride_rq, stride_rl,
    blocks, HAS_REFERENCE: tl.constexpr, SOFTMAX: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = sum over levels and points of a * bilinear(value; x, y) for BLOCK_Q queries of one head of one image"""
    program = tl.program_id(0)
    b = (program // blocks // H).to(tl.int64)
    head = program // blocks % H
    offs_q = program % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < M
    queries = offs_q.to(tl.int64)
    value_ptr += b * stride_vb + head * stride_vh
    # of level 0, point 0
    row_p = b * stride_pb + queries * stride_pq + head * (L * P * 2)
    row_w = b * stride_wb + queries * stride_wq + head * (L * P)
    row_r = b * stride_rb + queries * stride_rq
    row_y = (b * M + queries) * H + head
    top = tl.zeros((BLOCK_Q,), tl.float32)
    total = top
    if SOFTMAX:
        offs_p = tl.arange(0, BLOCK_P)
        # (BLOCK_Q, BLOCK_P)
        logits = tl.load(
            weights_ptr + row_w[:, None] + offs_p[None, :], mask_q[:, None] & (offs_p < L * P)[None, :], float("-inf")
        ).to(tl.float32)
        top = tl.where(mask_q, tl.max(logits, 1), 0.0)
        total = tl.where(mask_q, tl.sum(tl.exp(logits - top[:, None]), 1), 1.0)
        tl.store(stats_ptr + 2 * row_y, top, mask_q)
        tl.store(stats_ptr + 2 * row_y + 1, total, mask_q)
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    first = b * 0  # the level's first position, 64 bits
    for level in tl.static_range(L):
        h = deformable_size(level, h0, h1, h2, h3, h4, h5, h6, h7)
        w = deformable_size(level, w0, w1, w2, w3, w4, w5, w6, w7)
        level_ptr = value_ptr + first * stride_vs
        for p in range(P):
            point = level * P + p
            offs_r = row_r + level * stride_rl
            x = deformable_at(points_ptr, reference_ptr, row_p + 2 * point, offs_r, mask_q, w, 0, HAS_REFERENCE)
            y = deformable_at(points_ptr, reference_ptr, row_p + 2 * point, offs_r, mask_q, h, 1, HAS_REFERENCE)
            a = deformable_weight(weights_ptr, row_w + point, mask_q, top, total, SOFTMAX)
            left = tl.floor(x)
            up = tl.floor(y)
            right_share = x - left
            down_share = y - up
            for corner in tl.static_range(4):
                near = (right_share if corner % 2 else 1.0 - right_share) * (
                    down_share if corner // 2 else 1.0 - down_share
                )
                v = deformable_corner(
                    level_ptr, left + corner % 2, up + corner // 2, h, w, stride_vs, mask_q, K, BLOCK_K
                )
                acc += (a * near)[:, None] * v
        first += h * w
    offs_k = tl.arange(0, BLOCK_K)
    tl.store(
        y_ptr + row_y[:, None] * K + offs_k[None, :], _tl.cast(acc, y_ptr.dtype.element_ty),
        mask_q[:, None] & (offs_k < K)[None, :],
    )  # fmt: skip


@triton.jit
def deformable_attention_bwd_points_kernel(
    dy_ptr, value_ptr, points_ptr, weights_ptr, reference_ptr, stats_ptr, dpoints_ptr, dweights_ptr, dreference_ptr,
    M, H, P, h0, h1, h2, h3, h4, h5, h6, h7, w0, w1, w2, w3, w4, w5, w6, w7,
    stride_vb, stride_vs, stride_vh, stride_pb, stride_pq, stride_wb, stride_wq, stride_rb, stride_rq, stride_rl,
    stride_db, stride_dq, stride_dh, blocks,
    HAS_REFERENCE: tl.constexpr, HAS_DREFERENCE: tl.constexpr, OWN_LEVELS: tl.constexpr,
    SOFTMAX: tl.constexpr, L: tl.constexpr, K: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """da = dy . sample and its softmax's gradient; dx = a dy . (right - left column), dy likewise; of a reference, the
    head's share of their sum"""
    program = tl.program_id(0)
    b = (program // blocks // H).to(tl.int64)
    head = program // blocks % H
    offs_q = program % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < M
    queries = offs_q.to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    offs_p = tl.arange(0, BLOCK_P)
    value_ptr += b * stride_vb + head * stride_vh
    row_p = b * stride_pb + queries * stride_pq + head * (L * P * 2)
    row_w = b * stride_wb + queries * stride_wq + head * (L * P)
    row_r = b * stride_rb + queries * stride_rq
    row = (b * M + queries) * H + head
    dy = tl.load(
        dy_ptr + (b * stride_db + queries * stride_dq + head * stride_dh)[:, None] + offs_k[None, :],
        mask_q[:, None] & (offs_k < K)[None, :], 0.0,
    ).to(tl.float32)  # fmt: skip
    top = tl.zeros((BLOCK_Q,), tl.float32)
    total = top
    if SOFTMAX:
        top = tl.load(stats_ptr + 2 * row, mask_q, 0.0)
        total = tl.load(stats_ptr + 2 * row + 1, mask_q, 1.0)
    da = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
    sum_x = tl.zeros((BLOCK_Q,), tl.float32)
    sum_y = sum_x
    first = b * 0
    for level in tl.static_range(L):
        h = deformable_size(level, h0, h1, h2, h3, h4, h5, h6, h7)
        w = deformable_size(level, w0, w1, w2, w3, w4, w5, w6, w7)
        level_ptr = value_ptr + first * stride_vs
        for p in range(P):
            point = level * P + p
            offs_r = row_r + level * stride_rl
            x = deformable_at(points_ptr, reference_ptr, row_p + 2 * point, offs_r, mask_q, w, 0, HAS_REFERENCE)
            y = deformable_at(points_ptr, reference_ptr, row_p + 2 * point, offs_r, mask_q, h, 1, HAS_REFERENCE)
            a = deformable_weight(weights_ptr, row_w + point, mask_q, top, total, SOFTMAX)
            left = tl.floor(x)
            up = tl.floor(y)
            right_share = x - left
            down_share = y - up
            d00 = tl.sum(dy * deformable_corner(level_ptr, left, up, h, w, stride_vs, mask_q, K, BLOCK_K), 1)
            d01 = tl.sum(dy * deformable_corner(level_ptr, left + 1, up, h, w, stride_vs, mask_q, K, BLOCK_K), 1)
            d10 = tl.sum(dy * deformable_corner(level_ptr, left, up + 1, h, w, stride_vs, mask_q, K, BLOCK_K), 1)
            d11 = tl.sum(dy * deformable_corner(level_ptr, left + 1, up + 1, h, w, stride_vs, mask_q, K, BLOCK_K), 1)
            along_up = (1.0 - right_share) * d00 + right_share * d01
            along_down = (1.0 - right_share) * d10 + right_share * d11
            sample = (1.0 - down_share) * along_up + down_share * along_down
            da = tl.where((offs_p == point)[None, :], sample[:, None], da)
            dx = a * ((1.0 - down_share) * (d01 - d00) + down_share * (d11 - d10))
            dv = a * (along_down - along_up)
            if HAS_DREFERENCE:
                sum_x += dx * w
                sum_y += dv * h
            if not HAS_REFERENCE:
                dx *= w
                dv *= h
            offs = (row * L * P + point) * 2
            tl.store(dpoints_ptr + offs, _tl.cast(dx, dpoints_ptr.dtype.element_ty), mask_q)
            tl.store(dpoints_ptr + offs + 1, _tl.cast(dv, dpoints_ptr.dtype.element_ty), mask_q)
        first += h * w
        if HAS_DREFERENCE and (OWN_LEVELS or level == L - 1):
            # (B, M, H, L or 1, 2)
            offs = (row * L + level) * 2 if OWN_LEVELS else row * 2
            tl.store(dreference_ptr + offs, sum_x, mask_q)
            tl.store(dreference_ptr + offs + 1, sum_y, mask_q)
            sum_x = tl.zeros((BLOCK_Q,), tl.float32)
            sum_y = sum_x
    mask = mask_q[:, None] & (offs_p < L * P)[None, :]
    if SOFTMAX:
        # dlogit = a (da - sum of a da)
        logits = tl.load(weights_ptr + row_w[:, None] + offs_p[None, :], mask, float("-inf")).to(tl.float32)
        shares = tl.exp(logits - top[:, None]) / total[:, None]
        da = shares * (da - tl.sum(shares * da, 1)[:, None])
    tl.store(dweights_ptr + (row * L * P)[:, None] + offs_p[None, :], _tl.cast(da, dweights_ptr.dtype.element_ty), mask)


@triton.jit
def deformable_attention_bwd_value_kernel(
    dy_ptr, points_ptr, weights_ptr, reference_ptr, stats_ptr, dvalue_ptr, S, M, H, P, h, w, first,
    stride_pb, stride_pq, stride_wb, stride_wq, stride_rb, stride_rq, stride_db, stride_dq, stride_dh, blocks,
    HAS_REFERENCE: tl.constexpr, SOFTMAX: tl.constexpr, SKIP: tl.constexpr, LP: tl.constexpr, K: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dvalue = Aᵀ dy for BLOCK_S positions of one level, A[q, s] = sum over points of a hat(x - s_x) hat(y - s_y), in
    the order of the queries. points_ptr, weights_ptr, reference_ptr: of the level."""
    program = tl.program_id(0)
    b = (program // blocks // H).to(tl.int64)
    head = program // blocks % H
    offs_s = program % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < h * w
    at_x = (offs_s % w).to(tl.float32)
    at_y = (offs_s // w).to(tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    if SKIP:
        # rows of the map that these positions lie in, and one further
        above = (program % blocks * BLOCK_S // w - 1) * 1.0
        below = ((program % blocks * BLOCK_S + BLOCK_S - 1) // w + 1) * 1.0
    acc = tl.zeros((BLOCK_S, BLOCK_K), tl.float32)
    for begin in range(0, M, BLOCK_Q):
        offs_q = begin + tl.arange(0, BLOCK_Q)
        mask_q = offs_q < M
        queries = offs_q.to(tl.int64)
        row_p = b * stride_pb + queries * stride_pq + head * (LP * 2)
        row_w = b * stride_wb + queries * stride_wq + head * LP
        row_r = b * stride_rb + queries * stride_rq
        hit = 1
        if SKIP:
            near = tl.zeros((BLOCK_Q,), tl.int32)
            for p in range(P):
                y = deformable_at(points_ptr, reference_ptr, row_p + 2 * p, row_r, mask_q, h, 1, HAS_REFERENCE)
                near += (mask_q & (y > above) & (y < below)).to(tl.int32)
            hit = tl.sum(near, 0)
        if hit > 0:
            top = tl.zeros((BLOCK_Q,), tl.float32)
            total = top
            if SOFTMAX:
                row = (b * M + queries) * H + head
                top = tl.load(stats_ptr + 2 * row, mask_q, 0.0)
                total = tl.load(stats_ptr + 2 * row + 1, mask_q, 1.0)
            # (BLOCK_Q, BLOCK_S)
            shares = tl.zeros((BLOCK_Q, BLOCK_S), tl.float32)
            for p in range(P):
                x = deformable_at(points_ptr, reference_ptr, row_p + 2 * p, row_r, mask_q, w, 0, HAS_REFERENCE)
                y = deformable_at(points_ptr, reference_ptr, row_p + 2 * p, row_r, mask_q, h, 1, HAS_REFERENCE)
                a = deformable_weight(weights_ptr, row_w + p, mask_q, top, total, SOFTMAX)
                far_x = tl.abs(x[:, None] - at_x[None, :])
                far_y = tl.abs(y[:, None] - at_y[None, :])
                # False for NaN
                touches = (far_x < 1.0) & (far_y < 1.0) & mask_q[:, None]
                shares += tl.where(touches, a[:, None] * (1.0 - far_x) * (1.0 - far_y), 0.0)
            dy = tl.load(
                dy_ptr + (b * stride_db + queries * stride_dq + head * stride_dh)[:, None] + offs_k[None, :],
                mask_q[:, None] & (offs_k < K)[None, :], 0.0,
            )  # fmt: skip
            acc = _tl.dot(tl.trans(_tl.cast(shares, PRODUCT)), _tl.cast(dy, PRODUCT), acc, PRECISION)
    rows = ((b * S + first + offs_s) * H + head)[:, None] * K
    tl.store(
        dvalue_ptr + rows + offs_k[None, :], _tl.cast(acc, dvalue_ptr.dtype.element_ty),
        mask_s[:, None] & (offs_k < K)[None, :],
    )  # fmt: skip
