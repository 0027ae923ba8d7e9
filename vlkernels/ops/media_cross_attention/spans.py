"""Which media each text token sees, as the `span` of media_cross_attention: plain PyTorch, once for all layers.

Nothing here waits for the device. A span is int32 (B, T, 2), [begin, end) in media: begin == end is a token whose
attention is zero, begin > end (1, 0) one that gets the mean of all values.
"""

from __future__ import annotations

import torch
from torch import Tensor

EMPTY = ("mean", "zero", "all")


def text_time(media_locations: Tensor) -> Tensor:
    """int32 (B, T): how many media have come up to each token, itself included; media_locations bool (B, T)."""
    return media_locations.cumsum(-1, dtype=torch.int32)


def spans_of_time(time: Tensor, media: int, immediate: bool = True) -> Tensor:
    """The spans of tokens after time (B, T) of `media` media, as OpenFlamingo masks in two steps.

    immediate: a token sees medium `time` alone; before the first medium its attention is zero; past the last one all
    its keys are masked, which gives the mean. Else it sees all media up to `time`, and before the first the mean.
    """
    zero = torch.zeros_like(time)
    if immediate:
        inside = (time >= 1) & (time <= media)
        begin = torch.where(inside, time - 1, torch.where(time > media, 1, zero))
        end = torch.where(inside, time, zero)
    else:
        begin = torch.where(time == 0, 1, zero)
        end = time.clamp(max=media)
    return torch.stack((begin, end), -1).to(torch.int32)


def spans_of_visible(visible: Tensor, empty: str = "mean") -> tuple[Tensor, Tensor]:
    """(visible, spans) of bool visible (B, T, J): the hull of what each token sees.

    empty: what a token that sees nothing gets: "mean" of all values and "zero" leave `visible` as it is, "all" opens
    every medium to it.
    """
    if empty not in EMPTY:
        raise ValueError(f"empty is {empty!r}; accepted: {', '.join(EMPTY)}")
    media = visible.shape[-1]
    none = ~visible.any(-1, keepdim=True)
    if empty == "all":
        visible, none = visible | none, torch.zeros_like(none)
    number = torch.arange(media, device=visible.device, dtype=torch.int32)
    begin = torch.where(visible, number, media).amin(-1, keepdim=True) if media else none.int()
    end = torch.where(visible, number + 1, 0).amax(-1, keepdim=True) if media else none.int()
    begin = torch.where(none, int(empty == "mean"), begin)
    end = torch.where(none, 0, end)
    return visible, torch.cat((begin, end), -1).to(torch.int32)
