"""dora_linear beside stock peft, plain PyTorch and torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, Unavailable, _lora_layer, autocast, compiled, frozen_of, leaves_of

BASELINE = "peft"


def plain(x, weight, a, b, magnitude, norm, bias, scale: float, p: float, low: torch.dtype | None) -> Tensor:
    """The op's equation with torch's own dropout, and the norm from a dense B A as people write it.

    low: dtype of the low-rank branch where it is not that of x; None leaves it to autocast.
    """
    if norm is None:
        with torch.no_grad():
            norm = torch.linalg.vector_norm(weight + scale * (b @ a), dim=1)
    g = magnitude / norm
    z = F.dropout(x if low is None else x.to(low), p)
    u = F.linear(x, weight)
    y = u if bias is None else u + bias
    y = y + (g - 1) * (F.linear(z.to(x.dtype), weight) if p else u) + g * scale * F.linear(F.linear(z, a), b)
    return y.to(u.dtype)


def _plain(function):
    def build(case: Case, kw: dict, precision: Precision) -> Instance:
        names = ("x", "weight", "a", "b", "magnitude", "norm", "bias", "scale", "p")
        rest = {name: kw[name] for name in names}
        low = _lora_layer.low_dtype(kw, precision)

        def forward() -> Tensor:
            with autocast(kw, precision):
                return function(**rest, low=low)

        return Instance(forward, leaves_of(kw), frozen_of(kw))

    return build


def peft_layer(case: Case, kw: dict) -> nn.Sequential:
    """A model whose only layer is stock peft's lora.Linear with a DoRA adapter of the case's weights."""
    if kw["norm"] is not None:
        raise Unavailable("peft computes the norm itself")
    model = _lora_layer.adapted(kw, use_dora=True)
    dora = model[0].lora_magnitude_vector["default"]
    dora.weight = nn.Parameter(kw["magnitude"].detach())
    model.leaves["magnitude"] = dora.weight
    return model


stock, swapped = _lora_layer.stock(peft_layer), _lora_layer.swapped(peft_layer)


PROVIDERS = (
    Provider("peft", stock),
    Provider("eager", _plain(plain)),
    Provider("compile", _plain(compiled(plain))),
    Provider("frozen linear", _lora_layer.frozen, "bound"),
)
PEERS = ()

# swapped modules that the memory report counts: (name, precision, dropout, ours, baseline)
MODULES = tuple(
    ("peft lora.Linear DoRA", precision, p, Provider("swapped", swapped, "ours"), Provider("peft", stock))
    for precision, p in (("bf16", 0.0), ("bf16", 0.05), ("bf16+fp32 amp", 0.05), ("bf16+fp32", 0.05))
)
