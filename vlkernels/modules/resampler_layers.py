"""The one equation of all perceiver resamplers: latents attend to [norm(x); norm(latents)], layer after layer.

    l = l + out(attention(q(norm(l)), kv([norm(x); norm(l)]))),   l = l + down(act(up(norm(l))))

Keys and values of x are one product for all layers (`_kv.layers_kv`), those of the latents one with the queries, and
the two sources are never concatenated. Until the first residual the latents are the same for every media, so the first
layer's norm, queries, keys and values of the latents are computed once. Modules of their own names are in
`resampler.py`. Where a child is no plain nn.Linear or norm any more, or a block of children carries hooks, that part of
the equation runs through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _autocast
from ..ops._shuffle import ACTS
from ..ops.cross_attention import cross_attention
from ..ops.linear_projector import linear_projector
from ..ops.mlp_projector import mlp_projector
from ._children import hook_problem
from ._kv import layers_kv
from ._parts import fusable, norm_options
from .resampler_media import Media


class ResamplerAttention(nn.Module):
    """out(attention(q(l), kv([c; l]))), c = context_norm(x), l = latents_norm(latents); children under `names`.

    names: role -> child's name, in the order of creation. Roles: context_norm, latents_norm, q_norm, k_norm (each may
    be missing), q, out, and either kv (keys first) or k and v. heads: of the queries; kv_heads divides it.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        names: Mapping[str, str],
        *,
        kv_heads: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        **made,
    ):
        super().__init__()
        kv_heads = kv_heads or heads
        if min(heads, head_dim, kv_heads) < 1 or heads % kv_heads:
            raise ValueError(
                f"{heads} heads of width {head_dim}, {kv_heads} key/value heads; accepted: 1 or more, and heads a "
                "multiple of the key/value heads"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"attention dropout is {dropout}; accepted: at least 0, less than 1")
        self.names, self.head_dim, self.dropout, self.bias = dict(names), head_dim, dropout, bias
        inner, kv_inner = heads * head_dim, kv_heads * head_dim
        shapes = {"q": (dim, inner), "kv": (dim, 2 * kv_inner), "k": (dim, kv_inner), "v": (dim, kv_inner)}
        shapes["out"] = (inner, dim)
        for role, name in names.items():
            if role.endswith("_norm"):
                child = nn.LayerNorm(head_dim if role in ("q_norm", "k_norm") else dim, **made)
            else:
                child = nn.Linear(*shapes[role], bias=bias, **made)
            self.add_module(name, child)

    def part(self, role: str) -> nn.Module | None:
        return getattr(self, self.names[role]) if role in self.names else None

    @property
    def kv(self) -> list[nn.Module]:
        return [self.part("kv")] if "kv" in self.names else [self.part("k"), self.part("v")]

    def heads_of(self, *products: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., G, K) of one product [k | v], or of one each."""
        if len(products) == 1:
            return products[0].unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        return tuple(t.unflatten(-1, (-1, self.head_dim)) for t in products)

    def attend(self, q: Tensor, k2: Tensor, v2: Tensor, **first) -> Tensor:
        """The op on both sources; (B, M, H K). The head norms are called where the op may not read them."""
        norms = {"q_norm": self.part("q_norm"), "k_norm": self.part("k_norm")}
        options = {}
        if norms["q_norm"] is not None:
            if fusable(*norms.values()) and norms["q_norm"].eps == norms["k_norm"].eps:
                options = {f"{n}_{p}": getattr(m, p) for n, m in norms.items() for p in ("weight", "bias")}
                options |= {"norm": "layer", "eps": norms["q_norm"].eps}
            else:
                if "x" in first:
                    n = F.linear(first["x"], first["kv_weight"], first["kv_bias"])
                    first = {"mask": first.get("mask"), **dict(zip(("k", "v"), self.heads_of(n), strict=True))}
                q, k2 = norms["q_norm"](q), norms["k_norm"](k2)
                first |= {"k": norms["k_norm"](first["k"])} if "k" in first else {}
        p = self.dropout if self.training else 0.0
        return cross_attention(q, k2=k2, v2=v2, p=p, **first, **options).flatten(-2)

    def forward(self, context: Tensor, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """The whole attention through its children: context (B, N, D), latents (B, M, D), mask bool (B, N)."""
        return self.part("out")(
            self.attend(*queries(self, self.part("latents_norm"), latents), mask=mask,
                        **keys_values(self, self.part("context_norm"), context))
        )  # fmt: skip


class FeedForward(nn.Module):
    """down(act(up(n))), or gated down(act(gate(n)) * up(n)), n = norm(x) or x; children under `names`, no biases.

    names: role -> child's name, in the order of creation. Roles: norm and gate (each may be missing), up, down.
    """

    def __init__(
        self,
        dim: int,
        inner: int,
        names: Mapping[str, str],
        act: str,
        *,
        out: int | None = None,
        level: int = 0,
        **made,
    ):
        super().__init__()
        if act not in ACTS:
            raise ValueError(f"act is {act!r}; accepted: {', '.join(ACTS)}")
        self.names, self.act, self.level = dict(names), act, level
        shapes = {"gate": (dim, inner), "up": (dim, inner), "down": (inner, out or dim)}
        for role, name in names.items():
            child = nn.LayerNorm(dim, **made) if role == "norm" else nn.Linear(*shapes[role], bias=False, **made)
            self.add_module(name, child)

    def part(self, role: str) -> nn.Module | None:
        return getattr(self, self.names[role]) if role in self.names else None

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.part("norm"))

    def run(self, x: Tensor, norm: nn.Module | None, residual: bool = False) -> Tensor:
        """The block after `norm`, by the op where the children are plain; residual: added to x."""
        up, gate, down = self.part("up"), self.part("gate"), self.part("down")
        if not fusable(norm, up, gate, down):
            n = x if norm is None else norm(x)
            h = ACTS[self.act](up(n)) if gate is None else ACTS[self.act](gate(n)) * up(n)
            return x + down(h) if residual else down(h)
        return mlp_projector(
            x, up.weight, down.weight, wg=None if gate is None else gate.weight, act=self.act, level=self.level,
            residual=residual, **norm_options(norm),
        )  # fmt: skip


class ResamplerLayer(nn.Module):
    """One layer; children under `names`: attention and ffn, and where they lie outside of those context_norm,
    latents_norm and ffn_norm. A missing ffn is an identity inside the residual: the layer doubles its latents."""

    def __init__(self, names: Mapping[str, str], **children: nn.Module):
        super().__init__()
        self.names = dict(names)
        for role, name in names.items():
            self.add_module(name, children[role])

    def part(self, role: str) -> nn.Module | None:
        return getattr(self, self.names[role]) if role in self.names else None

    def norm(self, role: str) -> nn.Module | None:
        """The norm of a role, be it the layer's or its block's."""
        if role in self.names:
            return self.part(role)
        return self.part("ffn").part("norm") if role == "ffn_norm" else self.part("attention").part(role)

    def feed_forward(self, latents: Tensor) -> Tensor:
        if "ffn" not in self.names:
            return latents + latents
        ffn = self.part("ffn")
        if called(ffn, FeedForward):
            outer = self.part("ffn_norm")
            return latents + ffn(latents if outer is None else outer(latents))
        return ffn.run(latents, self.norm("ffn_norm"), residual=True)

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """The layer on its own: latents (B, M, D), context (B, N, D), mask bool (B, N)."""
        outer = (self.part("context_norm"), self.part("latents_norm"))
        c, n = (t if norm is None else norm(t) for norm, t in zip(outer, (context, latents), strict=True))
        return self.feed_forward(latents + self.part("attention")(c, n, mask))


# -- pieces --------------------------------------------------------------------------------------------------------


def called(block: nn.Module, kind: type) -> bool:
    """The block's own forward must run: somebody hooked or replaced it."""
    return type(block) is not kind or hook_problem("block", block) is not None


def in_one_dtype(latents: Tensor, *linears: nn.Linear) -> bool:
    """Whether a product may add the latents itself: nothing is rounded that plain PyTorch keeps wide."""
    dtype = _autocast.compute_dtype(latents) or latents.dtype
    return latents.dtype == dtype and all(linear.weight.dtype == dtype for linear in linears)


def keys_values(attention: ResamplerAttention, norm: nn.Module | None, x: Tensor) -> dict[str, Tensor]:
    """{"k", "v"} of x (..., C) in one layer, through the children."""
    n = x if norm is None else norm(x)
    return dict(zip(("k", "v"), attention.heads_of(*(child(n) for child in attention.kv)), strict=True))


def queries(
    attention: ResamplerAttention,
    norm: nn.Module | None,
    latents: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, M, H, K), k2 and v2 (B, M, G, K) of latents: one product with `weight`, [q | k | v], else the children."""
    if weight is None:
        n = latents if norm is None else norm(latents)
        q = attention.part("q")(n).unflatten(-1, (-1, attention.head_dim))
        return q, *attention.heads_of(*(child(n) for child in attention.kv))
    parts = [child.weight for child in (attention.part("q"), *attention.kv)]
    y = linear_projector(latents, weight, bias, parts=parts, **norm_options(norm)).unflatten(
        -1, (-1, attention.head_dim)
    )
    H = attention.part("q").out_features // attention.head_dim
    G = (y.shape[-2] - H) // 2
    return y.split([H, G, G], -2)


def packed_weights(pairs: Sequence[tuple[ResamplerAttention, nn.Module | None]]) -> list[tuple]:
    """(weight, bias) of [q | k | v] for each attention whose children are plain, else (None, None); one copy of all."""
    owners = [[a.part("q"), *a.kv] for a, _ in pairs]
    able = [fusable(norm, *linears, bias=a.bias) for linears, (a, norm) in zip(owners, pairs, strict=True)]
    rows = [sum(m.out_features for m in linears) for linears in owners]
    taken = [linears for linears, fits in zip(owners, able, strict=True) if fits]
    if not taken:
        return [(None, None)] * len(pairs)
    sizes = [n for n, fits in zip(rows, able, strict=True) if fits]
    weights = iter(torch.cat([m.weight for linears in taken for m in linears]).split(sizes))
    if not pairs[0][0].bias:
        return [(next(weights), None) if fits else (None, None) for fits in able]
    biases = iter(torch.cat([m.bias for linears in taken for m in linears]).split(sizes))
    return [(next(weights), next(biases)) if fits else (None, None) for fits in able]


def context_sources(
    pairs: Sequence[tuple[ResamplerAttention, nn.Module | None]], x: Tensor, level: int
) -> list[dict[str, Tensor]]:
    """For each attention the arguments of cross_attention that stand for keys and values of x (B, N, C)."""
    fits = [fusable(norm, *a.kv, bias=a.bias) for a, norm in pairs]
    taken = [pair for pair, able in zip(pairs, fits, strict=True) if able]
    found = iter(())
    if taken:
        norms = [norm for _, norm in taken]
        found = iter(
            layers_kv(
                x,
                [[m.weight for m in a.kv] for a, _ in taken],
                taken[0][0].head_dim,
                biases=[[m.bias for m in a.kv] for a, _ in taken] if taken[0][0].bias else None,
                norms=None if norms[0] is None else norms,
                level=level,
            )
        )
    return [next(found) if able else keys_values(*pair, x) for pair, able in zip(pairs, fits, strict=True)]


# -- the stack -----------------------------------------------------------------------------------------------------


def resample(latents: Tensor, layers: Sequence[nn.Module], norm: nn.Module, media: Media, level: int) -> Tensor:
    """norm(latents) (M, D) after all layers, for each media: (media, M, D)."""
    fused = [
        type(layer) is ResamplerLayer
        and not called(layer, ResamplerLayer)
        and not called(layer.part("attention"), ResamplerAttention)
        for layer in layers
    ]
    taken = [layer for layer, fits in zip(layers, fused, strict=True) if fits]
    attentions = [layer.part("attention") for layer in taken]
    contexts = [layer.norm("context_norm") for layer in taken]
    owns = [layer.norm("latents_norm") for layer in taken]
    sources = iter(context_sources(list(zip(attentions, contexts, strict=True)), media.x, level))
    packed = iter(packed_weights(list(zip(attentions, owns, strict=True))))
    stream = latents[None]
    for layer, fits in zip(layers, fused, strict=True):
        if not fits:
            stream = media.call(layer, media.spread(stream))
            continue
        attention = layer.part("attention")
        heads = queries(attention, layer.norm("latents_norm"), stream, *next(packed))
        y = media.attend(attention, heads, next(sources))
        stream = layer.feed_forward(projected(attention.part("out"), y, stream))
    return norm(media.restored(media.spread(stream)))


def projected(out: nn.Module, y: Tensor, latents: Tensor) -> Tensor:
    """latents + out(y), in one product where the latents have y's batch."""
    if latents.shape[0] != y.shape[0] or not fusable(out) or not in_one_dtype(latents, out):
        return latents + out(y)
    return torch.addmm(latents.flatten(0, 1), y.flatten(0, 1), out.weight.t()).view(latents.shape)
