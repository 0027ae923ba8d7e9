"""lora_linear in Triton: cuBLAS runs the large products, these kernels the rank-r ones, a pass over each activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _lora, _lora_plan, _nf4_triton, _refuse
from .._device import arch
from .._dropout import keep_factor, threshold
from .._lora import Dims, config, config_key, loaded  # noqa: F401  (benchmarks/tune.py writes records under the key)
from . import plans
from .reference import low_rank_dtype


def refuses(x, weight, a, b, bias, lora_bias, base, seed, quant, scale, p, dtype, blocksize, quant_dtype) -> str | None:
    if (reason := _refuse.common(x, dtype, weight=weight if quant is None else None, a=a, b=b, base=base)) is not None:
        return reason
    if dtype is None and a.dtype not in (x.dtype, torch.float32):
        return f"adapters in {a.dtype} over {x.dtype}; kernels take adapters in x's dtype or float32"
    if a.shape[0] > _lora.MAX_RANK:
        return f"rank {a.shape[0]}; kernels take ranks from 1 to {_lora.MAX_RANK}"
    if a.shape[1] == 0 or b.shape[0] == 0:
        return f"zero channels: a {tuple(a.shape)}, b {tuple(b.shape)}"
    return None


def declines(
    x, weight, a, b, bias, lora_bias, base, seed, quant, scale, p, dtype, blocksize, quant_dtype
) -> str | None:
    # with dropout never: a checkpoint's first pass has no gradients, and its recomputation must draw the same mask
    # with a packed weight never: the reference dequantises all of it
    plain = quant is None and threshold(p) == 0
    if not torch.is_grad_enabled() and plain and x.numel() // x.shape[-1] <= 64:
        return "at most 64 rows without gradients (decoding): launch-bound, and nothing is saved"
    return None


def forward(
    x, weight, a, b, bias, lora_bias, base, seed, quant, scale, p, dtype, blocksize, quant_dtype,
    update=None, product=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (..., N) and s (T, R). `update` and `product` replace the kernels of the rank-r update and of two sources."""
    update = update or _lora.update
    out_dtype = dtype or x.dtype
    x2 = _lora.rows(x)
    low = low_rank_dtype(x, a, dtype)
    s = x.new_empty((x2.shape[0], a.shape[0]), dtype=low)
    if x2.shape[0]:
        dims = Dims(x2.shape[0], x2.shape[1], b.shape[0], a.shape[0])
        tiles = config(dims, low, arch(x), loaded(x, a), plain=out_dtype)
        plan = plans.chosen(tiles, weight, b, quant)
        if plan != _lora_plan.DEFAULT:
            y = plans.forward(
                plan, x2, weight, a, b, bias, lora_bias, seed, scale, p, s, out_dtype, tiles, product
            )  # fmt: skip
            return y.view(*x.shape[:-1], b.shape[0]), s
    if base is None:
        bias = None if bias is None else bias.to(out_dtype)
        shape = b.shape[0], a.shape[1]
        # a fresh buffer, so the update may write over it
        if quant is not None and _nf4_triton.fused_reason(x2.shape[0], shape) is None:
            y = _nf4_triton.linear(x2, weight, quant, bias, shape, blocksize, quant_dtype, out_dtype)
            y = y.view(*x.shape[:-1], shape[0])
        else:
            y = F.linear(x.to(out_dtype), _dense(weight, quant, shape, blocksize, quant_dtype, out_dtype), bias)
        y_in = y
    else:
        y_in = base.to(out_dtype)
        y = torch.empty_like(y_in, memory_format=torch.contiguous_format)
    if x2.shape[0] == 0:
        return y, s
    _lora.down(x2, [a], seed, p, [s], tiles.down, keep_factor(p))
    update(_lora.rows(y_in), [(s, b)], lora_bias, None, scale, 0.0, _lora.rows(y), tiles.update)
    return y, s


def _dense(weight, quant, shape, blocksize, quant_dtype, dtype) -> Tensor:
    """The weight (N, K) in `dtype`; a packed one is dequantised, and kept for a moment."""
    if quant is None:
        return weight.to(dtype)
    return _nf4_triton.dense(weight, quant, shape, blocksize, quant_dtype, dtype)


def backward(dy, saved, needs, scale, p, dtype, blocksize, quant_dtype, update=None, product=None) -> dict[str, Tensor]:
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
    tiles = config(dims, s.dtype, arch(x), loaded(x, a), plain=out_dtype)
    plan = plans.chosen(tiles, weight, b, saved["quant"]) if needs["x"] else _lora_plan.DEFAULT
    plain = ds = None
    if plan == "packed":
        plain, ds = plans.packed_backward(dy2, weight, b, s, scale)
    need_ds = (needs["x"] or needs["a"]) and ds is None
    own_ds, db = _lora.backward_of_up(dy2, b, s, scale, tiles, need_ds, needs["b"])
    ds = own_ds if ds is None else ds
    if needs["b"]:
        grads["b"] = db
    if needs["a"]:
        grads["a"] = torch.empty_like(a, memory_format=torch.contiguous_format)
        _lora.outer(x2, [ds], saved["seed"], p, [grads["a"].t()], tiles.outer_x, keep_factor(p))
    if needs["x"] and plan == "two_source":
        grads["x"] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        plans.two_source_dx(dy2, weight, a, saved["seed"], p, ds, _lora.rows(grads["x"]), tiles, product)
    elif needs["x"]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if weight is not None and plain is None:
            shape = b.shape[0], a.shape[1]
            plain = dy2 @ _dense(weight, saved["quant"], shape, blocksize, quant_dtype, out_dtype)
            dx = plain.view(x.shape) if plain.dtype == x.dtype else dx
        update(plain, [(ds, a.t())], None, saved["seed"], 1.0, p, _lora.rows(dx), tiles.update_dx)
        grads["x"] = dx
    return grads
