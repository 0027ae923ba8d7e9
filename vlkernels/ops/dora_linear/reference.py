"""dora_linear: a linear layer whose adapted weight has rows of a learned length. Liu et al., arXiv 2402.09353 (DoRA),
with the norm a constant in backward (its section 4.3); peft `tuners/lora/dora.py`.

Dims: T all rows of x, K input width, N output width, R rank.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dropout import draw_seed, dropout, threshold


def forward(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    scale: float = 1.0,
    p: float = 0.0,
    level: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = g * (x Wᵀ + scale x Aᵀ Bᵀ) + bias with g = magnitude / norm; norm = row lengths of W + scale B A, a constant.

    With dropout, z = drop_p(x): y = x Wᵀ + (g - 1) * z Wᵀ + g * scale * z Aᵀ Bᵀ + bias, two products with W.

    Args:
        x: (..., K), any strides.
        weight: (N, K), frozen or trainable.
        a, b: (R, K) and (N, R), R from 1 to 512; in x's dtype, or float32 over a half-precision x: then the low-rank
            branch is computed in float32 and the sum is rounded once.
        magnitude: (N,), any floating dtype.
        norm: (N,), what `row_norm(weight, a, b, scale)` gives, where the caller has it; None computes it. No gradient.
        bias: (N,). An adapter bias is not part of DoRA; peft refuses it too.
        seed: 0-d int64 on x's device; drawn from torch's generator when p > 0 and none is given.
        scale: peft's alpha / r (alpha / sqrt(r) with rsLoRA).
        p: dropout probability in [0, 1), in steps of 1/65536; the mask is `keep_mask(seed, T, K, p)`.
        level: what kernels keep for backward besides x and s (T, R): 0 keeps u (T, N), 1 does not and computes that
            product with W once more where the magnitude trains: 2 T K N FLOPs more, on the 4 T K N that forward and
            backward take over a frozen W, or 8 T K N with dropout.
        dtype: compute everything but g in this dtype; autocast sets it. Accumulation is float32 in any case.

    g is computed in float32 at least, from the parameters as they are. z Wᵀ is a product in the weight's dtype; peft
    without autocast takes it in float32 under dropout where its adapters are float32, though not without dropout.

    Returns: y (..., N), in `dtype`, else in x's dtype.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    c = (row_norm(weight, a, b, scale) if norm is None else norm).detach()
    g = magnitude.to(torch.promote_types(c.dtype, magnitude.dtype)) / c
    if dtype is not None:
        x, weight, a, b, bias = (t if t is None else t.to(dtype) for t in (x, weight, a, b, bias))
    z = x.to(a.dtype)
    if threshold(p) == 0:
        y = g * (F.linear(x, weight) + scale * F.linear(F.linear(z, a), b))
    else:
        z = dropout(z, seed, p)
        y = F.linear(x, weight) + (g - 1) * F.linear(z.to(weight.dtype), weight)
        y = y + g * (scale * F.linear(F.linear(z, a), b))
    return (y if bias is None else y + bias).to(x.dtype)


def row_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + scale B A‖ of each row, (N,), in float32 at least and without gradient; kernels never build B A."""
    with torch.no_grad(), no_autocast(weight):
        wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
        return torch.linalg.vector_norm(weight.to(wide) + scale * (b.to(wide) @ a.to(wide)), dim=1)


def no_autocast(t: Tensor):
    """A context without autocast on t's device; meta tensors have none to switch off."""
    device = t.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def residuals(x, weight, a, b, magnitude, norm, bias, seed, scale, p, level, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of what a kernel's forward saves besides arguments: the norm (N,) where it was not given; s = drop(x) Aᵀ
    (T, R), unscaled; at level 0 u (T, N) = x Wᵀ, or (keep * x) Wᵀ without the factor 1 / (1 - p)."""
    rows, out = x.numel() // x.shape[-1], b.shape[0]
    return (
        x.new_empty((0 if norm is not None else out,), dtype=torch.float32),
        x.new_empty((rows, a.shape[0]), dtype=low_rank_dtype(a, dtype)),
        x.new_empty((rows, out) if level == 0 else (0, out), dtype=dtype or x.dtype),
    )


def low_rank_dtype(a: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which s and the adapters enter a product."""
    return dtype or a.dtype


def check(x, weight, a, b, magnitude, norm, bias, seed, scale, p, level, dtype) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"x": x, "weight": weight, "a": a, "b": b, "magnitude": magnitude}
    for name, t in tensors.items():
        if t is None:
            raise TypeError(f"{name} is None; accepted: a torch.Tensor")
    _check.floating(**tensors, norm=norm, bias=bias)
    _check.same_device(**tensors, norm=norm, bias=bias, seed=seed)
    _check.probability("p", p)
    if level not in (0, 1):
        raise ValueError(f"level is {level!r}; accepted: 0, 1")
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
    _check.shape("weight", weight, (out, width), "(N, K) with the N of b and the K of a")
    for name, t in (("magnitude", magnitude), ("norm", norm), ("bias", bias)):
        _check.shape(name, t, (out,), "(N,)")
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", x=x, weight=weight, bias=bias)
        _check.same_dtype("", a=a, b=b)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() != 0):
        raise ValueError(f"seed is {seed.dtype} of shape {tuple(seed.shape)}; accepted: a 0-d int64 tensor")
    norm = None if norm is None else norm.detach()
    return x, weight, a, b, magnitude, norm, bias, seed, float(scale), float(p), int(level), dtype


def draw(x, weight, a, b, magnitude, norm, bias, seed, scale, p, level, dtype) -> tuple:
    """The arguments with the random seed filled in, where dropout needs one and none was given."""
    if threshold(p) == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    return x, weight, a, b, magnitude, norm, bias, seed, scale, p, level, dtype
