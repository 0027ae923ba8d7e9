"""Qwen-VL's resampler and its relatives: learned queries attend once to the image tokens; no residual, no MLP.

    y = LN(out([softmax((LN(query) + e_q) W_qᵀ ((c + e_k) W_kᵀ)ᵀ) c W_vᵀ]) proj,   c = LN(x W_kvᵀ)

with fixed two-dimensional sine/cosine positions e, of which values get none. Queries are the same for every image: they
are computed once, with a batch of 1. (c + e_k) W_kᵀ = c W_kᵀ + e_k W_kᵀ, so that keys and values are one product with
the norm inside, and the position's is one of the grid, not of each image.
level 0 keeps keys and values for backward, level 1 computes them again there. The position is then a row's and a
column's (`_position_kv.one_source`); with a table that is trained or of no such form, level 1 keeps them too.
Survey eq. 9, whose residual, MLP and [X_v; P'] keys upstream does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cross_attention import cross_attention
from ..ops.linear_projector import linear_projector
from ._children import child_problem
from ._parts import check_heads, check_level, check_tokens, norm_options, packed_projection, plain
from ._position_kv import Grid, Separable, one_source
from ._positions import ResizedTables, sincos_2d


class PositionResampler(nn.Module):
    """What the classes below share: parameters, and the equation above given positions and masks."""

    def __init__(
        self, num_queries: int, embed_dim: int, num_heads: int, kv_dim: int | None, eps: float, level: int, **made
    ):
        super().__init__()
        self.level = check_level(level)
        if num_queries < 1:
            raise ValueError(f"num_queries is {num_queries}; accepted: 1 or more")
        self.head_dim = check_heads("embed_dim", embed_dim, num_heads)
        if embed_dim % 4:
            raise ValueError(f"embed_dim is {embed_dim}; accepted: a multiple of 4, for the positions")
        self.num_queries, self.embed_dim, self.num_heads = num_queries, embed_dim, num_heads
        self.kv_dim = embed_dim if kv_dim is None else kv_dim
        self.query = nn.Parameter(torch.empty(num_queries, embed_dim, **made))
        same = self.kv_dim == embed_dim
        self.kv_proj = nn.Identity() if same else nn.Linear(self.kv_dim, embed_dim, bias=False, **made)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads, **made)
        self.ln_q = nn.LayerNorm(embed_dim, eps=eps, **made)
        self.ln_kv = nn.LayerNorm(embed_dim, eps=eps, **made)
        self.ln_post = nn.LayerNorm(embed_dim, eps=eps, **made)
        self.proj = nn.Parameter(torch.empty(embed_dim, embed_dim, **made))

    def reset_parameters(self) -> None:
        """Queries and linears truncated normal 0.02, zero biases, proj N(0, 1 / embed_dim), the packed q, k, v
        Xavier-uniform; norms 1 and 0; fixed positions."""
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.normal_(self.proj, std=self.embed_dim**-0.5)
        nn.init.xavier_uniform_(self.attn.in_proj_weight)
        nn.init.zeros_(self.attn.in_proj_bias)
        for child in self.modules():
            if isinstance(child, nn.Linear):
                nn.init.trunc_normal_(child.weight, std=0.02)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
            elif isinstance(child, nn.LayerNorm):
                child.reset_parameters()

    def _resample(
        self,
        x: Tensor,
        q_position: Tensor | None,
        k_position: Tensor,
        index: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """x (B, N, C); k_position (P, D), of which image token t gets row t, or row index[b, t]; mask bool (B, N),
        True = attend; bias (M, N) is added to the scores. size: k_position's rows and columns, where it is a row's
        and a column's position side by side."""
        x, attn = self.kv_proj(x), self.attn
        q = self.ln_q(self.query)
        q = q if q_position is None else q + q_position
        if child_problem("attn", attn, (nn.MultiheadAttention,)) is not None:
            return self._post(self._called(x, q, k_position, index, mask, bias))
        weights = attn.in_proj_weight.chunk(3)
        biases = attn.in_proj_bias.chunk(3)
        if plain(self.ln_kv) and self.level == 1 and size is not None:
            place = torch.arange(x.shape[1], device=x.device)[None] if index is None else index
            source = one_source(x, weights[1:], biases[1:], self.ln_kv, k_position, size, place)
        elif plain(self.ln_kv):
            found = packed_projection(x, self.ln_kv, weights[1:], biases[1:], (k_position, None), index)
            source = dict(zip(("k", "v"), found, strict=True))
        else:
            c = self.ln_kv(x)
            keys = c + (k_position if index is None else k_position[index])
            source = {"k": F.linear(keys, weights[1], biases[1]), "v": F.linear(c, weights[2], biases[2])}
        heads = {n: t.unflatten(-1, (-1, self.head_dim)) if n in ("k", "v") else t for n, t in source.items()}
        q = F.linear(q[None], weights[0], biases[0]).unflatten(-1, (-1, self.head_dim))
        p = attn.dropout if self.training else 0.0
        y = cross_attention(q, **heads, mask=mask, bias=None if bias is None else bias[None, None], p=p)
        return self._post(attn.out_proj(y.flatten(-2)))

    def _called(self, x, q, k_position, index, mask, bias) -> Tensor:
        """The attention by calling `attn`, where somebody hooked or replaced it."""
        c = self.ln_kv(x)
        keys = c + (k_position if index is None else k_position[index])
        q = q.expand(x.shape[0], -1, -1)
        q, keys, c = (t if self.attn.batch_first else t.transpose(0, 1) for t in (q, keys, c))
        ignored = None if mask is None else ~mask
        y = self.attn(q, keys, c, key_padding_mask=ignored, attn_mask=bias, need_weights=False)[0]
        return y if self.attn.batch_first else y.transpose(0, 1)

    def _post(self, y: Tensor) -> Tensor:
        if not plain(self.ln_post):
            return self.ln_post(y) @ self.proj
        return linear_projector(y, self.proj.t(), **norm_options(self.ln_post))

    def extra_repr(self) -> str:
        sizes = f"{self.num_queries} queries, {self.kv_dim} -> {self.embed_dim}"
        return f"{sizes}, num_heads={self.num_heads}, level={self.level}"


class QwenVLResampler(PositionResampler):
    """Qwen-VL's `attn_pool`, `ln_post` and `proj`: x (B, N, C) -> (B, grid_size², D), C = kv_dim, D = embed_dim.

    N is a square. Queries and keys get a position: `pos_embed` (grid_size², D), fixed and frozen, for keys bicubically
    interpolated to N tokens; the interpolated tables are kept while `pos_embed` is frozen and unchanged.
    forward's attn_mask (grid_size², N) is added to the scores; a query that sees no token at all (-inf) gets zeros from
    the attention, where torch's gives NaN.

    Parameters: `query`, `pos_embed` (M, D), `kv_proj.weight` (D, C) unless C is None or D, `attn.in_proj_weight`
    (3 D, D), `attn.in_proj_bias`, `attn.out_proj`, `ln_q`, `ln_kv`, `ln_post` (eps), `proj` (D, D), applied as y proj.
    Initialised as in reset_parameters. Source: Qwen/Qwen-VL visual.py (Yuliang-Liu/Monkey holds it); arXiv 2308.12966.
    """

    def __init__(
        self,
        grid_size: int,
        embed_dim: int,
        num_heads: int,
        kv_dim: int | None = None,
        *,
        eps: float = 1e-6,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        made = {"device": device, "dtype": dtype}
        if grid_size < 1:
            raise ValueError(f"grid_size is {grid_size}; accepted: 1 or more")
        super().__init__(grid_size**2, embed_dim, num_heads, kv_dim, eps, level, **made)
        self.grid_size = grid_size
        self.pos_embed = nn.Parameter(torch.empty(grid_size**2, embed_dim, **made), requires_grad=False)
        self._resized, self._separable = ResizedTables(), Separable()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.pos_embed.copy_(sincos_2d(self.grid_size, self.grid_size, self.embed_dim).flatten(0, 1))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        check_tokens("x", x, self.kv_dim)
        N = x.shape[1]
        side = round(N**0.5)
        if side * side != N or N == 0:
            raise ValueError(f"x has {N} tokens; accepted: a square number of them, row by row and without CLS")
        if attn_mask is not None:
            if tuple(attn_mask.shape) != (self.num_queries, N):
                raise ValueError(
                    f"attn_mask has shape {tuple(attn_mask.shape)}; accepted: (queries, tokens) = {self.num_queries, N}"
                )
            if not attn_mask.is_floating_point():
                raise TypeError(f"attn_mask has dtype {attn_mask.dtype}; accepted: a float that is added to the scores")
        keys = self._resized.get(self.pos_embed, self.grid_size, side)
        return self._resample(x, self.pos_embed, keys, bias=attn_mask, size=(side, side) if self._on_grid() else None)

    def _on_grid(self) -> bool:
        """Whether keys' positions may be taken apart: a trained table gets its gradient entry by entry."""
        if self.level == 0 or self.pos_embed.requires_grad:
            return False
        # what bicubic interpolation makes of such a table is one, too
        return self._separable(self.pos_embed, Grid(self.grid_size, False))

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._on_grid()  # a graph that is traced next has no values to look at


class OmniLMMResampler(QwenVLResampler):
    """The resampler of OmniLMM and MiniCPM-V 1: QwenVLResampler, whose `ln_post` and `proj` upstream has inside.

    Source: OpenBMB/MiniCPM-V omnilmm/model/resampler.py.
    """


class MiniCPMVResampler(PositionResampler):
    """The resampler of MiniCPM-V 2.5 and 2.6: x (B, N, C) -> (B, num_queries, D), C = kv_dim, D = embed_dim.

    tgt_sizes: (rows, columns) of each image, int (B, 2) or a sequence of pairs, whose first rows * columns tokens are
    in x, row by row; the tokens after them are padding and not attended to. A tensor is read by the host, once; pass a
    sequence to keep a GPU from being waited for, or inside torch.compile(fullgraph=True).
    Keys get the position (row, column), queries and values none: `pos_embed` (max rows, max columns, D) is a buffer
    outside of the state dict that grows when a larger image comes.

    Parameters as QwenVLResampler's, without `pos_embed`. After `to_empty` call reset_parameters.
    Source: openbmb/MiniCPM-V-2_6 resampler.py; arXiv 2408.01800.
    """

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        num_heads: int,
        kv_dim: int | None = None,
        *,
        max_size: tuple[int, int] = (70, 70),
        eps: float = 1e-6,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__(num_queries, embed_dim, num_heads, kv_dim, eps, level, device=device, dtype=dtype)
        if len(max_size) != 2 or min(max_size) < 1:
            raise ValueError(f"max_size is {max_size!r}; accepted: (rows, columns), 1 or more")
        table = torch.empty(*max_size, embed_dim, device=device, dtype=dtype)
        self.register_buffer("pos_embed", table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.pos_embed.copy_(sincos_2d(*self.pos_embed.shape[:2], self.embed_dim))

    def forward(self, x: Tensor, tgt_sizes: Tensor | Sequence[Sequence[int]]) -> Tensor:
        check_tokens("x", x, self.kv_dim)
        B, N, _ = x.shape
        sizes = tgt_sizes.tolist() if isinstance(tgt_sizes, Tensor) else [tuple(size) for size in tgt_sizes]
        if len(sizes) != B or any(not isinstance(size, Sequence) or len(size) != 2 for size in sizes):
            raise ValueError(f"tgt_sizes is {sizes}; accepted: (rows, columns) of each of the {B} images")
        for b, (h, w) in enumerate(sizes):
            if h < 1 or w < 1 or h * w > N:
                raise ValueError(
                    f"tgt_sizes[{b}] is {(h, w)}; accepted: 1 or more each, and not more than the {N} tokens x has"
                )
        if B == 0:
            return x.new_zeros(0, self.num_queries, self.embed_dim)
        H, W = max(h for h, _ in sizes), max(w for _, w in sizes)
        table = self._table(H, W).to(self.query.dtype).flatten(0, 1)
        if all(size == sizes[0] for size in sizes) and H * W == N:
            return self._resample(x, None, table, size=(H, W))
        size = torch.tensor(sizes).to(x.device, non_blocking=True)
        token = torch.arange(N, device=x.device)
        rows, columns = size[:, :1], size[:, 1:]
        mask = token < rows * columns
        # token t of an image stands at (t // columns, t % columns); padding takes any row of the table
        index = torch.where(mask, token // columns * W + token % columns, 0)
        return self._resample(x, None, table, index, mask, size=(H, W))

    def _table(self, h: int, w: int) -> Tensor:
        """The first h rows and w columns of pos_embed, which grows to hold them."""
        have = self.pos_embed
        if h > have.shape[0] or w > have.shape[1]:
            shape = max(h, have.shape[0]), max(w, have.shape[1])
            with torch.inference_mode(False):
                self.pos_embed = sincos_2d(*shape, self.embed_dim).to(have.device, have.dtype)
        return self.pos_embed[:h, :w]
