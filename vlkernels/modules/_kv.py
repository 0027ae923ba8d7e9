"""Keys and values of all layers that attend to the same tokens: one product, or one in each layer and none kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _autocast
from ..ops._source import tokens
from ..ops._source import weights as joined
from ..ops.multi_layer_kv import multi_layer_kv


def layers_kv(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    head_dim: int,
    *,
    biases: Sequence[Sequence[Tensor]] | None = None,
    norms: Sequence[nn.Module] | None = None,
    level: int = 0,
) -> list[dict[str, Any]]:
    """For each layer the arguments of cross_attention that stand for [k | v] = norm_l(x) W_lᵀ + b_l.

    x (B, N, C). weights: of each layer [kv] (2 G K, C), keys first, or [key, value] (G K, C) each; biases likewise.
    norms: nn.LayerNorm or nn.RMSNorm of each layer, of one kind and eps, or None for none.
    level 0: {"k", "v"} (B, N, G, K), views of one tensor, kept for backward. level 1: {"x", "kv_weight", "kv_bias"}
    with their parts, so that neither keys nor values, normalised x or folded weights are kept, for one more product, a
    norm and a pass over the weights in backward.
    """
    norm, eps = "none", 1e-5
    if norms is not None:
        norm = "layer" if isinstance(norms[0], nn.LayerNorm) else "rms"
        eps = norms[0].eps
    if level == 0:
        scale, shift = None, None
        if norms is not None:
            scale, shift = _stacked([n.weight for n in norms], [getattr(n, "bias", None) for n in norms])
        flat = [w for layer in weights for w in layer]
        weight = torch.cat(flat) if len(flat) > 1 else flat[0]
        bias = None if biases is None else torch.cat([b for layer in biases for b in layer])
        # the layers' own weights are kept for backward, not their concatenation
        parts = flat if len(flat) > 1 else ()
        y = multi_layer_kv(x, weight, bias, scale, shift, parts, layers=len(weights), norm=norm, eps=eps)
        kv = y.unflatten(-1, (2 * len(weights), -1, head_dim)).unbind(-3)
        return [{"k": k, "v": v} for k, v in zip(kv[0::2], kv[1::2], strict=True)]
    norms = [None] * len(weights) if norms is None else norms
    biases = [None] * len(weights) if biases is None else biases
    found = recomputed_x([x], norm, eps)
    return [
        found | recomputed_weights(layer, bias, own) for layer, bias, own in zip(weights, biases, norms, strict=True)
    ]


def recomputed_x(parts: list[Tensor], norm: str, eps: float) -> dict[str, Any]:
    """cross_attention's x and what it is made of: [norm(parts[0]), parts[1]]."""
    dtype = _autocast.compute_dtype(parts[0])  # what the products take
    return {"x": tokens(parts, norm, eps, dtype), "x_parts": parts, "x_norm": norm, "x_eps": eps}


def recomputed_weights(
    weights: Sequence[Tensor], biases: Sequence[Tensor] | None, norm: nn.Module | None, columns: Tensor | None = None
) -> dict[str, Any]:
    """cross_attention's kv_weight and kv_bias of a layer with its norm folded in, and the parts that are kept.

    columns (G K, P): what the keys get of the second of x's parts.
    """
    parts = list(weights)
    scale = None if norm is None else norm.weight
    if scale is None and columns is not None:
        scale = torch.ones_like(parts[0][0])
    parts += [t for t in (scale, columns) if t is not None]
    bias = None if biases is None else torch.cat(list(biases))
    shift = getattr(norm, "bias", None)
    if shift is not None:
        with _autocast.off(shift):  # which would keep a cast copy of each weight
            moved = torch.cat([torch.mv(w, shift.to(w.dtype)) for w in weights])
        bias = moved if bias is None else bias + moved
    return {"kv_weight": joined(parts), "kv_bias": bias, "kv_parts": parts if len(parts) > 1 else []}


def _stacked(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """(L, C) of the scales, and of the shifts where there are any: views of one copy."""
    if biases[0] is None:
        return torch.stack(list(weights)), None
    return torch.stack([*weights, *biases]).unflatten(0, (2, -1)).unbind()
