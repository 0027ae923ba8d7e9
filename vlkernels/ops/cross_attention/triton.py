"""cross_attention in Triton: one pass over the keys and values of both sources each way; launches and configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .. import _refuse, _tl
from .._attention import batch_stride, heads_normed, through_norms
from .._device import arch, multiprocessors
from .._dropout import keep_factor, threshold
from .kernels import (
    cross_attention_bwd_dkv_kernel,
    cross_attention_bwd_dq_kernel,
    cross_attention_bwd_kernel,
    cross_attention_combine_kernel,
    cross_attention_fwd_kernel,
)
from .reference import sizes

MAX_HEAD_DIM = 128  # a row of keys is held in one tile


def refuses(
    q, k, v, k2, v2, x, kv_weight, kv_bias, mask, mask2, bias, index, q_norm_weight, q_norm_bias, k_norm_weight,
    k_norm_bias, x_parts, kv_parts, seed, norm, eps, scale, masked, p, causal, x_norm, x_eps, dtype,
) -> str | None:  # fmt: skip
    if (reason := _refuse.common(q, dtype, k=k, v=v, k2=k2, v2=v2, x=x, kv_weight=kv_weight)) is not None:
        return reason
    if q.shape[3] > MAX_HEAD_DIM:
        return f"head dim {q.shape[3]}; kernels take up to {MAX_HEAD_DIM}"
    if x is not None and x.shape[2] == 0:
        return "x has no channels"
    return None


def declines(*values) -> str | None:
    return None


def note(
    q, k, v, k2, v2, x, kv_weight, kv_bias, mask, mask2, bias, index, q_norm_weight, q_norm_bias, k_norm_weight,
    k_norm_bias, x_parts, kv_parts, seed, norm, eps, scale, masked, p, causal, x_norm, x_eps, dtype,
) -> str:  # fmt: skip
    """Whose kernel computes the forward."""
    B, M, H, K = sizes(q, k, k2, x, mask, mask2, bias, index)
    G = k2.shape[2] if k2 is not None else k.shape[2] if k is not None else kv_weight.shape[0] // (2 * K)
    plain = k2 is None and all(t is None for t in (mask, bias, index)) and p == 0.0
    if by_flash(plain, M, H, G, K, dtype or q.dtype, q.device.type):
        return "forward by torch's FlashAttention 2, backward by this op's kernels"
    return ""


FLASH_QUERIES = 128  # from here on a tile of queries fills FlashAttention's; not timed on a GPU yet


def by_flash(plain: bool, M: int, H: int, G: int, K: int, dtype: torch.dtype, device: str) -> bool:
    """Whether torch's FlashAttention 2 (the flash-attn package's kernel) computes the forward.

    It takes one source without mask, bias, index and dropout, and as many key heads as heads. Its pipeline is ahead of
    these kernels for many queries; it writes the same denominators, so the backward, which with it would add in no
    fixed order, stays this op's.
    """
    fits = plain and G == H and K % 8 == 0 and K <= MAX_HEAD_DIM and dtype in (torch.float16, torch.bfloat16)
    return fits and M >= FLASH_QUERIES and device == "cuda"


# -- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dims:
    """Of one call of T queries, M in each row of the batch; indexed: an index chooses rows of the first source."""

    T: int
    M: int
    N: int
    N2: int
    H: int
    G: int
    K: int
    indexed: bool

    @property
    def B(self) -> int:
        return self.T // max(1, self.M)


@dataclass(frozen=True)
class Config:
    """Tiles of queries x keys. splits: of the first source over programs, each with a partial result.

    one: the backward reads keys and values once and writes everything, dq held in registers; else dq, and dk with dv,
    are kernels of their own.
    """

    m: int
    n: int
    warps: int
    stages: int
    splits: int
    back_m: int
    back_n: int
    back_warps: int
    back_splits: int
    one: bool


def config(dims: Dims, dtype: torch.dtype, device_arch: int, loaded: torch.dtype | None = None) -> Config:
    """loaded: the dtype that q, k and v are read in, where a kernel rounds it to `dtype` itself (autocast).

    None of the steps below has been timed on a GPU yet; tiles are the largest that compile without a spill.
    """
    sms = multiprocessors(device_arch)
    wide, single = dims.K > 64, dtype == torch.float32
    rows = max(16, triton.next_power_of_2(dims.M))
    # float32 products take three tf32 terms each, and twice the registers
    m = min(rows, 64 if not single else 16 if wide else 32)
    n = 32 if single or wide else 64
    back_m, back_n = min(rows, 32 if single else 64), 32 if single or wide else 64
    if single and wide:
        back_m, back_n = 16, 16
    elif wide and loaded == torch.float32:
        back_m, back_n = min(back_m, 32), 32 if device_arch < 100 else 16
    # without wgmma the operands of a product lie in registers too
    more = 0 < device_arch < 90 and not single
    if more:
        n = back_n = 32
    # dq of all queries of a head stays in one program's registers
    one = dims.G == dims.H and not dims.indexed and dims.M <= back_m  # noqa: SIM300
    blocks = dims.B * dims.H * triton.cdiv(dims.M, m)
    return Config(
        m, n, 8 if device_arch >= 100 and m == n == 64 else 4, 2, _splits(blocks, dims.N, n, sms), back_m, back_n,
        8 if wide or single or more else 4, _splits(dims.B * dims.H, dims.N, back_n, sms) if one else 1, one,
    )  # fmt: skip


def _splits(programs: int, keys: int, block: int, sms: int) -> int:
    """As many as fill the device, of two tiles each at least: a split costs a float32 partial result."""
    return max(1, min(sms // max(1, programs), keys // (2 * block)))


# -- forward and backward ------------------------------------------------------------------------------------------


def forward(
    q, k, v, k2, v2, x, kv_weight, kv_bias, mask, mask2, bias, index, q_norm_weight, q_norm_bias, k_norm_weight,
    k_norm_bias, x_parts, kv_parts, seed, norm, eps, scale, masked, p, causal, x_norm, x_eps, dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, M, H, K); stats (B, H, M, 2): the softmax's maximum and denominator."""
    B, M, H, K = sizes(q, k, k2, x, mask, mask2, bias, index)
    compute = dtype or q.dtype
    if x is not None:
        k, v = _projected(x, kv_weight, kv_bias, compute, K)
    q = heads_normed(q, q_norm_weight, q_norm_bias, norm, eps, compute)[0]
    k = heads_normed(k, k_norm_weight, k_norm_bias, norm, eps, compute)[0]
    k2 = heads_normed(k2, k_norm_weight, k_norm_bias, norm, eps, compute)[0]
    y = torch.empty((B, M, H, K), dtype=compute, device=q.device)
    stats = torch.empty((B, H, M, 2), dtype=torch.float32, device=q.device)
    call = _Call.of(B, q, k, v, k2, v2, mask, mask2, bias, index, seed, scale, masked, p, causal, compute)
    if y.numel() == 0:
        return y, stats
    plain = k2 is None and all(t is None for t in (mask, bias, index)) and p == 0.0
    if k is not None and k.shape[1] and by_flash(plain, M, H, call.dims.G, K, compute, q.device.type):
        return _flash(q, k, v, B, scale or K**-0.5, compute)
    tiles = config(call.dims, compute, arch(q), call.loaded)
    blocks = triton.cdiv(M, tiles.m)
    if tiles.splits == 1:
        out, partial = y, stats
    else:
        out = torch.empty((tiles.splits, *y.shape), dtype=torch.float32, device=q.device)
        partial = torch.empty((tiles.splits, *stats.shape), dtype=torch.float32, device=q.device)
    cross_attention_fwd_kernel[(B * H * blocks * tiles.splits,)](
        *call.tensors, out, partial, *call.numbers, blocks, tiles.splits, _per(call.dims.N, tiles.splits, tiles.n),
        **call.flags, SPLIT=tiles.splits > 1, BLOCK_M=tiles.m, BLOCK_N=tiles.n,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if tiles.splits > 1:
        rows = B * M * H
        cross_attention_combine_kernel[(triton.cdiv(rows, 16),)](
            out, partial, y, stats, rows, M, H, tiles.splits, K=K, BLOCK_K=call.flags["BLOCK_K"], BLOCK_T=16,
            num_warps=4,
        )  # fmt: skip
    return y, stats


def _flash(q: Tensor, k: Tensor, v: Tensor, B: int, scale: float, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """y and stats by torch's FlashAttention 2: with the log of the denominator as maximum, the denominator is 1."""
    q, k, v = (t.to(compute).expand(B, -1, -1, -1).transpose(1, 2) for t in (q, k, v))
    if q.is_cuda:
        y, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    else:  # the same operator where tests run
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    lse = lse.float()
    return y.transpose(1, 2).contiguous(), torch.stack((lse, torch.ones_like(lse)), -1)


def backward(dy, saved, needs, norm, eps, scale, masked, p, causal, x_norm, x_eps, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    names = ("q", "k", "v", "k2", "v2", "x", "kv_weight", "kv_bias", "mask", "mask2", "bias", "index", "seed")
    q, k, v, k2, v2, x, kv_weight, kv_bias, mask, mask2, bias, index, seed = (saved[n] for n in names)
    norms = {side: (saved[side + "_norm_weight"], saved[side + "_norm_bias"]) for side in "qk"}
    y, stats = saved["y"], saved["stats"]
    B, M, H, K = y.shape
    compute = dtype or q.dtype
    if x is not None:
        k, v = _projected(x, kv_weight, kv_bias, compute, K)
    raw = {"q": q, "k": k, "k2": k2}
    (q, q_stats), (k, k_stats), (k2, k2_stats) = (
        heads_normed(t, *norms[name[0]], norm, eps, compute) for name, t in raw.items()
    )
    call = _Call.of(B, q, k, v, k2, v2, mask, mask2, bias, index, seed, scale, masked, p, causal, compute)
    first = None if k is None else _SourceGrad(k, B, index is not None, compute, packed=x is not None)
    second = None if k2 is None else _SourceGrad(k2, B, False, compute)
    grads = {"q": _attention_backward(dy, y, stats, call, q, first, second, k, index)}
    for name, source in (("", first), ("2", second)):
        if source is not None:
            grads["k" + name], grads["v" + name] = source.summed()
    grads |= through_norms(grads, raw, norms, {"q": q_stats, "k": k_stats, "k2": k2_stats}, norm)
    if x is not None:
        # (rows, 2 G K): keys and values of a row lie together
        grads |= _through_projection(first.both.flatten(0, 1).flatten(1), x, kv_weight, kv_bias, compute, needs)
    return {n: grads[n].to(saved[n].dtype) for n, need in needs.items() if need}


class _SourceGrad:
    """Where the kernels write dk and dv of one source.

    Rows of the batch are the source's own with an index, and B without; a source of one row for the whole batch gets
    their sum. packed: (rows, N, 2, G, K) in one tensor, as the product of x with keys and values above each other.
    """

    def __init__(self, k: Tensor, B: int, indexed: bool, compute: torch.dtype, packed: bool = False):
        self.rows, self.shape = (k.shape[0] if indexed else B), k.shape
        dtype = compute if self.rows == k.shape[0] else torch.float32
        made = {"dtype": dtype, "device": k.device}
        self.both = torch.empty((self.rows, k.shape[1], 2, *k.shape[2:]), **made) if packed else None
        self.pair = self.both.unbind(2) if packed else [torch.empty((self.rows, *k.shape[1:]), **made) for _ in "kv"]

    def summed(self) -> list[Tensor]:
        if self.rows != self.shape[0]:
            if self.both is not None:
                self.both = self.both.sum(0, keepdim=True)
                self.pair = self.both.unbind(2)
            else:
                self.pair = [t.sum(0, keepdim=True) for t in self.pair]
        return list(self.pair)


def _attention_backward(dy, y, stats, call: _Call, q, first, second, k, index) -> Tensor:
    """dq; dk and dv are written into the sources' buffers."""
    B, M, H, K = y.shape
    dims, empty = call.dims, y.new_empty(0)
    tiles = config(dims, call.compute, arch(y), call.loaded)
    dy = dy.to(call.compute)
    dy = dy if dy.stride(3) == 1 else dy.contiguous()
    parts = tiles.back_splits if tiles.one else 1
    whole = parts == 1 and q.shape[0] == B
    dq = torch.empty((parts, *y.shape), dtype=call.compute if whole else torch.float32, device=y.device)
    before = (*call.tensors, dy, y, stats)
    numbers = (*call.numbers, *dy.stride()[:3])
    common = call.flags | {"BLOCK_M": tiles.back_m, "BLOCK_N": tiles.back_n, "num_warps": tiles.back_warps}
    blocks = triton.cdiv(M, tiles.back_m)
    outs, strides = [], []
    for source in (first, second):
        outs += [empty, empty] if source is None else source.pair
        strides += (0, 0, 0) if source is None else source.pair[0].stride()[:3]
    if y.numel() == 0:
        for t in outs:
            t.zero_()
    elif tiles.one:
        cross_attention_bwd_kernel[(B * H * parts,)](
            *before, dq, *outs, *numbers, *strides, parts, _per(dims.N, parts, tiles.back_n), **common, num_stages=1
        )
    else:
        cross_attention_bwd_dq_kernel[(B * H * blocks,)](*before, dq, *numbers, blocks, **common, num_stages=2)
        order, starts = (empty, empty) if index is None else _members(index, k.shape[0])
        for number, source in enumerate((first, second)):
            if source is not None and source.shape[1]:
                grid = source.rows * dims.G * triton.cdiv(source.shape[1], tiles.back_n)
                cross_attention_bwd_dkv_kernel[(grid,)](
                    *before, order, starts, *source.pair, *numbers, *source.pair[0].stride()[:3], blocks,
                    SECOND=number == 1, **common, num_stages=1,
                )  # fmt: skip
    return dq[0] if whole else dq.sum((0, 1) if q.shape[0] != B else 0).view(q.shape)


def _members(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The rows of q by the source row that they attend to, and where each source row's begin (rows + 1)."""
    ordered, order = torch.sort(index, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(rows + 1, device=index.device))


# -- around the attention ------------------------------------------------------------------------------------------


def _projected(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, K: int) -> tuple[Tensor, Tensor]:
    """k and v (B, N, G, K), views of one product."""
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return y.unflatten(-1, (2, -1, K)).unbind(-3)


def _through_projection(dkv, x, weight, bias, dtype, needs) -> dict[str, Tensor]:
    """Gradients of x, kv_weight, kv_bias from dkv (rows, 2 G K)."""
    grads, dkv = {}, dkv.to(dtype)
    if needs["x"]:
        grads["x"] = (dkv @ weight.to(dtype)).view(x.shape)
    if needs["kv_weight"]:
        grads["kv_weight"] = dkv.t() @ x.reshape(-1, x.shape[2]).to(dtype)
    if needs["kv_bias"]:
        grads["kv_bias"] = dkv.sum(0, dtype=torch.float32)
    return grads


# -- arguments of the kernels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """What every kernel of one call takes: pointers, sizes with strides, and compile-time flags."""

    dims: Dims
    compute: torch.dtype
    loaded: torch.dtype
    tensors: tuple[Tensor, ...]
    numbers: tuple
    flags: dict

    @classmethod
    def of(cls, B, q, k, v, k2, v2, mask, mask2, bias, index, seed, scale, masked, p, causal, compute) -> _Call:
        q, k, v, k2, v2 = (t if t is None or t.stride(3) == 1 else t.contiguous() for t in (q, k, v, k2, v2))
        _, M, H, K = q.shape
        N, N2 = (0 if t is None else t.shape[1] for t in (k, k2))
        G = (k if k is not None else k2).shape[2]
        empty = q.new_empty(0)
        tensors = [empty if t is None else t for t in (q, k, v, k2, v2)]
        tensors += [empty if t is None else t.view(torch.uint8) for t in (mask, mask2)]
        tensors += [empty if t is None else t for t in (bias, index, seed)]
        strides = [batch_stride(t, (0, 1, 2)) for t in (q, k, v, k2, v2)]
        strides += [batch_stride(t, (0, 1)) for t in (mask, mask2)] + [batch_stride(bias, (0, 1, 2, 3))]
        if N + N2 >= 2**31 - 64 or M >= 2**31 - 64:
            raise ValueError(f"{N} + {N2} keys, {M} queries; accepted: fewer than 2^31 of each")
        numbers = (
            M, N, N2, H, G, *(s for group in strides for s in group), scale or K**-0.5, masked,
            threshold(p), keep_factor(p),
        )  # fmt: skip
        flags = {
            "HAS_MASK": mask is not None, "HAS_MASK2": mask2 is not None, "HAS_BIAS": bias is not None,
            "HAS_INDEX": index is not None, "HAS_DROPOUT": p > 0.0, "CAUSAL": causal, "HAS_SECOND": k2 is not None,
            **_tl.product(compute), "K": K, "BLOCK_K": max(16, triton.next_power_of_2(K)),
        }  # fmt: skip
        return cls(Dims(B * M, M, N, N2, H, G, K, index is not None), compute, q.dtype, tuple(tensors), numbers, flags)


def _per(keys: int, splits: int, block: int) -> int:
    """Keys of the first source in one split, whole tiles."""
    return triton.cdiv(triton.cdiv(keys, block), splits) * block
