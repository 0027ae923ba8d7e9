"""jit helpers shared by Triton kernels."""

import torch
import triton
import triton.language as tl
from triton import knobs

TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product(dtype: torch.dtype) -> dict:
    """How kernels multiply operands of `dtype`: float32 ones in three tf32 terms, which keeps float32's digits."""
    return {"PRODUCT": TL_DTYPE[dtype], "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee"}


# The interpreter keeps bf16 as uint16: it multiplies the raw bits, and truncates where the GPU rounds to nearest even.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with float32 accumulation; PRECISION ('ieee' or 'tf32x3') matters for float32 operands only."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest even on the GPU and in the interpreter alike."""
    if INTERPRETED and tl.bfloat16 == DTYPE and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def philox7(c0, c1, c2, c3, k0, k1):
    """Philox4x32 with 7 rounds: four uint32 words for the counter (c0..c3) under the key (k0, k1)."""
    for _ in tl.static_range(7):
        a = c0
        b = c2
        c0 = tl.umulhi(b, 0xCD9E8D57) ^ c1 ^ k0
        c2 = tl.umulhi(a, 0xD2511F53) ^ c3 ^ k1
        c1 = b * 0xCD9E8D57
        c3 = a * 0xD2511F53
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def dropout_keep(seed, rows, first_col, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """(BLOCK_ROWS, BLOCK_COLS) bool: reference.keep_mask for `rows` and the columns from first_col on.

    One Philox call serves 8 columns, so first_col and BLOCK_COLS are multiples of 8.
    """
    groups = (first_col // 8 + tl.arange(0, BLOCK_COLS // 8)).to(tl.uint32)
    zero = tl.zeros((BLOCK_ROWS, BLOCK_COLS // 8), tl.uint32)
    c0 = zero + groups[None, :]
    c1 = zero + rows.to(tl.uint32)[:, None]
    c2 = zero + (rows.to(tl.int64) >> 32).to(tl.uint32)[:, None]
    k0 = zero + (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = zero + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox7(c0, c1, c2, zero, k0, k1)
    # element j of a group is half j & 1 of word j >> 1; each join appends the next lower bit of j as the last axis
    even = tl.join(tl.join(_low(w0, threshold), _low(w2, threshold)), tl.join(_low(w1, threshold), _low(w3, threshold)))
    odd = tl.join(
        tl.join(_high(w0, threshold), _high(w2, threshold)), tl.join(_high(w1, threshold), _high(w3, threshold))
    )
    return tl.reshape(tl.join(even, odd), (BLOCK_ROWS, BLOCK_COLS)) != 0


# One byte an element crosses threads, not a word: a 128x256 tile of words beside its accumulator spills on sm_90.
@triton.jit
def _low(word, threshold):
    return ((word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int8)


@triton.jit
def _high(word, threshold):
    return ((word >> 16).to(tl.int32) >= threshold).to(tl.int8)


@triton.jit
def times_mask(x, keep):
    """x * keep, a product and no select, so that NaN and Inf survive a zero as they do in eager dropout."""
    if INTERPRETED:
        return cast(x.to(tl.float32) * keep.to(tl.float32), x.dtype)
    return x * keep.to(x.dtype)


@triton.jit
def act(x, ACT: tl.constexpr):
    """The activation of float32 x; "gelu" is the erf form."""
    if ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u), which has no cancellation
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif ACT == "hardswish":
        y = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * 0.16666666666666666
    else:
        tl.static_assert(ACT == "relu", "unknown activation")
        y = tl.where(x < 0.0, 0.0, x)
    return y


@triton.jit
def act_derivative(x, ACT: tl.constexpr):
    """d act / dx of float32 x."""
    if ACT == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
    elif ACT == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACT == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        y = s * (1.0 + 1.702 * x * (1.0 - s))
    elif ACT == "hardswish":
        y = tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x * 0.3333333333333333 + 0.5, 1.0))
    else:
        tl.static_assert(ACT == "relu", "unknown activation")
        y = tl.where(x > 0.0, 1.0, 0.0)
    return y


@triton.jit
def tanh(x):
    """tanh of float32 x; near 0, where gates start, by Cephes' polynomial, which has no cancellation."""
    z = x * x
    near = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    near = (near - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))
