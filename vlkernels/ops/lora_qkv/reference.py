"""lora_qkv: the three projections of an attention block, any of them with a low-rank branch, as one node.

Hu et al., arXiv 2106.09685; peft `tuners/lora/layer.py` on each projection. Dims: T all rows of x, K model width,
Nq = heads * head dim, Nk = Nv = key-value heads * head dim, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check, _lora_group
from .._shuffle import normalised

NAMES = ("q", "k", "v")


def forward(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    q_a: Tensor | None = None,
    q_b: Tensor | None = None,
    k_a: Tensor | None = None,
    k_b: Tensor | None = None,
    v_a: Tensor | None = None,
    v_b: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    q_lora_bias: Tensor | None = None,
    k_lora_bias: Tensor | None = None,
    v_lora_bias: Tensor | None = None,
    q_quant: Tensor | None = None,
    k_quant: Tensor | None = None,
    v_quant: Tensor | None = None,
    norm_weight: Tensor | None = None,
    seed: Tensor | None = None,
    q_scale: float = 1.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    p: float = 0.0,
    eps: float = 1e-6,
    offset: float = 0.0,
    dtype: torch.dtype | None = None,
    blocksize: int = 64,
    quant_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each i of q, k, v: y_i = h W_iᵀ + bias_i + scale_i * (drop_p(h) A_iᵀ B_iᵀ + lora_bias_i).

    h is x, or with `norm_weight` RMSNorm(x) * (norm_weight + offset): then x is what is kept for backward and h is
    computed again.

    Args:
        x: (..., K), any strides.
        *_weight: (N_i, K), frozen or trainable. *_a, *_b: (R_i, K) and (N_i, R_i), ranks may differ, None for a
            projection without adapter; in x's dtype, or float32 over a half-precision x.
        *_bias, *_lora_bias: (N_i,). norm_weight: (K,).
        *_quant, blocksize, quant_dtype: of weights packed in 4 bits, see lora_linear.
        seed: int64, one number for each adapted projection, in the order q, k, v; drawn when p > 0 and none is given.
            Every projection drops its own elements, as in peft.
        *_scale: alpha / r. p: dropout probability in [0, 1). eps, offset: of the norm; Gemma's offset is 1.
        dtype: compute everything in this dtype; autocast sets it. Accumulation is float32 in any case.

    Returns: q (..., Nq), k (..., Nk), v (..., Nv), in `dtype`, else in x's dtype.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    values = dict(locals())
    group = [_lora_group.cast(b, dtype) for b in _lora_group.branches(NAMES, values)]
    h = x
    if norm_weight is not None:
        h = normalised(x, "rms", norm_weight, None, eps, offset)
    h = h if dtype is None else h.to(dtype)
    seeds = iter(seed) if seed is not None else None
    return tuple(
        _lora_group.forward(b, h, next(seeds) if seeds is not None and b.a is not None else None, p) for b in group
    )


def residuals(x, *rest) -> tuple[Tensor, ...]:
    """Shapes of what a kernel's forward saves besides arguments: the s_i, and the norm's statistics."""
    values = named(x, *rest)
    rows = x.numel() // x.shape[-1]
    group = _lora_group.branches(NAMES, values)
    stats = x.new_empty((rows, 2) if values["norm_weight"] is not None else (0,), dtype=torch.float32)
    return (*_lora_group.residuals(group, rows, x, values["dtype"]), stats)


def named(*values) -> dict:
    """Values by argument name."""
    return dict(zip(forward.__annotations__, values, strict=False))


def check(*args) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    values = named(*args)
    x, norm_weight, dtype = values["x"], values["norm_weight"], values["dtype"]
    _check.floating(x=x, norm_weight=norm_weight)
    _check.same_device(x=x, norm_weight=norm_weight)
    _check.probability("p", values["p"])
    if x.dim() < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (..., K)")
    _check.shape("norm_weight", norm_weight, (x.shape[-1],), "(K,)")
    group = _lora_group.branches(NAMES, values)
    _lora_group.check(group, x, dtype)
    _lora_group.check_seed(values["seed"], x, len(_lora_group.adapted(group)))
    floats = {k: float(values[k]) for k in ("q_scale", "k_scale", "v_scale", "p", "eps", "offset")}
    return tuple((values | floats).values())


def draw(*args) -> tuple:
    """The arguments with the seeds filled in, where dropout needs them and none were given."""
    values = named(*args)
    count = len(_lora_group.adapted(_lora_group.branches(NAMES, values)))
    values["seed"] = _lora_group.draw(values["seed"], values["x"], values["p"], count)
    return tuple(values.values())
