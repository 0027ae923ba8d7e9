"""The pre-norm transformer block of mapping networks, which can leave out rows that nobody reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.cross_attention import cross_attention
from ._parts import check_heads, check_level, packed_projection, plain, projections, residual_mlp

ALL = slice(None)


class SelfAttentionBlock(nn.Module):
    """x = x + proj(attention(norm1(x))); x = x + fc2(act(fc1(norm2(x)))): x (B, T, D) -> (B, T, D).

    forward's `rows` returns only those rows, exactly: their queries attend to the keys and values of all rows, and what
    follows the attention runs on them alone. For the last block before a module that reads some rows only.

    Parameters: `norm1`, `norm2` (eps), `qkv` (3 D, D) when packed, else `to_queries` (D, D) and `to_keys_values`
    (2 D, D), `proj`, `fc1` (F, D), `fc2` (D, F); qkv_bias is of the projections before the attention.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        *,
        act: str,
        packed: bool = True,
        qkv_bias: bool = True,
        eps: float = 1e-5,
        level: int = 0,
        **made,
    ):
        super().__init__()
        self.head_dim, self.act, self.level = check_heads("the width", width, heads), act, check_level(level)
        self.norm1 = nn.LayerNorm(width, eps=eps, **made)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias, **made) if packed else None
        self.to_queries = None if packed else nn.Linear(width, width, bias=qkv_bias, **made)
        self.to_keys_values = None if packed else nn.Linear(width, 2 * width, bias=qkv_bias, **made)
        self.proj = nn.Linear(width, width, **made)
        self.norm2 = nn.LayerNorm(width, eps=eps, **made)
        self.fc1, self.fc2 = nn.Linear(width, inner, **made), nn.Linear(inner, width, **made)

    def forward(self, x: Tensor, rows: slice = ALL) -> Tensor:
        q, kv = self._projections(x, rows)
        k, v = kv.unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        y = cross_attention(q.unflatten(-1, (-1, self.head_dim)), k, v).flatten(-2)
        x = x[:, rows] + self.proj(y)
        return residual_mlp(x, self.norm2, self.fc1, self.fc2, self.act, self.level)

    def _projections(self, x: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Queries (B, rows, D), and keys and values (B, T, 2 D)."""
        D = x.shape[-1]
        if self.qkv is None:
            if rows == ALL:
                return tuple(projections(x, self.norm1, [self.to_queries, self.to_keys_values]))
            return (
                projections(x[:, rows], self.norm1, [self.to_queries])[0],
                projections(x, self.norm1, [self.to_keys_values])[0],
            )
        if rows == ALL or not plain(self.norm1, self.qkv):
            y = projections(x, self.norm1, [self.qkv])[0]
            return y[:, rows, :D], y[..., D:]
        weight, bias = self.qkv.weight, self.qkv.bias
        return tuple(
            packed_projection(t, self.norm1, [weight[part]], None if bias is None else [bias[part]])[0]
            for t, part in ((x[:, rows], slice(0, D)), (x, slice(D, None)))
        )


def with_constants(x: Tensor, constants: Tensor, first: bool = False) -> Tensor:
    """x (B, N, D) with the same rows (M, D) after, or before, the tokens of every sample."""
    rows = constants.expand(x.shape[0], -1, -1)
    # under autocast the constants keep the stream wide, as they do upstream
    return torch.cat((rows, x) if first else (x, rows), 1)


def run(blocks: nn.ModuleList, x: Tensor, rows: slice) -> Tensor:
    """x after all blocks, its `rows` only."""
    for block in blocks[:-1]:
        x = block(x)
    return blocks[-1](x, rows) if len(blocks) else x[:, rows]
