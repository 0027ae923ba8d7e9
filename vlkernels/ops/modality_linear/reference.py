"""modality_linear: each row goes through the weight of its own modality, without gathering the rows of one.

The visual experts of CogVLM (arXiv 2311.03079) and the modality-adaptive key and value projections of mPLUG-Owl2
(2311.04257); survey eq. 26.
Dims: T rows, K input width, N output width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._shuffle import ACTS

EXPERTS = 4
INDEX_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def forward(
    x: Tensor,
    index: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor | None = None,
    w3: Tensor | None = None,
    b0: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    b3: Tensor | None = None,
    gate: Tensor | None = None,
    act: str = "silu",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y[t] = x[t] W_eᵀ + b_e with e = index[t]; zero where index[t] names none of the experts.

    Args:
        x: (..., K).
        gate: (..., K), the gate of a feed-forward block, of which this is the last linear: act(gate) * x takes x's
            place. Kernels keep gate and x for backward and neither act(gate) nor the product.
        act: of the gate: "silu", "gelu" (erf), "gelu_tanh", "relu", "quick_gelu".
        index: (...), of booleans or integers: the expert of each row. A row of any other number (-1 for padding) is
            zero and costs no product. The values stay on the device: nothing waits for them.
        w0, w1, w2, w3: (N, K), two to four experts. b0, b1, b2, b3: (N), of any of them.
        dtype: compute everything in this dtype; autocast sets it.

    Returns: y (..., N), in `dtype`, else in x's dtype. Here every row goes through every expert and one result is
    taken; kernels compute the experts that a tile of rows has.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if gate is not None:
        gate, x = (t if dtype is None else t.to(dtype) for t in (gate, x))
        x = ACTS[act](gate) * x
    weights = [w for w in (w0, w1, w2, w3) if w is not None]
    biases = (b0, b1, b2, b3)[: len(weights)]
    if dtype is not None:
        x = x.to(dtype)
        weights = [w.to(dtype) for w in weights]
        biases = [b if b is None else b.to(dtype) for b in biases]
    index = index.to(torch.int64).unsqueeze(-1)
    y = x.new_zeros((*x.shape[:-1], w0.shape[0]))
    for e, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = torch.where(index == e, F.linear(x, weight, bias), y)
    return y


def residuals(*values) -> tuple:
    """Kernels save nothing besides arguments."""
    return ()


def check(x, index, w0, w1, w2, w3, b0, b1, b2, b3, gate, act, dtype) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    weights = {"w0": w0, "w1": w1, "w2": w2, "w3": w3}
    biases = {"b0": b0, "b1": b1, "b2": b2, "b3": b3}
    tensors = {"x": x} | weights | biases | {"gate": gate}
    _check.floating(**tensors)
    if not isinstance(index, Tensor) or index.dtype not in INDEX_DTYPES:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index is {got}; accepted: a tensor of booleans or integers")
    _check.same_device(**tensors, index=index)
    if x.dim() < 1 or w0.dim() != 2 or w0.shape[1] != x.shape[-1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, w0 {tuple(w0.shape)}; accepted: x (..., K), w0 (N, K)")
    _check.shape("index", index, tuple(x.shape[:-1]), "x's shape without its channels")
    _check.shape("gate", gate, tuple(x.shape), "the shape of x")
    if act not in ACTS:
        raise ValueError(f"act is {act!r}; accepted: {', '.join(ACTS)}")
    if w2 is None and w3 is not None:
        raise ValueError("w3 is given without w2; experts are numbered without a gap")
    for (name, w), b in zip(weights.items(), biases.values(), strict=True):
        _check.shape(name, w, tuple(w0.shape), "the shape of w0")
        if w is None and b is not None:
            raise ValueError(f"b{name[1]} is given without {name}")
    for name, b in biases.items():
        _check.shape(name, b, (w0.shape[0],), "(N,)")
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", **tensors)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    return x, index, w0, w1, w2, w3, b0, b1, b2, b3, gate, act, dtype


def draw(*values) -> tuple:
    """Nothing is random here."""
    return values
