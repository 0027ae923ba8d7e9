"""lora_linear: a linear layer with a low-rank branch. Hu et al., arXiv 2106.09685; peft `tuners/lora/layer.py`.

Dims: T all rows of x, K input width, N output width, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, _nf4
from .._dropout import draw_seed, dropout, threshold


def forward(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    base: Tensor | None = None,
    seed: Tensor | None = None,
    quant: Tensor | None = None,
    scale: float = 1.0,
    p: float = 0.0,
    dtype: torch.dtype | None = None,
    blocksize: int = 64,
    quant_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scale * (drop_p(x) Aᵀ Bᵀ + lora_bias), or with `base` in place of x Wᵀ + bias.

    Args:
        x: (..., K), any strides.
        weight: (N, K), frozen or trainable; None when `base` is given. With `quant` 4-bit codes, (ceil(N K / 2), 1)
            uint8, without a gradient.
        a, b: (R, K) and (N, R), R from 1 to 512; in x's dtype, or float32 over a half-precision x: then the low-rank
            branch is computed in float32 and the sum is rounded once, as peft does without autocast.
        bias, lora_bias: (N,). base: (..., N), for a second adapter on the same layer.
        seed: 0-d int64 on x's device; drawn from torch's generator when p > 0 and none is given.
        quant: what `ops._nf4.quantize` gives with a packed weight: code book and absmax, 1-D uint8. W is dequantised.
        scale: peft's alpha / r (alpha / sqrt(r) with rsLoRA).
        p: dropout probability in [0, 1), in steps of 1/65536; the mask is `keep_mask(seed, T, K, p)`.
        dtype: compute everything in this dtype; autocast sets it. Accumulation is float32 in any case.
        blocksize, quant_dtype: of the packed weight; its values are rounded to quant_dtype, where that is given, before
            they are cast to the dtype of the product.

    Returns: y (..., N), in `dtype`, else in x's dtype.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if quant is not None:
        shape = b.shape[0], a.shape[1]
        weight = _nf4.dequantize(weight, quant, shape, blocksize, quant_dtype, dtype or x.dtype)
    if dtype is not None:
        x, weight, a, b, bias, lora_bias, base = (
            t if t is None else t.to(dtype) for t in (x, weight, a, b, bias, lora_bias, base)
        )
    y = F.linear(x, weight, bias) if base is None else base
    z = x.to(a.dtype)
    if threshold(p) > 0:
        z = dropout(z, seed, p)
    return (y + F.linear(F.linear(z, a), b, lora_bias) * scale).to(y.dtype)


def residuals(
    x, weight, a, b, bias, lora_bias, base, seed, quant, scale, p, dtype, blocksize, quant_dtype
) -> tuple[Tensor]:
    """Shape of what a kernel's forward saves besides arguments: s = drop(x) Aᵀ (T, R), unscaled."""
    return (x.new_empty((x.numel() // x.shape[-1], a.shape[0]), dtype=low_rank_dtype(x, a, dtype)),)


def low_rank_dtype(x: Tensor, a: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which s and the adapters enter a product."""
    return dtype or a.dtype


def check(x, weight, a, b, bias, lora_bias, base, seed, quant, scale, p, dtype, blocksize, quant_dtype) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    dense = weight if quant is None else None
    if quant is not None:
        _nf4.check_bytes(weight=weight, quant=quant)
    _check.floating(x=x, weight=dense, a=a, b=b, bias=bias, lora_bias=lora_bias, base=base)
    _check.same_device(x=x, weight=weight, a=a, b=b, bias=bias, lora_bias=lora_bias, base=base, seed=seed, quant=quant)
    _check.probability("p", p)
    if (weight is None) == (base is None):
        raise ValueError("give either weight or base (the output of the plain layer), not both and not neither")
    if base is not None and bias is not None:
        raise ValueError("bias belongs to weight; base already contains it")
    if base is not None and quant is not None:
        raise ValueError("quant belongs to a packed weight; base has none")
    if x.dim() < 1 or a.dim() != 2 or b.dim() != 2 or a.shape[0] < 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)}; "
            "accepted: x (..., K), a (R, K), b (N, R) with R >= 1"
        )
    rank, width = a.shape
    if x.shape[-1] != width:
        raise ValueError(
            f"x has {x.shape[-1]} channels, a {tuple(a.shape)} takes {width}; accepted: x (..., K), a (R, K)"
        )
    out = b.shape[0]
    _check.shape("b", b, (out, rank), "(N, R) with the R of a")
    _check.shape("weight", dense, (out, width), "(N, K) with the N of b and the K of a")
    if quant is not None:
        _nf4.check(weight, quant, (out, width), blocksize, quant_dtype)
    _check.shape("bias", bias, (out,), "(N,)")
    _check.shape("lora_bias", lora_bias, (out,), "(N,)")
    _check.shape("base", base, (*x.shape[:-1], out), "(..., N)")
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", x=x, weight=dense, bias=bias, base=base)
        _check.same_dtype("", a=a, b=b, lora_bias=lora_bias)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() != 0):
        raise ValueError(f"seed is {seed.dtype} of shape {tuple(seed.shape)}; accepted: a 0-d int64 tensor")
    return (
        x, weight, a, b, bias, lora_bias, base, seed, quant, float(scale), float(p), dtype, int(blocksize), quant_dtype
    )  # fmt: skip


def draw(x, weight, a, b, bias, lora_bias, base, seed, quant, scale, p, dtype, blocksize, quant_dtype) -> tuple:
    """The arguments with the random seed filled in, where dropout needs one and none was given."""
    if threshold(p) == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    return x, weight, a, b, bias, lora_bias, base, seed, quant, scale, p, dtype, blocksize, quant_dtype
