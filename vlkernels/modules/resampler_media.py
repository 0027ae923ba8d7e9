"""Media of one batch: dense with a mask, or packed one after the other with their numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._parts import as_bool
from .projector import check_channels


class Media:
    """Which tokens belong to which media: dense x (B, N, C), or packed x (total tokens, C) with tokens per media.

    Packed media of one length are one batch of the attention, a view of the packed tensor; where they do not lie side
    by side, x is put in that order first.
    """

    def __init__(self, x: Tensor, mask: Tensor | None, lengths: list[int] | None):
        self.order, self.groups = None, None
        self.x, self.mask, self.count = x, mask, x.shape[0]
        if lengths is None:
            return
        self.count = len(lengths)
        same: list[tuple[int, list[int]]] = []  # a length, and the media of that length
        for i, length in enumerate(lengths):
            # compared and not hashed or sorted: under torch.compile it may be symbolic
            found = [media for other, media in same if other == length]
            if found:
                found[0].append(i)
            else:
                same.append((length, [i]))
        order = [i for _, media in same for i in media]
        if order != list(range(self.count)):
            self.order = order
            self.x, self.mask = (
                t if t is None else torch.cat([pieces[i] for pieces in [t.split(lengths)] for i in order])
                for t in (x, mask)
            )
        self.x, self.mask = self.x[None], None if self.mask is None else self.mask[None]
        self.groups, first, token = [], 0, 0
        for length, media in same:
            self.groups.append((first, len(media), token, length))
            first, token = first + len(media), token + len(media) * length

    def attend(self, attention: nn.Module, heads: Sequence[Tensor], source: dict[str, Tensor]) -> Tensor:
        """The attention (media, M, H K) of q, k2, v2, of batch 1 or one row a media, to `source` of all tokens."""

        def run(own: list[Tensor], cut, mask: Tensor | None) -> Tensor:
            cut_source = {n: cut(t) if n in ("k", "v", "x") else t for n, t in source.items()}
            if "x_parts" in source:
                cut_source["x_parts"] = [cut(t) for t in source["x_parts"]]
            return attention.attend(*own, mask=mask, **cut_source)

        return self._batches(list(heads), run, lambda own: attention.attend(*own))

    def call(self, layer: nn.Module, latents: Tensor) -> Tensor:
        """layer(latents, context, mask), latents (media, M, D)."""
        return self._batches(
            [latents],
            lambda own, cut, mask: layer(*own, cut(self.x), mask),
            lambda own: layer(*own, own[0][:, :0], None),
        )

    def spread(self, latents: Tensor) -> Tensor:
        return latents if latents.shape[0] == self.count else latents.expand(self.count, -1, -1)

    def _batches(self, latents: list[Tensor], run, alone) -> Tensor:
        """run(latents, cut, mask) on each batch of media of one length, alone(latents) on media without tokens.

        cut takes a batch's tokens out of a tensor of all of them.
        """
        if self.count == 0:
            # through all parameters: each still gets a gradient, zero
            return run([t[:0] for t in latents], lambda t: t[:0], None)
        if self.groups is None:
            return run(latents, lambda t: t, self.mask)
        out = []
        for media, count, token, length in self.groups:
            own = [t if t.shape[0] == 1 else t[media : media + count] for t in latents]
            if length == 0:
                out.append(alone([t.expand(count, *t.shape[1:]) for t in own]))
                continue

            def cut(t: Tensor, token=token, count=count, length=length) -> Tensor:
                return t[0, token : token + count * length].unflatten(0, (count, length))

            out.append(run(own, cut, None if self.mask is None else cut(self.mask)))
        return out[0] if len(out) == 1 else torch.cat(out)

    def restored(self, y: Tensor) -> Tensor:
        """y's rows in the media's own order."""
        if self.order is None:
            return y
        inverse = sorted(range(self.count), key=self.order.__getitem__)
        return y[torch.tensor(inverse, device=y.device)]


def counts_of(name: str, counts: Sequence[int] | Tensor, total: int, of: str) -> list[int]:
    """Counts as ints, whose sum is `total`."""
    if isinstance(counts, Tensor):
        if counts.device.type != "cpu" or counts.dim() != 1 or counts.is_floating_point():
            raise ValueError(
                f"{name} is {counts.dtype} {tuple(counts.shape)} on {counts.device}; accepted: ints on the host, or a "
                "1-d int64 tensor on the CPU (a GPU's would wait for the device)"
            )
        counts = counts.tolist()
    counts = [int(n) for n in counts]
    if any(n < 0 for n in counts) or sum(counts) != total:
        raise ValueError(f"{name} is {counts}; accepted: counts of 0 or more whose sum is the {total} {of}")
    return counts


def visible(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask as bool over all of x's axes but the channels; it may have only the first of them."""
    mask = as_bool("mask", mask, x.shape[:-1], axes=1)
    if mask is None:
        return None
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}, x on {x.device}; all tensors must be on one device")
    return mask.reshape(*mask.shape, *(1,) * (x.dim() - 1 - mask.dim())).expand(x.shape[:-1])


def media_of(name: str, x: Tensor, channels: int, mask: Tensor | None, lengths: Sequence[int] | Tensor | None) -> Media:
    """Dense (B, N, D), or packed (total tokens, D) with the tokens of each image."""
    check_channels(name, x, channels)
    if x.dim() != (3 if lengths is None else 2):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; accepted: (B, N, {channels}), or (tokens, {channels}) with lengths"
        )
    if lengths is not None:
        lengths = counts_of("lengths", lengths, x.shape[0], f"tokens of {name}")
    return Media(x, visible(mask, x), lengths)


def check_sizes(level: int, **sizes: int | None) -> None:
    if level not in (0, 1):
        raise ValueError(f"level is {level!r}; accepted: 0 (keep), 1 (recompute)")
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; accepted: 1 or more")
