"""dora_linear beside stock peft, plain PyTorch and torch.compile."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, Unavailable, autocast, frozen_of, leaves_of

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
        low = None if precision.autocast or kw["a"].dtype == kw["x"].dtype else kw["a"].dtype

        def forward() -> Tensor:
            with autocast(kw, precision):
                return function(**rest, low=low)

        return Instance(forward, leaves_of(kw), frozen_of(kw))

    return build


@functools.cache
def _compiled():
    return torch.compile(plain, dynamic=False)


def _compiled_plain(**kw) -> Tensor:
    return _compiled()(**kw)


def peft_layer(case: Case, kw: dict) -> nn.Sequential:
    """A model whose only layer is stock peft's lora.Linear with a DoRA adapter of the case's weights."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"peft is not importable: {error}") from None
    if kw["norm"] is not None:
        raise Unavailable("peft computes the norm itself")
    rank, width = kw["a"].shape
    x = kw["x"]
    base = nn.Linear(width, kw["b"].shape[0], bias=kw["bias"] is not None, device=x.device, dtype=x.dtype)
    base.weight = nn.Parameter(kw["weight"].detach(), requires_grad=kw["weight"].requires_grad)
    trainable = {"weight": base.weight} if kw["weight"].requires_grad else {}
    if kw["bias"] is not None:
        base.bias = nn.Parameter(kw["bias"].detach())
        trainable["bias"] = base.bias
    config = LoraConfig(
        r=rank, lora_alpha=rank * kw["scale"], lora_dropout=kw["p"], target_modules=["0"], use_dora=True
    )
    model = nn.Sequential(base)
    inject_adapter_in_model(config, model)
    layer = model[0]
    down, up, dora = layer.lora_A["default"], layer.lora_B["default"], layer.lora_magnitude_vector["default"]
    down.weight, up.weight = nn.Parameter(kw["a"].detach()), nn.Parameter(kw["b"].detach())
    dora.weight = nn.Parameter(kw["magnitude"].detach())
    for t in trainable.values():
        t.requires_grad_()
    model.leaves = {"x": x, "a": down.weight, "b": up.weight, "magnitude": dora.weight} | trainable
    return model.train()


def _module(model: nn.Sequential, kw: dict, precision: Precision) -> Instance:
    def forward() -> Tensor:
        with autocast(kw, precision):
            return model(kw["x"])

    return Instance(forward, model.leaves, tuple(model.parameters()))


def _peft(case: Case, kw: dict, precision: Precision) -> Instance:
    return _module(peft_layer(case, kw), kw, precision)


def swapped(case: Case, kw: dict, precision: Precision) -> Instance:
    """The same peft layer after vlkernels.swap; use_backend() chooses where it runs."""
    import vlkernels

    model = peft_layer(case, kw)
    vlkernels.swap(model, strict=True)
    return _module(model, kw, precision)


def _frozen(case: Case, kw: dict, precision: Precision) -> Instance:
    """The frozen layer alone: no adapter makes it faster."""

    def forward() -> Tensor:
        with autocast(kw, precision):
            return F.linear(kw["x"], kw["weight"], kw["bias"])

    leaves = {name: t for name, t in leaves_of(kw).items() if name in ("x", "weight", "bias")}
    return Instance(forward, leaves, frozen_of(kw))


PROVIDERS = (
    Provider("peft", _peft),
    Provider("eager", _plain(plain)),
    Provider("compile", _plain(_compiled_plain)),
    Provider("frozen linear", _frozen, "bound"),
)
PEERS = ()

# swapped modules that the memory report counts: (name, precision, dropout, ours, baseline)
MODULES = tuple(
    ("peft lora.Linear DoRA", precision, p, Provider("swapped", swapped, "ours"), Provider("peft", _peft))
    for precision, p in (("bf16", 0.0), ("bf16", 0.05), ("bf16+fp32 amp", 0.05), ("bf16+fp32", 0.05))
)
