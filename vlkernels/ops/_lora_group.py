"""Several projections of one x, each with or without an adapter: what the group ops of the LoRA family share.

Dims: T all rows of x, K input width, N_i output widths, R_i ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, _nf4
from ._dropout import draw_seed, dropout, threshold


@dataclass(frozen=True)
class Branch:
    """y = x Wᵀ + bias + scale * (drop(x) Aᵀ Bᵀ + lora_bias); a and b are None for a projection without adapter.

    With `quant` the weight is packed in 4 bits, as lora_linear has it.
    """

    name: str
    width: int  # K
    weight: Tensor  # (N, K), or packed
    a: Tensor | None  # (R, K)
    b: Tensor | None  # (N, R)
    bias: Tensor | None
    lora_bias: Tensor | None
    quant: Tensor | None
    scale: float
    blocksize: int
    quant_dtype: torch.dtype | None

    @property
    def out(self) -> int:
        """N. Of a packed weight: half a byte an element, and the last one may be half empty."""
        if self.quant is None:
            return self.weight.shape[0]
        return self.b.shape[0] if self.b is not None else self.weight.numel() * 2 // max(self.width, 1)


FIELDS = ("weight", "a", "b", "bias", "lora_bias", "quant")


def branch(name: str, values: dict, width: int) -> Branch:
    """The projection called `name` among an op's arguments `<name>_weight` and so on, over `width` channels."""
    own = (values[f"{name}_{field}"] for field in (*FIELDS, "scale"))
    return Branch(name, width, *own, values["blocksize"], values["quant_dtype"])


def branches(names: tuple[str, ...], values: dict) -> list[Branch]:
    """Projections of x."""
    return [branch(name, values, values["x"].shape[-1]) for name in names]


def adapted(group: list[Branch]) -> list[Branch]:
    return [branch for branch in group if branch.a is not None]


def low_rank_dtype(group: list[Branch], x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which s and the adapters enter a product."""
    return dtype or next((branch.a.dtype for branch in adapted(group)), x.dtype)


def residuals(group: list[Branch], rows: int, x: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    """Shapes of s_i = drop_i(x) A_iᵀ (T, R_i), unscaled; zero columns for a projection without adapter."""
    low = low_rank_dtype(group, x, dtype)
    return [x.new_empty((rows, 0 if b.a is None else b.a.shape[0]), dtype=low) for b in group]


def check(group: list[Branch], x: Tensor, dtype: torch.dtype | None) -> None:
    """An error that names the argument that does not fit."""
    for branch in group:
        name, width = branch.name, branch.width
        named = {f"{name}_{f}": getattr(branch, f) for f in FIELDS}
        packed = (f"{name}_quant", f"{name}_weight") if branch.quant is not None else (f"{name}_quant",)
        dense = {k: v for k, v in named.items() if k not in packed}
        if branch.quant is not None:
            _nf4.check_bytes(**{k: named[k] for k in packed})
        _check.floating(**dense)
        _check.same_device(x=x, **named)
        if (branch.a is None) != (branch.b is None):
            raise ValueError(f"give both {name}_a and {name}_b, or neither for a projection without adapter")
        if branch.a is None and branch.lora_bias is not None:
            raise ValueError(f"{name}_lora_bias belongs to an adapter, and {name}_a is None")
        if branch.quant is None and (branch.weight.dim() != 2 or branch.weight.shape[1] != width):
            raise ValueError(
                f"{name}_weight has shape {tuple(branch.weight.shape)}; accepted: (N, K) with K = {width} as its input"
            )
        if branch.a is not None:
            if branch.a.dim() != 2 or branch.a.shape[0] < 1 or branch.b.dim() != 2:
                raise ValueError(
                    f"{name}_a has shape {tuple(branch.a.shape)}, {name}_b {tuple(branch.b.shape)}; accepted: (R, K) "
                    "and (N, R) with R >= 1"
                )
            _check.shape(f"{name}_a", branch.a, (branch.a.shape[0], width), f"(R, K) with the K of {name}_weight")
            meaning = f"(N, R) with the N of {name}_weight and the R of {name}_a"
            _check.shape(f"{name}_b", branch.b, (branch.out, branch.a.shape[0]), meaning)
        if branch.quant is not None:
            _nf4.check(branch.weight, branch.quant, (branch.out, width), branch.blocksize, branch.quant_dtype)
        _check.shape(f"{name}_bias", branch.bias, (branch.out,), "(N,)")
        _check.shape(f"{name}_lora_bias", branch.lora_bias, (branch.out,), "(N,)")
        if dtype is None:
            hint = " (or pass dtype=, or use autocast)"
            plain = {k: v for k, v in dense.items() if k in (f"{name}_weight", f"{name}_bias")}
            _check.same_dtype(hint, x=x, **plain)
    if dtype is None:
        low = {f"{b.name}_{f}": getattr(b, f) for b in adapted(group) for f in ("a", "b", "lora_bias")}
        _check.same_dtype("", **low)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")


def check_seed(seed: Tensor | None, x: Tensor, count: int) -> None:
    _check.same_device(x=x, seed=seed)
    if seed is not None and (seed.dtype != torch.int64 or tuple(seed.shape) != (count,)):
        raise ValueError(
            f"seed is {seed.dtype} of shape {tuple(seed.shape)}; accepted: int64 of shape ({count},), one an adapter"
        )


def draw(seed: Tensor | None, x: Tensor, p: float, count: int) -> Tensor | None:
    """One seed an adapter, in the order of the projections; None where nothing is dropped."""
    if threshold(p) == 0 or count == 0:
        return None
    return draw_seed(x.device, count) if seed is None else seed


def forward(branch: Branch, x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """One projection in plain PyTorch; seed is its own 0-d number."""
    weight = branch.weight
    if branch.quant is not None:
        shape = branch.out, branch.width
        weight = _nf4.dequantize(weight, branch.quant, shape, branch.blocksize, branch.quant_dtype, x.dtype)
    y = F.linear(x, weight, branch.bias)
    if branch.a is None:
        return y
    z = x.to(branch.a.dtype)
    if seed is not None:
        z = dropout(z, seed, p)
    return (y + F.linear(F.linear(z, branch.a), branch.b, branch.lora_bias) * branch.scale).to(y.dtype)


def cast(branch: Branch, dtype: torch.dtype | None) -> Branch:
    """Every tensor of the branch in `dtype`, as autocast has it; a packed weight stays."""
    if dtype is None:
        return branch
    names = ("a", "b", "bias", "lora_bias", *(("weight",) if branch.quant is None else ()))
    tensors = {name: getattr(branch, name) for name in names}
    return replace(branch, **{name: t.to(dtype) for name, t in tensors.items() if t is not None})
