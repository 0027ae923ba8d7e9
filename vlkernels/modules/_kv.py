"""Keys and values of all layers that attend to the same tokens: one product, or one in each layer and none kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._shuffle import normalised
from ..ops.multi_layer_kv import multi_layer_kv


def layers_kv(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    head_dim: int,
    *,
    biases: Sequence[Sequence[Tensor]] | None = None,
    norms: Sequence[nn.Module] | None = None,
    level: int = 0,
) -> list[dict[str, Tensor]]:
    """For each layer the arguments of cross_attention that stand for [k | v] = norm_l(x) W_lᵀ + b_l.

    x (B, N, C). weights: of each layer [kv] (2 G K, C), keys first, or [key, value] (G K, C) each; biases likewise.
    norms: nn.LayerNorm or nn.RMSNorm of each layer, of one kind and eps, or None for none.
    level 0: {"k", "v"} (B, N, G, K), views of one tensor, kept for backward. level 1: {"x", "kv_weight", "kv_bias"},
    so that neither keys nor values are kept, for one more product in backward.
    """
    norm, eps, scale, shift = "none", 1e-5, None, None
    if norms is not None:
        norm = "layer" if isinstance(norms[0], nn.LayerNorm) else "rms"
        eps = norms[0].eps
        scale, shift = _stacked([n.weight for n in norms], [getattr(n, "bias", None) for n in norms])
    if level == 0:
        flat = [w for layer in weights for w in layer]
        weight = torch.cat(flat) if len(flat) > 1 else flat[0]
        bias = None if biases is None else torch.cat([b for layer in biases for b in layer])
        # the layers' own weights are kept for backward, not their concatenation
        parts = flat if len(flat) > 1 else ()
        y = multi_layer_kv(x, weight, bias, scale, shift, parts, layers=len(weights), norm=norm, eps=eps)
        kv = y.unflatten(-1, (2 * len(weights), -1, head_dim)).unbind(-3)
        return [{"k": k, "v": v} for k, v in zip(kv[0::2], kv[1::2], strict=True)]
    n = normalised(x, norm, None, None, eps)
    if torch.is_autocast_enabled(x.device.type) and n.dtype != torch.float64:
        n = n.to(torch.get_autocast_dtype(x.device.type))  # what the products take, and all that is kept
    found = []
    for i, layer in enumerate(weights):
        weight = torch.cat(list(layer)) if len(layer) > 1 else layer[0]
        bias = None if biases is None else torch.cat(list(biases[i]))
        if shift is not None:
            moved = F.linear(shift[i], weight)
            bias = moved if bias is None else bias + moved
        found.append({"x": n, "kv_weight": weight if scale is None else weight * scale[i], "kv_bias": bias})
    return found


def _stacked(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """(L, C) of the scales, and of the shifts where there are any: views of one copy."""
    if biases[0] is None:
        return torch.stack(list(weights)), None
    return torch.stack([*weights, *biases]).unflatten(0, (2, -1)).unbind()
