"""Deformable attention: the standalone module of Deformable DETR, and Honeybee's D-Abstractor, which stacks it.

    offsets, logits = z W_oᵀ + b_o, z W_aᵀ + b_a          z = query + position
    y = out(sum over points of softmax(logits) * bilinear(x W_vᵀ + b_v; reference + offsets / (w, h)))

The two projections of the queries are one product, and in the D-Abstractor, whose layers all read the same tokens, so
are the value projections of all layers. Honeybee (arXiv 2312.06742), Deformable DETR (2010.04159).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cross_attention import cross_attention
from ..ops.deformable_attention import deformable_attention
from ..ops.linear_projector import linear_projector
from ..ops.multi_layer_kv import multi_layer_kv
from ..ops.norm_residual import norm_residual
from ._children import hook_problem
from ._parts import check_heads, check_level, check_tokens, norm_options
from ._post_norm import Stream, added, fed_forward, joined, plain_linear, projected


class MultiScaleDeformableAttention(nn.Module):
    """out(sum over levels and points of a * bilinear(value; location)): query (B, M, D), x (B, S, D) -> (B, M, D).

    Args of forward:
        query: what offsets and weights are projected from, positions already added.
        reference: (B or 1, M, L or 1, 2), (x, y) in [0, 1] units, or (..., 4), boxes (x, y, width, height): then the
            location is their centre + offset / P * size / 2.
        x: the maps, row by row, one level after the other.
        shapes: (h, w) of each level, ints of the host.
        mask: (B, S), True = keep; values of other positions are zero.
        value: x projected, (B, S, H, K), where all layers' values were made at once; x is not read then.

    Parameters as in transformers' DeformableDetrMultiscaleDeformableAttention: `sampling_offsets` (H L P 2, D),
    `attention_weights` (H L P, D), `value_proj` (D, D), `output_proj` (D, D). Initialised as there: offsets zero
    weights, biases in H directions around the circle, the further the later the point; weights zero; the others
    Xavier-uniform with zero biases. Source: fundamentalvision/Deformable-DETR models/ops/modules/ms_deform_attn.py.
    """

    def __init__(
        self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4, device=None, dtype=None
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.head_dim = check_heads("d_model", d_model, n_heads)
        if n_levels < 1 or n_points < 1:
            raise ValueError(f"n_levels is {n_levels}, n_points {n_points}; accepted: 1 or more")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        count = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, 2 * count, **made)
        self.attention_weights = nn.Linear(d_model, count, **made)
        self.value_proj = nn.Linear(d_model, d_model, **made)
        self.output_proj = nn.Linear(d_model, d_model, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation above, also after `to_empty`."""
        nn.init.zeros_(self.sampling_offsets.weight)
        bias = self.sampling_offsets.bias
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2.0 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32)[:, None]
        grid = (direction[:, None, None] * steps).expand(-1, self.n_levels, -1, -1)
        with torch.no_grad():
            bias.copy_(grid.reshape(-1).to(bias))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        x: Tensor | None,
        shapes: Sequence[Sequence[int]],
        mask: Tensor | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        check_tokens("query", query, self.d_model)
        if value is None:
            check_tokens("x", x, self.d_model)
            value = self.values(x, mask)
        (B, M), L = (value.shape[0], query.shape[1]), self.n_levels
        if query.shape[0] not in (1, B):
            raise ValueError(f"query has a batch of {query.shape[0]}; accepted: 1, or {B} as the maps")
        rows, size = tuple(reference.shape[:-1]), reference.shape[-1] if reference.dim() else 0
        if len(rows) != 3 or rows[0] not in (1, B) or rows[1] != M or rows[2] not in (1, L) or size not in (2, 4):
            raise ValueError(
                f"reference has shape {tuple(reference.shape)}; accepted: (B or 1, M, L or 1, 2), or 4 for boxes, with "
                f"B = {B}, M = {M}, L = {L}"
            )
        offsets, logits = projected(Stream(query), (self.sampling_offsets, self.attention_weights))
        H, P = self.n_heads, self.n_points
        # queries that are the same for every image are projected once
        points = offsets.unflatten(-1, (H, L, P, 2)).expand(B, -1, -1, -1, -1, -1)
        weights = logits.unflatten(-1, (H, L, P)).expand(B, -1, -1, -1, -1)
        if reference.shape[-1] == 4:
            boxes = reference[:, :, None, :, None]
            # at least float32, where a location's digits are sampling places
            points = boxes[..., :2] + points.to(torch.promote_types(points.dtype, torch.float32)) * (
                boxes[..., 2:] * (0.5 / P)
            )
            reference = None
        y = deformable_attention(value, points, weights, reference, shapes)
        return self.output_proj(y.flatten(-2))

    def values(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x projected, (B, S, H, K)."""
        value = self.value_proj(x)
        if mask is not None:
            if mask.shape != x.shape[:2]:
                raise ValueError(f"mask has shape {tuple(mask.shape)}; accepted: (B, S) = {tuple(x.shape[:2])}")
            value = value.masked_fill(~mask.to(torch.bool)[..., None], 0.0)
        return value.unflatten(-1, (self.n_heads, -1))

    def extra_repr(self) -> str:
        return f"{self.d_model}, levels={self.n_levels}, heads={self.n_heads}, points={self.n_points}"


class DeformableDecoderLayer(nn.Module):
    """One layer, on a post-norm stream t: t = LN(t + self attention of (t + position), values of t); t = LN(t +
    deformable attention of t + position); t = LN(t + fc2(relu(fc1(t)))).

    Parameters `self_attn.{q,k,v,out}_proj`, `self_attn_layer_norm`, `encoder_attn` (MultiScaleDeformableAttention),
    `encoder_attn_layer_norm`, `fc1` (F, D), `fc2` (D, F), `final_layer_norm`, named as in transformers'
    DeformableDetrDecoderLayer.
    """

    def __init__(
        self, d_model: int, heads: int, ffn: int, n_points: int, *, dropout: float, eps: float, level: int, **made
    ):
        super().__init__()
        self.head_dim, self.dropout, self.level = check_heads("d_model", d_model, heads), dropout, level
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(d_model, d_model, **made) for name in names})
        self.self_attn_layer_norm = nn.LayerNorm(d_model, eps=eps, **made)
        self.encoder_attn = MultiScaleDeformableAttention(d_model, 1, heads, n_points, **made)
        self.encoder_attn_layer_norm = nn.LayerNorm(d_model, eps=eps, **made)
        self.fc1, self.fc2 = nn.Linear(d_model, ffn, **made), nn.Linear(ffn, d_model, **made)
        self.final_layer_norm = nn.LayerNorm(d_model, eps=eps, **made)

    def forward(
        self,
        stream: Stream,
        position: Tensor,
        reference: Tensor,
        x: Tensor | None,
        shapes: Sequence[Sequence[int]],
        value: Tensor | None = None,
    ) -> Stream:
        own, p = self.self_attn, self.dropout if self.training else 0.0
        q, k = projected(Stream(_shifted(stream, position)), (own.q_proj, own.k_proj))
        (v,) = projected(stream, (own.v_proj,))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v.expand(q.shape[0], -1, -1)))
        stream = added(stream, own.out_proj(cross_attention(q, k, v).flatten(2)), self.self_attn_layer_norm, p)
        branch = self.encoder_attn(_shifted(stream, position), reference, x, shapes, value=value)
        stream = added(stream, branch, self.encoder_attn_layer_norm, p)
        branch = fed_forward(stream, self.fc1, self.fc2, "relu", self.level)
        stream = added(stream, branch, self.final_layer_norm, p)
        # what a hook gathers or sees is this layer's own: the next one must not read its norms
        return stream if hook_problem("layer", self) is None else Stream(stream.settled())


class DAbstractor(nn.Module):
    """Honeybee's D-Abstractor: x (B, N, C) -> (B, num_queries + num_eos_tokens, D_t); N is a square, C =
    encoder_hidden_size, D_t = output_hidden_size.

    With z = input_proj(x) + v_pos_emb and pooled = adaptive average pooling of its map to num_queries tokens, the
    layers' queries start from (pooled_v_target)
        "query": pooled as positions, query_position_embeddings as content;
        "tgt": query_position_embeddings as positions, pooled as content;
        "none": positions and content are the two halves of query_position_embeddings, (M, 2 D).
    All layers sample z at `reference_points`, learned, and the last one's tokens, behind them `eos_tokens`, go through
    output_proj. dropout: of each sub-layer, in training. level: of the FFN, 0 keeps its first product for backward, 1
    recomputes it. x itself is left as it is.

    Parameters, upstream's below `abstractor.`: `input_proj.0` unless C = D, `v_pos_emb` (1, N, D) with pos_emb,
    `query_position_embeddings.weight`, `reference_points` (1, M, 2), `layers.{l}` as in DeformableDecoderLayer,
    `eos_tokens` (1, n, D), `output_proj` unless D = D_t. Initialised as upstream's: linears N(0, 0.02) with zero biases
    and embeddings N(0, 0.02), deformable attention as in MultiScaleDeformableAttention, reference points on a grid,
    v_pos_emb and eos_tokens truncated normal 0.02. A checkpoint's `v_pos_emb` with one row more than N loses its first,
    that of CLS.

    Upstream computes in float32; here all dtypes and autocast work, locations and softmax stay in float32.
    Source: khanrc/honeybee honeybee/projectors/dabs.py; arXiv 2312.06742.
    """

    def __init__(
        self,
        num_input_tokens: int,
        encoder_hidden_size: int,
        output_hidden_size: int,
        d_model: int = 1024,
        num_queries: int = 144,
        layers: int = 6,
        heads: int = 8,
        ffn: int = 1024,
        n_points: int = 4,
        *,
        pooled_v_target: str = "query",
        num_eos_tokens: int = 0,
        pos_emb: bool = True,
        dropout: float = 0.1,
        eps: float = 1e-5,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        if pooled_v_target not in ("query", "tgt", "none"):
            raise ValueError(f"pooled_v_target is {pooled_v_target!r}; accepted: 'query', 'tgt', 'none'")
        if layers < 1 or num_eos_tokens < 0 or ffn < 1:
            raise ValueError(
                f"layers is {layers}, ffn {ffn}, num_eos_tokens {num_eos_tokens}; accepted: 1, 1 and 0 or more"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; accepted: at least 0, less than 1")
        self.side = _root("num_input_tokens", num_input_tokens)
        self.query_side = _root("num_queries", num_queries)
        self.encoder_hidden_size, self.d_model, self.num_queries = encoder_hidden_size, d_model, num_queries
        self.pooled_v_target = pooled_v_target

        def linear(width: int, out: int) -> nn.Module:
            return nn.Identity() if width == out else nn.Linear(width, out, **made)

        self.input_proj = nn.ModuleList([linear(encoder_hidden_size, d_model)])
        width = d_model * (2 if pooled_v_target == "none" else 1)
        self.query_position_embeddings = nn.Embedding(num_queries, width, **made)
        self.reference_points = nn.Parameter(torch.empty(1, num_queries, 2, **made))
        self.v_pos_emb = nn.Parameter(torch.empty(1, num_input_tokens, d_model, **made)) if pos_emb else None
        self.eos_tokens = nn.Parameter(torch.empty(1, num_eos_tokens, d_model, **made)) if num_eos_tokens else None
        options = {"dropout": float(dropout), "eps": eps, "level": check_level(level)}
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(d_model, heads, ffn, n_points, **options, **made) for _ in range(layers)
        )
        self.output_proj = linear(d_model, output_hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation above, also after `to_empty`."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for layer in self.layers:
            layer.encoder_attn.reset_parameters()
        for tokens in (self.v_pos_emb, self.eos_tokens):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)
        at = torch.linspace(0.5, self.side - 0.5, self.query_side) / self.side
        y, x = torch.meshgrid(at, at, indexing="ij")
        with torch.no_grad():
            self.reference_points.copy_(torch.stack((x.flatten(), y.flatten()), -1)[None].to(self.reference_points))

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("x", x, self.encoder_hidden_size)
        if self.v_pos_emb is not None and x.shape[1] != self.v_pos_emb.shape[1]:
            raise ValueError(f"x has {x.shape[1]} tokens; accepted: the {self.v_pos_emb.shape[1]} rows of v_pos_emb")
        side = _root("the number of x's tokens", x.shape[1])
        z = self._projected(x)
        content, position = self._queries(z, side)
        reference, shapes = self.reference_points[:, :, None], [(side, side)]
        values = self._values(z)
        stream = Stream(content)
        for i, layer in enumerate(self.layers):
            stream = layer(stream, position, reference, z if values is None else None, shapes,
                           None if values is None else values[i])  # fmt: skip
        return self._out(stream)

    def _projected(self, x: Tensor) -> Tensor:
        """input_proj(x) + v_pos_emb, in one product where there is one."""
        (proj,), table = self.input_proj, self.v_pos_emb
        if not plain_linear(proj):
            z = proj(x)
            return z if table is None else z + table
        return linear_projector(x, proj.weight, proj.bias, position=None if table is None else table[0])

    def _queries(self, z: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Content and position, (B, M, D) or (1, M, D) each."""
        rows = self.query_position_embeddings.weight[None]
        if self.pooled_v_target == "none":
            position, content = rows.chunk(2, -1)
            return content, position
        maps = z.transpose(1, 2).unflatten(-1, (side, side))
        pooled = F.adaptive_avg_pool2d(maps, self.query_side).flatten(2).transpose(1, 2)
        return (rows, pooled) if self.pooled_v_target == "query" else (pooled, rows)

    def _values(self, z: Tensor) -> list[Tensor] | None:
        """Of all layers, (B, N, H, K) each, views of one product; None where a layer must make its own."""
        taken = [getattr(layer, "encoder_attn", None) for layer in self.layers]
        if not all(
            type(m) is MultiScaleDeformableAttention and hook_problem("encoder_attn", m) is None
            and plain_linear(m.value_proj) and m.value_proj.bias is not None for m in taken
        ):  # fmt: skip
            return None
        parts = [m.value_proj.weight for m in taken]
        y = multi_layer_kv(
            z, joined(parts), joined([m.value_proj.bias for m in taken]), parts=parts if len(parts) > 1 else (),
            layers=len(parts),
        )  # fmt: skip
        return list(y.unflatten(-1, (len(parts), taken[0].n_heads, -1)).unbind(2))

    def _out(self, stream: Stream) -> Tensor:
        """output_proj of the last layer's tokens and, behind them, of the eos tokens."""
        proj, eos = self.output_proj, self.eos_tokens
        if plain_linear(proj):
            y = linear_projector(stream.s, proj.weight, proj.bias, **norm_options(stream.norm))
        else:
            y = proj(stream.settled())
        if eos is None:
            return y
        return torch.cat((y, proj(eos).expand(y.shape[0], -1, -1).to(y.dtype)), 1)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        key, own = f"{prefix}v_pos_emb", self.v_pos_emb
        if own is not None and key in state_dict and state_dict[key].shape[1:2] == (own.shape[1] + 1,):
            state_dict[key] = state_dict[key][:, 1:]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.num_queries} queries, {self.encoder_hidden_size} -> {self.d_model}, {self.pooled_v_target!r}"


def _shifted(stream: Stream, position: Tensor) -> Tensor:
    """x + position: one pass over what is under the norm. Either may have a batch of 1."""
    s, norm = stream
    shape = torch.broadcast_shapes(s.shape, position.shape)
    if norm is None:
        return s + position
    return norm_residual(s.expand(shape), position.expand(shape), norm.weight, norm.bias, eps=norm.eps)


def _root(name: str, count: int) -> int:
    side = 1
    while side * side < count:  # math.isqrt would break a graph whose sizes are symbols
        side += 1
    if side * side != count:
        raise ValueError(f"{name} is {count}; accepted: a square, 1 or more")
    return side
