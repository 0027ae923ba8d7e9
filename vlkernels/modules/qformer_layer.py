"""One Q-Former layer on two streams, queries and text, which meet in the self-attention as two sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ops.cross_attention import cross_attention
from ._children import hook_problem
from ._post_norm import Stream, added, fed_forward, projected


@dataclasses.dataclass(frozen=True)
class ImageKV:
    """Keys and values of the image in each cross-attending layer, made once by QFormer.image_kv for several calls.

    layers: cross_attention's arguments by layer; None where the layer must call its own children, which read x.
    """

    layers: Mapping[int, dict[str, Tensor] | None]
    mask: Tensor | None
    x: Tensor


class QFormerLayer(nn.Module):
    """One layer; queries and text are streams of their own, which meet in the self-attention as two sources.

    encoder_hidden_size 0 builds no cross-attention. Children are named as in transformers' Blip2QFormerLayer.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        intermediate_size: int,
        encoder_hidden_size: int,
        *,
        act: str,
        eps: float,
        text: bool,
        hidden_dropout: float,
        attention_dropout: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.act, self.head_dim = act, hidden_size // heads
        self.hidden_dropout, self.attention_dropout = hidden_dropout, attention_dropout

        def closing(width: int) -> nn.ModuleDict:
            norm = nn.LayerNorm(hidden_size, eps=eps, **made)
            return nn.ModuleDict({"dense": nn.Linear(width, hidden_size, **made), "LayerNorm": norm})

        def attention(width: int) -> nn.ModuleDict:
            widths = {"query": hidden_size, "key": width, "value": width}
            own = nn.ModuleDict({name: nn.Linear(w, hidden_size, **made) for name, w in widths.items()})
            return nn.ModuleDict({"attention": own, "output": closing(hidden_size)})

        self.attention = attention(hidden_size)
        self.crossattention = attention(encoder_hidden_size) if encoder_hidden_size else None
        for end in ("", "_query") if text else ("_query",):
            opening = nn.ModuleDict({"dense": nn.Linear(hidden_size, intermediate_size, **made)})
            self.add_module(f"intermediate{end}", opening)
            self.add_module(f"output{end}", closing(intermediate_size))

    def forward(
        self,
        queries: Stream | None,
        text: Stream | None,
        past: tuple[Tensor | None, ...] | None,
        *,
        image: ImageKV | None,
        image_kv: dict[str, Tensor] | None,
        masks: tuple[Tensor | None, Tensor | None, float],
        index: Tensor | None,
        causal: bool,
        level: int,
        want: tuple[str, ...],
    ) -> tuple[Stream | None, Stream | None, tuple[Tensor | None, ...]]:
        query_mask, text_mask, masked = masks
        q, k, v = self._heads(queries, "queries" in want)
        q2, k2, v2 = self._heads(text, "text" in want)
        if past is not None:
            k, v, before_k, before_v = past
            if before_k is not None:
                k2 = torch.cat((before_k.expand(k2.shape[0], -1, -1, -1), k2), 1)
                v2 = torch.cat((before_v.expand(v2.shape[0], -1, -1, -1), v2), 1)
        options = {"masked": masked, "p": self._p(self.attention_dropout)}
        first = {"k": k, "v": v, "mask": query_mask} if k is not None else {}
        second = {"k2": k2, "v2": v2, "mask2": text_mask} if k2 is not None else {}
        if not first and not causal:
            first, second = {"k": k2, "v": v2, "mask": text_mask}, {}
        if q is not None:
            o = cross_attention(q, **first, **({} if causal else second), **options)
            queries = self._closed(queries, o, self.attention.output)
            if self.crossattention is not None:
                queries = self._cross(queries, image, image_kv, index)
            queries = self._feed(queries, "_query", level)
        if q2 is not None:
            o = cross_attention(q2, **first, **second, **options, causal=causal)
            text = self._feed(self._closed(text, o, self.attention.output), "", level)
        found = (queries if q is not None else None, text if q2 is not None else None)
        if hook_problem("layer", self) is not None:
            # what a hook gathers or sees is this layer's own: the next one must not read its norms
            found = tuple(s if s is None else Stream(s.settled()) for s in found)
        return *found, (k, v, k2, v2)

    def _heads(self, stream: Stream | None, wanted: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """q, k, v (B, T, H, K); without q where only keys and values are of use."""
        if stream is None:
            return None, None, None
        own = self.attention.attention
        found = projected(stream, (own.query, own.key, own.value) if wanted else (own.key, own.value))
        found = tuple(t.unflatten(-1, (-1, self.head_dim)) for t in found)
        return found if wanted else (None, *found)

    def _cross(self, queries: Stream, image: ImageKV, kv: dict[str, Tensor] | None, index: Tensor | None) -> Stream:
        own = self.crossattention
        (q,) = projected(queries, (own.attention.query,))
        if kv is None:
            kv = keys_values(image.x, own.attention, self.head_dim)
        p = self._p(self.attention_dropout)
        q = q.unflatten(-1, (-1, self.head_dim))
        return self._closed(queries, cross_attention(q, **kv, mask=image.mask, index=index, p=p), own.output)

    def _closed(self, stream: Stream, o: Tensor, output: nn.Module) -> Stream:
        return added(stream, output.dense(o.flatten(2)), output.LayerNorm, self._p(self.hidden_dropout))

    def _feed(self, stream: Stream, end: str, level: int) -> Stream:
        first, output = getattr(self, f"intermediate{end}"), getattr(self, f"output{end}")
        branch = fed_forward(stream, first.dense, output.dense, self.act, level)
        return added(stream, branch, output.LayerNorm, self._p(self.hidden_dropout))

    def _p(self, p: float) -> float:
        return p if self.training else 0.0

    def drops(self) -> bool:
        """Whether a dropout acts in this layer."""
        return bool(self._p(self.hidden_dropout) or self._p(self.attention_dropout))


def keys_values(x: Tensor, attention: nn.Module, head_dim: int) -> dict[str, Tensor]:
    """k and v (B, N, H, K) through the children."""
    return {n: c(x).unflatten(-1, (-1, head_dim)) for n, c in (("k", attention.key), ("v", attention.value))}
