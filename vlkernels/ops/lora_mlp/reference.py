"""lora_mlp: a gated feed-forward block (SwiGLU, GeGLU), any of its projections with a low-rank branch, as one node.

Shazeer, arXiv 2002.05202; Hu et al., arXiv 2106.09685; transformers' LlamaMLP over peft's layers. Dims: T all rows of
x, K model width, F feed-forward width, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check, _lora_group
from .._lora_group import Branch
from .._shuffle import ACTS, normalised

NAMES = ("gate", "up", "down")


def forward(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_a: Tensor | None = None,
    gate_b: Tensor | None = None,
    up_a: Tensor | None = None,
    up_b: Tensor | None = None,
    down_a: Tensor | None = None,
    down_b: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_lora_bias: Tensor | None = None,
    up_lora_bias: Tensor | None = None,
    down_lora_bias: Tensor | None = None,
    gate_quant: Tensor | None = None,
    up_quant: Tensor | None = None,
    down_quant: Tensor | None = None,
    norm_weight: Tensor | None = None,
    seed: Tensor | None = None,
    gate_scale: float = 1.0,
    up_scale: float = 1.0,
    down_scale: float = 1.0,
    p: float = 0.0,
    act: str = "silu",
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: bool = False,
    dtype: torch.dtype | None = None,
    blocksize: int = 64,
    quant_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = down(act(gate(h)) * up(h)) [+ x], each projection z Wᵀ + bias + scale * (drop_p(z) Aᵀ Bᵀ + lora_bias).

    h is x, or with `norm_weight` RMSNorm(x) * (norm_weight + offset); `residual` adds x itself. Kept for backward: x,
    gate(h), up(h) and the rank-wide products; act(gate) * up and h are computed again.

    Args:
        x: (..., K), any strides.
        gate_weight, up_weight: (F, K). down_weight: (K', F), K' = K with `residual`. Frozen or trainable.
        *_a, *_b: (R, in) and (out, R) of each projection, ranks may differ, None for a projection without adapter; in
            x's dtype, or float32 over a half-precision x.
        *_bias, *_lora_bias: (out,). norm_weight: (K,).
        *_quant, blocksize, quant_dtype: of weights packed in 4 bits, see lora_linear.
        seed: int64, one number for each adapted projection, in the order gate, up, down; drawn when p > 0 and none is
            given. Every projection drops its own elements, as in peft.
        *_scale: alpha / r. p: dropout probability in [0, 1). act: silu (SwiGLU), gelu (erf), gelu_tanh (Gemma), relu,
            quick_gelu. eps, offset: of the norm; Gemma's offset is 1.
        dtype: compute everything in this dtype; autocast sets it. Accumulation is float32 in any case.

    Returns: y (..., K'), in `dtype`, else in x's dtype; with `residual` in the wider of that and x's.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    values = dict(locals())
    gate, up, down = (_lora_group.cast(b, dtype) for b in group_of(values))
    h = x if norm_weight is None else normalised(x, "rms", norm_weight, None, eps, offset)
    h = h if dtype is None else h.to(dtype)
    seeds = iter(seed) if seed is not None else None
    own = [next(seeds) if seeds is not None and b.a is not None else None for b in (gate, up, down)]
    pre, linear = (_lora_group.forward(b, h, s, p) for b, s in zip((gate, up), own, strict=False))
    y = _lora_group.forward(down, ACTS[act](pre) * linear, own[2], p)
    return x + y if residual else y


def residuals(x, *rest) -> tuple[Tensor, ...]:
    """Shapes of what a kernel's forward saves besides arguments: gate(h), up(h), the s_i, the norm's statistics."""
    values = named(x, *rest)
    rows, dtype = x.numel() // x.shape[-1], values["dtype"]
    group = group_of(values)
    pre = [x.new_empty((rows, b.out), dtype=dtype or x.dtype) for b in group[:2]]
    stats = x.new_empty((rows, 2) if values["norm_weight"] is not None else (0,), dtype=torch.float32)
    return (*pre, *_lora_group.residuals(group, rows, x, dtype), stats)


def group_of(values: dict) -> list[Branch]:
    """gate and up of x, and down of what they make."""
    gate, up = _lora_group.branches(NAMES[:2], values)
    return [gate, up, _lora_group.branch("down", values, gate.out)]


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
    if values["act"] not in ACTS:
        raise ValueError(f"act is {values['act']!r}; accepted: {', '.join(ACTS)}")
    if x.dim() < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (..., K)")
    _check.shape("norm_weight", norm_weight, (x.shape[-1],), "(K,)")
    group = group_of(values)
    _lora_group.check(group, x, dtype)
    if group[0].out != group[1].out:
        raise ValueError(
            f"up_weight has {group[1].out} rows; accepted: (F, K) with the F of gate_weight = {group[0].out}"
        )
    if values["residual"] and group[2].out != x.shape[-1]:
        raise ValueError(f"residual=True adds x with {x.shape[-1]} channels to {group[2].out}; accepted: equal widths")
    _lora_group.check_seed(values["seed"], x, len(_lora_group.adapted(group)))
    floats = {k: float(values[k]) for k in ("gate_scale", "up_scale", "down_scale", "p", "eps", "offset")}
    return tuple((values | floats | {"residual": bool(values["residual"])}).values())


def draw(*args) -> tuple:
    """The arguments with the seeds filled in, where dropout needs them and none were given."""
    values = named(*args)
    count = len(_lora_group.adapted(group_of(values)))
    values["seed"] = _lora_group.draw(values["seed"], values["x"], values["p"], count)
    return tuple(values.values())
