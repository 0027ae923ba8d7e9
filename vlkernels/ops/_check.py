"""Checks at the front door: each error names the argument, what it got and what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(**tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {t.dtype}; accepted: float16, bfloat16, float32, float64")


def same_device(**tensors: Tensor | None) -> None:
    first = None
    for name, t in tensors.items():
        if t is None:
            continue
        if first is None:
            first = (name, t.device)
        elif t.device != first[1]:
            raise ValueError(f"{name} is on {t.device}, {first[0]} on {first[1]}; all tensors must be on one device")


def same_dtype(hint: str = "", **tensors: Tensor | None) -> None:
    first = None
    for name, t in tensors.items():
        if t is None:
            continue
        if first is None:
            first = (name, t.dtype)
        elif t.dtype != first[1]:
            raise TypeError(f"{name} has dtype {t.dtype}, {first[0]} has {first[1]}; they must agree{hint}")


def shape(name: str, t: Tensor | None, expected: tuple[int, ...], meaning: str) -> None:
    if t is not None and tuple(t.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(t.shape)}; accepted: {meaning} = {tuple(expected)}")


def probability(name: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} is {p}; accepted: a dropout probability in [0, 1)")
