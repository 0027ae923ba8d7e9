"""norm_residual beside plain PyTorch, as post-norm models write it: a norm, a dropout and an addition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vlkernels.ops._shuffle import normalised

from . import Provider, compiled, plain

BASELINE = "eager"


def equation(x, branch, weight, bias, norm: str, eps: float, p: float) -> Tensor:
    """The op's equation with torch's own dropout."""
    return normalised(x, norm, weight, bias, eps) + (F.dropout(branch, p) if p else branch)


def _without_seed(kw: dict) -> dict:
    return {name: value for name, value in kw.items() if name != "seed"}


PROVIDERS = (
    Provider("eager", plain(equation, _without_seed)),
    Provider("compile", plain(compiled(equation), _without_seed)),
)
PEERS: tuple[Provider, ...] = ()
