"""What all gated layers of one step share: which media each text token sees, and the media's keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.media_cross_attention import spans
from ._kv import layers_kv
from ._parts import fusable


@dataclass(frozen=True)
class MediaMask:
    """Which media each text token sees; made once a step, on the device, without waiting for it.

    span: int32 (B, T, 2), the media [begin, end) that bound what a token sees, or None; visible: (B, T, J) bool or
    additive, or None; tokens: keys of one medium; row_mask: (B, T) bool, of rows with a feed-forward branch, or None.
    """

    span: Tensor | None = None
    visible: Tensor | None = None
    tokens: int = 1
    row_mask: Tensor | None = None

    @classmethod
    def of_locations(
        cls,
        media_locations: Tensor | None,
        media: int,
        tokens: int,
        length: int,
        *,
        immediate: bool = True,
        use_cached_media: bool = False,
        strict: bool = True,
    ) -> MediaMask:
        """OpenFlamingo's rule: a token sees the last medium before it, or all of them with immediate=False.

        media_locations: bool (B, length), True at each media token; with use_cached_media of any length, and every
        token stands after all of them; None, then only, lets every token see all media.
        strict: more media tokens than media in a sample are an error where the locations are on the CPU, so that
        looking costs no wait for a device; on a GPU, and with strict=False, such tokens get the mean of all values.
        """
        if media_locations is None:
            if not use_cached_media:
                raise ValueError("media_locations is None; accepted with use_cached_media=True only")
            return cls(tokens=tokens)
        if media_locations.dim() != 2 or (media_locations.shape[1] != length and not use_cached_media):
            raise ValueError(
                f"media_locations has shape {tuple(media_locations.shape)}; accepted: (B, T) with T = {length}, the "
                "length of the text, or any with use_cached_media=True"
            )
        _check_dtype("media_locations", media_locations)
        time = spans.text_time(media_locations != 0)
        if strict:
            _check_counts(time, media)
        if use_cached_media:
            none = time.new_zeros(time.shape[0], 1)
            time = torch.cat((none, time), 1)[:, -1:].expand(-1, length)
        return cls(spans.spans_of_time(time, media, immediate), tokens=tokens)

    @classmethod
    def of_visible(
        cls, visible: Tensor, tokens: int, gate: Tensor | None = None, *, empty: str = "mean", row_mask: bool = False
    ) -> MediaMask:
        """visible: bool (or 0 and 1) (B, T, J). gate: (B, T), 0 makes a token's attention zero.

        empty: what a token without media gets: "mean" of all values, "zero", or "all" media; row_mask: such tokens get
        no feed-forward branch.
        """
        if visible.dim() != 3:
            raise ValueError(f"visible has shape {tuple(visible.shape)}; accepted: (B, T, J), J media")
        visible = visible != 0
        some = visible.any(-1) if row_mask else None
        visible, span = spans.spans_of_visible(visible, empty)
        return cls(_closed(span, gate), visible, tokens, some)

    @classmethod
    def of_additive(cls, mask: Tensor, gate: Tensor | None = None, row_mask: Tensor | None = None) -> MediaMask:
        """transformers' mask (B, 1, T, N) of keys, 0 where visible and very negative elsewhere; read as it is.

        gate: (B, T), 0 makes a token's attention zero. A token that sees nothing gets the mean of all values.
        """
        if mask.dim() != 4 or mask.shape[1] != 1:
            raise ValueError(f"the mask has shape {tuple(mask.shape)}; accepted: (B, 1, T, N)")
        _, span = spans.spans_of_visible(mask[:, 0] >= 0)
        return cls(_closed(span, gate), mask[:, 0], 1, row_mask)

    def check(self, x: Tensor, keys: int) -> None:
        """An error where the mask is not one of x (B, T, D) over so many keys."""
        for name, t in (("span", self.span), ("visible", self.visible)):
            if t is not None and t.shape[:2] != x.shape[:2]:
                raise ValueError(
                    f"the mask's {name} is of {tuple(t.shape[:2])} (batch, tokens), x {tuple(x.shape[:2])}"
                )
        if keys % self.tokens or (self.visible is not None and self.visible.shape[2] * self.tokens != keys):
            media = "whole media" if self.visible is None else f"{self.visible.shape[2]} media"
            raise ValueError(f"{keys} media tokens; accepted by the mask: {media} of {self.tokens}")


def mllama_mask(cross_attention_mask: Tensor, keys: int) -> MediaMask:
    """Mllama's rule for cross_attention_mask (B, T, images, tiles) of 0 and 1 over `keys` vision tokens.

    A token without a visible tile attends to all of them, and gets no feed-forward branch.
    """
    if cross_attention_mask.dim() != 4:
        raise ValueError(
            f"cross_attention_mask has shape {tuple(cross_attention_mask.shape)}; accepted: (B, T, images, tiles)"
        )
    visible = cross_attention_mask.flatten(2)
    if visible.shape[2] == 0 or keys % visible.shape[2]:
        raise ValueError(f"{keys} vision tokens of {visible.shape[2]} tiles; accepted: as many of each tile")
    return MediaMask.of_visible(visible, keys // visible.shape[2], empty="all", row_mask=True)


@dataclass(frozen=True)
class MediaContext:
    """Keys and values of one or more gated layers, in one product for all of them, and what the tokens see.

        context = MediaContext.of(layers, media, mask)
        x = layer(x, context=context)     # for each of the layers, wherever it lies in the model

    The layers keep their weights; nothing of the media is kept but keys and values.
    """

    mask: MediaMask
    kv: dict[int, dict[str, Tensor]]

    @classmethod
    def of(cls, layers: Sequence[nn.Module], media: Tensor, mask: MediaMask) -> MediaContext:
        """media: (B, N, C), or OpenFlamingo's (B, J, n, C)."""
        media = media.flatten(1, 2) if media.dim() == 4 else media
        attentions = [layer.attention for layer in layers]
        fused = [fusable(*a.kv) for a in attentions]
        together = [a for a, fits in zip(attentions, fused, strict=True) if fits]
        found = {}
        if together:
            weights = [[linear.weight for linear in a.kv] for a in together]
            kv = layers_kv(media, weights, together[0].head_dim)
            found = {id(a): source for a, source in zip(together, kv, strict=True)}
        for a, fits in zip(attentions, fused, strict=True):
            if not fits:
                found[id(a)] = a.heads_of(*(linear(media) for linear in a.kv))
        return cls(mask, found)

    def of_layer(self, layer: nn.Module) -> dict[str, Tensor]:
        found = self.kv.get(id(layer.attention))
        if found is None:
            raise ValueError("the context was made for other layers; accepted: MediaContext.of(layers with this one)")
        return found


def _closed(span: Tensor, gate: Tensor | None) -> Tensor:
    """The span with begin == end where the gate is 0."""
    if gate is None:
        return span
    if gate.shape != span.shape[:2]:
        raise ValueError(f"the gate has shape {tuple(gate.shape)}; accepted: (B, T) = {tuple(span.shape[:2])}")
    return span.masked_fill((gate == 0)[..., None], 0)


def _check_dtype(name: str, t: Tensor) -> None:
    if t.is_floating_point():
        raise TypeError(f"{name} has dtype {t.dtype}; accepted: bool, or 0 and 1 as integers")


def _check_counts(time: Tensor, media: int) -> None:
    """Not under compile and not on a device: nothing may wait for a number there."""
    if time.device.type != "cpu" or type(time) is not Tensor or torch.compiler.is_compiling() or not time.numel():
        return
    counts = time[:, -1]
    if int(counts.max()) > media:
        sample = int(counts.argmax())
        raise ValueError(
            f"sample {sample} has {int(counts[sample])} media tokens, media holds {media}; accepted: at most as many "
            "(strict=False gives the tokens after the last medium the mean of all values, as upstream)"
        )
