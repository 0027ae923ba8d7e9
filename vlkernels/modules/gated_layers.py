"""The one equation of gated cross-attention-dense layers (Flamingo, arXiv 2204.14198; survey eq. 23).

    h = x + tanh(a) out(attention(q(norm(x)), kv(media))),   y = h + tanh(f) row_mask down(act(up(norm(h))))

Modules of their own names are in `gated.py`. A branch that ends in a product is not kept for backward: its gate's
gradient follows from the weight's. Where a child is no plain nn.Linear or norm, that part runs through it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ops._shuffle import ACTS
from ..ops.gated_residual import gated_residual
from ..ops.media_cross_attention import media_cross_attention
from ..ops.mlp_projector import mlp_projector
from ._children import child_problem
from ._parts import fusable, norm_options, packed_projection
from .gated_media import MediaContext


class GatedAttention:
    """The attention of a gated layer: what a module with children `q`, `kv` (one or two), `out` and norms adds to them.

    A subclass has head_dim, dropout and `part(role)` for q, kv or k and v, out, and q_norm with k_norm where there are.
    """

    @property
    def kv(self) -> list[nn.Module]:
        return [self.part("kv")] if self.part("kv") is not None else [self.part("k"), self.part("v")]

    def heads_of(self, *products: Tensor) -> dict[str, Tensor]:
        """Keys and values (B, N, G, K) of one product [k | v], or of one each."""
        if len(products) == 1:
            pair = products[0].unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        else:
            pair = (t.unflatten(-1, (-1, self.head_dim)) for t in products)
        return dict(zip("kv", pair, strict=True))

    def attend(self, x: Tensor, norm: nn.Module | None, kv: Mapping[str, Tensor], context: MediaContext) -> Tensor:
        """y (B, T, H K) before the out projection; x is normalised by `norm` first."""
        mask, linear = context.mask, self.part("q")
        mask.check(x, kv["k"].shape[1])
        if fusable(norm, linear):
            q = packed_projection(x, norm, [linear.weight], None)[0]
        else:
            q = linear(x if norm is None else norm(x))
        q, k = q.unflatten(-1, (-1, self.head_dim)), kv["k"]
        options, norms = {}, (self.part("q_norm"), self.part("k_norm"))
        if norms[0] is not None:
            if _rms(*norms):
                options = {"q_norm_weight": norms[0].weight, "k_norm_weight": norms[1].weight, "norm": "rms"}
                options["eps"] = norms[0].eps
            else:
                q, k = norms[0](q), norms[1](k)
        p = self.dropout if self.training else 0.0
        return media_cross_attention(
            q, k, kv["v"], mask.span, mask.visible, tokens=mask.tokens, p=p, **options
        ).flatten(-2)  # fmt: skip


def gated_attention(x: Tensor, y: Tensor, out: nn.Module, gate: Tensor, p: float = 0.0) -> Tensor:
    """x + tanh(gate) dropout(out(y))"""
    if p == 0.0 and fusable(out):
        return gated_residual(x, gate, inner=y, weight=out.weight)[0]
    return gated_residual(x, gate, out(y), p=p)[0]


def gated_mlp(
    x: Tensor,
    norm: nn.Module,
    up: nn.Module,
    down: nn.Module,
    gate: Tensor,
    act: str,
    level: int,
    *,
    own_gate: nn.Module | None = None,
    row_mask: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """x + tanh(gate) row_mask dropout(down(act(up(n)))), n = norm(x); own_gate: act(own_gate(n)) up(n) within."""
    if not fusable(norm, up, down, own_gate):
        n = norm(x)
        h = ACTS[act](up(n)) if own_gate is None else ACTS[act](own_gate(n)) * up(n)
        return gated_residual(x, gate, down(h), row_mask=row_mask, p=p)[0]
    options = {"act": act, "level": level, **norm_options(norm)}
    options["wg"] = None if own_gate is None else own_gate.weight
    if gate.numel() == 1 and p == 0.0:
        return mlp_projector(x, up.weight, down.weight, scale=gate.tanh(), row_mask=row_mask, residual=True, **options)
    # a gate for each channel acts on the product's result, which is kept for its gradient
    branch = mlp_projector(x, up.weight, down.weight, **options)
    return gated_residual(x, gate, branch, row_mask=row_mask, p=p)[0]


def _rms(q_norm: nn.Module, k_norm: nn.Module) -> bool:
    """The op may read the head norms itself."""
    return (
        all(child_problem("norm", m, (nn.RMSNorm,)) is None for m in (q_norm, k_norm))
        and q_norm.eps == k_norm.eps
        and q_norm.eps is not None
    )


def check_media(name: str, media: Tensor, x: Tensor, channels: int, dims: tuple[int, ...]) -> None:
    if not isinstance(media, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(media).__name__}")
    if media.dim() not in dims or media.shape[-1] != channels or media.shape[0] != x.shape[0]:
        shape = " or ".join(f"(B, {'J, n' if d == 4 else 'N'}, C)" for d in dims)
        raise ValueError(
            f"{name} has shape {tuple(media.shape)}; accepted: {shape} with B = {x.shape[0]} and C = {channels}"
        )


def linear_act(name: str) -> str:
    if name not in ACTS:
        raise ValueError(f"hidden_act is {name!r}; accepted: {', '.join(ACTS)}")
    return name
