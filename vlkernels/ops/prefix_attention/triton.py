"""prefix_attention in Triton: one pass over q and o each way, the prefix in registers; launches and configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .. import _refuse, _tl
from .._device import arch, multiprocessors
from .kernels import prefix_attention_bwd_kernel, prefix_attention_fwd_kernel, prefix_attention_sum_kernel

MAX_HEAD_DIM = 128  # a row of the prefix is held in one tile
MAX_HEADS = 1024  # one program sums the gradients of all gates
SUM_BLOCK = 1024  # elements of dk or dv that one program sums


def refuses(o, q, k, v, gate, factor, scale, tanh, dtype) -> str | None:
    if (reason := _refuse.common(o, dtype, q=q, k=k, v=v, gate=gate, factor=factor)) is not None:
        return reason
    if o.shape[3] > MAX_HEAD_DIM:
        return f"head dim {o.shape[3]}; kernels take up to {MAX_HEAD_DIM}"
    if o.shape[2] > MAX_HEADS:
        return f"{o.shape[2]} heads; kernels take up to {MAX_HEADS}"
    return None


def declines(*values) -> str | None:
    return None


# -- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dims:
    """Of one call: T = B L rows; S rows of the prefix's batch, 1 or B."""

    T: int
    L: int
    P: int
    S: int
    H: int
    G: int
    K: int

    @property
    def B(self) -> int:
        return self.T // max(1, self.L)


@dataclass(frozen=True)
class Config:
    """l: queries of a head that one program takes in forward; back_l: in backward at a time.

    splits: programs that share the queries of one row of the prefix's batch and one key/value head in backward; each
    keeps its sums of dk and dv in registers and writes them once. per: tiles of each. together: dq, dk and dv in one
    launch, else in three, each of which reads q and dy. hold: of the one that gives dq, what of the prefix stays on
    chip between its products: 2 keys and values, 1 values. gate_rows: tiles whose gates' gradients one pass sums.
    """

    l: int
    warps: int
    back_l: int
    back_warps: int
    splits: int
    per: int
    together: bool
    hold: int
    gate_rows: int


def config(dims: Dims, compute: torch.dtype, device_arch: int, loaded: torch.dtype) -> Config:
    """Tiles by width; loaded: the dtype in which q comes. Not timed on a GPU yet.

    The kernels are bound by memory: small tiles keep the products' operands in registers, and 32 rows keep sm_100 from
    its tensor memory, of whose layouts Triton 3.7 fails to compile these sums over rows.
    """
    p, k = max(16, triton.next_power_of_2(dims.P)), max(16, triton.next_power_of_2(dims.K))
    # a float32 operand of a product is three
    single = compute == torch.float32
    # two sums of (P, K) stay in registers while tiles of q and dy pass
    heavy = p * k > 16 * 128
    l = 16 if single or loaded == torch.float32 else 32
    # on sm_80 the compiler keeps to 128 registers and spills what more rows need
    back_l = 16 if 0 < device_arch < 90 and not heavy else l
    back_warps = 8 if heavy or single else 4
    together = not (single and p * k > 32 * 128)
    # sm_80's shared memory has no room for both
    hold = 1 if 0 < device_arch < 90 and not together else 2
    blocks = triton.cdiv(dims.L, back_l)
    tiles = max(1, dims.B // max(1, dims.S) * (dims.H // dims.G) * blocks)
    programs = max(1, dims.S * dims.G)
    splits = max(1, min(tiles, triton.cdiv(2 * multiprocessors(device_arch), programs)))
    per = triton.cdiv(tiles, splits)
    gate_rows = max(1, 512 // triton.next_power_of_2(dims.H))
    return Config(l, 4, back_l, back_warps, triton.cdiv(tiles, per), per, together, hold, gate_rows)


# -- forward and backward ------------------------------------------------------------------------------------------


def forward(o, q, k, v, gate, factor, scale, tanh, dtype) -> tuple[Tensor]:
    """y (B, L, H, K)."""
    compute = dtype or o.dtype
    B, L, H, K = o.shape
    y = torch.empty((B, L, H, K), dtype=compute, device=o.device)
    if y.numel() == 0:
        return (y,)
    o = _rows(o)
    call = _Call.of(q, k, v, gate, factor, scale, tanh, compute)
    tiles = config(call.dims, compute, arch(o), q.dtype)
    blocks = triton.cdiv(L, tiles.l)
    prefix_attention_fwd_kernel[(B * blocks * H,)](
        *call.tensors, o, y, *call.numbers, *o.stride()[:3], blocks, **call.flags, BLOCK_L=tiles.l,
        num_warps=tiles.warps, num_stages=1,
    )  # fmt: skip
    return (y,)


def backward(dy, saved, needs, scale, tanh, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed; o's is dy itself, which is not given here."""
    q, k, v, gate, factor = (saved[n] for n in ("q", "k", "v", "gate", "factor"))
    compute = dtype or q.dtype
    B, L, H, K = q.shape
    S, P, G, _ = k.shape
    made = {n: torch.empty(saved[n].shape, dtype=saved[n].dtype, device=q.device) for n, need in needs.items() if need}
    if q.numel() == 0:
        return {n: t.zero_() for n, t in made.items()}
    dy = _rows(dy)
    call = _Call.of(q, k, v, gate, factor, scale, tanh, compute)
    tiles = config(call.dims, compute, arch(q), q.dtype)
    blocks = triton.cdiv(L, tiles.back_l)
    prefix, gates = needs["k"] or needs["v"], needs["gate"] or needs["factor"]
    empty, single = q.new_empty(0), {"dtype": torch.float32, "device": q.device}
    parts = torch.empty((S, G, tiles.splits, 2, P, K), **single) if prefix else empty
    dgates = torch.empty((B * blocks, H), **single) if gates else empty
    wanted = {"HAS_DQ": needs["q"], "HAS_GATES": gates, "HAS_DK": needs["k"], "HAS_DV": needs["v"]}
    launches = [tuple(wanted)] if tiles.together else [("HAS_DQ", "HAS_GATES"), ("HAS_DK",), ("HAS_DV",)]
    for names in launches:
        flags = {name: need and name in names for name, need in wanted.items()}
        if any(flags.values()):
            prefix_attention_bwd_kernel[(S * G * tiles.splits,)](
                *call.tensors, dy, made.get("q", empty), parts, dgates, *call.numbers, *dy.stride()[:3], blocks,
                tiles.splits, tiles.per, B // S, **call.flags, **flags, HALVES=not tiles.together,
                HOLD=tiles.hold if tiles.together or "HAS_DQ" in names else 0, BLOCK_L=tiles.back_l,
                num_warps=tiles.back_warps, num_stages=1,
            )  # fmt: skip
    if prefix or gates:
        pieces = triton.cdiv(P * K, SUM_BLOCK)
        sums = 2 * S * G * pieces if prefix else 0
        block_h = triton.next_power_of_2(H)
        prefix_attention_sum_kernel[(sums + gates,)](
            parts, dgates, gate, factor, *(made.get(n, empty) for n in ("k", "v", "gate", "factor")), P, G, H,
            tiles.splits, B * blocks, pieces, sums, gate.stride(0) if gate.shape[0] > 1 else 0,
            K=K, HAS_DK=needs["k"], HAS_DV=needs["v"], HAS_DGATE=needs["gate"], HAS_DFACTOR=needs["factor"],
            ONE_GATE=gate.shape[0] == 1, TANH=tanh, HAS_FACTOR=factor is not None, BLOCK=SUM_BLOCK, BLOCK_H=block_h,
            BLOCK_R=tiles.gate_rows, num_warps=4,
        )  # fmt: skip
    return made


# -- arguments of the kernels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """What both kernels of one call take: pointers, sizes with strides, and compile-time flags."""

    dims: Dims
    tensors: tuple
    numbers: tuple
    flags: dict

    @classmethod
    def of(cls, q, k, v, gate, factor, scale, tanh, compute) -> _Call:
        q, k, v = (_rows(t) for t in (q, k, v))
        B, L, H, K = q.shape
        S, P, G, _ = k.shape
        if L >= 2**31 - 128 or B * L * H >= 2**31 * 16:
            raise ValueError(f"q has shape {tuple(q.shape)}; accepted: fewer than 2^31 tiles of 16 rows")
        source = [0 if S == 1 else t.stride(0) for t in (k, v)]
        numbers = (
            L, P, H, G, *q.stride()[:3], source[0], *k.stride()[1:3], source[1], *v.stride()[1:3],
            gate.stride(0) if gate.shape[0] > 1 else 0, scale or K**-0.5,
        )  # fmt: skip
        flags = {
            "TANH": tanh, "HAS_FACTOR": factor is not None, **_tl.product(compute), "K": K,
            "BLOCK_K": max(16, triton.next_power_of_2(K)), "BLOCK_P": max(16, triton.next_power_of_2(P)),
        }  # fmt: skip
        return cls(Dims(B * L, L, P, S, H, G, K), (q, k, v, gate, factor), numbers, flags)


def _rows(t: Tensor) -> Tensor:
    """t with contiguous head dims; itself where they are."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()
