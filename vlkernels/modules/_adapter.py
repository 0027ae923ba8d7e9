"""What the adapter modules share: where one stands, and its bottleneck as one op where the children are plain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.bottleneck_adapter import bottleneck_adapter
from ..ops.norm_residual import norm_residual
from ._children import hook_problem
from ._parts import norm_options, plain
from ._post_norm import joined

_TANH = ("gelu_tanh", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")
# names of transformers' activations -> the op's; the others below run as plain PyTorch
OP_ACTS = {
    **{name: name for name in ("relu", "gelu", "silu", "quick_gelu", "none")},
    **dict.fromkeys(_TANH, "gelu_tanh"), "gelu_python": "gelu", "swish": "silu", "linear": "none",
}  # fmt: skip
FUNCTIONS = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "none": lambda t: t,
    "quick_gelu": lambda t: t * (1.702 * t).sigmoid(),
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "leaky_relu": F.leaky_relu, "leakyrelu": F.leaky_relu,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu6": F.relu6, "relu2": lambda t: F.relu(t).square(),
    "mish": F.mish,
}  # fmt: skip


class Activation(nn.Module):
    """An activation by transformers' name: relu, gelu, gelu_new, silu, swish, quick_gelu, leakyrelu, tanh, ..."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name.lower()
        if self.name not in OP_ACTS and self.name not in FUNCTIONS:
            raise ValueError(f"activation is {name!r}; accepted: {', '.join({**OP_ACTS, **FUNCTIONS})}")

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[OP_ACTS.get(self.name, self.name)](x)

    def extra_repr(self) -> str:
        return self.name


class Projection(nn.Module):
    """A linear map whose matrix is made from smaller parameters: `dense()` gives its weight (out, in) and bias."""

    def dense(self) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.dense())


class Branch(nn.Module):
    """A module whose forward is up(act(down(x))), which `bottleneck` may do in its place."""


class SublayerAdapter(nn.Module):
    """An adapter of a sub-layer: h its output before the residual add, r its residual input.

    `branch(h, r)` is what replaces h; `adapter(h, r)` is the sub-layer's end, branch(h, r) + r and then its norm.
    What each adapter does is in `_end`: branch, plus residual where `add`.
    """

    place = "output"  # "input": h is the sub-layer's input after its norm, and there is no r
    needs_residual = False  # branch reads r
    needs_norm = False  # branch reads the norm of a post-norm block
    needs_inputs = False  # branch reads the sub-layer's own input: r after the norm of a pre-norm block

    def __init__(self, width: int):
        super().__init__()
        if width < 1:
            raise ValueError(f"width is {width}; accepted: 1 or more")
        self.width = width

    def _end(self, hidden: Tensor, residual: Tensor | None, norm: nn.Module | None, add: bool, **context) -> Tensor:
        raise NotImplementedError

    def branch(self, hidden: Tensor, residual: Tensor | None = None, norm: nn.Module | None = None, **context):
        """What replaces `hidden` in a block that adds `residual` and applies `norm` by itself."""
        self._check(hidden, residual)
        return self._end(hidden, residual, norm, False, **context)

    def forward(self, hidden: Tensor, residual: Tensor | None = None, norm: nn.Module | None = None, **context):
        """norm(branch(hidden, residual) + residual), each left out where it is None."""
        self._check(hidden, residual)
        y = self._end(hidden, residual, norm, residual is not None, **context)
        return y if norm is None else norm(y)

    def _check(self, hidden: Tensor, residual: Tensor | None) -> None:
        if not isinstance(hidden, Tensor):
            raise TypeError(f"hidden must be a torch.Tensor, got {type(hidden).__name__}")
        if hidden.dim() < 1 or hidden.shape[-1] != self.width:
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}; accepted: (..., D) with D = {self.width}")
        if residual is not None and residual.shape != hidden.shape:
            raise ValueError(
                f"residual has shape {tuple(residual.shape)}; accepted: that of hidden = {tuple(hidden.shape)}"
            )
        if residual is None and self.needs_residual:
            raise ValueError(f"residual is None; accepted by this {type(self).__name__}: the sub-layer's input")


def bottleneck(
    x: Tensor,
    down: nn.Module | Sequence[nn.Module],
    up: nn.Module,
    act: nn.Module,
    *,
    norm: nn.Module | None = None,
    p: float = 0.0,
    base: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    gate_act: str = "none",
    scale: float = 1.0,
    skip: str = "none",
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
    around: Sequence[nn.Module] = (),
    whole: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """base + residual + scale G (up(dropout(act(down(norm(x))))) [+ x]) [+ x], as `bottleneck_adapter` has it.

    down: one projection, or several whose outputs stand side by side. kinds: the projections that may be read here.
    around: containers that `whole` calls. whole: the branch by its children, in place of the calls above.
    """
    downs = list(down) if isinstance(down, (Sequence, nn.ModuleList)) else [down]
    name = OP_ACTS.get(getattr(act, "name", ""))
    read = (
        name is not None and norm_fusable(norm) and plain(*downs, up, kinds=kinds) and all(map(_stock, (act, *around)))
    )
    weights = [dense(d) for d in downs] if read else []
    if read and len({bias is None for _, bias in weights}) == 1:
        up_weight, up_bias = dense(up)
        biases = [bias for _, bias in weights]
        return bottleneck_adapter(
            x, joined([w for w, _ in weights]), up_weight, None if biases[0] is None else joined(biases), up_bias,
            base=base, residual=residual, gate=gate, act=name, p=p, scale=scale, skip=skip,
            gate_act=gate_act, **norm_options(norm),
        )  # fmt: skip
    if whole is not None:
        b = whole(x)
    else:
        n = x if norm is None else norm(x)
        z = downs[0](n) if len(downs) == 1 else torch.cat([d(n) for d in downs], -1)
        z = act(z)
        b = up(F.dropout(z, p) if p else z)
    return ended(b, x, base, residual, gate, gate_act, scale, skip)


def ended(
    b: Tensor,
    x: Tensor,
    base: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    gate_act: str = "none",
    scale: float = 1.0,
    skip: str = "none",
) -> Tensor:
    """What the op does with a branch that has been computed."""
    b = b + x if skip == "gated" else b
    if gate is not None:
        b = (gate.sigmoid() if gate_act == "sigmoid" else gate) * b
    b = b if scale == 1.0 else scale * b
    for t in (x if skip == "add" else None, base, residual):
        b = b if t is None else b + t
    return b


def dense(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of a plain projection; a grouped convolution's weight as the block diagonal it is."""
    if isinstance(projection, Projection):
        return projection.dense()
    weight = projection.weight
    if isinstance(projection, nn.Conv1d):
        parts = weight.squeeze(-1).unflatten(0, (projection.groups, -1)).unbind(0)
        weight = parts[0] if len(parts) == 1 else torch.block_diag(*parts)
    return weight, projection.bias


def norm_fusable(norm: nn.Module | None) -> bool:
    """The op may do the norm itself: over the last axis, with what its weights say and no more."""
    return norm is None or (
        plain(norm, kinds=(nn.LayerNorm, nn.RMSNorm)) and len(norm.normalized_shape) == 1 and norm.eps is not None
    )


def normed_sum(x: Tensor, norm: nn.Module, other: Tensor | None) -> Tensor:
    """norm(x) + other; of a plain norm x alone is kept for backward."""
    if other is None or not norm_fusable(norm):
        return norm(x) if other is None else norm(x) + other
    return norm_residual(x, other, **norm_options(norm, "weight", "bias"))


def rank_of(width: int, reduction: float, r: int | None = None) -> int:
    """r, or width // reduction."""
    if r is None and not reduction > 0:
        raise ValueError(f"reduction is {reduction}; accepted: more than 0")
    found = int(width // reduction) if r is None else r
    if found < 1:
        raise ValueError(f"the bottleneck of width {width} has rank {found}; accepted: 1 or more")
    return found


def probability(dropout: float) -> float:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; accepted: a dropout probability in [0, 1)")
    return float(dropout)


def scaling(of: float | str, made: dict) -> tuple[float, nn.Parameter | None]:
    """The fixed factor, and the parameter of "learned"."""
    if of == "learned":
        return 1.0, nn.Parameter(torch.ones(1, **made))
    if isinstance(of, (bool, str)) or not isinstance(of, (int, float)):
        raise ValueError(f"the scaling is {of!r}; accepted: a number, 'learned'")
    return float(of), None


def _stock(module: nn.Module) -> bool:
    known = type(module) in (nn.Sequential, Activation) or isinstance(module, Branch)
    return known and hook_problem("child", module) is None
