"""Perceiver resamplers of transformers: Idefics, Idefics2, Kosmos-2. What holds for all is told in `resampler.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .projector import check_channels
from .resampler_layers import (
    FeedForward,
    ResamplerAttention,
    ResamplerLayer,
    called,
    context_sources,
    packed_weights,
    queries,
    resample,
)
from .resampler_media import check_sizes, media_of

_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}


class IdeficsPerceiverResampler(nn.Module):
    """transformers' Idefics resampler: context (B, N, D) -> (B, M, D), D = embed_dim, M = n_latents.

    As PerceiverResampler, with q, k and v of their own, ReLU in the feed-forward block of width `intermediate_size`
    (4 D if not given; upstream 4 vision_config.embed_dim), and with `qk_layer_norms` an LN over each head of q and k.

    mask: bool (or 0 and 1) (B, N), True = visible. Packed: context (total tokens, D), lengths = tokens of each image;
    result (images, M, D), mask (total tokens,).

    Parameters: `latents` (M, D), `blocks.{l}.0.context_layer_norm`, `.latents_layer_norm`, `.q_layer_norm`,
    `.k_layer_norm` (K), `.q_proj`, `.k_proj`, `.v_proj`, `.output_proj`, `blocks.{l}.1.ln`, `.fc`, `.c_proj`,
    `layer_norm`; linears without biases, LN eps 1e-5. Initialised as IdeficsModel does: linears N(0, 0.02), latents
    N(0, 1). Source: transformers models/idefics/perceiver.py.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int = 6,
        n_heads: int = 16,
        head_dim: int = 96,
        n_latents: int = 64,
        *,
        qk_layer_norms: bool = False,
        intermediate_size: int | None = None,
        initializer_range: float = 0.02,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        check_sizes(level, embed_dim=embed_dim, n_latents=n_latents, intermediate_size=intermediate_size)
        self.embed_dim, self.level = embed_dim, level
        self.latents = nn.Parameter(torch.randn(n_latents, embed_dim, **made))
        names = {"context_norm": "context_layer_norm", "latents_norm": "latents_layer_norm"}
        names |= {"q_norm": "q_layer_norm", "k_norm": "k_layer_norm"} if qk_layer_norms else {}
        names |= {**_PROJECTIONS, "out": "output_proj"}
        inner = intermediate_size or 4 * embed_dim
        self.blocks = nn.ModuleList(
            ResamplerLayer(
                {"attention": "0", "ffn": "1"},
                attention=ResamplerAttention(embed_dim, n_heads, head_dim, names, **made),
                ffn=FeedForward(
                    embed_dim, inner, {"norm": "ln", "up": "fc", "down": "c_proj"}, "relu", level=level, **made
                ),
            )
            for _ in range(depth)
        )
        self.layer_norm = nn.LayerNorm(embed_dim, **made)
        _normal_linears(self, initializer_range)

    def forward(
        self, context: Tensor, mask: Tensor | None = None, *, lengths: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        media = media_of("context", context, self.embed_dim, mask, lengths)
        return resample(self.latents, self.blocks, self.layer_norm, media, self.level)


class Idefics2PerceiverResampler(nn.Module):
    """transformers' Idefics2 resampler: context (B, N, D) -> (B, M, D), D = hidden_size, M = resampler_n_latents.

    As PerceiverResampler with RMSNorm, key/value heads that several query heads share, and a gated feed-forward block
    W_down(act(W_gate n) * W_up n), n = RMSNorm(l), of width 4 D.

    attention_mask: bool (or 0 and 1) (B, N), True = visible. Packed: context (total tokens, D), lengths = tokens of
    each image; result (images, M, D), attention_mask (total tokens,).

    Parameters: `latents` (M, D), `layers.{l}.input_latents_norm`, `.input_context_norm`, `.self_attn.q_proj`,
    `.k_proj`, `.v_proj`, `.o_proj`, `.post_attention_layernorm`, `.mlp.gate_proj`, `.up_proj`, `.down_proj`, `norm`.
    No biases. Initialised as upstream: linears N(0, 0.02), latents one.
    Source: transformers models/idefics2/modeling_idefics2.py.
    """

    def __init__(
        self,
        hidden_size: int,
        resampler_n_latents: int = 64,
        resampler_depth: int = 3,
        resampler_n_heads: int = 16,
        resampler_head_dim: int = 96,
        num_key_value_heads: int = 4,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        *,
        initializer_range: float = 0.02,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        check_sizes(level, hidden_size=hidden_size, resampler_n_latents=resampler_n_latents)
        self.hidden_size, self.level = hidden_size, level
        self.latents = nn.Parameter(torch.ones(resampler_n_latents, hidden_size, **made))
        names = {
            "latents_norm": "input_latents_norm",
            "context_norm": "input_context_norm",
            "attention": "self_attn",
            "ffn_norm": "post_attention_layernorm",
            "ffn": "mlp",
        }
        self.layers = nn.ModuleList()
        for _ in range(resampler_depth):
            attention = ResamplerAttention(
                hidden_size, resampler_n_heads, resampler_head_dim, {**_PROJECTIONS, "out": "o_proj"},
                kv_heads=num_key_value_heads, dropout=attention_dropout, **made,
            )  # fmt: skip
            ffn = _gated(hidden_size, 4 * hidden_size, hidden_size, hidden_act, level, made)
            norms = {n: nn.RMSNorm(hidden_size, eps=rms_norm_eps, **made) for n in names if n.endswith("norm")}
            self.layers.append(ResamplerLayer(names, attention=attention, ffn=ffn, **norms))
        self.norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps, **made)
        _normal_linears(self, initializer_range)

    def forward(
        self,
        context: Tensor,
        attention_mask: Tensor | None = None,
        *,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        media = media_of("context", context, self.hidden_size, attention_mask, lengths)
        return resample(self.latents, self.layers, self.norm, media, self.level)


class Idefics2Connector(nn.Module):
    """y = perceiver_resampler(W_down(act(W_gate x) * W_up x)): x (B, N, C) -> (B, M, D), C = vision_hidden_size.

    D = text_hidden_size, inner width text_intermediate_size, no biases. Further words, mask and packed form are those
    of Idefics2PerceiverResampler. Parameters `modality_projection.gate_proj`, `.up_proj`, `.down_proj` and those of
    `perceiver_resampler`. Source: transformers models/idefics2/modeling_idefics2.py.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_intermediate_size: int,
        text_hidden_size: int,
        *,
        hidden_act: str = "silu",
        initializer_range: float = 0.02,
        level: int = 0,
        device=None,
        dtype=None,
        **resampler,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        check_sizes(level, vision_hidden_size=vision_hidden_size, text_intermediate_size=text_intermediate_size)
        self.vision_hidden_size = vision_hidden_size
        self.modality_projection = _gated(
            vision_hidden_size, text_intermediate_size, text_hidden_size, hidden_act, level, made
        )
        self.perceiver_resampler = Idefics2PerceiverResampler(
            text_hidden_size,
            hidden_act=hidden_act,
            initializer_range=initializer_range,
            level=level,
            **made,
            **resampler,
        )
        _normal_linears(self.modality_projection, initializer_range)

    def forward(
        self,
        image_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        check_channels("image_hidden_states", image_hidden_states, self.vision_hidden_size)
        return self.perceiver_resampler(self.modality_projection(image_hidden_states), attention_mask, lengths=lengths)


class Kosmos2Projection(nn.Module):
    """transformers' Kosmos2ImageToTextProjection: features (B, N, C) -> (B, M, D), D = embed_dim.

        h = W_d x + b_d;  y = W_o attention(q = W_q l, [k; v] from [h; l]) + b_o,  l = latent_query (M, D)

    One attention without norms, residual or feed-forward block, all linears with biases; upstream also returns the
    attention's weights. Queries, and keys and values of the latents, are computed once for the whole batch. mask and
    packed form (features, lengths) as IdeficsPerceiverResampler's.

    Parameters: `dense` (D, C), `latent_query` (M, D), `x_attn.k_proj`, `.v_proj`, `.q_proj`, `.out_proj`. Initialised
    as upstream's model: linears N(0, 0.02) with zero biases, latents N(0, 1). attention_dropout acts in training.
    Source: transformers models/kosmos2/modeling_kosmos2.py; arXiv 2306.14824.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        embed_dim: int,
        attention_heads: int = 32,
        latent_query_num: int = 64,
        attention_dropout: float = 0.1,
        *,
        init_std: float = 0.02,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        check_sizes(
            level,
            vision_hidden_size=vision_hidden_size,
            embed_dim=embed_dim,
            attention_heads=attention_heads,
            latent_query_num=latent_query_num,
        )
        if embed_dim % attention_heads:
            raise ValueError(f"embed_dim is {embed_dim}; accepted: a multiple of the {attention_heads} attention_heads")
        self.vision_hidden_size, self.embed_dim, self.level = vision_hidden_size, embed_dim, level
        self.dense = nn.Linear(vision_hidden_size, embed_dim, **made)
        self.latent_query = nn.Parameter(torch.randn(latent_query_num, embed_dim, **made))
        names = {"k": "k_proj", "v": "v_proj", "q": "q_proj", "out": "out_proj"}
        self.x_attn = ResamplerAttention(
            embed_dim,
            attention_heads,
            embed_dim // attention_heads,
            names,
            bias=True,
            dropout=attention_dropout,
            **made,
        )
        _normal_linears(self, init_std)

    def forward(
        self, features: Tensor, mask: Tensor | None = None, *, lengths: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        check_channels("features", features, self.vision_hidden_size)
        media = media_of("features", self.dense(features), self.embed_dim, mask, lengths)
        latents, attention = self.latent_query[None], self.x_attn
        if called(attention, ResamplerAttention):
            y = media.call(lambda own, x, mask: attention(x, own, mask), media.spread(latents))
            return media.restored(y)
        pair = [(attention, None)]
        heads = queries(attention, None, latents, *packed_weights(pair)[0])
        y = media.attend(attention, heads, context_sources(pair, media.x, self.level)[0])
        return media.restored(attention.part("out")(y))


# -- shared ---------------------------------------------------------------------------------------------------------


def _gated(dim: int, inner: int, out: int, act: str, level: int, made: dict) -> FeedForward:
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return FeedForward(dim, inner, names, act, out=out, level=level, **made)


def _normal_linears(module: nn.Module, std: float) -> None:
    """transformers' initialisation: weights N(0, std), biases zero."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
