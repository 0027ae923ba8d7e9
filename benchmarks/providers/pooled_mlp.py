"""pooled_mlp beside LDPv2 as upstream writes it, pooled after the second linear, and beside torch.compile of that."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vlkernels.ops._conv import pooled
from vlkernels.ops._shuffle import ACTS

from . import Provider, compiled, plain

BASELINE = "eager"


def upstream(x, w1, w2, h, w, out_h, out_w, b1, b2, act, level) -> Tensor:
    """pool(act(x W1ᵀ + b1) W2ᵀ + b2)"""
    return pooled(F.linear(ACTS[act](F.linear(x, w1, b1)), w2, b2), h, w, out_h, out_w)


PROVIDERS = (Provider("eager", plain(upstream)), Provider("compile", plain(compiled(upstream))))
PEERS: tuple[Provider, ...] = ()
