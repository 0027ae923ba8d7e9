"""LaVIN's mixture-of-modality adapters: before the attention of a Llama, and in CLIP. luogen1996/LaVIN; 2305.15023.

How adapters are called: `adapters.py`; these stand before the sub-layer. Survey 4.2.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.bottleneck_adapter import bottleneck_adapter
from ._adapter import Activation, SublayerAdapter, bottleneck, dense, ended, probability
from ._parts import plain
from .llama_adapter import LlamaAdapterAttention, LlamaAdapterFeedForward


class RepAdapter(SublayerAdapter):
    """conv_B(dropout(conv_A(x))), 1 x 1 convolutions over the channels, without x itself: x (B, L, D) -> (B, L, D).

    In CLIP: x + attention(adapter(ln_1(x))); LaVIN's published run has a RepAdapterRouter in this place, too.
    Args: width D, r; groups of conv_B, whose weight (D, r / groups, 1) sees that part of the bottleneck each. dropout
    acts in training. Parameters: `conv_A` (r, D, 1), Xavier-uniform, `conv_B`; biases and conv_B zero at the start.
    """

    place = "input"

    def __init__(
        self, width: int, r: int = 8, *, groups: int = 2, dropout: float = 0.1, device=None, dtype=None
    ):  # fmt: skip
        super().__init__(width)
        made = {"device": device, "dtype": dtype}
        if r < 1 or groups < 1 or r % groups or width % groups:
            raise ValueError(f"width {width}, r {r}, groups {groups}; accepted: a divisor of both, 1 or more")
        self.p = probability(dropout)
        self.conv_A = nn.Conv1d(width, r, 1, **made)
        self.conv_B = nn.Conv1d(r, width, 1, groups=groups, **made)
        nn.init.xavier_uniform_(self.conv_A.weight)
        for parameter in (self.conv_A.bias, self.conv_B.weight, self.conv_B.bias):
            nn.init.zeros_(parameter)

    def _end(self, hidden, residual, norm, add):
        return bottleneck(
            hidden, self.conv_A, self.conv_B, Activation("none"), p=self._p(), residual=residual if add else None,
            kinds=(nn.Conv1d,), whole=lambda t: self.conv_B(self._down(t)).transpose(1, 2),
        )  # fmt: skip

    def _p(self) -> float:
        return self.p if self.training else 0.0

    def _down(self, x: Tensor) -> Tensor:
        """(B, r, L) by the children."""
        z = self.conv_A(x.transpose(1, 2))
        return F.dropout(z, self._p()) if self._p() else z

    def _check(self, hidden, residual):
        super()._check(hidden, residual)
        if hidden.dim() != 3 or hidden.shape[1] == 0:
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}; accepted: (B, L, {self.width}), L > 0")

    def extra_repr(self) -> str:
        return f"r={self.conv_A.out_channels}, groups={self.conv_B.groups}, p={self.p}"


class RepAdapterRouter(RepAdapter):
    """y = x + s w_0 conv_B(a) + s w_1 conv_D(a), a = dropout(conv_A(x)): two ups of one down, mixed for each sample.

        w = softmax(expert_weights(x[:, 0]) / t), (B, 2), of the first token alone

    scale: s. half_route: w rounded to float16, as upstream. forward(x, weights=): w of an earlier call, at generation
    that of the prompt. Parameters: RepAdapter's, `conv_D`, zero, and `expert_weights` (2, D): y is x at the start, bit
    for bit.
    """

    def __init__(
        self,
        width: int,
        r: int = 8,
        *,
        groups: int = 2,
        scale: float = 1.0,
        t: float = 10.0,
        half_route: bool = True,
        dropout: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__(width, r, groups=groups, dropout=dropout, device=device, dtype=dtype)
        if not t > 0:
            raise ValueError(f"t is {t}; accepted: a temperature above 0")
        self.scale, self.t, self.half_route = float(scale), float(t), half_route
        self.conv_D = nn.Conv1d(r, width, 1, groups=groups, device=device, dtype=dtype)
        nn.init.zeros_(self.conv_D.weight)
        nn.init.zeros_(self.conv_D.bias)
        self.expert_weights = nn.Linear(width, 2, device=device, dtype=dtype)

    def route(self, x: Tensor) -> Tensor:
        """w (B, 2) of x (B, L, D)."""
        w = torch.softmax(self.expert_weights(x[:, 0]) / self.t, -1)
        # upstream's product of float16 and a wider one is in the wider
        return w.half().to(torch.promote_types(w.dtype, torch.float32)) if self.half_route else w

    def _end(self, hidden, residual, norm, add, weights=None):
        w = self.route(hidden) if weights is None else weights
        if tuple(w.shape) != (hidden.shape[0], 2):
            raise ValueError(f"weights has shape {tuple(w.shape)}; accepted: (B, 2) with B = {hidden.shape[0]}")
        residual = residual if add else None
        ups = (self.conv_B, self.conv_D)
        if plain(self.conv_A, *ups, kinds=(nn.Conv1d,)):
            (down, down_bias), (b, b_bias), (d, d_bias) = map(dense, (self.conv_A, *ups))
            return bottleneck_adapter(
                hidden, down, torch.cat((b, d), 1), down_bias, torch.stack((b_bias, d_bias)), residual=residual,
                route=w, act="none", scale=self.scale, skip="add", p=self._p(),
            )  # fmt: skip
        z, w = self._down(hidden), w.to(hidden.dtype)
        y = sum(w[:, i, None, None] * up(z) for i, up in enumerate(ups))
        return ended(y.transpose(1, 2), hidden, None, residual, scale=self.scale, skip="add")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}, t={self.t:g}"


class LaVINCache(NamedTuple):
    """Keys, values (B, S, G, K), and the routers' weights of the prompt."""

    k: Tensor
    v: Tensor
    weights: tuple[Tensor, ...]


class LaVINBlock(nn.Module):
    """A Llama layer in Meta's names with LaVIN's adapters: x (B, L, D) -> (B, L, D).

        h = x + attention(adapter_attn(attention_norm(x)));  y = h + feed_forward(ffn_norm(h))

    mode "block" also has `adapter_mlp`, before the feed-forward. hidden: the feed-forward's width; r, groups, scale, t,
    half_route, dropout: RepAdapterRouter's.

    forward: cos, sin and mask as LlamaAdapterAttention's, of which `lavin_mask` makes what hides the modality token.
    past, use_cache: with either the result is (y, LaVINCache): at generation the routers' weights are the prompt's.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        mode: str = "attn",
        kv_heads: int | None = None,
        eps: float = 1e-5,
        device=None,
        dtype=None,
        **adapter_options,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        if mode not in ("attn", "block"):
            raise ValueError(f"mode is {mode!r}; accepted: attn, block")
        self.attention = LlamaAdapterAttention(dim, heads, kv_heads=kv_heads, **made)
        self.attention.gate = None  # of a prefix, which is not here
        self.feed_forward = LlamaAdapterFeedForward(dim, hidden, **made)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps, **made), nn.RMSNorm(dim, eps, **made)
        self.adapter_attn = RepAdapterRouter(dim, **adapter_options, **made)
        self.adapter_mlp = RepAdapterRouter(dim, **adapter_options, **made) if mode == "block" else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask=None, past: LaVINCache | None = None, use_cache=False):
        n, kv = self.attention_norm(x), None
        caching = use_cache or past is not None
        if caching:
            none = x.new_zeros(x.shape[0], 0, self.attention.kv_heads, self.attention.head_dim)
            kv = (none, none) if past is None else (past.k, past.v)
        weights = [self.adapter_attn.route(n) if past is None else past.weights[0]]
        y = self.attention(self.adapter_attn(n, weights=weights[0]), cos, sin, mask, past=kv)
        y, kv = y if caching else (y, None)
        h = x + y
        n = self.ffn_norm(h)
        if self.adapter_mlp is not None:
            weights.append(self.adapter_mlp.route(n) if past is None else past.weights[1])
            n = self.adapter_mlp(n, weights=weights[1])
        y = h + self.feed_forward(n)
        return (y, LaVINCache(*kv, tuple(weights))) if caching else y


class LaVINModality(nn.Module):
    """LaVIN's input: [modality | BOS | image | text], from embeddings of [BOS | text].

    forward(h (B, L, D), has_image (B,), image (B, N, D) or None, labels (B, L) or None) -> (B, 1 + N + L, D), and with
    labels their like (B, 1 + N + L), 0 (ignored) at the modality token and at the image. A sample without an image has
    its text right after BOS, and zeros of label 0 at its end. has_image: bool, or 0 and 1. `lavin_mask` is the mask.
    Parameters: `adapter_modality_embedding.weight` (2, D), row 1 with an image.
    """

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.adapter_modality_embedding = nn.Embedding(2, dim, device=device, dtype=dtype)

    def forward(
        self, h: Tensor, has_image: Tensor, image: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        B, L, D = h.shape
        N = 0 if image is None else image.shape[1]
        self._check(h, has_image, image, labels)
        seen = has_image.long()
        token = self.adapter_modality_embedding(seen)[:, None].to(h.dtype)
        zeros = h.new_zeros(B, N, D)
        image = zeros if image is None else image.to(h.dtype)
        # BOS, image, text, zeros; a sample without an image skips the image, and keeps the zeros at its end
        rows = torch.cat((h[:, :1], image, h[:, 1:], zeros), 1)
        at = torch.arange(N + L, device=h.device).expand(B, -1)
        at = torch.where((seen[:, None] == 0) & (at > 0), at + N, at)
        y = torch.cat((token, rows.gather(1, at[..., None].expand(-1, -1, D))), 1)
        if labels is None:
            return y
        none = labels.new_zeros(B, N)
        marks = torch.cat((labels[:, :1], none, labels[:, 1:], none), 1).gather(1, at)
        return y, torch.cat((labels.new_zeros(B, 1), marks), 1)

    def _check(self, h, has_image, image, labels) -> None:
        D = self.adapter_modality_embedding.embedding_dim
        if h.shape[2] != D or h.shape[1] == 0:
            raise ValueError(f"h has shape {tuple(h.shape)}; accepted: (B, L, {D}), L > 0")
        if tuple(has_image.shape) != (h.shape[0],) or has_image.is_floating_point():
            raise ValueError(
                f"has_image is {has_image.dtype} {tuple(has_image.shape)}; accepted: bool or integers ({h.shape[0]},)"
            )
        if image is not None and (image.dim() != 3 or (image.shape[0], image.shape[2]) != (h.shape[0], D)):
            raise ValueError(f"image has shape {tuple(image.shape)}; accepted: ({h.shape[0]}, N, {D})")
        if labels is not None and labels.shape != h.shape[:2]:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; accepted: {tuple(h.shape[:2])}")


def lavin_mask(length: int, past: int = 0, device=None) -> Tensor:
    """Bool (length, past + length), True = attend: causal, and position 0, the modality token, seen by itself alone."""
    mask = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    mask[:, 0] = torch.arange(past, past + length, device=device) == 0
    return mask
