"""bottleneck_adapter in Triton.

Up to MAX_RANK columns of z a tile of rows is one program each way: x is read, z stays in registers, the rows of x and
of what is added are read where y is written. Backward computes z once more in the same way and writes it, dpre and the
norm's statistics as scratch for the weights' gradients (weights.py); nothing but arguments is kept from forward.
Above that the products are cuBLAS's, with one pass between them and one after (products.py). Experts of a route are
columns of one wide z: those of expert e times route_e.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .. import _lora, _norm, _refuse, _tl
from .._device import arch, multiprocessors
from .._dropout import keep_factor, threshold
from . import products, weights
from .kernels import bottleneck_adapter_bwd_kernel, bottleneck_adapter_fwd_kernel
from .reference import gate_kind, out_dtype

MAX_RANK = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}


def refuses(
    x, down, up, down_bias, up_bias, norm_weight, norm_bias, base, residual, gate, route, seed, act, norm, eps, scale,
    skip, gate_act, p, dtype,
) -> str | None:  # fmt: skip
    given = {"down": down, "up": up, "down_bias": down_bias, "up_bias": up_bias, "norm_weight": norm_weight,
             "norm_bias": norm_bias, "base": base, "residual": residual, "gate": gate, "route": route}  # fmt: skip
    if (reason := _refuse.common(x, dtype, **given)) is not None:
        return reason
    return None if fused(up, dtype or x.dtype) else _norm.refuses(x, norm, 1)


def declines(*values) -> str | None:
    return None


def note(x, down, up, *others) -> str:
    dtype = others[-1] or x.dtype
    if fused(up, dtype):
        return "one kernel for a tile of rows"
    return f"products on cuBLAS: {up.shape[1]} columns of z, one kernel holds {MAX_RANK[dtype]}"


def fused(up: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tile of rows holds all of z."""
    return up.shape[1] <= MAX_RANK[dtype]


@dataclass(frozen=True)
class Dims:
    """ER: columns of z, of all experts."""

    T: int
    D: int
    N: int
    ER: int


@dataclass(frozen=True)
class Call:
    """One call as kernels see it. gate: "none", "row", "channel", "element"; per_gate: rows that share an entry of a
    gate of rows, per_sample: rows of a sample."""

    T: int
    D: int
    N: int
    R: int
    E: int
    routed: bool
    compute: torch.dtype
    gate: str
    per_gate: int
    per_sample: int
    act: str
    norm: str
    eps: float
    scale: float
    skip: str
    sigmoid: bool
    p: float

    @property
    def dims(self) -> Dims:
        return Dims(self.T, self.D, self.N, self.R * self.E)


def call(x, down, up, gate, route, act, norm, eps, scale, skip, gate_act, p, dtype) -> Call:
    D, R, N = x.shape[-1], down.shape[0], up.shape[0]
    T, kind = x.numel() // D, gate_kind(x, gate, N)
    shared = kind in ("scalar", "sample", "row")
    return Call(
        T, D, N, R, 1 if route is None else route.shape[1], route is not None, dtype or x.dtype,
        "row" if shared else kind, max(1, T // max(1, gate.numel())) if shared else 1,
        max(1, T // max(1, x.shape[0])), act, norm, eps, scale, skip, gate_act == "sigmoid", p,
    )  # fmt: skip


def flat_gate(gate: Tensor | None, kind: str) -> Tensor | None:
    if gate is None:
        return None
    return _lora.rows(gate) if kind == "element" else gate.reshape(-1).contiguous()


def forward(
    x, down, up, down_bias, up_bias, norm_weight, norm_bias, base, residual, gate, route, seed, act, norm, eps, scale,
    skip, gate_act, p, dtype,
) -> tuple[Tensor]:  # fmt: skip
    c = call(x, down, up, gate, route, act, norm, eps, scale, skip, gate_act, p, dtype)
    y = torch.empty((*x.shape[:-1], c.N), dtype=out_dtype(x, base, residual, skip, dtype), device=x.device)
    if c.T == 0:
        return (y,)
    x2, gate = _lora.rows(x), flat_gate(gate, c.gate)
    base, residual = (t if t is None else _lora.rows(t) for t in (base, residual))
    route, *vectors = (_flat(t) for t in (route, down_bias, up_bias, norm_weight, norm_bias))
    if not fused(up, c.compute):
        products.forward(c, x2, down, up, *vectors, base, residual, gate, route, seed, y.view(-1, c.N))
        return (y,)
    tile = config(c.dims, c.compute, arch(x), _lora.loaded(x, down, up)).forward
    bottleneck_adapter_fwd_kernel[(triton.cdiv(c.T, tile.rows),)](
        x2, down, up, *vectors, base, residual, gate, route, seed, y, c.T, c.D, c.N, c.R, c.E, c.per_gate,
        c.per_sample, x2.stride(0), *down.stride(), *up.stride(), c.N,
        *(0 if t is None else t.stride(0) for t in (base, residual, gate)), eps, scale, threshold(p), keep_factor(p),
        HAS_BASE=base is not None, HAS_RESIDUAL=residual is not None, **_switches(c, *vectors), **_blocks(tile),
        **_tl.product(c.compute),
    )  # fmt: skip
    return (y,)


def backward(dy, saved, needs, act, norm, eps, scale, skip, gate_act, p, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, down, up, down_bias, up_bias, norm_weight, norm_bias, gate, route, seed = (saved[n] for n in (
        "x", "down", "up", "down_bias", "up_bias", "norm_weight", "norm_bias", "gate", "route", "seed"))  # fmt: skip
    c = call(x, down, up, gate, route, act, norm, eps, scale, skip, gate_act, p, dtype)
    if c.T == 0:
        return {n: torch.zeros_like(saved[n], memory_format=torch.contiguous_format) for n in saved if needs[n]}
    x2, dy2 = _lora.rows(x), _lora.rows(dy)
    shapes = {n: t for n, t in saved.items() if needs[n]}
    flat = {"route": route, "down_bias": down_bias, "up_bias": up_bias, "norm_weight": norm_weight}
    tensors = {n: _flat(t) for n, t in (flat | {"norm_bias": norm_bias}).items()}
    tensors |= {"down": down, "up": up, "gate": flat_gate(gate, c.gate), "seed": seed}
    made = _fused_backward if fused(up, c.compute) else products.backward
    grads = made(c, dy2, x2, tensors, needs)
    return {n: grads[n].view(t.shape).to(t.dtype) for n, t in shapes.items()}


def _fused_backward(c: Call, dy: Tensor, x: Tensor, t: dict, needs: dict) -> dict[str, Tensor]:
    tiles, gate = config(c.dims, c.compute, arch(x), _lora.loaded(x, t["down"], t["up"])), t["gate"]
    need_down, need_up = weights.wanted(c, needs)
    scratch = need_down or need_up

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

    z, dpre = (empty(scratch, c.T, c.R * c.E, dtype=c.compute) for _ in range(2))
    stats = empty(scratch and c.norm != "none", c.T, 2)
    dx = empty(needs["x"], c.T, c.D, dtype=x.dtype)
    dgate = empty(needs["gate"] and c.gate == "element", c.T, c.N, dtype=None if gate is None else gate.dtype)
    dots = empty(needs["gate"] and c.gate == "row", c.T)
    droute = empty(needs["route"], c.T, c.E)
    if any(out is not None for out in (z, dx, dgate, dots, droute)):
        tile = tiles.backward
        vectors = tuple(t[n] for n in ("down_bias", "up_bias", "norm_weight", "norm_bias"))
        bottleneck_adapter_bwd_kernel[(triton.cdiv(c.T, tile.rows),)](
            dy, x, t["down"], t["up"], *vectors, gate, t["route"], t["seed"], dx, z, dpre, stats, dgate, dots, droute,
            c.T, c.D, c.N, c.R, c.E, c.per_gate, c.per_sample, dy.stride(0), x.stride(0), *t["down"].stride(),
            *t["up"].stride(), c.N, 0 if gate is None else gate.stride(0), c.eps, c.scale, threshold(c.p),
            keep_factor(c.p),
            HAS_DX=needs["x"], HAS_SCRATCH=scratch, HAS_DGATE=dgate is not None or dots is not None,
            HAS_DROUTE=needs["route"], **_switches(c, *vectors), **_blocks(tile), **_tl.product(c.compute),
        )  # fmt: skip
    grads = {"x": dx, "gate": dgate, "route": droute}
    if dots is not None:
        grads["gate"] = weights.of_rows(dots, gate, c.sigmoid)
    if need_down:
        grads |= _of_down(c, x, t, needs, dpre, stats, tiles.outer_x)
    return weights.of_up(c, dy, x, t, needs, z if need_up else None, None, tiles.outer_dy, grads)


def _of_down(c: Call, x, t, needs, dpre, stats, tile) -> dict[str, Tensor]:
    grads, sums = {}, None
    if needs["down_bias"] or t["norm_bias"] is not None:
        sums = dpre.sum(0, dtype=torch.float32)
        sums = sums.view(c.E, c.R).sum(0) if c.E > 1 else sums
        grads["down_bias"] = sums
    if needs["down"] or needs["norm_weight"] or needs["norm_bias"]:
        parts, _ = weights.outer(x, dpre, tile, stats=stats, layer=c.norm == "layer")
        grads |= weights.finish_down(parts, sums, t["down"], t["norm_weight"], t["norm_bias"], c.R, needs)
    return grads


def _flat(t: Tensor | None) -> Tensor | None:
    """Contiguous; a vector of a wider buffer is copied."""
    return None if t is None else t.contiguous()


def _switches(c: Call, down_bias, up_bias, norm_weight, norm_bias) -> dict:
    return {
        "ACT": c.act, "NORM": c.norm, "GATE": c.gate, "SIGMOID": c.sigmoid, "SKIP": c.skip, "ROUTED": c.routed,
        "HAS_DB": down_bias is not None, "HAS_UB": up_bias is not None, "HAS_NW": norm_weight is not None,
        "HAS_NB": norm_bias is not None, "HAS_DROPOUT": c.p > 0.0,
    }  # fmt: skip


def _blocks(tile: Tile) -> dict:
    return {"BLOCK_T": tile.rows, "BLOCK_D": tile.cols, "BLOCK_N": tile.out, "BLOCK_R": tile.rank,
            "num_warps": tile.warps, "num_stages": tile.stages}  # fmt: skip


# -- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """rows; columns of x (cols), of y (out) and of z (rank, all of them) held at once."""

    rows: int
    cols: int
    out: int
    rank: int
    warps: int
    stages: int = 3


@dataclass(frozen=True)
class Config:
    forward: Tile
    backward: Tile
    outer_x: weights.Tile  # dpreᵀ norm(x)
    outer_dy: weights.Tile  # dyᵀ z


def config(dims: Dims, dtype: torch.dtype, device_arch: int, loaded: torch.dtype) -> Config:
    """Tiles by shape; `loaded` is the widest dtype of x and the weights. None of the steps below has been timed on a
    GPU yet."""
    wide = dtype == torch.float32
    sms = multiprocessors(device_arch)
    rank = _lora.cover(dims.ER)

    def rows(most: int) -> int:
        # every program reads both weights, so tall tiles, but at least one for each multiprocessor
        while most > 16 and triton.cdiv(dims.T, most) < sms:
            most //= 2
        return most

    def tile(most: int, cols: int, out: int, stages: int) -> Tile:
        held = rows(most)
        # h, z and their factors stay in registers beside a tile of y
        warps = 8 if rank > 64 or held * rank >= (32 * 64 if wide else 64 * 64) else 4
        return Tile(held, min(cols, _lora.cover(dims.D)), min(out, _lora.cover(dims.N)), rank, warps, stages)

    def outer(width: int) -> weights.Tile:
        cols, held = min(64, _lora.cover(width)), min(rank, 64 if wide else 128)
        programs = triton.cdiv(width, cols) * triton.cdiv(rank, held)
        # a partial sum costs 8 bytes a column and rank, against 2 or 4 a row and column of the pass itself
        splits = max(1, min(triton.cdiv(2 * sms, programs), dims.T // max(64, 4 * rank)))
        # wgmma reads operands from shared memory; on sm_100 they take registers, on sm_80 those of half as many rows
        warps = 8 if cols * held >= (64 * 64 if device_arch >= 100 else 64 * 128) else 4
        held_rows = 32 if wide or device_arch < 90 else 64
        return weights.Tile(held_rows, cols, held, warps, 3 if device_arch == 90 else 2, splits)

    # a tile of a weight is addresses and operands in registers too: past these sizes builds spill
    most = 64 if rank <= 64 and not wide else 32 if rank <= 64 or not wide else 16
    cols = 32 if wide or rank > 128 else 64
    forward = tile(most, cols, cols, 2 if rank > 128 else 3)
    if rank > 64:
        # under autocast a tile of x is there twice, before and after rounding
        twice = loaded == torch.float32
        most = 16 if wide or twice or rank > 128 else 32
        backward = tile(most, 16 if wide or rank > 128 else 32, 16 if rank > 128 else 32, 2)
    else:
        backward = tile(most, cols, cols, 2)
    return Config(forward, backward, outer(dims.D), outer(dims.N))
