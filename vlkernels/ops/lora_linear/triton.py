"""lora_linear in Triton: cuBLAS runs the large products, these kernels the rank-r ones, a pass over each activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _lora, _refuse
from .._device import arch
from .._dropout import keep_factor, threshold
from .._lora import Dims, config, loaded
from .reference import low_rank_dtype


def refuses(x, weight, a, b, bias, lora_bias, base, seed, scale, p, dtype) -> str | None:
    if (reason := _refuse.common(x, dtype, weight=weight, a=a, b=b, base=base)) is not None:
        return reason
    if dtype is None and a.dtype not in (x.dtype, torch.float32):
        return f"adapters in {a.dtype} over {x.dtype}; kernels take adapters in x's dtype or float32"
    if a.shape[0] > _lora.MAX_RANK:
        return f"rank {a.shape[0]}; kernels take ranks from 1 to {_lora.MAX_RANK}"
    if a.shape[1] == 0 or b.shape[0] == 0:
        return f"zero channels: a {tuple(a.shape)}, b {tuple(b.shape)}"
    return None


def declines(x, weight, a, b, bias, lora_bias, base, seed, scale, p, dtype) -> str | None:
    # with dropout never: a checkpoint's first pass has no gradients, and its recomputation must draw the same mask
    if not torch.is_grad_enabled() and threshold(p) == 0 and x.numel() // x.shape[-1] <= 64:
        return "at most 64 rows without gradients (decoding): launch-bound, and nothing is saved"
    return None


def forward(x, weight, a, b, bias, lora_bias, base, seed, scale, p, dtype, update=None) -> tuple[Tensor, Tensor]:
    """y (..., N) and s (T, R). `update` replaces the rank-r update kernel (the CUDA backend's own)."""
    update = update or _lora.update
    out_dtype = dtype or x.dtype
    if base is None:
        # cuBLAS; a fresh buffer, so the update may write over it
        y = F.linear(x.to(out_dtype), weight.to(out_dtype), None if bias is None else bias.to(out_dtype))
        y_in = y
    else:
        y_in = base.to(out_dtype)
        y = torch.empty_like(y_in, memory_format=torch.contiguous_format)
    x2 = _lora.rows(x)
    low = low_rank_dtype(x, a, dtype)
    s = x.new_empty((x2.shape[0], a.shape[0]), dtype=low)
    if x2.shape[0] == 0:
        return y, s
    dims = Dims(x2.shape[0], x2.shape[1], b.shape[0], a.shape[0])
    tiles = config(dims, low, arch(x), loaded(x, a))
    _lora.down(x2, [a], seed, p, [s], tiles.down, keep_factor(p))
    update(_lora.rows(y_in), [(s, b)], lora_bias, None, scale, 0.0, _lora.rows(y), tiles.update)
    return y, s


def backward(dy, saved, needs, scale, p, dtype, update=None) -> dict[str, Tensor]:
    """Gradients by argument name: dx, dW, da, db, dbias, dlora_bias, dbase for those that are needed."""
    update = update or _lora.update
    x, weight, a, b, s = (saved[name] for name in ("x", "weight", "a", "b", "s"))
    out_dtype = dtype or x.dtype
    grads = {}
    dy2, x2 = _lora.rows(dy.to(out_dtype)), _lora.rows(x)
    if needs["base"]:
        grads["base"] = dy.to(saved["base"].dtype).clone(memory_format=torch.contiguous_format)
    if needs["weight"]:
        grads["weight"] = (dy2.t() @ x2.to(out_dtype)).to(weight.dtype)
    if needs["bias"] or needs["lora_bias"]:
        column_sums = dy2.sum(0, dtype=torch.float32)
        if needs["bias"]:
            grads["bias"] = column_sums.to(saved["bias"].dtype)
        if needs["lora_bias"]:
            grads["lora_bias"] = (column_sums * scale).to(saved["lora_bias"].dtype)
    if dy2.shape[0] == 0:
        grads |= {name: torch.zeros_like(saved[name]) for name in ("x", "a", "b") if needs[name]}
        return grads

    dims = Dims(x2.shape[0], x2.shape[1], b.shape[0], a.shape[0])
    tiles = config(dims, s.dtype, arch(x), loaded(x, a))
    need_ds = needs["x"] or needs["a"]
    ds, db = _lora.backward_of_up(dy2, b, s, scale, tiles, need_ds, needs["b"])
    if needs["b"]:
        grads["b"] = db
    if needs["a"]:
        grads["a"] = torch.empty_like(a, memory_format=torch.contiguous_format)
        _lora.outer(x2, [ds], saved["seed"], p, [grads["a"].t()], tiles.outer_x, keep_factor(p))
    if needs["x"]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if weight is None:
            plain = None
        else:
            plain = dy2 @ weight.to(out_dtype)
            dx = plain.view(x.shape) if plain.dtype == x.dtype else dx
        update(plain, [(ds, a.t())], None, saved["seed"], 1.0, p, _lora.rows(dx), tiles.update_dx)
        grads["x"] = dx
    return grads
