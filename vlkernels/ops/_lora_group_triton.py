"""Several adapted projections of one x in Triton: cuBLAS runs the large products, each activation is passed over once
for all adapters of the group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _lora, _nf4_triton, _refuse
from ._device import arch
from ._dropout import keep_factor
from ._lora import Dims, config
from ._lora_group import Branch, adapted


def refuses(group: list[Branch], x: Tensor, dtype: torch.dtype | None) -> str | None:
    named = {
        f"{b.name}_{f}": getattr(b, f) for b in group for f in ("weight", "a", "b") if f != "weight" or b.quant is None
    }
    if (reason := _refuse.common(x, dtype, **named)) is not None:
        return reason
    for branch in group:
        if branch.out == 0 or branch.width == 0:
            return f"zero channels: {branch.name}_weight {(branch.out, branch.width)}"
        if branch.a is None:
            continue
        if dtype is None and branch.a.dtype not in (x.dtype, torch.float32):
            return f"adapters in {branch.a.dtype} over {x.dtype}; kernels take adapters in x's dtype or float32"
        if branch.a.shape[0] > _lora.MAX_RANK:
            return f"{branch.name}_a has rank {branch.a.shape[0]}; kernels take ranks from 1 to {_lora.MAX_RANK}"
    return None


def _config(branch: Branch, rows: int, low: torch.dtype, x: Tensor):
    """Tiles of the passes over the projection's own y and dy."""
    dims = Dims(rows, branch.width, branch.out, branch.a.shape[0])
    return config(dims, low, arch(x), _lora.loaded(x, branch.a))


def _shared_config(group: list[Branch], rows: int, low: torch.dtype, x: Tensor):
    """Tiles of the passes over x and dx, which all adapters share."""
    with_adapter = adapted(group)
    rank = max(b.a.shape[0] for b in with_adapter)
    dims = Dims(rows, group[0].width, group[0].out, rank)
    return config(dims, low, arch(x), _lora.loaded(x, *(b.a for b in with_adapter)), len(with_adapter))


def _dense(branch: Branch, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) in `dtype`; a packed one is dequantised, and kept for a moment."""
    if branch.quant is None:
        return branch.weight.to(dtype)
    shape = branch.out, branch.width
    return _nf4_triton.dense(branch.weight, branch.quant, shape, branch.blocksize, branch.quant_dtype, dtype)


def _linear(branch: Branch, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x Wᵀ + bias; few rows over a packed weight read it in 4 bits."""
    bias = None if branch.bias is None else branch.bias.to(dtype)
    shape, rows = (branch.out, branch.width), x.numel() // max(branch.width, 1)
    if branch.quant is not None and rows and _nf4_triton.fused_reason(rows, shape) is None:
        y = _nf4_triton.linear(
            _lora.rows(x), branch.weight, branch.quant, bias, shape, branch.blocksize, branch.quant_dtype, dtype
        )
        return y.view(*x.shape[:-1], branch.out)
    return F.linear(x, _dense(branch, dtype), bias)


def forward(
    group: list[Branch], x: Tensor, seed: Tensor | None, p: float, dtype: torch.dtype, ss: list[Tensor]
) -> list[Tensor]:
    """The y_i (..., N_i) in `dtype`; fills ss with s_i."""
    wide = x.to(dtype)
    ys = [_linear(branch, wide, dtype) for branch in group]
    x2 = _lora.rows(x)
    with_adapter = adapted(group)
    if x2.shape[0] == 0 or not with_adapter:
        return ys
    live = [s for s, b in zip(ss, group, strict=True) if b.a is not None]
    tile = _shared_config(group, x2.shape[0], live[0].dtype, x).down
    _lora.down(x2, [b.a for b in with_adapter], seed, p, live, tile, keep_factor(p))
    for branch, y, s in zip(group, ys, ss, strict=True):
        if branch.a is not None:
            y2, tile = _lora.rows(y), _config(branch, x2.shape[0], s.dtype, x).update
            _lora.update(y2, [(s, branch.b)], branch.lora_bias, None, branch.scale, 0.0, y2, tile)
    return ys


def backward(
    group: list[Branch],
    dys: list[Tensor | None],
    x: Tensor,
    ss: list[Tensor],
    seed: Tensor | None,
    p: float,
    dtype: torch.dtype,
    needs: dict[str, bool],
    need_x: bool,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """dx in x's dtype, and gradients by argument name where needed; a dy of None is a zero."""
    grads: dict[str, Tensor] = {}
    x2 = _lora.rows(x)
    rows = x2.shape[0]
    plain: Tensor | None = None
    pairs: list[tuple[Tensor, Tensor]] = []  # (ds_i, A_i) of every adapter, a zero ds for a dy of None
    need_ds = need_x or any(needs[f"{b.name}_a"] for b in adapted(group))
    for branch, dy, s in zip(group, dys, ss, strict=True):
        need = {f: needs[f"{branch.name}_{f}"] for f in ("weight", "a", "b", "bias", "lora_bias")}
        if dy is None or rows == 0:
            names = [f for f in need if need[f] and (f != "a" or rows == 0)]
            grads |= {f"{branch.name}_{f}": torch.zeros_like(getattr(branch, f)) for f in names}
            if branch.a is not None and rows:
                pairs.append((torch.zeros_like(s), branch.a))
            continue
        dy2 = _lora.rows(dy.to(dtype))
        if need["weight"]:
            grads[f"{branch.name}_weight"] = (dy2.t() @ x2.to(dtype)).to(branch.weight.dtype)
        if need["bias"] or need["lora_bias"]:
            sums = dy2.sum(0, dtype=torch.float32)
            if need["bias"]:
                grads[f"{branch.name}_bias"] = sums.to(branch.bias.dtype)
            if need["lora_bias"]:
                grads[f"{branch.name}_lora_bias"] = (sums * branch.scale).to(branch.lora_bias.dtype)
        if need_x:
            weight = _dense(branch, dtype)
            plain = dy2 @ weight if plain is None else plain.addmm_(dy2, weight)
        if branch.a is not None:
            tiles = _config(branch, rows, s.dtype, x)
            ds, db = _lora.backward_of_up(dy2, branch.b, s, branch.scale, tiles, need_ds, need["b"])
            if need["b"]:
                grads[f"{branch.name}_b"] = db
            pairs.append((ds, branch.a))
    if rows == 0:
        return (torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need_x else None), grads
    with_adapter = adapted(group)
    tiles = _shared_config(group, rows, ss[group.index(with_adapter[0])].dtype, x) if with_adapter else None
    wanted = [b for b in with_adapter if needs[f"{b.name}_a"]]
    if wanted:
        # all or nothing: a frozen A among trained ones costs its share of one pass
        for b in with_adapter:
            grads[f"{b.name}_a"] = torch.empty_like(b.a, memory_format=torch.contiguous_format)
        outs = [grads[f"{b.name}_a"].t() for b in with_adapter]
        _lora.outer(x2, [ds for ds, _ in pairs], seed, p, outs, tiles.outer_x, keep_factor(p))
    if not need_x:
        return None, grads
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if plain is None:
        plain = torch.zeros(x2.shape, dtype=dtype, device=x.device)
    if not pairs:
        return plain.view(x.shape).to(x.dtype), grads
    dx = plain.view(x.shape) if plain.dtype == x.dtype else dx
    transposed = [(ds, a.t()) for ds, a in pairs]
    _lora.update(plain, transposed, None, seed, 1.0, p, _lora.rows(dx), tiles.update_dx)
    return dx, grads
