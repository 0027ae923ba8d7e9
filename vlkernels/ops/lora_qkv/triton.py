"""lora_qkv in Triton: one pass over x for all three adapters each way, one norm, cuBLAS for the large products."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _lora_group, _lora_group_triton, _norm
from .._dropout import threshold
from .reference import NAMES, named

CONFIG_IN = _lora_group_triton  # whose config() picks the tiles


def refuses(*args) -> str | None:
    values = named(*args)
    group = _lora_group.branches(NAMES, values)
    if (reason := _lora_group_triton.refuses(group, values["x"], values["dtype"])) is not None:
        return reason
    return None if values["norm_weight"] is None else _norm.refuses(values["x"], "rms", 1)


def declines(*args) -> str | None:
    values = named(*args)
    rows = values["x"].numel() // values["x"].shape[-1]
    # with dropout never: a checkpoint's first pass has no gradients, and its recomputation must draw the same mask
    if not torch.is_grad_enabled() and threshold(values["p"]) == 0 and rows <= 64:
        return "at most 64 rows without gradients (decoding): launch-bound, and nothing is saved"
    return None


def _input(x: Tensor, norm_weight, eps: float, offset: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """(what the projections read, statistics): x itself, or its norm."""
    if norm_weight is None:
        return x, torch.empty((0,), dtype=torch.float32, device=x.device)
    h, stats = _norm.normed(x, norm_weight, None, "rms", eps, 1, dtype or x.dtype, offset=offset)
    return h.view(x.shape), stats


def forward(*args) -> tuple[Tensor, ...]:
    """q, k, v, then s of each and the norm's statistics."""
    values = named(*args)
    x, dtype = values["x"], values["dtype"]
    group = _lora_group.branches(NAMES, values)
    ss = _lora_group.residuals(group, x.numel() // x.shape[-1], x, dtype)
    h, stats = _input(x, values["norm_weight"], values["eps"], values["offset"], dtype)
    ys = _lora_group_triton.forward(group, h, values["seed"], values["p"], dtype or x.dtype, ss)
    return *ys, *ss, stats


def backward(dq, dk, dv, saved, needs, p, eps, offset, dtype, **others) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, norm_weight, stats = saved["x"], saved["norm_weight"], saved["stats"]
    group = _lora_group.branches(NAMES, saved | others)
    ss = [saved[f"{name}_s"] for name in NAMES]
    need_norm = norm_weight is not None and (needs["x"] or needs["norm_weight"])
    read = any(needs[f"{n}_{f}"] for n in NAMES for f in ("a", "weight"))
    h = x
    if norm_weight is not None and read:
        h = _norm.normed(x, norm_weight, None, "rms", eps, 1, dtype or x.dtype, offset=offset)[0].view(x.shape)
    elif norm_weight is not None:
        h = x.to(dtype or x.dtype)  # read by no gradient: its shape and dtype count
    dh, grads = _lora_group_triton.backward(
        group, [dq, dk, dv], h, ss, saved["seed"], p, dtype or x.dtype, needs, needs["x"] or need_norm
    )
    if norm_weight is None:
        return grads | {"x": dh}
    if need_norm:
        wanted = {n: needs.get(n, False) for n in ("x", "norm_weight", "norm_bias")}
        grads |= _norm.norm_backward(
            dh.reshape(-1, x.shape[-1]), x, norm_weight, None, stats, "rms", 1, wanted, offset=offset
        )
    return grads
