"""Gated cross-attention-dense layers under upstream's names: OpenFlamingo and flamingo-pytorch, IDEFICS, Mllama.

What holds for all is told in `gated_layers.py`. Keys and values of all layers of a model in one product, and the media
that a token sees, are made once a step: `gated_media.MediaContext`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._parts import GatedLinears, check_level
from .gated_layers import GatedAttention, check_media, gated_attention, gated_mlp, linear_act
from .gated_media import MediaContext, MediaMask, mllama_mask


class MaskedCrossAttention(GatedAttention, nn.Module):
    """to_out(attention(to_q(norm(x)), to_kv(media))): x (B, T, D) and media (B, J, n, C) -> (B, T, D).

    Parameters: `norm` (LayerNorm), `to_q` (H K, D), `to_kv` (2 H K, C) with keys first, `to_out` (D, H K); no biases.
    The media are not normalised. Source: open_flamingo src/helpers.py, flamingo-pytorch.
    """

    _names = {"q": "to_q", "kv": "to_kv", "out": "to_out"}
    dropout = 0.0

    def __init__(
        self, dim, dim_visual=None, dim_head=64, heads=8, only_attend_immediate_media=True, *, strict=True, **made
    ):
        super().__init__()
        inner = dim_head * heads
        self.dim, self.dim_visual, self.head_dim = dim, dim_visual or dim, dim_head
        self.only_attend_immediate_media, self.strict = only_attend_immediate_media, strict
        self.norm = nn.LayerNorm(dim, **made)
        self.to_q = nn.Linear(dim, inner, bias=False, **made)
        self.to_kv = nn.Linear(self.dim_visual, 2 * inner, bias=False, **made)
        self.to_out = nn.Linear(inner, dim, bias=False, **made)

    def part(self, role: str) -> nn.Module | None:
        return getattr(self, self._names[role]) if role in self._names else None

    @property
    def attention(self) -> MaskedCrossAttention:
        return self

    def context(self, x, media, media_locations, use_cached_media) -> MediaContext:
        check_media("media", media, x, self.dim_visual, (4,))
        if media_locations is not None and media_locations.shape[0] != media.shape[0]:
            raise ValueError(
                f"media_locations has {media_locations.shape[0]} samples, media {media.shape[0]}; accepted: as many"
            )
        mask = MediaMask.of_locations(
            media_locations, media.shape[1], media.shape[2], x.shape[1], immediate=self.only_attend_immediate_media,
            use_cached_media=use_cached_media, strict=self.strict,
        )  # fmt: skip
        return MediaContext.of([self], media, mask)

    def forward(
        self, x: Tensor, media: Tensor, media_locations: Tensor | None = None, use_cached_media: bool = False
    ) -> Tensor:
        context = self.context(x, media, media_locations, use_cached_media)
        return self.to_out(self.attend(x, self.norm, context.of_layer(self), context))


class GatedCrossAttentionBlock(nn.Module):
    """h = x + tanh(attn_gate) attn(x, media); y = h + tanh(ff_gate) ff(h): x (B, T, D) -> (B, T, D).

    attn is MaskedCrossAttention, ff = Linear(gelu(Linear(LayerNorm(h)))) of width ff_mult D without biases. One stands
    before every n-th decoder layer; in flamingo-pytorch the media are as wide as the text (dim_visual None).

    forward: media (B, J, n, C), the resampler's output; media_locations bool (B, T), True at each media token, which
    sees its medium already. A token sees the last medium so far (only_attend_immediate_media), or all so far. Before
    the first medium the attention is zero (immediate) or the mean of all values. use_cached_media: every token stands
    after all of media_locations, which may have another length or be None (all media seen). context: a MediaContext of
    several blocks, in place of media and locations.

    strict: on the CPU a sample with more media tokens than media is an error; elsewhere, for that would wait for the
    device, and with strict=False, the tokens after the last medium get the mean of all values, as upstream.
    level: 0 keeps the feed-forward's first product for backward, 1 recomputes it.

    Parameters: `attn.norm`, `attn.to_q`, `attn.to_kv`, `attn.to_out`, `attn_gate` (1), `ff.0`, `ff.1`, `ff.3`,
    `ff_gate` (1); gates start at 0, where y is x bit for bit. Source: open_flamingo src/helpers.py.
    """

    def __init__(
        self,
        dim: int,
        dim_visual: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        only_attend_immediate_media: bool = True,
        *,
        strict: bool = True,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        if min(dim, dim_head, heads, ff_mult) < 1:
            raise ValueError(f"dim {dim}, dim_head {dim_head}, heads {heads}, ff_mult {ff_mult}; accepted: 1 or more")
        self.level = check_level(level)
        self.attn = MaskedCrossAttention(
            dim, dim_visual, dim_head, heads, only_attend_immediate_media, strict=strict, **made
        )
        self.attn_gate = nn.Parameter(torch.zeros(1, **made))
        self.ff = nn.Sequential(
            nn.LayerNorm(dim, **made),
            nn.Linear(dim, ff_mult * dim, bias=False, **made),
            nn.GELU(),
            nn.Linear(ff_mult * dim, dim, bias=False, **made),
        )
        self.ff_gate = nn.Parameter(torch.zeros(1, **made))

    @property
    def attention(self) -> MaskedCrossAttention:
        return self.attn

    def forward(
        self,
        x: Tensor,
        media: Tensor | None = None,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
        *,
        context: MediaContext | None = None,
    ) -> Tensor:
        _check_text(x, self.attn.dim)
        if context is None:
            context = self.attn.context(x, media, media_locations, use_cached_media)
        y = self.attn.attend(x, self.attn.norm, context.of_layer(self), context)
        x = gated_attention(x, y, self.attn.to_out, self.attn_gate)
        return gated_mlp(x, self.ff[0], self.ff[1], self.ff[3], self.ff_gate, "gelu", self.level)


class _CrossAttention(GatedAttention, nn.Module):
    """q_proj, k_proj, v_proj, o_proj without biases and, where named, RMSNorms of each head of q and k."""

    def __init__(self, width, heads, kv_heads, vision, dropout, norms, eps, **made):
        super().__init__()
        if heads < 1 or width % heads or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"width {width}, {heads} heads, {kv_heads} key/value heads; accepted: each a multiple of the next"
            )
        self.head_dim, self.dropout, self._norms = width // heads, dropout, norms
        self.q_proj = nn.Linear(width, width, bias=False, **made)
        self.k_proj = nn.Linear(vision, kv_heads * self.head_dim, bias=False, **made)
        self.v_proj = nn.Linear(vision, kv_heads * self.head_dim, bias=False, **made)
        self.o_proj = nn.Linear(width, width, bias=False, **made)
        for name in norms.values():
            self.add_module(name, nn.RMSNorm(self.head_dim, eps=eps, **made))

    def part(self, role: str) -> nn.Module | None:
        name = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj", **self._norms}.get(role)
        return None if name is None else getattr(self, name)


class IdeficsGatedCrossAttentionLayer(nn.Module):
    """transformers' IDEFICS layer: x (B, T, D) and image_hidden_states (B, N, C) -> (B, T, D).

        h = x + tanh(alpha_cross_attn) gate o_proj(attention(RMSNorm(x), images)),
        y = h + tanh(alpha_dense) down_proj(act(gate_proj(n)) * up_proj(n)), n = RMSNorm(h)

    image_attention_mask: (B, 1, T, N) additive, as in transformers, or bool (B, T, J) of J images with N / J tokens
    each. cross_attention_gate: (B, T), 0 makes a row's attention zero; without it, rows that see no image. alpha_type:
    "float", one gate, or "vector", one for each channel. dropout: of the attention weights and of both branches, in
    training. context: a MediaContext of several layers, in place of images, mask and gate.

    Parameters: `cross_attn.{q,k,v,o}_proj`, with qk_layer_norms `cross_attn.{q,k}_layer_norm`,
    `mlp.{gate,up,down}_proj`, `input_layernorm`, `post_attention_layernorm`, `alpha_cross_attn`, `alpha_dense` (zeros).
    Source: transformers models/idefics/modeling_idefics.py.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_attention_heads: int,
        vision_embed_dim: int,
        *,
        alpha_type: str = "float",
        qk_layer_norms: bool = False,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        dropout: float = 0.0,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        if alpha_type not in ("float", "vector"):
            raise ValueError(f"alpha_type is {alpha_type!r}; accepted: float, vector")
        self.level, self.dropout, self.act = check_level(level), dropout, linear_act(hidden_act)
        self.hidden_size, self.vision_embed_dim = hidden_size, vision_embed_dim
        norms = {"q_norm": "q_layer_norm", "k_norm": "k_layer_norm"} if qk_layer_norms else {}
        self.cross_attn = _CrossAttention(
            hidden_size,
            num_attention_heads,
            num_attention_heads,
            vision_embed_dim,
            dropout,
            norms,
            rms_norm_eps,
            **made,
        )
        self.mlp = GatedLinears(hidden_size, intermediate_size, **made)
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=rms_norm_eps, **made)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=rms_norm_eps, **made)
        shape = (1,) if alpha_type == "float" else (1, 1, hidden_size)
        self.alpha_cross_attn = nn.Parameter(torch.zeros(shape, **made))
        self.alpha_dense = nn.Parameter(torch.zeros(shape, **made))

    @property
    def attention(self) -> _CrossAttention:
        return self.cross_attn

    def forward(
        self,
        hidden_states: Tensor,
        image_hidden_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        cross_attention_gate: Tensor | None = None,
        *,
        context: MediaContext | None = None,
    ) -> Tensor:
        _check_text(hidden_states, self.hidden_size)
        if context is None:
            check_media("image_hidden_states", image_hidden_states, hidden_states, self.vision_embed_dim, (3,))
            mask = idefics_mask(image_attention_mask, cross_attention_gate, image_hidden_states.shape[1], hidden_states)
            context = MediaContext.of([self], image_hidden_states, mask)
        return idefics_layer(self, hidden_states, context, self.act, self.level, self.dropout if self.training else 0.0)


def idefics_layer(layer: nn.Module, x: Tensor, context: MediaContext, act: str, level: int, p: float) -> Tensor:
    """The layer's equation over whatever module has its children; `layer.attention` is a GatedAttention."""
    attention, mlp = layer.attention, layer.mlp
    y = attention.attend(x, layer.input_layernorm, context.of_layer(layer), context)
    x = gated_attention(x, y, attention.part("out"), layer.alpha_cross_attn, p)
    return gated_mlp(
        x, layer.post_attention_layernorm, mlp.up_proj, mlp.down_proj, layer.alpha_dense, act, level,
        own_gate=mlp.gate_proj, p=p,
    )  # fmt: skip


def idefics_mask(mask: Tensor | None, gate: Tensor | None, keys: int, x: Tensor) -> MediaMask:
    """The mask of IDEFICS' two arguments over `keys` image tokens."""
    if mask is None:
        if gate is None:
            return MediaMask()
        mask = torch.ones((*x.shape[:2], 1), dtype=torch.bool, device=x.device)
        return MediaMask.of_visible(mask, keys, gate)
    if mask.dim() == 4:
        return MediaMask.of_additive(mask, gate)
    if mask.dim() != 3 or mask.shape[2] == 0 or keys % mask.shape[2]:
        raise ValueError(
            f"image_attention_mask has shape {tuple(mask.shape)} over {keys} image tokens; accepted: (B, 1, T, N), or "
            "(B, T, J) with N a multiple of J"
        )
    return MediaMask.of_visible(mask, keys // mask.shape[2], gate, empty="zero" if gate is None else "mean")


class MllamaCrossAttentionDecoderLayer(nn.Module):
    """transformers' Mllama layer, which replaces self-attention: x (B, T, D), vision states (B, N, D) -> (B, T, D).

        h = x + tanh(cross_attn_attn_gate) o_proj(attention(RMSNorm(x), vision)),
        y = h + tanh(cross_attn_mlp_gate) row_mask down_proj(act(gate_proj(n)) * up_proj(n)), n = RMSNorm(h)

    cross_attention_mask: (B, T, images, tiles) of 0 and 1, N / (images tiles) tokens of each tile; a token that sees no
    tile attends to all of them and has row_mask 0. None: all is seen. context: a MediaContext of several layers, in
    place of states and mask.

    Parameters: `cross_attn.{q,k,v,o}_proj`, `cross_attn.{q,k}_norm` (RMSNorm of each head), `mlp.{gate,up,down}_proj`,
    `input_layernorm`, `post_attention_layernorm`, `cross_attn_attn_gate`, `cross_attn_mlp_gate` (1, zeros).
    Source: transformers models/mllama/modeling_mllama.py.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        *,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-5,
        dropout: float = 0.0,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.level, self.act, self.hidden_size = check_level(level), linear_act(hidden_act), hidden_size
        self.cross_attn = _CrossAttention(
            hidden_size, num_attention_heads, num_key_value_heads or num_attention_heads, hidden_size, dropout,
            {"q_norm": "q_norm", "k_norm": "k_norm"}, rms_norm_eps, **made,
        )  # fmt: skip
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=rms_norm_eps, **made)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1, **made))
        self.mlp = GatedLinears(hidden_size, intermediate_size, **made)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=rms_norm_eps, **made)
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1, **made))

    @property
    def attention(self) -> _CrossAttention:
        return self.cross_attn

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        *,
        context: MediaContext | None = None,
    ) -> Tensor:
        _check_text(hidden_states, self.hidden_size)
        if context is None:
            check_media("cross_attention_states", cross_attention_states, hidden_states, self.hidden_size, (3,))
            keys = cross_attention_states.shape[1]
            mask = MediaMask() if cross_attention_mask is None else mllama_mask(cross_attention_mask, keys)
            context = MediaContext.of([self], cross_attention_states, mask)
        return mllama_layer(self, hidden_states, context, self.act, self.level)


def mllama_layer(layer: nn.Module, x: Tensor, context: MediaContext, act: str, level: int) -> Tensor:
    """The layer's equation over whatever module has its children; `layer.attention` is a GatedAttention."""
    attention, mlp = layer.attention, layer.mlp
    y = attention.attend(x, layer.input_layernorm, context.of_layer(layer), context)
    x = gated_attention(x, y, attention.part("out"), layer.cross_attn_attn_gate)
    return gated_mlp(
        x, layer.post_attention_layernorm, mlp.up_proj, mlp.down_proj, layer.cross_attn_mlp_gate, act, level,
        own_gate=mlp.gate_proj, row_mask=context.mask.row_mask,
    )  # fmt: skip


def _check_text(x: Tensor, width: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, T, D) with D = {width}")
