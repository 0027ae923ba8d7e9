"""norm_residual beside plain PyTorch, as post-norm models write it: a norm, a dropout and an addition."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.ops._shuffle import normalised
from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, autocast, frozen_of, leaves_of

BASELINE = "eager"


def plain(x, branch, weight, bias, norm: str, eps: float, p: float) -> Tensor:
    """The op's equation with torch's own dropout."""
    return normalised(x, norm, weight, bias, eps) + (F.dropout(branch, p) if p else branch)


def _plain(function):
    def build(case: Case, kw: dict, precision: Precision) -> Instance:
        rest = {name: value for name, value in kw.items() if name != "seed"}

        def forward() -> Tensor:
            with autocast(kw, precision):
                return function(**rest)

        return Instance(forward, leaves_of(kw), frozen_of(kw))

    return build


@functools.cache
def _compiled():
    return torch.compile(plain, dynamic=False)


def _compiled_plain(**kw) -> Tensor:
    return _compiled()(**kw)


PROVIDERS = (Provider("eager", _plain(plain)), Provider("compile", _plain(_compiled_plain)))
PEERS: tuple[Provider, ...] = ()
