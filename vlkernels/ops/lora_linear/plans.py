"""lora_linear's plans beside the default one, which triton.py holds; `_lora_plan` says what each does."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import _lora, _lora_packed, _lora_plan, _lora_two_source, _packed_storage
from .._dropout import keep_factor


def chosen(tiles: _lora.Config, weight: Tensor | None, b: Tensor, quant: Tensor | None) -> str:
    """The plan of a call with these weights."""
    if weight is None or quant is not None:
        return _lora_plan.DEFAULT
    return _lora_plan.choose(tiles.plan, _packed_storage.packed(weight, b) is not None)


def forward(
    plan: str, x2, weight, a, b, bias, lora_bias, seed, scale, p, s, dtype, tiles: _lora.Config, product=None
) -> Tensor:
    """y (T, N) under "two_source" or "packed", and s (T, R) filled in. `product` replaces the two-source kernel."""
    if plan == "packed":
        ext = _lora_packed.extend(x2, a, seed, p, scale, s, tiles.packed)
        bias = _lora_packed.bias_of_both(bias, lora_bias, scale, dtype)
        return F.linear(ext, _packed_storage.packed(weight, b).to(dtype), bias)
    _lora.down(x2, [a], seed, p, [s], tiles.down, keep_factor(p))
    y = x2.new_empty((x2.shape[0], b.shape[0]), dtype=dtype)
    product = product or _lora_two_source.product
    product(x2.to(dtype), weight.to(dtype), s, b, bias, lora_bias, None, scale, 0.0, y, tiles.two_source)
    return y


def packed_backward(dy2: Tensor, weight: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """dy W (T, K), a view with gaps between its rows, and ds = scale dy B (T, R), from one product."""
    both = dy2 @ _packed_storage.packed(weight, b).to(dy2.dtype)
    width = weight.shape[1]
    return both[:, :width], (both[:, width:] * scale).to(s.dtype)


def two_source_dx(dy2, weight, a, seed, p, ds, dx: Tensor, tiles: _lora.Config, product=None) -> None:
    """dx = keep / (1 - p) * (ds A) + dy W, written into dx (T, K)."""
    product = product or _lora_two_source.product
    product(dy2, weight.to(dy2.dtype).t(), ds, a.t(), None, None, seed, 1.0, p, dx, tiles.two_source_dx)


def packed_copies(arguments: dict) -> dict:
    """The op's arguments with weight and b as columns of one buffer, where their dtypes allow it."""
    weight, b = arguments["weight"], arguments["b"]
    if weight is None or arguments.get("quant") is not None or weight.dtype != b.dtype:
        return arguments
    if _packed_storage.packed(weight, b) is not None:
        return arguments
    views = zip(("weight", "b"), _packed_storage.pack(weight, b), strict=True)
    return arguments | {name: view.requires_grad_(arguments[name].requires_grad) for name, view in views}
