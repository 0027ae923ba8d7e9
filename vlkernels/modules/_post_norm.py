"""A post-norm stream that keeps its sums and never the normalised state: each consumer takes LN(s) inside its op.

BERT's sub-layer is x' = LN(x + f(x)). With s the sum under the norm, x = LN(s) and s' = LN(s) + dropout(f(LN(s))).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops._shuffle import ACTS
from ..ops.linear_projector import linear_projector
from ..ops.mlp_projector import mlp_projector
from ..ops.norm_residual import norm_residual
from ._parts import norm_options, plain


class Stream(NamedTuple):
    """x = norm(s), or s itself where norm is None. s (B, T, D); norm is plain, so that its weights may be read."""

    s: Tensor
    norm: nn.LayerNorm | None = None

    def settled(self) -> Tensor:
        """x, by calling the norm."""
        return self.s if self.norm is None else self.norm(self.s)


def under(s: Tensor, norm: nn.Module) -> Stream:
    """norm(s), left to the consumers where the norm does nothing but what its weights say."""
    known = plain(norm, kinds=(nn.LayerNorm,)) and norm.weight is not None
    return Stream(s, norm) if known else Stream(norm(s))


def projected(stream: Stream, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """linear(x) of each: one product where the children are plain."""
    if not all(plain_linear(linear) for linear in linears) or len({linear.bias is None for linear in linears}) > 1:
        x = stream.settled()
        return tuple(linear(x) for linear in linears)
    weight, bias = joined([linear.weight for linear in linears]), None
    if linears[0].bias is not None:
        bias = joined([linear.bias for linear in linears])
    parts = [linear.weight for linear in linears] if len(linears) > 1 else ()
    y = linear_projector(stream.s, weight, bias, parts=parts, **norm_options(stream.norm))
    return y.split([linear.out_features for linear in linears], -1)


def fed_forward(stream: Stream, first: nn.Module, second: nn.Module, act: str, level: int) -> Tensor:
    """second(act(first(x))): the branch of the feed-forward sub-layer."""
    if not (plain_linear(first) and plain_linear(second)):
        return second(ACTS[act](first(stream.settled())))
    return mlp_projector(
        stream.s,
        first.weight,
        second.weight,
        first.bias,
        second.bias,
        act=act,
        level=level,
        **norm_options(stream.norm),
    )


def added(stream: Stream, branch: Tensor, norm: nn.Module, p: float) -> Stream:
    """norm(x + dropout(branch)); a stream of batch 1 is repeated to branch's."""
    s = stream.s.expand(branch.shape)
    return under(norm_residual(s, branch, p=p, **norm_options(stream.norm, "weight", "bias")), norm)


def plain_linear(child: nn.Module) -> bool:
    return plain(child, kinds=(nn.Linear,))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
