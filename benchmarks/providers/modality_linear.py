"""modality_linear beside what visual experts run today: rows of one modality gathered, multiplied and scattered."""

from __future__ import annotations

import torch
from torch import Tensor

from vlkernels.ops._shuffle import ACTS
from vlkernels.ops.modality_linear import reference

from . import Provider, compiled, plain

BASELINE = "gather"


def gather(x, index, gate, act: str, **experts) -> Tensor:
    """Boolean masks, as CogVLM and mPLUG-Owl2 write it; each mask waits for the device."""
    if gate is not None:
        x = ACTS[act](gate) * x
    w0 = experts["w0"]
    y = x.new_zeros((*x.shape[:-1], w0.shape[0]), dtype=_dtype(x))
    for e in range(4):
        if experts[f"w{e}"] is not None:
            mask = index == e
            y[mask] = torch.nn.functional.linear(x[mask], experts[f"w{e}"], experts[f"b{e}"])
    return y


def _dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


PROVIDERS = (
    Provider("gather", plain(gather)),
    Provider("every expert", plain(reference.forward)),
    Provider("compile", plain(compiled(reference.forward))),
)
PEERS: tuple[Provider, ...] = ()
