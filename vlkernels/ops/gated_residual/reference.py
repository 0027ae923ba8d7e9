"""gated_residual: the stream plus a branch behind a gate that starts closed: y = x + tanh(gate) branch.

Flamingo's gated cross-attention-dense (arXiv 2204.14198; survey eq. 23): OpenFlamingo, IDEFICS, Mllama; a gate for each
head as in LLaMA-Adapter (2303.16199), without tanh as in peft's AdaptionPrompt.
Dims: T rows, C channels, G gates, I inner width of a branch that ends in a product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._dropout import draw_seed, dropout
from .._shuffle import NORMS, normalised


def forward(
    x: Tensor,
    gate: Tensor,
    branch: Tensor | None = None,
    inner: Tensor | None = None,
    weight: Tensor | None = None,
    row_mask: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    seed: Tensor | None = None,
    tanh: bool = True,
    norm: str = "none",
    eps: float = 1e-5,
    p: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x + tanh(gate) row_mask dropout(branch), n = norm(y) norm_weight + norm_bias.

    Args:
        x: (..., C), in any floating dtype.
        gate: G numbers of any shape, C a multiple of G; gate g is that of channels g C/G to (g + 1) C/G - 1: one for
            all, one for each head, or one for each channel.
        branch: (..., C), kept for backward.
        inner, weight: in place of branch (..., I) and (C, I): branch = inner weightᵀ, computed here and not kept, for
            the gradient of the gate follows from the weight's: dtanh_c = sum over i of weight_ci (dyᵀ inner)_ci.
        row_mask: (...,), of 0 and 1 or bool: which rows get the branch.
        norm_weight, norm_bias: (C), of the norm; RMSNorm has no bias.
        seed: 0-d int64 on x's device, of the dropout; drawn from torch's generator when p > 0 and none is given.
        tanh: False takes the gate as it is.
        norm: "none" (n is empty), "layer" (biased variance) or "rms". eps: added to the variance, or the mean square.
        p: dropout of the branch; element (row, column) as in ops._dropout.keep_mask. Not with inner.
        dtype: of the product inner weightᵀ; autocast sets it. It does not change x, branch or the norm.

    Returns: y (..., C) in the wider of x's and the branch's dtypes, and n in y's. Backward keeps the branch (or inner)
    and the gate, with a norm y and 8 bytes a row; where the gate is 0, y is x bit for bit.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if branch is None:
        branch = F.linear(inner.to(dtype or inner.dtype), weight.to(dtype or weight.dtype))
    out = torch.promote_types(x.dtype, branch.dtype)
    level = gate.flatten().repeat_interleave(x.shape[-1] // gate.numel())
    if p > 0.0:
        branch = dropout(branch, seed, p)
    if row_mask is not None:
        branch = branch.masked_fill((row_mask == 0)[..., None], 0.0)
    branch = ((level.tanh() if tanh else level) * branch).to(branch.dtype)
    y = x + branch
    if norm == "none":
        return y, y.flatten()[:0]
    wide = torch.promote_types(out, norm_weight.dtype if norm_weight is not None else out)
    affine = (t if t is None else t.to(wide) for t in (norm_weight, norm_bias))
    return y, normalised(y.to(wide), norm, *affine, eps).to(out)


def residuals(
    x, gate, branch, inner, weight, row_mask, norm_weight, norm_bias, seed, tanh, norm, eps, p, dtype
) -> tuple[Tensor]:
    """What a kernel's forward saves besides arguments: the norm's (mean, rstd)."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return (x.new_empty((rows, 2) if norm != "none" else (0,), dtype=torch.float32),)


def keeps_y(x, gate, branch, inner, weight, row_mask, norm_weight, norm_bias, seed, tanh, norm, *_) -> bool:
    """The norm's gradient needs its input."""
    return norm != "none"


def direct(tanh, norm, eps, p, dtype) -> tuple[str, ...]:
    """Without a norm x's gradient is y's."""
    return ("x",) if norm == "none" else ()


def check(x, gate, branch, inner, weight, row_mask, norm_weight, norm_bias, seed, tanh, norm, eps, p, dtype) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"x": x, "gate": gate, "branch": branch, "inner": inner, "weight": weight}
    tensors |= {"norm_weight": norm_weight, "norm_bias": norm_bias}
    _check.floating(**tensors)
    _check.same_device(**tensors, row_mask=row_mask)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (..., C), C > 0")
    C = x.shape[-1]
    if gate.numel() == 0 or C % gate.numel():
        raise ValueError(f"gate has shape {tuple(gate.shape)}; accepted for {C} channels: a divisor of them")
    if (branch is None) == (inner is None) or (inner is None) != (weight is None):
        raise ValueError("accepted: branch, or inner and weight in its place")
    _check.shape("branch", branch, tuple(x.shape), "the shape of x")
    if inner is not None:
        if weight.dim() != 2 or weight.shape[0] != C or tuple(inner.shape) != (*x.shape[:-1], weight.shape[1]):
            raise ValueError(
                f"inner has shape {tuple(inner.shape)}, weight {tuple(weight.shape)}; accepted for x {tuple(x.shape)}: "
                "(..., I) and (C, I)"
            )
        if p > 0.0:
            raise ValueError(f"p is {p} with inner; accepted: dropout of a branch")
        if dtype is None:
            _check.same_dtype(" (or pass dtype=, or use autocast)", inner=inner, weight=weight)
    _check.shape("row_mask", row_mask, tuple(x.shape[:-1]), "the rows of x")
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; accepted: {', '.join(NORMS)}")
    _check.shape("norm_weight", norm_weight, (C,), "(C,)")
    _check.shape("norm_bias", norm_bias, (C,), "(C,)")
    if norm == "none" and (norm_weight is not None or norm_bias is not None):
        raise ValueError('norm is "none", yet norm_weight or norm_bias is given')
    if norm == "rms" and norm_bias is not None:
        raise ValueError("norm_bias is given; RMSNorm has none")
    _check.probability("p", p)
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() or seed.device != x.device):
        raise ValueError(
            f"seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; accepted: 0-d int64 on x's device"
        )
    if dtype is not None and dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    return (
        x, gate, branch, inner, weight, row_mask, norm_weight, norm_bias, seed, bool(tanh), norm, float(eps), float(p),
        dtype,
    )  # fmt: skip


def draw(x, gate, branch, inner, weight, row_mask, norm_weight, norm_bias, seed, tanh, norm, eps, p, dtype) -> tuple:
    """The seed of the dropout, where there is any and none was given."""
    if p > 0.0 and seed is None:
        seed = draw_seed(x.device)
    return x, gate, branch, inner, weight, row_mask, norm_weight, norm_bias, seed, tanh, norm, eps, p, dtype
