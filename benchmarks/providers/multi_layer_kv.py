"""multi_layer_kv beside plain PyTorch: a norm and a linear in each layer, as every resampler and Q-Former has them.

"layers" is what models run: each layer's keys and values stay a tensor of their own. "eager" and "compile" give the
op's one tensor, which costs a copy more, and are therefore checked against it; the ratios refer to "layers".
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vlkernels.ops._shuffle import normalised
from vlkernels.ops.multi_layer_kv import reference
from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, autocast, compiled, frozen_of, plain

BASELINE = "layers"


def _layers(case: Case, kw: dict, precision: Precision) -> Instance:
    """Keys and values of each layer, from parameters of each layer's own."""

    def own(name: str) -> list[Tensor | None]:
        t = kw[name]
        parts = [None] * kw["layers"] if t is None else t.detach().chunk(kw["layers"])
        return [p if p is None else p.squeeze(0).requires_grad_(t.requires_grad) for p in parts]

    x, parts = kw["x"], {name: own(name) for name in ("weight", "bias", "norm_weight", "norm_bias")}
    leaves = {f"{name} {i}": p for name, ps in parts.items() for i, p in enumerate(ps) if p is not None}
    leaves = {n: p for n, p in leaves.items() if p.requires_grad} | ({"x": x} if x.requires_grad else {})

    def forward() -> tuple[Tensor, ...]:
        with autocast(kw, precision):
            return tuple(
                F.linear(normalised(x, kw["norm"], scale, shift, kw["eps"]), weight, bias)
                for weight, bias, scale, shift in zip(*parts.values(), strict=True)
            )

    return Instance(forward, leaves, frozen_of(kw))


PROVIDERS = (
    Provider("layers", _layers, "bound"),
    Provider("eager", plain(reference.forward)),
    Provider("compile", plain(compiled(reference.forward))),
)
PEERS: tuple[Provider, ...] = ()
