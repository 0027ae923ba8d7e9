"""prefix_attention: what queries find in a short prefix, gated and added to what they found in the text.

LLaMA-Adapter (arXiv 2303.16199, v2 2304.15010; survey eq. 25) and peft's AdaptionPrompt: the prefix has a softmax of
its own, so that the attention over the text is any kernel's and this is an epilogue of it.
Dims: B batch, L text tokens, P prefix rows, H heads, G key/value heads (H a multiple), K head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check

MAX_PREFIX = 64


def forward(
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    factor: Tensor | None = None,
    scale: float = 0.0,
    tanh: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = o + factor * tanh(gate) * softmax(scale q kᵀ) v, per head; the softmax is over the prefix alone.

    A prefix of one row has weight 1 whatever its score: y = o + factor * tanh(gate) * v, which is what LLaMA-Adapter
    v2 writes for it without a softmax, and q and k then get zero gradients.

    Args:
        o: (B, L, H, K), the attention's output over the text, before the output projection; any strides. A tensor in
            the layout (B, H, L, K) goes in as `o.transpose(1, 2)`, without a copy.
        q: (B, L, H, K), the queries of that attention (rotated, where it rotates them), any strides.
        k, v: (B or 1, P, G, K), the prefix's keys and values, P from 1 to 64, any strides; query head h reads
            key/value head h // (H / G). A batch of 1 serves all samples.
        gate: (H) per head or (1) for all, in any floating dtype.
        factor: (1), multiplies the gate once more (LLaMA-Adapter v2's new_gate); any floating dtype.
        scale: of the scores; 0 stands for K^-0.5.
        tanh: the gate is tanh(gate), else gate itself.
        dtype: compute everything in this dtype; autocast sets it. Gate and softmax are float32 at least.

    Returns: y (B, L, H, K), contiguous, in `dtype`, else in o's dtype. Where the gate is 0, y equals o. Kept for
    backward: q, k, v, gate and factor, none of them new; o gets the gradient of y itself.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if dtype is not None:
        o, q, k, v = (t.to(dtype) for t in (o, q, k, v))
    B, _, _, K = q.shape
    s = torch.einsum("blgjk,bpgk->bgjlp", q.unflatten(2, (k.shape[2], -1)), k.expand(B, -1, -1, -1))
    s = s * (scale or K**-0.5)
    weights = s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)
    found = torch.einsum("bgjlp,bpgk->blgjk", weights, v.expand(B, -1, -1, -1)).flatten(2, 3)
    strength = gate.to(torch.promote_types(gate.dtype, torch.float32))
    strength = strength.tanh() if tanh else strength
    if factor is not None:
        strength = strength * factor
    return (o + (strength[:, None] * found).to(o.dtype)).contiguous()


def residuals(o, q, k, v, gate, factor, scale, tanh, dtype) -> tuple:
    """A kernel's forward saves nothing besides arguments."""
    return ()


def check(o, q, k, v, gate, factor, scale, tanh, dtype) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"o": o, "q": q, "k": k, "v": v}
    _check.floating(**tensors, gate=gate, factor=factor)
    _check.same_device(**tensors, gate=gate, factor=factor)
    if o.dim() != 4 or 0 in o.shape[2:]:
        raise ValueError(f"o has shape {tuple(o.shape)}; accepted: (B, L, H, K) with H and K 1 or more")
    B, _, H, K = o.shape
    _check.shape("q", q, tuple(o.shape), "the shape of o")
    if k.dim() != 4 or k.shape[3] != K or k.shape[0] not in (1, B):
        raise ValueError(
            f"k has shape {tuple(k.shape)}; accepted for o {tuple(o.shape)}: (B or 1, P, G, K) with B = {B}, K = {K}"
        )
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads; accepted: a number that divides the {H} heads of o")
    if not 1 <= k.shape[1] <= MAX_PREFIX:
        raise ValueError(f"the prefix has {k.shape[1]} rows; accepted: 1 to {MAX_PREFIX}")
    _check.shape("v", v, tuple(k.shape), "the shape of k")
    if gate.dim() != 1 or gate.shape[0] not in (1, H):
        raise ValueError(f"gate has shape {tuple(gate.shape)}; accepted: (H,) = ({H},) or (1,)")
    _check.shape("factor", factor, (1,), "(1,)")
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"scale is {scale}; accepted: a positive number, or 0 for K^-0.5")
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", **tensors)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    return o, q, k, v, gate, factor, float(scale), bool(tanh), dtype


def draw(*values) -> tuple:
    """Nothing is random."""
    return values


def direct(**others) -> tuple[str, ...]:
    """o is added to, so that its gradient is y's."""
    return ("o",)
