"""The Triton kernels of prefix_attention; triton.py launches them and picks their tiles."""

import triton
import triton.language as tl

from .. import _tl


@triton.jit
def prefix_attention_rows(ptr, offs, mask, stride, K: tl.constexpr, BLOCK_K: tl.constexpr, PRODUCT: tl.constexpr):
    """(rows, BLOCK_K) of one head"""
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.load(
        ptr + offs[:, None].to(tl.int64) * stride + offs_k[None, :], mask[:, None] & (offs_k < K)[None, :], 0.0
    )
    return _tl.cast(rows, PRODUCT)


@triton.jit
def prefix_attention_tanh(x):
    """tanh with float32's digits also near 0, where gates begin: a continued fraction there, exact at 0"""
    z = x * x
    near = x / (1.0 + z / (3.0 + z / (5.0 + z / (7.0 + z / (9.0 + z / 11.0)))))
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(z < 0.36, near, tl.where(x < 0.0, -far, far))


@triton.jit
def prefix_attention_strength(gate_ptr, factor_ptr, at, TANH: tl.constexpr, HAS_FACTOR: tl.constexpr):
    """factor * tanh(gate) of one head"""
    g = tl.load(gate_ptr + at).to(tl.float32)
    if TANH:
        g = prefix_attention_tanh(g)
    if HAS_FACTOR:
        g *= tl.load(factor_ptr).to(tl.float32)
    return g


@triton.jit
def prefix_attention_weights(
    q, keys, mask_p, scale, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr
):
    """softmax(scale q kᵀ) over the prefix"""
    s = _tl.dot(q, tl.trans(keys), tl.zeros((BLOCK_L, BLOCK_P), tl.float32), PRECISION) * scale
    s = tl.where(mask_p[None, :], s, float("-inf"))
    w = tl.exp(s - tl.max(s, 1)[:, None])
    return w / tl.sum(w, 1)[:, None]


@triton.jit
def prefix_attention_add(
    acc, a, b, factor, PRECISION: tl.constexpr, HALVES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + factor aᵀ b for a (BLOCK_L, BLOCK_P); HALVES: half of its columns at a time, for 64 rows of float32 would
    go to sm_100's tensor memory, for which Triton 3.7 emits a trap"""
    if HALVES:
        first, second = tl.split(tl.permute(tl.reshape(a, (BLOCK_L, 2, BLOCK_P // 2)), (0, 2, 1)))
        zero = tl.zeros((BLOCK_P // 2, BLOCK_K), tl.float32)
        both = tl.join(_tl.dot(tl.trans(first), b, zero, PRECISION), _tl.dot(tl.trans(second), b, zero, PRECISION))
        return acc + tl.reshape(tl.permute(both, (2, 0, 1)), (BLOCK_P, BLOCK_K)) * factor
    else:
        return acc + _tl.dot(tl.trans(a), b, tl.zeros((BLOCK_P, BLOCK_K), tl.float32), PRECISION) * factor


@triton.jit
def prefix_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, factor_ptr, o_ptr, y_ptr, L, P, H, G, stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kp, stride_kg, stride_vb, stride_vp, stride_vg, stride_gate, scale, stride_ob, stride_ol,
    stride_oh, blocks,
    TANH: tl.constexpr, HAS_FACTOR: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """y = o + g softmax(scale q kᵀ) v for one tile of queries of one head; heads of the same rows come together"""
    pid = tl.program_id(0)
    h = pid % H
    block = (pid // H) % blocks
    b = (pid // H // blocks).to(tl.int64)
    kv = h // (H // G)
    offs_l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_p = tl.arange(0, BLOCK_P)
    offs_k = tl.arange(0, BLOCK_K)
    mask_l = offs_l < L
    mask_p = offs_p < P
    q = prefix_attention_rows(q_ptr + b * stride_qb + h * stride_qh, offs_l, mask_l, stride_ql, K, BLOCK_K, PRODUCT)
    k_ptr += b * stride_kb + kv * stride_kg
    keys = prefix_attention_rows(k_ptr, offs_p, mask_p, stride_kp, K, BLOCK_K, PRODUCT)
    w = prefix_attention_weights(q, keys, mask_p, scale, PRECISION, BLOCK_L, BLOCK_P)
    values = prefix_attention_rows(
        v_ptr + b * stride_vb + kv * stride_vg, offs_p, mask_p, stride_vp, K, BLOCK_K, PRODUCT
    )
    found = _tl.dot(_tl.cast(w, PRODUCT), values, tl.zeros((BLOCK_L, BLOCK_K), tl.float32), PRECISION)
    found *= prefix_attention_strength(gate_ptr, factor_ptr, h * stride_gate, TANH, HAS_FACTOR)
    o = o_ptr + b * stride_ob + h * stride_oh + offs_l[:, None].to(tl.int64) * stride_ol + offs_k[None, :]
    mask = mask_l[:, None] & (offs_k < K)[None, :]
    y = _tl.cast(tl.load(o, mask, 0.0), PRODUCT).to(tl.float32) + found
    out = y_ptr + ((b * L + offs_l) * H + h)[:, None] * K + offs_k[None, :]
    tl.store(out, _tl.cast(y, y_ptr.dtype.element_ty), mask)


@triton.jit
def prefix_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, factor_ptr, dy_ptr, dq_ptr, parts_ptr, dgates_ptr, L, P, H, G, stride_qb, stride_ql,
    stride_qh, stride_kb, stride_kp, stride_kg, stride_vb, stride_vp, stride_vg, stride_gate, scale, stride_dyb,
    stride_dyl, stride_dyh, blocks, splits, per, batches,
    TANH: tl.constexpr, HAS_FACTOR: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr,
    HAS_GATES: tl.constexpr, HOLD: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """With u = dy vᵀ, w the weights, d = sum of w u and g the gate: ds = g w (u - d) scale, dq = ds k, dk = dsᵀ q,
    dv = g wᵀ dy, and the gate's gradient before its tanh is the sum of d.

    One program: one key/value head of one row of the prefix's batch, and one of its splits of the queries.
    """
    pid = tl.program_id(0).to(tl.int64)
    split = (pid % splits).to(tl.int32)
    kv = ((pid // splits) % G).to(tl.int32)
    source = pid // splits // G
    J = H // G
    offs_p = tl.arange(0, BLOCK_P)
    offs_k = tl.arange(0, BLOCK_K)
    mask_p = offs_p < P
    mask_k = offs_k < K
    k_ptr += source * stride_kb + kv * stride_kg
    v_ptr += source * stride_vb + kv * stride_vg
    if HOLD == 2:
        keys = prefix_attention_rows(k_ptr, offs_p, mask_p, stride_kp, K, BLOCK_K, PRODUCT)
    if HOLD >= 1:
        values = prefix_attention_rows(v_ptr, offs_p, mask_p, stride_vp, K, BLOCK_K, PRODUCT)
    sum_k = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    sum_v = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    begin = split * per
    for t in range(begin, tl.minimum(begin + per, batches * J * blocks)):
        h = kv * J + t % J
        block = (t // J) % blocks
        b = source * batches + t // J // blocks
        offs_l = block * BLOCK_L + tl.arange(0, BLOCK_L)
        mask_l = offs_l < L
        q = prefix_attention_rows(q_ptr + b * stride_qb + h * stride_qh, offs_l, mask_l, stride_ql, K, BLOCK_K, PRODUCT)
        dy = prefix_attention_rows(
            dy_ptr + b * stride_dyb + h * stride_dyh, offs_l, mask_l, stride_dyl, K, BLOCK_K, PRODUCT
        )
        # HOLD 1: values only, 0: nothing; what is not held is loaded again for each product
        if HOLD < 2:
            keys = prefix_attention_rows(k_ptr, offs_p, mask_p, stride_kp, K, BLOCK_K, PRODUCT)
        w = prefix_attention_weights(q, keys, mask_p, scale, PRECISION, BLOCK_L, BLOCK_P)
        # the gate comes after the products: a small one would cost a half-precision operand its digits
        g = prefix_attention_strength(gate_ptr, factor_ptr, h * stride_gate, TANH, HAS_FACTOR)
        if HAS_DQ or HAS_DK or HAS_GATES:
            if HOLD < 1:
                values = prefix_attention_rows(v_ptr, offs_p, mask_p, stride_vp, K, BLOCK_K, PRODUCT)
            u = _tl.dot(dy, tl.trans(values), tl.zeros((BLOCK_L, BLOCK_P), tl.float32), PRECISION)
            d = tl.sum(w * u, 1)
            if HAS_GATES:
                # rows past the last have dy = 0
                tl.store(dgates_ptr + (b * blocks + block) * H + h, tl.sum(d, 0))
            ds = _tl.cast(w * (u - d[:, None]), PRODUCT)
            if HAS_DQ:
                if HOLD < 2:
                    keys = prefix_attention_rows(k_ptr, offs_p, mask_p, stride_kp, K, BLOCK_K, PRODUCT)
                dq = _tl.dot(ds, keys, tl.zeros((BLOCK_L, BLOCK_K), tl.float32), PRECISION) * (g * scale)
                out = dq_ptr + ((b * L + offs_l) * H + h)[:, None] * K + offs_k[None, :]
                tl.store(out, _tl.cast(dq, dq_ptr.dtype.element_ty), mask_l[:, None] & mask_k[None, :])
            if HAS_DK:
                sum_k = prefix_attention_add(sum_k, ds, q, g * scale, PRECISION, HALVES, BLOCK_L, BLOCK_P, BLOCK_K)
        if HAS_DV:
            sum_v = prefix_attention_add(
                sum_v, _tl.cast(w, PRODUCT), dy, g, PRECISION, HALVES, BLOCK_L, BLOCK_P, BLOCK_K
            )
    mask = mask_p[:, None] & mask_k[None, :]
    out = parts_ptr + pid * 2 * P * K + offs_p[:, None] * K + offs_k[None, :]
    if HAS_DK:
        tl.store(out, sum_k, mask)
    if HAS_DV:
        tl.store(out + P * K, sum_v, mask)


@triton.jit
def prefix_attention_sum_kernel(
    parts_ptr, dgates_ptr, gate_ptr, factor_ptr, dk_ptr, dv_ptr, dgate_ptr, dfactor_ptr, P, G, H, splits, rows, pieces,
    sums, stride_gate,
    K: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr, HAS_DGATE: tl.constexpr, HAS_DFACTOR: tl.constexpr,
    ONE_GATE: tl.constexpr, TANH: tl.constexpr, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dk and dv from the splits' sums, in their order; the last program: dgate and dfactor from those of the tiles"""
    pid = tl.program_id(0)
    if pid < sums:
        piece = pid % pieces
        second = (pid // pieces) % 2
        at = (pid // pieces // 2).to(tl.int64)  # of the source and key/value head
        offs = piece * BLOCK + tl.arange(0, BLOCK)
        mask = offs < P * K
        total = tl.zeros((BLOCK,), tl.float32)
        if (HAS_DK and second == 0) or (HAS_DV and second == 1):
            for split in range(splits):
                total += tl.load(parts_ptr + ((at * splits + split) * 2 + second) * P * K + offs, mask, 0.0)
        # (S, P, G, K)
        out = ((at // G * P + offs // K) * G + at % G) * K + offs % K
        if HAS_DK:
            tl.store(dk_ptr + out, _tl.cast(total, dk_ptr.dtype.element_ty), mask & (second == 0))
        if HAS_DV:
            tl.store(dv_ptr + out, _tl.cast(total, dv_ptr.dtype.element_ty), mask & (second == 1))
    elif HAS_DGATE or HAS_DFACTOR:
        offs_h = tl.arange(0, BLOCK_H)
        mask_h = offs_h < H
        acc = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
        for row in range(0, rows, BLOCK_R):
            offs_r = (row + tl.arange(0, BLOCK_R)).to(tl.int64)
            mask_r = (offs_r < rows)[:, None] & mask_h[None, :]
            acc += tl.load(dgates_ptr + offs_r[:, None] * H + offs_h[None, :], mask_r, 0.0)
        total_h = tl.sum(acc, 0)
        g = tl.load(gate_ptr + offs_h * stride_gate, mask_h, 0.0).to(tl.float32)
        slope = tl.full((BLOCK_H,), 1.0, tl.float32)
        if TANH:
            g = prefix_attention_tanh(g)
            slope = 1.0 - g * g
        if HAS_DFACTOR:
            dfactor = tl.sum(total_h * g, 0)
            tl.store(dfactor_ptr, _tl.cast(dfactor, dfactor_ptr.dtype.element_ty))
        if HAS_DGATE:
            dgate = total_h * slope
            if HAS_FACTOR:
                dgate *= tl.load(factor_ptr).to(tl.float32)
            if ONE_GATE:
                tl.store(dgate_ptr, _tl.cast(tl.sum(dgate, 0), dgate_ptr.dtype.element_ty))
            else:
                tl.store(dgate_ptr + offs_h, _tl.cast(dgate, dgate_ptr.dtype.element_ty), mask_h)
