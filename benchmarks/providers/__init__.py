"""What is timed and counted side by side: our backends, what users run today, and peers.

`benchmarks/providers/<op>.py` lists an op's BASELINE (the name that ratios refer to), PROVIDERS and PEERS; our own
backends come from the op.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlkernels import backends
from vlkernels.op import Op
from vlkernels.testing import compare
from vlkernels.testing.case import Case, Precision


class Unavailable(Exception):
    """Why a provider cannot run a case here."""


@dataclass(frozen=True)
class Instance:
    """One input set of a provider: `forward` computes the outputs, `leaves` get gradients, by argument name.

    frozen: what else is in memory whether or not anything is saved for backward. within: a context for the backward.
    """

    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: dict[str, Tensor]
    frozen: tuple[Tensor, ...] = ()
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def backward(self, y: Tensor | tuple[Tensor, ...], dy: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients as new tensors: nothing is accumulated, so that all providers pay the same."""
        with self.within():
            return torch.autograd.grad(y, tuple(self.leaves.values()), dy)


@dataclass(frozen=True)
class Provider:
    """name; build(case, arguments, precision) -> Instance, or Unavailable.

    kind: "ours", "baseline", "peer", or "bound" (computes less than the op: a lower bound, never checked against it).
    exact_dropout: draws the reference's own mask, so that it is checked with dropout; others are checked at p = 0.
    plan: which of the op's plans it follows, where that is not the default one.
    """

    name: str
    build: Callable[[Case, dict, Precision], Instance]
    kind: str = "baseline"
    exact_dropout: bool = False
    plan: str = ""


def ours(op: Op, backend: str) -> Provider:
    """The op forced onto one backend."""

    def build(case: Case, arguments: dict, precision: Precision) -> Instance:
        reason = backends.verdict(op, backend, _values(op, arguments, precision))
        if reason is not None:
            raise Unavailable(reason)
        leaves = leaves_of(arguments)

        def forward() -> Tensor:
            with autocast(arguments, precision):
                return op(**arguments, backend=backend)

        return Instance(forward, leaves, frozen_of(arguments))

    return Provider(backend, build, "ours", exact_dropout=True)


def planned(op: Op, backend: str, plan: str, refuses: Callable[[dict, Precision], str | None]) -> Provider:
    """The op forced onto one backend and one of its cases module's PLANS. refuses: why a case cannot follow it."""
    default, module = ours(op, backend), compare.cases_of(op)

    def build(case: Case, arguments: dict, precision: Precision) -> Instance:
        reason = refuses(arguments, precision)
        if reason is not None:
            raise Unavailable(reason)
        with module.planned(plan, arguments) as arguments:
            instance = default.build(case, arguments, precision)

        def within():
            return module.planned(plan, arguments)

        def forward() -> Tensor:
            with within():
                return instance.forward()

        return dataclasses.replace(instance, forward=forward, within=within)

    return dataclasses.replace(default, name=f"{backend} {plan}", build=build, plan=plan)


def _values(op: Op, arguments: dict, precision: Precision) -> tuple:
    with autocast(arguments, precision):
        return op.values(**arguments)


def module_of(op: Op):
    """benchmarks/providers/<op>.py, or None where the op has none yet."""
    name = f"{__name__}.{op.name}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def baseline_of(op: Op) -> str:
    """The provider that ratios refer to; the op's plain PyTorch where nobody declared what users run."""
    module = module_of(op)
    return module.BASELINE if module else "reference"


def named(op: Op, name: str) -> Provider:
    """One of the op's providers."""
    return next(p for p in of(op) if p.name == name)


def of(op: Op, kernels: bool = True, peers: bool = False) -> list[Provider]:
    """The op's providers: ours per backend (`kernels`) and the baselines, or peers alone."""
    module = module_of(op)
    if peers:
        return list(module.PEERS) if module else []
    built = [name for name in backends.ORDER if name != "reference" and kernels and is_built(op, name)]
    found = [ours(op, name) for name in built]
    found += [planned(op, name, *plan) for name, *plan in getattr(module, "PLANS", ()) if name in built]
    return found + (list(module.PROVIDERS) if module else [dataclasses.replace(ours(op, "reference"), kind="baseline")])


def is_built(op: Op, backend: str) -> bool:
    return not isinstance(op.kernels[backend], str)


def plain(function: Callable, arguments: Callable[[dict], dict] = dict) -> Callable:
    """A build that calls function(**arguments(case's)) as plain PyTorch."""

    def build(case: Case, kw: dict, precision: Precision) -> Instance:
        given = arguments(kw)

        def forward() -> Tensor:
            with autocast(kw, precision):
                return function(**given)

        return Instance(forward, leaves_of(kw), frozen_of(kw))

    return build


def compiled(function: Callable) -> Callable:
    """torch.compile(function), made at its first call."""
    made = functools.cache(lambda: torch.compile(function, dynamic=False))
    return lambda *args, **kwargs: made()(*args, **kwargs)


def tensors(arguments: dict) -> dict[str, Tensor]:
    return {k: v for k, v in arguments.items() if isinstance(v, Tensor)}


def leaves_of(arguments: dict) -> dict[str, Tensor]:
    return {k: v for k, v in tensors(arguments).items() if v.requires_grad}


def frozen_of(arguments: dict) -> tuple[Tensor, ...]:
    return tuple(v for v in tensors(arguments).values() if not v.requires_grad and v.dim())


def autocast(arguments: dict, precision: Precision):
    device = next(iter(tensors(arguments).values())).device
    return torch.autocast(device.type, precision.autocast or torch.bfloat16, enabled=precision.autocast is not None)
