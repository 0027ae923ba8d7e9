"""The norm of dora_linear apart from it, for who keeps it."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from . import dora_linear, reference


def row_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float, backend: str | None = None) -> Tensor:
    """‖W + scale B A‖ of each row: (N,) float32 at least, without gradient, for weight (N, K), a (R, K), b (N, R).

    It is the argument `norm` of dora_linear. Kernels read W once and never build B A; plain PyTorch does.
    """
    with torch.no_grad(), reference.no_autocast(weight):
        # the call that would compute this norm, on one row
        values = dora_linear.values(weight[:1], weight, a, b, weight[:, 0])
        chosen = backends.choose(dora_linear, values, backend)
        if chosen == "reference":
            return reference.row_norm(weight, a, b, scale)
        return dora_linear.kernels[chosen].norm_of(weight, a, b, scale)
