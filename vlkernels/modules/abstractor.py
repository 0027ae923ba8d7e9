"""mPLUG-Owl's visual abstractors and Honeybee's resampler: queries attend to themselves and to the image.

    n = norm1(q),  c = normk(x)
    y = n + out_proj(attention(n W_qᵀ, [n; c] W_kᵀ, [n; c] W_vᵀ))        the skip starts from the normalised query
    q = y + w2(ffn_ln(SiLU(w1(z)) * w3(z))),  z = norm2(y)

The image x is the same in every layer: keys and values of all layers are one product (`_kv.layers_kv`), those of the
queries one with the queries' own, and the two sources are never concatenated. Until the first residual the queries are
the same for every image and computed once. Survey section 4.1.3 (resampler, SwiGLU).

level 0 keeps the keys and values of all layers, level 1 computes them again in backward, in each layer on its own.
All take `device` and `dtype`; x has the parameters' dtype, or any under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cross_attention import cross_attention
from ..ops.linear_projector import linear_projector
from ..ops.norm_residual import norm_residual
from ._kv import layers_kv
from ._parts import as_bool, check_heads, check_level, check_tokens, plain, projections
from ._position_kv import Grid, Separable, layers_kv_on_grid
from ._positions import sincos_1d, sincos_2d


class AbstractorLayer(nn.Module):
    """One layer of the equation above: q (B or 1, M, D), x (B, N, D) -> (B, M, D), D = hidden_size.

    Parameters `norm1`, `normk`, `norm2` (eps), `ffn_ln` (F; eps_ffn), `query`, `key`, `value`, `out_proj` (D, D), `w1`,
    `w3` (F, D), `w2` (D, F). With `grid` the fixed positions `q_pos_embed` (M, D) and `k_pos_embed` (N, D), buffers of
    the state dict as upstream's, are added to what queries and keys are projected from, never to what values are.

    forward's source: keys and values of x as cross_attention takes them, where all layers' were computed at once.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        intermediate: int,
        *,
        dropout: float = 0.0,
        eps: float = 1e-5,
        eps_ffn: float = 1e-6,
        queries: int = 0,
        grid: Grid | None = None,
        **made,
    ):
        super().__init__()
        self.head_dim, self.dropout, self.grid = check_heads("hidden_size", hidden_size, heads), float(dropout), grid
        self.norm1, self.normk, self.norm2 = (nn.LayerNorm(hidden_size, eps=eps, **made) for _ in range(3))
        for name in ("query", "key", "value", "out_proj"):
            self.add_module(name, nn.Linear(hidden_size, hidden_size, **made))
        self.w1, self.w3 = (nn.Linear(hidden_size, intermediate, **made) for _ in range(2))
        self.w2 = nn.Linear(intermediate, hidden_size, **made)
        self.ffn_ln = nn.LayerNorm(intermediate, eps=eps_ffn, **made)
        if grid is not None:
            self.register_buffer("q_pos_embed", torch.empty(queries, hidden_size, **made))
            self.register_buffer("k_pos_embed", torch.empty(grid.tokens, hidden_size, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linears N(0, 0.02) with zero biases, norms 1 and 0, and the fixed positions."""
        for child in self.children():
            if isinstance(child, nn.Linear):
                nn.init.normal_(child.weight, std=0.02)
                nn.init.zeros_(child.bias)
            else:
                child.reset_parameters()
        if self.grid is not None:
            M, width = self.q_pos_embed.shape
            self.q_pos_embed.copy_(sincos_1d(torch.arange(M), width))
            table = sincos_2d(self.grid.side, self.grid.side, width).flatten(0, 1)
            self.k_pos_embed.copy_(F.pad(table, (0, 0, 1, 0)) if self.grid.cls else table)
            self._separable = Separable()

    def on_grid(self) -> bool:
        """Whether k_pos_embed is a row's and a column's position side by side, looked at once per change of it."""
        return self._separable(self.k_pos_embed, self.grid)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        if self.grid is not None:
            self.on_grid()  # a graph that is traced next has no values to look at

    def forward(
        self, q: Tensor, x: Tensor, mask: Tensor | None = None, source: dict[str, Tensor] | None = None
    ) -> Tensor:
        norm, out_proj, e1 = self.norm1, self.out_proj, self.q_pos_embed if self.grid is not None else None
        own = projections(q, norm, [self.query, self.key, self.value], [e1, e1, None])
        own = [t.unflatten(-1, (-1, self.head_dim)) for t in own]
        source = self.keys_values(x) if source is None else source
        p = self.dropout if self.training else 0.0
        y = out_proj(cross_attention(own[0], k2=own[1], v2=own[2], mask=mask, p=p, **source).flatten(-2))
        if q.shape == y.shape and plain(norm):
            y = norm_residual(q, y, norm.weight, norm.bias, eps=norm.eps)
        else:
            y = norm(q) + y
        up, gate = projections(y, self.norm2, [self.w1, self.w3])
        return y + projections(F.silu(up) * gate, self.ffn_ln, [self.w2])[0]

    def keys_values(self, x: Tensor) -> dict[str, Tensor]:
        """{"k", "v"} of x alone."""
        e2 = self.k_pos_embed if self.grid is not None else None
        kv = projections(x, self.normk, [self.key, self.value], [e2, None])
        return {n: t.unflatten(-1, (-1, self.head_dim)) for n, t in zip(("k", "v"), kv, strict=True)}


class _Abstractor(nn.Module):
    """What the three modules share: `layers`, `visual_fc` (N, D) and `vit_eos` (1, n, N)."""

    def __init__(
        self,
        hidden_size: int,
        out: int,
        n_query: int,
        layers: int,
        num_eos_tokens: int,
        dropout: float,
        level: int,
        made: dict,
        **options,
    ):
        super().__init__()
        if n_query < 1 or layers < 1 or num_eos_tokens < 0:
            raise ValueError(
                f"n_query is {n_query}, layers {layers}, num_eos_tokens {num_eos_tokens}; accepted: 1 or more, 1 or "
                "more, 0 or more"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; accepted: at least 0, less than 1")
        self.hidden_size, self.level = hidden_size, check_level(level)
        self.query_tokens = nn.Parameter(torch.empty(1, n_query, hidden_size, **made))
        nn.init.trunc_normal_(self.query_tokens, std=0.02)
        self.layers = nn.ModuleList(
            AbstractorLayer(hidden_size, dropout=dropout, queries=n_query, **options, **made) for _ in range(layers)
        )
        self.visual_fc = _linear(hidden_size, out, **made)
        self.vit_eos = nn.Parameter(torch.empty(1, num_eos_tokens, out, **made)) if num_eos_tokens else None
        if num_eos_tokens:
            nn.init.trunc_normal_(self.vit_eos, std=0.02)

    def _abstract(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, M + eos, N) of x (B, N, D), mask (B, N) with nonzero = keep."""
        mask = as_bool("mask", mask, x.shape[:2], floats=True)
        q = self.query_tokens
        sources = self._sources(x)
        for layer in self.layers:
            q = layer(q, x, mask, sources[layer]) if layer in sources else layer(q, x, mask)
        y = self.visual_fc(q)
        if self.vit_eos is None:
            return y
        return torch.cat((y, self.vit_eos.expand(y.shape[0], -1, -1).to(y.dtype)), 1)

    def _sources(self, x: Tensor) -> dict[nn.Module, dict[str, Tensor]]:
        """Keys and values of the layers whose projections of x are plain, computed at once."""
        taken = [
            layer
            for layer in self.layers
            if isinstance(layer, AbstractorLayer) and plain(layer.normk, layer.key, layer.value)
        ]
        if not taken or len({layer.normk.eps for layer in taken}) > 1:
            return {}
        weights = [(layer.key.weight, layer.value.weight) for layer in taken]
        biases = [(layer.key.bias, layer.value.bias) for layer in taken]
        norms, head_dim = [layer.normk for layer in taken], taken[0].head_dim
        if taken[0].grid is None:
            found = layers_kv(x, weights, head_dim, biases=biases, norms=norms, level=self.level)
        else:
            tables = [layer.k_pos_embed for layer in taken]
            fits = all([layer.on_grid() for layer in taken])
            found = layers_kv_on_grid(x, weights, head_dim, biases, norms, tables, taken[0].grid, fits, self.level)
        return dict(zip(taken, found, strict=True))


class MPLUGOwlAbstractor(_Abstractor):
    """mPLUG-Owl's visual abstractor: x (B, T, D), CLS included, -> (B, n_query + 1, N), D = hidden_size, N = lm_hidden.

    y = [visual_fc(queries after all layers); vit_eos]. mask (B, T): nonzero = keep; queries always see each other.
    dropout: of the attention weights, in training.

    Parameters `query_tokens` (1, n_query, D), which upstream's parent model holds, `layers.{l}` as in AbstractorLayer,
    `visual_fc` (N, D), `vit_eos` (1, 1, N). Linears N(0, 0.02) with zero biases, tokens truncated normal 0.02.
    Source: X-PLUG/mPLUG-Owl mPLUG-Owl/mplug_owl/modeling_mplug_owl.py; arXiv 2304.14178.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        lm_hidden: int = 4096,
        n_query: int = 64,
        layers: int = 6,
        heads: int = 16,
        intermediate: int = 4096,
        *,
        dropout: float = 0.1,
        eps: float = 1e-5,
        eps_ffn: float = 1e-6,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        made = {"device": device, "dtype": dtype}
        super().__init__(
            hidden_size, lm_hidden, n_query, layers, 1, dropout, level, made, heads=heads, intermediate=intermediate,
            eps=eps, eps_ffn=eps_ffn,
        )  # fmt: skip

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        check_tokens("x", x, self.hidden_size)
        return self._abstract(x, mask)


class MPLUGOwl2Abstractor(_Abstractor):
    """mPLUG-Owl 2's: MPLUGOwlAbstractor with fixed positions at the queries' and keys' projections of every layer.

    x (B, grid_size² (+ 1 with use_cls_token), D), CLS first. Queries have one-dimensional sine/cosine positions, tokens
    two-dimensional ones, CLS none. `query_tokens` (upstream: query_embeds) start as N(0, 1).
    Source: X-PLUG/mPLUG-Owl mPLUG-Owl2/mplug_owl2/model/visual_encoder.py; arXiv 2311.04257.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        lm_hidden: int = 4096,
        n_query: int = 64,
        layers: int = 6,
        heads: int = 16,
        intermediate: int = 2816,
        *,
        grid_size: int = 32,
        use_cls_token: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-5,
        eps_ffn: float = 1e-6,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        if grid_size < 1:
            raise ValueError(f"grid_size is {grid_size}; accepted: 1 or more")
        if hidden_size % 4:
            raise ValueError(f"hidden_size is {hidden_size}; accepted: a multiple of 4, for the positions")
        made = {"device": device, "dtype": dtype}
        super().__init__(
            hidden_size, lm_hidden, n_query, layers, 1, dropout, level, made, heads=heads, intermediate=intermediate,
            eps=eps, eps_ffn=eps_ffn, grid=Grid(grid_size, use_cls_token),
        )  # fmt: skip
        self.grid = Grid(grid_size, use_cls_token)
        nn.init.normal_(self.query_tokens)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        check_tokens("x", x, self.hidden_size)
        if x.shape[1] != self.grid.tokens:
            side, cls = self.grid.side, " + CLS" if self.grid.cls else ""
            raise ValueError(f"x has {x.shape[1]} tokens; accepted: {side} x {side}{cls} = {self.grid.tokens}")
        return self._abstract(x, mask)


class HoneybeeResampler(_Abstractor):
    """Honeybee's "resampler" projector: x (B, N, C) -> (B, n_query + num_eos_tokens, D_t).

    MPLUGOwlAbstractor on visual_input_fc(x + pos_emb). C = encoder_hidden_size, D = hidden_size, D_t =
    output_hidden_size, N = num_input_tokens where there is a pos_emb. x itself is left as it is.

    Parameters as MPLUGOwlAbstractor's, and `visual_input_fc` (D, C), `pos_emb` (1, N, C), truncated normal 0.02;
    `visual_fc` is upstream's visual_output_fc. A checkpoint's `pos_emb` with one row more loses its first, that of CLS.
    Source: khanrc/honeybee honeybee/projectors/resamplers.py; arXiv 2312.06742.
    """

    def __init__(
        self,
        num_input_tokens: int,
        encoder_hidden_size: int,
        output_hidden_size: int,
        hidden_size: int = 1024,
        n_query: int = 64,
        layers: int = 6,
        heads: int = 16,
        intermediate: int = 4096,
        *,
        num_eos_tokens: int = 1,
        pos_emb: bool = True,
        dropout: float = 0.1,
        eps: float = 1e-5,
        eps_ffn: float = 1e-6,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        made = {"device": device, "dtype": dtype}
        super().__init__(
            hidden_size, output_hidden_size, n_query, layers, num_eos_tokens, dropout, level, made, heads=heads,
            intermediate=intermediate, eps=eps, eps_ffn=eps_ffn,
        )  # fmt: skip
        self.encoder_hidden_size = encoder_hidden_size
        self.visual_input_fc = _linear(encoder_hidden_size, hidden_size, **made)
        self.pos_emb = None
        if pos_emb:
            self.pos_emb = nn.Parameter(torch.empty(1, num_input_tokens, encoder_hidden_size, **made))
            nn.init.trunc_normal_(self.pos_emb, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        check_tokens("x", x, self.encoder_hidden_size)
        fc = self.visual_input_fc
        if self.pos_emb is None:
            return self._abstract(fc(x), mask)
        if x.shape[1] != self.pos_emb.shape[1]:
            raise ValueError(f"x has {x.shape[1]} tokens; accepted: the {self.pos_emb.shape[1]} rows of pos_emb")
        if not plain(fc):
            return self._abstract(fc(x + self.pos_emb), mask)
        # (x + e) Wᵀ = x Wᵀ + e Wᵀ: nothing of x's size is made for the sum
        return self._abstract(
            linear_projector(x, fc.weight, fc.bias, position=F.linear(self.pos_emb[0], fc.weight)), mask
        )

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        key, own = f"{prefix}pos_emb", self.pos_emb
        if own is not None and key in state_dict and state_dict[key].shape[1:2] == (own.shape[1] + 1,):
            state_dict[key] = state_dict[key][:, 1:]
        super()._load_from_state_dict(state_dict, prefix, *rest)


# -- shared --------------------------------------------------------------------------------------------------------


def _linear(width: int, out: int, **made) -> nn.Linear:
    layer = nn.Linear(width, out, **made)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
