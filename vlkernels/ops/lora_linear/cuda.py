"""lora_linear with the compiled rank-r update, under the plan "two_source" with the compiled product where that takes
the operands; everything else stays as in triton.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _compiled, _lora_two_source, _two_source
from . import triton as skinny


def refuses(x, weight, a, b, bias, lora_bias, base, seed, quant, scale, p, dtype, blocksize, quant_dtype) -> str | None:
    if not x.is_cuda:
        return f"x is on {x.device.type}; compiled kernels run on CUDA devices"
    return missing(x.device.index) or skinny.refuses(
        x, weight, a, b, bias, lora_bias, base, seed, quant, scale, p, dtype, blocksize, quant_dtype
    )


def declines(
    x, weight, a, b, bias, lora_bias, base, seed, quant, scale, p, dtype, blocksize, quant_dtype
) -> str | None:
    return "no measurement shows it ahead of Triton's update kernel yet; backend='cuda' forces it"


def forward(*values) -> tuple[Tensor, Tensor]:
    return skinny.forward(*values, update=_update, product=_product)


def backward(dy, **context) -> dict[str, Tensor]:
    return skinny.backward(dy, **context, update=_update, product=_product)


def missing(device: int | None = None) -> str | None:
    """Why the compiled kernel cannot run on this CUDA device (default: the current one), or None."""
    return _compiled.missing("lora_linear", device)


def update(
    base: Tensor, s: Tensor, b: Tensor, bias: Tensor | None, seed: Tensor | None, scale: float, p: float, out: Tensor
) -> Tensor:
    """out = base + mask(seed, p) * scale * (s bᵀ + bias), written into `out`, which may be `base`.

    base, out (T, N); s (T, R); b (N, R), any strides; bias (N,) or None; seed 0-d int64, needed when p > 0.
    """
    torch.ops.vlkernels_cuda.lora_linear_update(base, s, b, bias, seed, scale, p, out)
    return out


def _update(base, pairs, bias, seed, scale, p, out, tile) -> None:
    """update as triton.py calls it: no base means zero, and the tile is the Triton kernel's own affair."""
    ((s, b),) = pairs
    update(out.zero_() if base is None else base, s, b, bias, seed, scale, p, out)


def _product(x, w, s, b, bias, lora_bias, seed, scale, p, out, tile) -> None:
    """The product over two sources as triton.py calls it, on the compiled kernels where they take it."""
    low = s.dtype
    bias, lora_bias = (None if t is None else t.to(low) for t in (bias, lora_bias))
    if _two_source.missing(x.device.index) is None and out.dtype == low:
        b = b.to(low)
        if seed is None and _two_source.refuses(x=x, w=w, s=s, b=b, bias=bias, lora_bias=lora_bias) is None:
            _two_source.forward(x, w, s, b, bias, lora_bias, scale, out)
            return
        # dx: w is a weight and b an a, both transposed
        plain = bias is None and lora_bias is None and scale == 1.0
        if plain and _two_source.refuses(x=x, w=w.t(), s=s, b=b.t()) is None:
            _two_source.backward_dx(x, w.t(), s, b.t(), seed, p, out)
            return
    _lora_two_source.product(x, w, s, b, bias, lora_bias, seed, scale, p, out, tile)
