"""bottleneck_adapter: [norm] -> down -> activation -> dropout -> up, gated and scaled, added to up to three tensors.

Houlsby (arXiv 1902.00751), Pfeiffer (2005.00052) and parallel adapters (2110.04366) as adapter-hub's `adapters` writes
them; MAGMA (2112.05253), VL-Adapter (2112.06825), FrozenBiLM (2206.08155), VL-PET (2308.09804: a gate on branch and
input together), LaVIN (2305.15023: several up projections, mixed by weights of each sample). Survey eq. 4.
Dims: B samples of L tokens, T all rows, D model width, R rank, N width of the result (D where x is added), E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dropout import draw_seed, dropout
from .._shuffle import ACTS as _ACTS
from .._shuffle import NORMS, normalised

ACTS = {"none": lambda t: t, **_ACTS}
SKIPS = ("add", "gated", "none")
GATE_ACTS = ("none", "sigmoid")


def forward(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    base: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    route: Tensor | None = None,
    seed: Tensor | None = None,
    act: str = "relu",
    norm: str = "none",
    eps: float = 1e-5,
    scale: float = 1.0,
    skip: str = "add",
    gate_act: str = "none",
    p: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """z = dropout(act(norm(x) downᵀ + down_bias)), b = z upᵀ + up_bias; y = base + residual + scale G b + x.

    Args:
        x: (..., D); with route or a gate of each sample (B, ..., D).
        down: (R, D), R from 1. up: (N, R); with E experts (N, E R) = [up_0 | up_1 | ...].
        down_bias: (R). up_bias: (N); with route (E, N).
        norm_weight, norm_bias: (D), of the norm; RMSNorm has no bias.
        base, residual: (..., N), added as they are; each gets y's gradient.
        gate: G, or its logits with gate_act="sigmoid": (..., N), one for each row (..., 1), for each sample
            (B, 1, ..., 1), for each channel (N) or for all (1). None is 1.
        route: (B, E), the weight of each expert in each sample: b = sum over e of route_e (z up_eᵀ + up_bias_e).
        seed: 0-d int64 on x's device, of the dropout; drawn from torch's generator when p > 0 and none is given.
        act: "relu", "gelu" (erf), "gelu_tanh", "silu", "quick_gelu", "none".
        norm: "none", "layer" (biased variance) or "rms". eps: added to the variance, or the mean square.
        scale: a fixed factor of the branch.
        skip: "add" adds x to y; "gated" adds x to b, under scale and gate: scale G (b + x); "none" adds none, and N
            may differ from D.
        gate_act: "none" takes the gate as it is, "sigmoid" its sigmoid.
        p: dropout of z; element (row, column) as in ops._dropout.keep_mask.
        dtype: of both products; autocast sets it. It changes neither what is added to them nor the norm, whose
            statistics are float32 in any case.

    Returns: y (..., N) in the widest dtype of the products (`dtype`, else x's), base, residual, and x where it is
    added. Kernels keep x and the arguments beside it for backward, nothing R wide.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    compute = dtype or x.dtype
    n = x
    if norm != "none":
        wide = x.dtype if norm_weight is None else torch.promote_types(x.dtype, norm_weight.dtype)
        n = normalised(x.to(wide), norm, *(t if t is None else t.to(wide) for t in (norm_weight, norm_bias)), eps)
    down, up, down_bias, up_bias = (t if t is None else t.to(compute) for t in (down, up, down_bias, up_bias))
    z = ACTS[act](F.linear(n.to(compute), down, down_bias))
    if p > 0.0:
        z = dropout(z, seed, p)
    if route is None:
        b = F.linear(z, up, up_bias)
    else:
        route = route.to(compute).view(route.shape[0], *[1] * (x.dim() - 2), route.shape[1])
        # (..., E R): the experts' products are one, of z once for each expert with its weight
        b = F.linear((route[..., None] * z[..., None, :]).flatten(-2), up)
        if up_bias is not None:
            b = b + route @ up_bias
    out = out_dtype(x, base, residual, skip, dtype)
    if skip == "gated":
        b = b + x
    if gate is not None:
        b = (gate.sigmoid() if gate_act == "sigmoid" else gate) * b
    b = (scale * b).to(out)
    if skip == "add":
        b = b + x
    # as adapters are written: what is added stands before the sub-layer's own residual
    b = b if base is None else b + base
    return b if residual is None else b + residual


def out_dtype(x: Tensor, base: Tensor | None, residual: Tensor | None, skip: str, dtype) -> torch.dtype:
    """y's: the widest of what is added up."""
    out = dtype or x.dtype
    for t in (base, residual, x if skip != "none" else None):
        out = out if t is None else torch.promote_types(out, t.dtype)
    return out


def residuals(*values) -> tuple[()]:
    """What kernels save besides arguments: nothing."""
    return ()


def direct(**others) -> tuple[str, ...]:
    """Their gradient is y's."""
    return ("base", "residual")


def gate_kind(x: Tensor, gate: Tensor | None, N: int) -> str | None:
    """ "none", "scalar", "channel", "sample", "row", "element": what a gate belongs to; None where it fits nothing."""
    if gate is None:
        return "none"
    lead, shape = tuple(x.shape[:-1]), tuple(gate.shape)
    if shape in ((), (1,)):
        return "scalar"
    if shape == (N,):
        return "channel"
    if len(shape) != x.dim() or shape[:1] != lead[:1]:
        return None
    if shape == (*lead, N):
        return "element"
    if shape == (*lead, 1):
        return "row"
    return "sample" if all(s == 1 for s in shape[1:]) else None


def check(
    x, down, up, down_bias, up_bias, norm_weight, norm_bias, base, residual, gate, route, seed, act, norm, eps, scale,
    skip, gate_act, p, dtype,
) -> tuple:  # fmt: skip
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    products = {"x": x, "down": down, "up": up, "down_bias": down_bias, "up_bias": up_bias}
    others = {"norm_weight": norm_weight, "norm_bias": norm_bias, "base": base, "residual": residual, "gate": gate}
    _check.floating(**products, **others, route=route)
    _check.same_device(**products, **others, route=route)
    for name, value, accepted in (
        ("act", act, ACTS), ("norm", norm, NORMS), ("skip", skip, SKIPS), ("gate_act", gate_act, GATE_ACTS)
    ):  # fmt: skip
        if value not in accepted:
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (..., D), D > 0")
    D = x.shape[-1]
    if down.dim() != 2 or up.dim() != 2 or 0 in down.shape or 0 in up.shape:
        raise ValueError(f"down has shape {tuple(down.shape)}, up {tuple(up.shape)}; accepted: (R, D), (N, R)")
    R, N = down.shape[0], up.shape[0]
    _check.shape("down", down, (R, D), "(R, D)")
    experts = _check_route(x, route)
    _check.shape("up", up, (N, experts * R), "(N, R)" if route is None else "(N, E R)")
    _check.shape("down_bias", down_bias, (R,), "(R,)")
    if route is None:
        _check.shape("up_bias", up_bias, (N,), "(N,)")
    else:
        _check.shape("up_bias", up_bias, (experts, N), "(E, N) with a route")
    if skip != "none" and N != D:
        raise ValueError(f'up gives {N} channels and x has {D}; accepted with skip="{skip}": the same number')
    _check_norm(D, norm, norm_weight, norm_bias)
    for name, t in (("base", base), ("residual", residual)):
        _check.shape(name, t, (*x.shape[:-1], N), "(..., N)")
    if gate_kind(x, gate, N) is None:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}; accepted for x {tuple(x.shape)} and {N} channels of y: (..., N), "
            "(..., 1), (B, 1, ..., 1), (N,), (1,)"
        )
    if gate is None and gate_act != "none":
        raise ValueError(f"gate_act is {gate_act!r} without a gate; accepted: 'none'")
    _check.probability("p", p)
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() or seed.device != x.device):
        raise ValueError(
            f"seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; accepted: 0-d int64 on x's device"
        )
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", **products)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    return (
        x, down, up, down_bias, up_bias, norm_weight, norm_bias, base, residual, gate, route, seed, act, norm,
        float(eps), float(scale), skip, gate_act, float(p), dtype,
    )  # fmt: skip


def _check_route(x: Tensor, route: Tensor | None) -> int:
    """The number of experts."""
    if route is None:
        return 1
    if x.dim() < 2 or route.dim() != 2 or route.shape[0] != x.shape[0] or route.shape[1] == 0:
        raise ValueError(
            f"route has shape {tuple(route.shape)}; accepted for x {tuple(x.shape)}: (B, E) with x (B, ..., D)"
        )
    return route.shape[1]


def _check_norm(D: int, norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    _check.shape("norm_weight", norm_weight, (D,), "(D,)")
    _check.shape("norm_bias", norm_bias, (D,), "(D,)")
    if norm == "none" and (norm_weight is not None or norm_bias is not None):
        raise ValueError('norm is "none", yet norm_weight or norm_bias is given')
    if norm == "rms" and norm_bias is not None:
        raise ValueError("norm_bias is given; RMSNorm has none")
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias is given without norm_weight; accepted: both, norm_weight alone, or none")


def draw(
    x, down, up, down_bias, up_bias, norm_weight, norm_bias, base, residual, gate, route, seed, act, norm, eps, scale,
    skip, gate_act, p, dtype,
) -> tuple:  # fmt: skip
    """The seed of the dropout, where there is any and none was given."""
    if p > 0.0 and seed is None:
        seed = draw_seed(x.device)
    return (
        x, down, up, down_bias, up_bias, norm_weight, norm_bias, base, residual, gate, route, seed, act, norm, eps,
        scale, skip, gate_act, p, dtype,
    )  # fmt: skip
