"""lora_mlp in Triton: gate and up share the passes over x, the activation takes one each way, the rest is cuBLAS."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _lora_group, _lora_group_triton, _norm, _tl
from .._dropout import threshold
from .._lora_group import Branch
from .reference import NAMES, group_of, named

CONFIG_IN = _lora_group_triton  # whose config() picks the tiles


def refuses(*args) -> str | None:
    values = named(*args)
    group = group_of(values)
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


def _seeds(group: list[Branch], seed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The seeds of gate and up, and that of down: views."""
    if seed is None:
        return None, None
    shared = len(_lora_group.adapted(group[:2]))
    return seed[:shared] if shared else None, seed[shared:] if group[2].a is not None else None


def forward(*args) -> tuple[Tensor, ...]:
    """y, then gate(h), up(h), s of each projection and the norm's statistics."""
    values = named(*args)
    x, dtype, p, norm_weight = values["x"], values["dtype"], values["p"], values["norm_weight"]
    out_dtype = dtype or x.dtype
    group = group_of(values)
    shared_seed, down_seed = _seeds(group, values["seed"])
    ss = _lora_group.residuals(group, x.numel() // x.shape[-1], x, dtype)
    h, stats = x, torch.empty((0,), dtype=torch.float32, device=x.device)
    if norm_weight is not None:
        h, stats = _norm.normed(x, norm_weight, None, "rms", values["eps"], 1, out_dtype, offset=values["offset"])
    h = h.reshape(-1, x.shape[-1])
    gate, up = _lora_group_triton.forward(group[:2], h, shared_seed, p, out_dtype, ss[:2])
    inner = _gated(gate, up, values["act"])
    (y,) = _lora_group_triton.forward(group[2:], inner, down_seed, p, out_dtype, ss[2:])
    y = y.view(*x.shape[:-1], y.shape[-1])
    return x + y if values["residual"] else y, gate, up, *ss, stats


def backward(dy, saved, needs, p, act, eps, offset, residual, dtype, **others) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, norm_weight, gate, up = saved["x"], saved["norm_weight"], saved["gate_pre"], saved["up_pre"]
    out_dtype, width = dtype or x.dtype, x.shape[-1]
    group = group_of(saved | others)
    shared_seed, down_seed = _seeds(group, saved["seed"])
    need_norm = norm_weight is not None and (needs["x"] or needs["norm_weight"])
    fields = ("weight", "a", "b", "bias", "lora_bias")
    need_gate_up = needs["x"] or need_norm or any(needs[f"{n}_{f}"] for n in NAMES[:2] for f in fields)

    # act(gate) * up is read by the gradients of down's weight and A alone; for the others its shape and dtype count
    inner = _gated(gate, up, act) if needs["down_weight"] or needs["down_a"] else up
    dinner, grads = _lora_group_triton.backward(
        group[2:], [dy.reshape(-1, dy.shape[-1])], inner, [saved["down_s"]], down_seed, p, out_dtype, needs,
        need_gate_up,
    )  # fmt: skip
    if not need_gate_up:
        return grads
    dgate, dup = _gated_backward(gate, up, dinner, act)

    h = x.reshape(-1, width)
    if norm_weight is not None and any(needs[f"{n}_{f}"] for n in NAMES[:2] for f in ("a", "weight")):
        h = _norm.normed(x, norm_weight, None, "rms", eps, 1, out_dtype, offset=offset)[0]
    elif norm_weight is not None:
        h = h.to(out_dtype)  # read by no gradient: its shape and dtype count
    dh, more = _lora_group_triton.backward(
        group[:2], [dgate, dup], h, [saved["gate_s"], saved["up_s"]], shared_seed, p, out_dtype, needs,
        needs["x"] or need_norm,
    )  # fmt: skip
    grads |= more
    if norm_weight is None:
        grads["x"] = None if dh is None else dh.view(x.shape)
    elif need_norm:
        wanted = {n: needs.get(n, False) for n in ("x", "norm_weight", "norm_bias")}
        grads |= _norm.norm_backward(dh, x, norm_weight, None, saved["stats"], "rms", 1, wanted, offset=offset)
    if residual and needs["x"]:
        grads["x"] = grads["x"].add_(dy)
    return grads


# -- the activation ------------------------------------------------------------------------------------------------


def _grid(t: Tensor) -> tuple[tuple[int, int], int]:
    """Programs and the columns of each: element-wise, 8 elements a thread; not timed on a GPU yet."""
    cols = min(1024, max(16, triton.next_power_of_2(t.shape[1])))
    return (t.shape[0], triton.cdiv(t.shape[1], cols)), cols


def _gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up, (T, F)"""
    out = torch.empty_like(gate)
    if gate.numel():
        grid, cols = _grid(gate)
        lora_mlp_act_kernel[grid](gate, up, out, gate.shape[1], ACT=act, BLOCK=cols, num_warps=4)
    return out


def _gated_backward(gate: Tensor, up: Tensor, dinner: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; that of gate is written over dinner, which nobody else holds."""
    dup = torch.empty_like(up)
    if gate.numel():
        grid, cols = _grid(gate)
        lora_mlp_act_bwd_kernel[grid](gate, up, dinner, dup, gate.shape[1], ACT=act, BLOCK=cols, num_warps=4)
    return dinner, dup


@triton.jit
def lora_mlp_act_kernel(gate_ptr, up_ptr, out_ptr, F, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """out = act(gate) * up"""
    offs_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_f < F
    offs = tl.program_id(0).to(tl.int64) * F + offs_f
    gate = tl.load(gate_ptr + offs, mask, 0.0).to(tl.float32)
    out = _tl.act(gate, ACT) * tl.load(up_ptr + offs, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + offs, _tl.cast(out, out_ptr.dtype.element_ty), mask)


@triton.jit
def lora_mlp_act_bwd_kernel(gate_ptr, up_ptr, dinner_ptr, dup_ptr, F, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """dgate = dinner up act'(gate), over dinner; dup = dinner act(gate)"""
    offs_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_f < F
    offs = tl.program_id(0).to(tl.int64) * F + offs_f
    gate = tl.load(gate_ptr + offs, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + offs, mask, 0.0).to(tl.float32)
    dinner = tl.load(dinner_ptr + offs, mask, 0.0).to(tl.float32)
    tl.store(dup_ptr + offs, _tl.cast(dinner * _tl.act(gate, ACT), dup_ptr.dtype.element_ty), mask)
    dgate = dinner * up * _tl.act_derivative(gate, ACT)
    tl.store(dinner_ptr + offs, _tl.cast(dgate, dinner_ptr.dtype.element_ty), mask)
