"""Perceiver resamplers: OpenFlamingo, lucidrains, LLaVA-NeXT; those of transformers are in `resampler_hf.py`.

Each maps the tokens of every image or video to M latents, however many tokens there are; equation and fusing are those
of `resampler_layers.py`. Latents always see each other, so a media whose tokens are all masked, or that has none, gets
what the latents alone give, as upstream.

All take `device`, `dtype`, and `level`: 0 keeps the keys and values of x and the first product of each feed-forward
block for backward, 1 recomputes both (one matrix product more for each). x has the parameters' dtype (float16,
bfloat16, float32; float64 on the reference), or any under autocast. Errors are ValueError or TypeError and name the
argument, what it got and what is accepted.

One packed batch holds any number of images and videos of any sample without padding: x has the tokens of all media one
after the other, and counts on the host (ints, or an int64 tensor on the CPU) say how many belong to each. A sample
without any media has no rows in the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .projector import check_channels
from .resampler_layers import FeedForward, ResamplerAttention, ResamplerLayer, resample
from .resampler_media import Media, check_sizes, counts_of, visible

_FLAMINGO = {
    "context_norm": "norm_media",
    "latents_norm": "norm_latents",
    "q": "to_q",
    "kv": "to_kv",
    "out": "to_out",
}


class PerceiverResampler(nn.Module):
    """OpenFlamingo's resampler, with its parameter names and constructor words; D = dim, M = num_latents.

        l = latents; per layer: l += W_o softmax(q kᵀ K^-0.5) v,  q = W_q LN(l),  [k | v] = W_kv [LN(x); LN(l)]
                                l += W_2 GELU(W_1 LN(l));         result LN(l)

    x (B, T, F, v, D): T media of F frames of v tokens; also (B, T, n, D), one frame each, and (B, n, D), one media.
    Result (B, T, M, D). mask: bool (or 0 and 1), True = visible, of x's leading axes or of the first of them, such as
    (B, T) for samples with fewer than T media and (B, T, F) for videos with fewer than F frames.

    Packed: x (total frames, v, D) with frames = frames of each media, and media = media of each sample (which numbers
    them; one sample if not given). Result (total media, M, D); `y.split(media)` gives the samples.

    Args:
        max_num_media, max_num_frames: rows of `media_time_embs` (.., 1, D) and `frame_embs` (.., D), added to x by the
            media's and the frame's number; more than that many are an error. None: no such embedding, any number.
        num_media_embeds: lucidrains' form, whose media embedding is called `media_pos_emb` (it is always there; 4).
        ff_mult: inner width int(dim * ff_mult) of the feed-forward block. 0 or less leaves it out of the residual
            l + ffn(l), which then doubles l: LLaVA-NeXT's `mm_perceiver_ff_mult`.

    Parameters: `latents` (M, D), `frame_embs`, `media_time_embs` or `media_pos_emb`, `layers.{l}.0.norm_media`,
    `.norm_latents`, `.to_q`, `.to_kv`, `.to_out`, `layers.{l}.1.0` (LN), `.1.1`, `.1.3`, `norm`; no biases.
    LN eps 1e-5. Initialised as nn.Linear and nn.LayerNorm, latents and embeddings N(0, 1).
    Source: mlfoundations/open_flamingo src/helpers.py, lucidrains/flamingo-pytorch; arXiv 2204.14198.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        ff_mult: float = 4,
        *,
        num_media_embeds: int | None = None,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        check_sizes(level, dim=dim, num_latents=num_latents)
        check_sizes(
            level, max_num_media=max_num_media, max_num_frames=max_num_frames, num_media_embeds=num_media_embeds
        )
        if max_num_media is not None and num_media_embeds is not None:
            raise ValueError("max_num_media and num_media_embeds name one embedding; accepted: one of them")
        self.dim, self.level = dim, level
        self.latents = nn.Parameter(torch.randn(num_latents, dim, **made))
        for name, rows in (
            ("frame_embs", (max_num_frames,)),
            ("media_time_embs", (max_num_media, 1)),
            ("media_pos_emb", (num_media_embeds, 1)),
        ):
            table = None if rows[0] is None else nn.Parameter(torch.randn(*rows, dim, **made))
            self.register_parameter(name, table)
        self.layers = nn.ModuleList()
        inner = int(dim * ff_mult)
        for _ in range(depth):
            parts = {"attention": ResamplerAttention(dim, heads, dim_head, _FLAMINGO, **made)}
            if ff_mult > 0:
                names = {"norm": "0", "up": "1", "down": "3"}
                parts["ffn"] = FeedForward(dim, inner, names, "gelu", level=level, **made)
            self.layers.append(ResamplerLayer(dict(zip(parts, "01", strict=False)), **parts))
        self.norm = nn.LayerNorm(dim, **made)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        frames: Sequence[int] | Tensor | None = None,
        media: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        check_channels("x", x, self.dim)
        if frames is None:
            return self._dense(x, mask, media)
        if x.dim() != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted with frames: (total frames, v, {self.dim})")
        frames = counts_of("frames", frames, x.shape[0], "frames of x")
        media = counts_of("media", [len(frames)] if media is None else media, len(frames), "entries of frames")
        self._check_embeddings(media, frames)
        mask = visible(mask, x)
        if self.frame_embs is not None:
            number = [f for count in frames for f in range(count)]
            x = x + self.frame_embs[torch.tensor(number, dtype=torch.int64, device=x.device)][:, None]
        if (table := self._media_embs()) is not None:
            order = [t for count in media for t in range(count)]
            number = [t for t, count in zip(order, frames, strict=True) for _ in range(count)]
            x = x + table[torch.tensor(number, dtype=torch.int64, device=x.device)]
        v = x.shape[1]
        return self._resample(x.flatten(0, 1), None if mask is None else mask.flatten(), [n * v for n in frames])

    def _dense(self, x: Tensor, mask: Tensor | None, media) -> Tensor:
        if media is not None:
            raise ValueError("media is given without frames; accepted: both, for packed x, or none")
        if x.dim() not in (3, 4, 5):
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, T, F, v, D), (B, T, n, D) or (B, n, D)")
        mask = visible(mask, x)
        B, T, F = (*x.shape[: x.dim() - 2], 1, 1)[:3]
        v = x.shape[-2]
        self._check_embeddings([T], [F])
        x = x.reshape(B, T, F, v, self.dim)
        if self.frame_embs is not None:
            x = x + self.frame_embs[:F, None]
        if (table := self._media_embs()) is not None:
            x = x + table[:T, None]
        mask = None if mask is None else mask.reshape(B * T, F * v)
        return self._resample(x.reshape(B * T, F * v, self.dim), mask, None).unflatten(0, (B, T))

    def _resample(self, x: Tensor, mask: Tensor | None, lengths: list[int] | None) -> Tensor:
        return resample(self.latents, self.layers, self.norm, Media(x, mask, lengths), self.level)

    def _media_embs(self) -> Tensor | None:
        return self.media_time_embs if self.media_pos_emb is None else self.media_pos_emb

    def _check_embeddings(self, media: list[int], frames: list[int]) -> None:
        for name, table, counts in (("media", self._media_embs(), media), ("frames", self.frame_embs, frames)):
            for count in counts if table is not None else ():
                if count > table.shape[0]:
                    raise ValueError(
                        f"x has {count} {name}; accepted: at most {table.shape[0]}, one for each embedding"
                    )

    def extra_repr(self) -> str:
        return f"latents={tuple(self.latents.shape)}, level={self.level}"


class LlavaPerceiverResampler(nn.Module):
    """LLaVA-NeXT's `perceiver` resampler: x (B, n, D) -> (B, M, D), D = dim; a PerceiverResampler under `perceiver`.

    Constructor words of upstream's arguments. heads 8 of width 64 are fixed there. mm_perceiver_ff_mult of 0 or less
    leaves the feed-forward block out, and every layer doubles its latents. mask: bool (B, n), True = visible.
    Source: LLaVA-VL/LLaVA-NeXT llava/model/multimodal_resampler/perceiver.py.
    """

    def __init__(
        self,
        dim: int,
        mm_perceiver_depth: int = 3,
        mm_perceiver_latents: int = 32,
        mm_perceiver_ff_mult: float = 4,
        *,
        dim_head: int = 64,
        heads: int = 8,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.perceiver = PerceiverResampler(
            dim,
            mm_perceiver_depth,
            dim_head,
            heads,
            mm_perceiver_latents,
            ff_mult=mm_perceiver_ff_mult,
            level=level,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, n, {self.perceiver.dim})")
        return self.perceiver(x, mask).squeeze(1)
