"""Bottleneck adapters of sub-layers, under upstream's parameter names. Survey eq. 4.

All are made by `Class(width, **options)`, or by name with `make_adapter(kind, width, **options)`, and called alike:
h is the sub-layer's output before its residual add, r the sub-layer's residual input and norm the block's own norm
after the add (None in pre-norm models):

    adapter.branch(h, r, norm) -> (..., D)    what replaces h in a block that adds r and applies norm by itself
    adapter(h, r, norm)        -> (..., D)    norm(branch(h, r, norm) + r): the sub-layer's whole end in one op

r and norm are optional where an adapter does not read them: `needs_residual`, `needs_norm` and `needs_inputs` say what
`branch` reads, the last one that it wants `inputs=`, what the sub-layer itself was given. `place` is "output", or
"input" for LaVIN's, which stands before the sub-layer: there h is the sub-layer's input after its norm, and
`adapter(h)` replaces it. VL-Adapter's with tasks take `task=` (default the first), Hyperformer's also `layer=`,
`block=`.

One op, `bottleneck_adapter`, does a whole adapter where its children are plain; with a hook on a child, or something
else in its place, the children are called.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._adapter import (
    Activation,
    SublayerAdapter,
    bottleneck,
    normed_sum,
    probability,
    rank_of,
    scaling,
)
from .adapter_hub import CONFIGS, AdapterHubAdapter
from .lavin import RepAdapterRouter
from .vl_adapter import VLAdapterController, VLHyperformer
from .vl_pet import VLPETAdapter


class BottleneckAdapter(SublayerAdapter):
    """branch(h) = h + scale * up(dropout(act(down(norm(a))))), a = h, or r with parallel: one adapter for any model.

    Parameters: `norm` (LayerNorm or RMSNorm over D, where norm is not "none"), `down` (R, D), `up` (D, R), both with
    biases, and `scale` (1) where scale is "learned". up starts at zero: then branch(h) is h, bit for bit.

    Args:
        width, r, reduction: D and R, R = D // reduction where r is None.
        act: transformers' name of an activation. norm: "none", "layer" or "rms", before `down`.
        parallel: `down` reads the sub-layer's residual input (He et al., arXiv 2110.04366), not its output.
        scale: a number, or "learned", a parameter that starts at 1. dropout: of the bottleneck, in training.
    """

    def __init__(
        self,
        width: int,
        *,
        r: int | None = None,
        reduction: float = 16,
        act: str = "relu",
        norm: str = "none",
        eps: float = 1e-5,
        parallel: bool = False,
        scale: float | str = 1.0,
        dropout: float = 0.0,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(width)
        made = {"device": device, "dtype": dtype}
        norms = {"none": lambda *a, **k: None, "layer": nn.LayerNorm, "rms": nn.RMSNorm}
        if norm not in norms:
            raise ValueError(f"norm is {norm!r}; accepted: {', '.join(norms)}")
        rank = rank_of(width, reduction, r)
        self.act, self.p, self.parallel, self.needs_residual = Activation(act), probability(dropout), parallel, parallel
        self.norm = norms[norm](width, eps=eps, **made)
        self.down, self.up = nn.Linear(width, rank, bias=bias, **made), nn.Linear(rank, width, bias=bias, **made)
        self.factor, self.scale = scaling(scale, made)
        nn.init.zeros_(self.up.weight)
        for linear in (self.down, self.up) if bias else ():
            nn.init.zeros_(linear.bias)

    def _end(self, hidden, residual, norm, add):
        words = {"base": hidden} if self.parallel else {"skip": "add"}
        return bottleneck(
            residual if self.parallel else hidden, self.down, self.up, self.act, norm=self.norm,
            p=self.p if self.training else 0.0, residual=residual if add else None, gate=self.scale,
            scale=self.factor, **words,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"parallel={self.parallel}, scale={self.factor if self.scale is None else 'learned'}, p={self.p}"


# -- MAGMA ---------------------------------------------------------------------------------------------------------


class MAGMAAdapter(SublayerAdapter):
    """branch(h) = h + D(h), or with parallel h + s D(inputs); D = up(relu(down([LN] .))).

    inputs: what the sub-layer itself was given. s: 1, or with scaled the parameter `adapter_scale` (1), 1 at the start.
    Parameters: `adapter`, a Sequential of [LayerNorm,] Linear (R, D), ReLU, Linear (D, R), R = D // factor; weights and
    biases N(0, 1e-3), clipped at 2e-3: not zero at the start. Published for GPT-J: factor 4 at the feed-forwards, or 8
    there and at the attentions. `MAGMAWrapper` holds the sub-layer too, as upstream. Source: magma/adapters.py.
    """

    def __init__(
        self,
        width: int,
        factor: int = 4,
        *,
        parallel: bool = False,
        scaled: bool = False,
        layer_norm: bool = False,
        act: str = "relu",
        device=None,
        dtype=None,
    ):
        super().__init__(width)
        made = {"device": device, "dtype": dtype}
        if scaled and not parallel:
            raise ValueError("scaled=True with parallel=False; accepted: a scale of the parallel adapter")
        self.parallel = self.needs_inputs = parallel
        rank, norm = rank_of(width, factor), [nn.LayerNorm(width, **made)] if layer_norm else []
        self.adapter = nn.Sequential(
            *norm, nn.Linear(width, rank, **made), Activation(act), nn.Linear(rank, width, **made)
        )
        self.adapter_scale = nn.Parameter(torch.ones(1, **made)) if scaled else None
        _clipped_normal(self.adapter)

    def _end(self, hidden, residual, norm, add, inputs=None):
        return self._adapted(hidden, inputs, residual if add else None)

    def _adapted(self, hidden: Tensor, inputs: Tensor | None, residual: Tensor | None = None) -> Tensor:
        if self.parallel and (inputs is None or inputs.shape != hidden.shape):
            got = None if inputs is None else tuple(inputs.shape)
            raise ValueError(
                f"inputs has shape {got}; accepted by a parallel adapter: that of hidden = {tuple(hidden.shape)}"
            )
        *norm, down, act, up = self.adapter
        words = {"base": hidden} if self.parallel else {"skip": "add"}
        return bottleneck(
            inputs if self.parallel else hidden, down, up, act, norm=norm[0] if norm else None,
            gate=self.adapter_scale, residual=residual, around=(self.adapter,), whole=self.adapter, **words,
        )  # fmt: skip


class MAGMAWrapper(MAGMAAdapter):
    """A sub-layer with MAGMA's adapter: f(x) + D(f(x)), or with parallel f(x) + s D(x).

    forward's arguments are those of the wrapped module f. Where f returns a tuple, as attention blocks do, its first
    element is adapted and the others are passed on.

    Parameters: f's under `module` when parallel, else under `attn_block` as upstream, whose normal adapter of a
    feed-forward is `nn.Sequential(mlp, MAGMAAdapter(...))`; then MAGMAAdapter's, with its options.
    """

    def __init__(self, module: nn.Module, width: int, factor: int = 4, *, parallel: bool = False, **options):
        super().__init__(width, factor, parallel=parallel, **options)
        self.add_module("module" if parallel else "attn_block", module)

    def forward(self, x: Tensor, *args, **kwargs):
        out = (self.module if self.parallel else self.attn_block)(x, *args, **kwargs)
        first, others = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        self._check(first, None)
        y = self._adapted(first, x if self.parallel else None)
        return y if others is None else (y, *others)

    def branch(self, *args, **kwargs):
        raise TypeError("a MAGMAWrapper is called as the module that it wraps; accepted: MAGMAAdapter(...).branch")


# -- FrozenBiLM ----------------------------------------------------------------------------------------------------


class FrozenBiLMAdapter(SublayerAdapter):
    """branch(h) = h + up(dropout(relu(down([ln] h)))). R = D / ds_factor; initialised as MAGMA's.

    ln_before: `ln` before `down`. ln_after: h + ln(h), without the bottleneck, whose parameters get no gradient: so
    does upstream's code with this switch, which the published model does not use. dropout acts in training.
    Parameters: `down` (R, D), `up` (D, R), `ln`. Source: model/adapter.py.
    """

    def __init__(
        self,
        width: int,
        ds_factor: int = 8,
        *,
        ln_before: bool = False,
        ln_after: bool = False,
        dropout: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__(width)
        made = {"device": device, "dtype": dtype}
        if ds_factor < 1 or width % ds_factor:
            raise ValueError(f"width is {width}, ds_factor {ds_factor}; accepted: a divisor of the width")
        self.ln_before, self.ln_after, self.p = ln_before, ln_after, probability(dropout)
        self.down, self.up = nn.Linear(width, width // ds_factor, **made), nn.Linear(width // ds_factor, width, **made)
        self.act = Activation("relu")
        self.ln = nn.LayerNorm(width, **made) if ln_before or ln_after else None
        _clipped_normal(self)

    def _end(self, hidden, residual, norm, add):
        residual = residual if add else None
        if self.ln_after:
            y = normed_sum(hidden, self.ln, hidden)
            return y if residual is None else y + residual
        return bottleneck(
            hidden, self.down, self.up, self.act, norm=self.ln, p=self.p if self.training else 0.0, skip="add",
            residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"ln_before={self.ln_before}, ln_after={self.ln_after}, p={self.p}"


class FrozenBiLMOutput(nn.Module):
    """DeBERTa-v2's output sub-layer with the adapter: LayerNorm(adapter(dropout(dense(x))) + residual).

    x (..., inner), inner D after the attention, else the feed-forward's width -> (..., D), as is residual.
    Parameters: `dense` (D, inner), `LayerNorm` (eps 1e-7), `adapter`. adapter_options: FrozenBiLMAdapter's.
    Source: model/deberta.py.
    """

    def __init__(
        self,
        width: int,
        inner: int | None = None,
        ds_factor: int = 8,
        *,
        dropout: float = 0.1,
        eps: float = 1e-7,
        device=None,
        dtype=None,
        **adapter_options,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.p = probability(dropout)
        self.dense = nn.Linear(inner or width, width, **made)
        self.LayerNorm = nn.LayerNorm(width, eps=eps, **made)
        self.adapter = FrozenBiLMAdapter(width, ds_factor, **adapter_options, **made)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        h = self.dense(x)
        h = F.dropout(h, self.p) if self.p and self.training else h
        return self.adapter(h, residual, self.LayerNorm)


# -- by name -------------------------------------------------------------------------------------------------------


KINDS = {
    "bottleneck": BottleneckAdapter,
    **{name: functools.partial(AdapterHubAdapter, config=name) for name in CONFIGS},
    "magma": MAGMAAdapter,
    "vl_adapter": VLAdapterController,
    "compacter": functools.partial(VLAdapterController, kind="compacter"),
    "low_rank": functools.partial(VLAdapterController, kind="low_rank"),
    "hyperformer": VLHyperformer,
    "vl_pet": VLPETAdapter,
    "lavin": RepAdapterRouter,
    "frozenbilm": FrozenBiLMAdapter,
}


def make_adapter(kind: str, width: int, **options) -> SublayerAdapter:
    """An adapter of a sub-layer of this width; kind: one of KINDS, options: those of its class."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; accepted: {', '.join(KINDS)}")
    return KINDS[kind](width, **options)


# -- shared --------------------------------------------------------------------------------------------------------


def _clipped_normal(module: nn.Module, std: float = 1e-3) -> None:
    """Weights and biases of all linears N(0, std), clipped at two of them."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            for parameter in (linear.weight, linear.bias):
                nn.init.normal_(parameter, std=std)
                with torch.no_grad():
                    parameter.clamp_(-2 * std, 2 * std)
