"""norm_residual: the normalised stream plus a branch's output: y = norm(x) + dropout(branch).

The residual of post-norm transformers, where x is the sum before the norm (BERT, arXiv 1810.04805; the Q-Former of
BLIP-2, 2301.12597), and of blocks whose skip starts from the normalised state (mPLUG-Owl, 2304.14178; LLaVA-NeXT's
res projectors). Written so, only the sum is kept for backward and never the normalised state.
Dims: T rows, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._dropout import draw_seed, dropout
from .._shuffle import NORMS, normalised


def forward(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-5,
    p: float = 0.0,
) -> Tensor:
    """y = norm(x) weight + bias + dropout(branch)

    Args:
        x, branch: (..., C), of the same shape, each in any floating dtype.
        weight, bias: (C), the norm's, in any floating dtype; RMSNorm has no bias.
        seed: 0-d int64 on x's device, of the dropout; drawn from torch's generator when p > 0 and none is given.
        norm: "none" (y = x + dropout(branch)), "layer" (biased variance) or "rms".
        eps: added to the variance, or the mean square.
        p: dropout of the branch; element (row, column) as in ops._dropout.keep_mask.

    Returns: y (..., C) in the wider of x's and branch's dtypes; autocast does not change it. The norm is computed in
    float32 at least. Here it is rounded to y's dtype and the dropped branch to its own before they are added, as by
    operators one after the other; kernels round the sum alone.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    out = torch.promote_types(x.dtype, branch.dtype)
    wide = torch.promote_types(out, weight.dtype if weight is not None else out)
    weight, bias = (t if t is None else t.to(wide) for t in (weight, bias))
    y = normalised(x.to(wide), norm, weight, bias, eps).to(out)
    return y + (branch if p == 0.0 else dropout(branch, seed, p))


def residuals(x, branch, weight, bias, seed, norm, eps, p) -> tuple[Tensor]:
    """What a kernel's forward saves besides arguments: the norm's (mean, rstd)."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return (x.new_empty((rows, 2) if norm != "none" else (0,), dtype=torch.float32),)


def check(x, branch, weight, bias, seed, norm, eps, p) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"x": x, "branch": branch, "weight": weight, "bias": bias}
    _check.floating(**tensors)
    _check.same_device(**tensors)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (..., C), C > 0")
    _check.shape("branch", branch, tuple(x.shape), "the shape of x")
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; accepted: {', '.join(NORMS)}")
    _check.shape("weight", weight, (x.shape[-1],), "(C,)")
    _check.shape("bias", bias, (x.shape[-1],), "(C,)")
    if norm == "none" and (weight is not None or bias is not None):
        raise ValueError('norm is "none", yet weight or bias is given')
    if norm == "rms" and bias is not None:
        raise ValueError("bias is given; RMSNorm has none")
    _check.probability("p", p)
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() or seed.device != x.device):
        raise ValueError(
            f"seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; accepted: 0-d int64 on x's device"
        )
    return x, branch, weight, bias, seed, norm, float(eps), float(p)


def draw(x, branch, weight, bias, seed, norm, eps, p) -> tuple:
    """The seed of the dropout, where there is any and none was given."""
    if p > 0.0 and seed is None:
        seed = draw_seed(x.device)
    return x, branch, weight, bias, seed, norm, eps, p
