"""One peft layer as a model, stock and swapped, and the frozen layer under it: shared by the adapters' providers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkernels.testing.case import Case, Precision

from . import Instance, Unavailable, autocast, frozen_of, leaves_of

MakeLayer = Callable[[Case, dict], nn.Sequential]


def low_dtype(kw: dict, precision: Precision) -> torch.dtype | None:
    """The dtype of the low-rank branch where it is not that of x; None leaves it to autocast."""
    return None if precision.autocast or kw["a"].dtype == kw["x"].dtype else kw["a"].dtype


def adapted(kw: dict, **options) -> nn.Sequential:
    """A model whose only layer is stock peft's lora.Linear with the case's weights; `leaves` by argument name.

    options: of LoraConfig, besides rank, alpha and dropout.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"peft is not importable: {error}") from None
    rank, width = kw["a"].shape
    x = kw["x"]
    base = nn.Linear(width, kw["b"].shape[0], bias=kw["bias"] is not None, device=x.device, dtype=x.dtype)
    base.weight = nn.Parameter(kw["weight"].detach(), requires_grad=kw["weight"].requires_grad)
    trainable = {"weight": base.weight} if kw["weight"].requires_grad else {}
    if kw["bias"] is not None:
        base.bias = nn.Parameter(kw["bias"].detach())
        trainable["bias"] = base.bias
    config = LoraConfig(r=rank, lora_alpha=rank * kw["scale"], lora_dropout=kw["p"], target_modules=["0"], **options)
    model = nn.Sequential(base)
    inject_adapter_in_model(config, model)
    down, up = model[0].lora_A["default"], model[0].lora_B["default"]
    down.weight, up.weight = nn.Parameter(kw["a"].detach()), nn.Parameter(kw["b"].detach())
    for t in trainable.values():
        t.requires_grad_()
    model.leaves = {"x": x, "a": down.weight, "b": up.weight} | trainable
    return model.train()


def of_model(model: nn.Sequential, kw: dict, precision: Precision) -> Instance:
    def forward() -> Tensor:
        with autocast(kw, precision):
            return model(kw["x"])

    return Instance(forward, model.leaves, tuple(model.parameters()))


def stock(make: MakeLayer):
    def build(case: Case, kw: dict, precision: Precision) -> Instance:
        return of_model(make(case, kw), kw, precision)

    return build


def swapped(make: MakeLayer):
    """The same peft layer after vlkernels.swap; use_backend() chooses where it runs."""

    def build(case: Case, kw: dict, precision: Precision) -> Instance:
        import vlkernels

        model = make(case, kw)
        vlkernels.swap(model, strict=True)
        return of_model(model, kw, precision)

    return build


def frozen(case: Case, kw: dict, precision: Precision) -> Instance:
    """The frozen layer alone: no adapter makes it faster."""

    def forward() -> Tensor:
        with autocast(kw, precision):
            return F.linear(kw["x"], kw["weight"], kw["bias"])

    leaves = {name: t for name, t in leaves_of(kw).items() if name in ("x", "weight", "bias")}
    return Instance(forward, leaves, frozen_of(kw))
