"""media_cross_attention in Triton: tiles of tokens over the keys of the media that one of them sees, either way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .. import _refuse, _tl
from .._attention import heads_normed, through_norms
from .._device import arch
from .._dropout import keep_factor, threshold
from .kernels import (
    media_cross_attention_bwd_dkv_kernel,
    media_cross_attention_bwd_dq_kernel,
    media_cross_attention_fwd_kernel,
)

MAX_HEAD_DIM = 128  # a row of keys is held in one tile


def refuses(
    q, k, v, span, visible, q_norm_weight, k_norm_weight, seed, tokens, norm, eps, scale, p, dtype
) -> str | None:
    if (reason := _refuse.common(q, dtype, k=k, v=v)) is not None:
        return reason
    if visible is not None and visible.dtype not in (torch.bool, *_refuse.KERNEL_DTYPES):
        return f"visible is {visible.dtype}; kernels take bool, float32, bfloat16, float16"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"head dim {q.shape[3]}; kernels take up to {MAX_HEAD_DIM}"
    if max(q.shape[1], k.shape[1]) >= 2**31 - 128:
        return f"{q.shape[1]} tokens, {k.shape[1]} keys; kernels take fewer than 2^31 of each"
    if (
        visible is not None
        and (reach := sum((n - 1) * s for n, s in zip(visible.shape[1:], visible.stride()[1:], strict=True))) >= 2**31
    ):
        return f"a sample of visible reaches {reach} elements; kernels take fewer than 2^31"
    return None


def declines(*values) -> str | None:
    return None


def forward(
    q, k, v, span, visible, q_norm_weight, k_norm_weight, seed, tokens, norm, eps, scale, p, dtype
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, K); stats (B, H, T, 2): the softmax's maximum and denominator."""
    B, M, H, K = q.shape
    compute = dtype or q.dtype
    q = heads_normed(q, q_norm_weight, None, norm, eps, compute)[0]
    k = heads_normed(k, k_norm_weight, None, norm, eps, compute)[0]
    y = torch.empty((B, M, H, K), dtype=compute, device=q.device)
    stats = torch.empty((B, H, M, 2), dtype=torch.float32, device=q.device)
    if y.numel():
        tensors, numbers, flags = _call(q, k, v, span, visible, seed, tokens, scale, p, compute)
        tiles = config(M, K, compute, arch(q), q.dtype, p > 0.0)
        blocks = triton.cdiv(M, tiles.m)
        media_cross_attention_fwd_kernel[(B * H * blocks,)](
            *tensors, y, stats, *numbers, blocks, **flags, BLOCK_M=tiles.m, BLOCK_N=tiles.n, num_warps=tiles.warps,
            num_stages=tiles.stages,
        )  # fmt: skip
    return y, stats


def backward(dy, saved, needs, tokens, norm, eps, scale, p, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    q, k, v, span, visible, seed, y, stats = (
        saved[n] for n in ("q", "k", "v", "span", "visible", "seed", "y", "stats")
    )
    B, M, H, K = y.shape
    N, G = k.shape[1], k.shape[2]
    compute = dtype or q.dtype
    norms = {side: (saved[side + "_norm_weight"], None) for side in "qk"}
    raw = {"q": q, "k": k}
    (q, q_stats), (k, k_stats) = (heads_normed(t, *norms[n], norm, eps, compute) for n, t in raw.items())
    dy = dy.to(compute)
    dy = dy if dy.stride(3) == 1 else dy.contiguous()
    tensors, numbers, flags = _call(q, k, v, span, visible, seed, tokens, scale, p, compute)
    tiles = config(M, K, compute, arch(y), q.dtype, p > 0.0)
    flags |= {"BLOCK_M": tiles.back_m, "BLOCK_N": tiles.back_n, "num_warps": tiles.back_warps}
    blocks = triton.cdiv(M, tiles.back_m)
    numbers = (*numbers, *dy.stride()[:3], blocks)
    grads = {"q": torch.empty(y.shape, dtype=compute, device=y.device)}
    need_kv = needs["k"] or needs["v"] or needs["k_norm_weight"]
    if need_kv:
        grads |= {n: torch.empty(k.shape, dtype=compute, device=y.device) for n in "kv"}
    if y.numel() == 0:
        for t in grads.values():
            t.zero_()
    else:
        # wide float32 heads that share keys spill with two stages, and on sm_80 with four warps
        stages = 1 if compute == torch.float32 and K > 64 and G < H else 2
        dq_warps = 8 if stages == 1 and 0 < arch(y) < 90 else tiles.dq_warps
        if needs["q"] or needs["q_norm_weight"]:
            media_cross_attention_bwd_dq_kernel[(B * H * blocks,)](
                *tensors,
                dy,
                y,
                stats,
                grads["q"],
                *numbers,
                **(flags | {"num_warps": dq_warps}),
                num_stages=stages,
            )
        if need_kv and N:
            media_cross_attention_bwd_dkv_kernel[(B * G * triton.cdiv(N, tiles.back_n),)](
                *tensors, dy, y, stats, grads["k"], grads["v"], *numbers, **(flags | tiles.dkv), num_stages=1
            )
    asked = {n: t for n, t in raw.items() if n in grads and (needs[n] or needs[n + "_norm_weight"])}
    grads |= through_norms(grads, asked, norms, {"q": q_stats, "k": k_stats}, norm)
    return {n: grads[n].to(saved[n].dtype) for n, need in needs.items() if need}


@dataclass(frozen=True)
class Config:
    """Tiles of tokens x keys, of the forward and the backward kernels."""

    m: int
    n: int
    warps: int
    stages: int
    back_m: int
    back_n: int
    back_warps: int
    dq_warps: int
    dkv: dict  # what the kernel of dk and dv has otherwise


def config(
    tokens: int, head_dim: int, dtype: torch.dtype, device_arch: int, loaded: torch.dtype, dropout: bool
) -> Config:
    """loaded: the dtype that q is read in, where a kernel rounds it to `dtype` itself (autocast).

    The steps are cross_attention's, found by compiling: the largest tiles without a spill. Not timed on a GPU yet.
    """
    wide, single = head_dim > 64, dtype == torch.float32
    rows = max(16, triton.next_power_of_2(tokens))
    # float32 products take three tf32 terms each, and twice the registers
    m = min(rows, 64 if not single else 16 if wide else 32)
    n = 16 if single and wide else 32 if single or wide else 64
    back_m, back_n = min(rows, 32 if single else 64), 32 if single or wide else 64
    if single and wide:
        back_m, back_n = 16, 16
    elif wide and loaded == torch.float32:
        back_m, back_n = min(back_m, 32), 32 if device_arch < 100 else 16
    # the mask takes registers beside both products
    if dropout:
        back_n = min(back_n, 16 if single else 32)
    # without wgmma the operands of a product lie in registers too
    more = 0 < device_arch < 90 and not single
    if more:
        n, back_n = 32, min(back_n, 32)
        m, back_m = min(m, 32), min(back_m, 32)
    # the rows that a loop reads its other operand against stay in registers, and in float32 each as two terms
    back_warps = 8 if wide or single or more or (dropout and device_arch >= 100) else 4
    # there even the smallest tile of wide float32 heads spills with terms of tf32: plain float32 products
    dkv = {"PRECISION": "ieee"} if single and wide and device_arch >= 100 else {}
    warps = 8 if (wide and not single and not more) or (device_arch >= 100 and m == n == 64) else 4
    stages = 1 if single and wide else 2
    return Config(m, n, warps, stages, back_m, back_n, back_warps, 4 if wide and single else back_warps, dkv)


def _call(q, k, v, span, visible, seed, tokens, scale, p, compute) -> tuple[tuple, tuple, dict]:
    """What every kernel of one call takes: pointers, sizes with strides, and compile-time flags."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    span = None if span is None else span.contiguous()
    kind = "none" if visible is None else "bool" if visible.dtype == torch.bool else "additive"
    empty = q.new_empty(0)
    seen = empty if visible is None else visible.view(torch.uint8) if kind == "bool" else visible
    tensors = (q, k, v, *(empty if t is None else t for t in (span, seen if visible is not None else None, seed)))
    N, K = k.shape[1], q.shape[3]
    strides = (s for t in (q, k, v) for s in t.stride()[:3])
    numbers = (
        q.shape[1], N, N // tokens, tokens, q.shape[2], k.shape[2], *strides,
        *((0, 0, 0) if visible is None else visible.stride()), scale or K**-0.5, threshold(p), keep_factor(p),
    )  # fmt: skip
    flags = {
        "HAS_SPAN": span is not None, "VISIBLE": kind, "HAS_DROPOUT": p > 0.0, **_tl.product(compute), "K": K,
        "BLOCK_K": max(16, triton.next_power_of_2(K)),
    }  # fmt: skip
    return tensors, numbers, flags
